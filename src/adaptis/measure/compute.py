"""What F, B, I, W and R mean on one stage: the only place where gradients are computed.

The backward is split exactly. In a split stage each `nn.Linear` computes through `_SplitLinear`:
during I its backward hands on the input gradient and leaves the two operands of the weight
gradient in a `Pending` list; W multiplies them later, with the very expression that a fused
backward uses, so that the sums are the same to the last bit. Everything else (norms, convolutions,
embeddings, scans) has its weight gradients computed in I.

It knows nothing of schedules, devices or processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from adaptis.measure.stage import Microbatch, StageModule, TorchModel


@dataclass(slots=True)
class Pending:
    """Weight gradients that I left for W.

    (parameter, left factor, right factor) of each product.
    """

    products: list[tuple[nn.Parameter, Tensor, Tensor]] = field(default_factory=list)
    sums: list[tuple[nn.Parameter, Tensor]] = field(
        default_factory=list
    )  # bias: gradients to be summed

    def tensors(self) -> list[Tensor]:
        """What is held."""
        return [t for _, a, b in self.products for t in (a, b)] + [g for _, g in self.sums]

    def num_bytes(self) -> int:
        """Bytes held, each storage once."""
        tensors = self.tensors()
        return sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
        )

    def run(self) -> None:
        """Compute the gradients and let go of their operands."""
        for parameter, gradient, inputs in self.products:
            _accumulate(parameter, _weight_gradient(gradient, inputs))
        for parameter, gradient in self.sums:
            _accumulate(parameter, gradient.sum(0))
        self.products.clear()
        self.sums.clear()


def _weight_gradient(gradient: Tensor, inputs: Tensor) -> Tensor:
    """(tokens, out)ᵀ (tokens, in).

    What torch computes for a linear layer, in the same order of operands.
    """
    return gradient.t().mm(inputs)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


class _Switch:
    """Where a stage's linear layers put their weight gradients: shared by all of them."""

    def __init__(self) -> None:
        self.split = False  # whether forwards go through _SplitLinear
        self.pending: Pending | None = (
            None  # open during I; None: compute the weight gradient at once
        )


class _SplitLinear(torch.autograd.Function):
    """y = x Aᵀ + b, whose weight gradient can wait."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, switch: _Switch
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, bias)
        ctx.switch = switch
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        inputs, weight, bias = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        input_gradient = flat.mm(weight).view(inputs.shape) if needs_input else None
        flat_inputs = inputs.reshape(-1, inputs.shape[-1])
        pending = ctx.switch.pending
        if pending is not None:
            if needs_weight:
                pending.products.append((weight, flat, flat_inputs))
            if needs_bias:
                pending.sums.append((bias, flat))
            return input_gradient, None, None, None
        weight_gradient = _weight_gradient(flat, flat_inputs) if needs_weight else None
        return input_gradient, weight_gradient, flat.sum(0) if needs_bias else None, None


@dataclass(frozen=True, slots=True)
class _Routed:
    """The forward of a linear layer that obeys a switch."""

    layer: nn.Linear
    switch: _Switch

    def __call__(self, input: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if self.switch.split and torch.is_grad_enabled():
            return _SplitLinear.apply(input, weight, bias, self.switch)
        return functional.linear(input, weight, bias)


def _route_linear_layers(module: nn.Module, switch: _Switch) -> None:
    """Let every plain `nn.Linear` in `module` obey `switch`.

    Subclasses with a forward of their own stay as they are. A module that another `StageCompute`
    had before (a `Chain` of ready-made modules) obeys the new one.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
            own = vars(layer).get("forward")
            if own is None or isinstance(own, _Routed):
                layer.forward = _Routed(layer, switch)


@dataclass(slots=True)
class _Saved:
    """What a stage keeps of one micro-batch from F to B or I."""

    microbatch: Microbatch
    weight: float
    inputs: Tensor | None  # a leaf; None on the first stage
    output: Tensor | None  # the end of the graph; None until R where the stage recomputes
    random: Tensor | None = None  # the generator's state before F, for R


class StageCompute:
    """One stage with everything it keeps between its instructions.

    Roughly: ``output = F(m, inputs)``; ``input_gradient = B(m, output_gradient)``, or ``I``
    likewise and ``W(m)`` later.
    """

    def __init__(
        self,
        model: TorchModel,
        module: StageModule,
        *,
        last: bool,
        split: bool = False,
        recompute: bool = False,
    ) -> None:
        self.module = module
        self.losses: dict[
            int, Tensor
        ] = {}  # micro-batch -> its share of the step's loss (last stage)
        self._model = model
        self._last = last
        self._recompute = recompute
        self._switch = _Switch()
        self._switch.split = split
        self._saved: dict[int, _Saved] = {}
        self._pending: dict[int, Pending] = {}
        _route_linear_layers(module, self._switch)

    def split(self, on: bool) -> None:
        """Whether the next forwards prepare for I and W."""
        self._switch.split = on

    def forward(
        self, m: int, inputs: Tensor | None, microbatch: Microbatch, weight: float
    ) -> Tensor | None:
        """F: the stage's output, detached; None on the last stage, which adds to `losses`.

        `weight` multiplies the summed loss: 1 / (tokens of the whole step).
        """
        leaf = None if inputs is None else inputs.detach().requires_grad_()
        saved = _Saved(microbatch, weight, leaf, None)
        self._saved[m] = saved
        if self._recompute:
            saved.random = torch.get_rng_state()
            with torch.no_grad():
                output = self._run(saved)
        else:
            output = saved.output = self._run(saved)
        if self._last:
            self.losses[m] = output.detach()
            return None
        return output.detach()

    def _run(self, saved: _Saved) -> Tensor:
        output = self.module(saved.inputs, saved.microbatch)
        if self._last:
            return self._model.loss(output, saved.microbatch) * saved.weight
        return output

    def recompute(self, m: int) -> None:
        """R: what F would have kept, from the kept input and the same random numbers."""
        saved = self._saved[m]
        now = torch.get_rng_state()
        if saved.random is not None:
            torch.set_rng_state(saved.random)
        saved.output = self._run(saved)
        torch.set_rng_state(now)

    def backward(self, m: int, gradient: Tensor | None) -> Tensor | None:
        """B.

        Accumulate the weight gradients, return the gradient of the input (None on the first stage).
        """
        saved = self._saved.pop(m)
        if saved.output is None:
            raise RuntimeError(f"micro-batch {m} has no activations: F or R has not run")
        if (
            saved.output.requires_grad
        ):  # a stage of frozen layers at the start of the chain has nothing to do
            torch.autograd.backward(saved.output, gradient)
        return None if saved.inputs is None else saved.inputs.grad

    def backward_input(self, m: int, gradient: Tensor | None) -> Tensor | None:
        """I: the gradient of the input.

        What the linear layers' weights need is left for `backward_weight`.
        """
        self._pending[m] = self._switch.pending = Pending()
        try:
            return self.backward(m, gradient)
        finally:
            self._switch.pending = None

    def backward_weight(self, m: int) -> None:
        """W: the weight gradients that I left."""
        self._pending.pop(m).run()

    def pending_bytes(self, m: int) -> int:
        """Bytes kept from I to W."""
        return self._pending[m].num_bytes()

    def held(self) -> list[Tensor]:
        """What is kept beside autograd's own: operands for W, and inputs."""
        inputs = [saved.inputs for saved in self._saved.values() if saved.inputs is not None]
        return inputs + [t for pending in self._pending.values() for t in pending.tensors()]

    def parameters(self) -> dict[str, nn.Parameter]:
        """By global name."""
        return self.module.global_parameters()

    def idle(self) -> bool:
        """Whether nothing is left over from a step."""
        return not self._saved and not self._pending

    def reset(self) -> None:
        """Forget the losses of the last step."""
        self.losses.clear()
