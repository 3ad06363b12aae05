"""The backward of any module in two halves: I hands on input gradients, W makes weight gradients.

Products with a weight (linear layers, convolutions, embeddings, matrices of experts) run as
`_Product`. Its backward, in I, returns the input's gradient and leaves the operands of the other
one. The graph has no edge to the weight, so nothing that hangs on the parameter stirs. W multiplies
those operands and adds to the parameter's gradient what a fused backward would, in its order. Where
a weight is computed from its parameter, or hooks wait for the gradient, a `_Later` stands beside
the product, whose backward multiplies; W is one run of autograd over all of those, and calls each
hook once. All else has its weight gradients in I: compiled layers, weights that depend on the
stage's input. Hooks on a parameter's AccumulateGrad node (DDP's) cannot be seen from here.

It knows nothing of schedules, losses or devices.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from adaptis.measure.products import LINEAR, PRODUCTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from adaptis.measure.products import Rule

# What may stand between a product's operand and its parameter: steps that keep no value for their
# backward, so that they can run in W although others of the same parameter ran in I.
_STEPS = (
    "T Transpose Permute Select Slice View UnsafeView ReshapeAlias Unsqueeze Squeeze ToCopy Expand "
    "Unbind Split SplitWithSizes Clone Alias Index"
)
_STEP_NODES = {f"{name}Backward{n}" for name in _STEPS.split() for n in (0, 1)}


class _Use:
    """One product with a weight, from F to W."""

    __slots__ = ("gradient", "inputs", "parameters", "rule", "weight")

    def __init__(self, rule: Rule, weight: Tensor, parameters: tuple[Tensor, ...]) -> None:
        self.rule, self.weight = rule, weight
        self.parameters = parameters  # the weight and any trained bias; empty: autograd finds them
        self.inputs: Tensor | None = None
        self.gradient: Tensor | None = None

    def finish(self, with_bias: bool) -> tuple[Tensor, Tensor | None]:
        """The gradients of the weight and the bias; the operands are let go."""
        inputs, gradient = self.inputs, self.gradient
        self.inputs = self.gradient = None
        assert inputs is not None
        assert gradient is not None
        return self.rule.weight_gradients(gradient, inputs, self.weight, with_bias)


class _Product(torch.autograd.Function):
    """A product whose weight gradient waits; `anchor` stands for the weight in the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        inputs: Tensor,
        bias: Tensor | None,
        later: tuple[_Use, Tensor | None],
        splitter: Splitter,
    ) -> Tensor:
        use, _ = later
        ctx.save_for_backward(inputs, use.weight)
        ctx.later, ctx.splitter = later, splitter
        return use.rule.forward(inputs, use.weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        inputs, weight = ctx.saved_tensors
        use, token = ctx.later
        gradient = use.rule.prepare(gradients[0])
        pending = ctx.splitter.pending
        if pending is not None:
            use.inputs, use.gradient = use.rule.prepare(inputs), gradient
            pending.uses.append((use, token))
        if not ctx.needs_input_grad[1]:
            return None, None, None, None, None
        found = use.rule.input_gradient(gradient, inputs, weight)
        return None, found.view(inputs.shape), None, None, None


class _Later(torch.autograd.Function):
    """An empty value made of a weight and a bias, whose backward is their gradients."""

    @staticmethod
    def forward(ctx: Any, use: _Use, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.use = use
        return torch.empty(0, dtype=weight.dtype, device=weight.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        use: _Use = ctx.use
        return None, *use.finish(ctx.needs_input_grad[2])


@dataclass(slots=True)
class Pending:
    """Weight gradients that the I of one micro-batch left for its W."""

    uses: list[tuple[_Use, Tensor | None]] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """What is held."""
        operands = [t for use, _ in self.uses for t in (use.inputs, use.gradient)]
        return [t for t in operands if t is not None]

    def num_bytes(self) -> int:
        """Bytes held, each storage once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.tensors()}
        return sum(storage.nbytes() for storage in storages.values())

    def run(self) -> None:
        """W: compute the gradients, let go of their operands."""
        tokens = [token for _, token in self.uses if token is not None]
        _settle([use for use, token in self.uses if token is None])
        self.uses.clear()
        if tokens:
            torch.autograd.backward(tokens, [token.detach() for token in tokens])


@torch.no_grad()
def _settle(uses: list[_Use]) -> None:
    """Add up the gradients of each parameter, in the order of the backward, then to its own."""
    left = Counter(id(p) for use in uses for p in use.parameters)
    totals: dict[int, Tensor] = {}
    for use in uses:
        for parameter, found in zip(
            use.parameters, use.finish(len(use.parameters) > 1), strict=False
        ):
            key = id(parameter)
            assert found is not None
            total = totals.pop(key) + found if key in totals else found
            left[key] -= 1
            if left[key]:
                totals[key] = total
            elif parameter.grad is not None:
                parameter.grad += total
            else:
                same = total.stride() == parameter.stride()
                parameter.grad = total if same else torch.empty_like(parameter).copy_(total)


class Splitter:
    """Makes the products of one module obey: their weight gradients wait while `pending` is open.

    A module that another splitter had before obeys the new one.
    """

    def __init__(self, module: nn.Module, *, on: bool) -> None:
        self.on = on  # whether forwards prepare for I and W
        self.working = False  # within an instruction of the stage: outside all layers are plain
        self.watching = False
        self.pending: Pending | None = None  # open during I
        self._waiting: dict[int, Tensor] | None = {}  # parameters; None once `learn` has looked
        self._whole: dict[int, Tensor] = {}  # parameters that are also used in other ways
        self._casts: dict[int, Tensor] = {}
        self._anchor = torch.empty(0, requires_grad=True)
        _route(module, self)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Around forward passes, and backward ones that may repeat some."""
        self.working = self.on
        try:
            yield
        finally:
            self.working = False
            self._casts.clear()

    @contextmanager
    def collecting(self) -> Iterator[Pending]:
        """Around I."""
        self.pending = pending = Pending()
        try:
            with self.prepared():
                yield pending
        finally:
            self.pending = None

    @property
    def ready(self) -> bool:
        """Whether a product called now may wait."""
        return self.working and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    @property
    def sure(self) -> bool:
        """Whether `learn` has nothing left to look for."""
        return not self.on or self._waiting is None

    def apply(self, rule: Rule, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product, prepared for I and W; `weight` belongs to a parameter."""
        if self._waiting is not None:
            for value in (weight, bias):
                parameter = _parameter_of(value)
                if parameter is not None:
                    self._waiting[id(parameter)] = parameter
        kind = inputs.device.type
        if inputs.is_floating_point() and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            inputs, weight = self._cast(inputs, dtype), self._cast(weight, dtype)
            bias = None if bias is None else self._cast(bias, dtype)
        trained = [p for p in (weight, bias) if p is not None and p.requires_grad]
        if all(_is_free(p) for p in trained):
            use, token = _Use(rule, weight.detach(), tuple(trained)), None
        else:
            use = _Use(rule, weight.detach(), ())
            token = _Later.apply(use, weight, bias)
        plain_bias = None if bias is None else bias.detach()
        return _Product.apply(self._anchor, inputs, plain_bias, (use, token), self)

    def _cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """As autocast does: weights once a forward, float64 never."""
        if value.dtype in (dtype, torch.float64):
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]

    def is_weight(self, value: Any) -> bool:
        """Whether a gradient of `value` is one of a parameter that is used in products alone."""
        parameter = _parameter_of(value)
        return parameter is not None and id(parameter) not in self._whole

    def may_wait(self, weight: Any, bias: Any) -> bool:
        """Whether all the weight gradients of a product may."""
        free = bias is None or not bias.requires_grad or self.is_weight(bias)
        return free and self.is_weight(weight)

    def learn(self, ends: Iterable[Tensor]) -> bool:
        """Look through the first graph for parameters that do not only wait.

        Part of their gradient would be there after I and part after W, and their hooks would run
        twice. If there are any, they never wait from now on; False: the forward has to be repeated.
        """
        if self.sure:
            return True
        assert self._waiting is not None
        waiting, self._waiting = self._waiting, None
        nodes: list[Any] = [end.grad_fn for end in ends if end.grad_fn is not None]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            key = id(getattr(node, "variable", None))
            if key in waiting:
                self._whole[key] = waiting[key]
            further = {n for n, _ in node.next_functions if n is not None} - seen
            seen |= further
            nodes += further
        return not self._whole


def _is_free(value: Tensor) -> bool:
    """Whether nobody but the optimizer looks at a parameter's gradient."""
    hooks: Any = value
    return type(value) is nn.Parameter and not (
        hooks._backward_hooks or hooks._post_accumulate_grad_hooks
    )


def _parameter_of(value: Any) -> Tensor | None:
    """The parameter that `value` is, or is made of by steps that keep nothing."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    node: Any = value.grad_fn
    if node is None:
        return value if isinstance(value, nn.Parameter) else None
    while node is not None and node.name() in _STEP_NODES:
        node = node.next_functions[0][0]
    parameter = getattr(node, "variable", None)
    return parameter if isinstance(parameter, nn.Parameter) else None


class _Watch(TorchFunctionMode):
    """Finds the products with a weight among all functions called."""

    def __init__(self, splitter: Splitter) -> None:
        super().__init__()
        self._splitter = splitter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        plan, kwargs = PRODUCTS.get(func), kwargs or {}
        if plan is None or not self._splitter.ready:
            return func(*args, **kwargs)
        try:
            call = plan(self._splitter.is_weight, *args, **kwargs)
        except TypeError:  # a form with arguments that no product here has
            call = None
        if call is None or not self._splitter.may_wait(call[2], call[3]):
            return func(*args, **kwargs)
        return self._splitter.apply(*call)


class _Routed:
    """The forward of a layer that obeys a splitter."""

    def __init__(self, layer: nn.Module, splitter: Splitter, forward: Callable[..., Any]) -> None:
        self.layer, self.splitter, self.forward = layer, splitter, forward
        self._linear = getattr(forward, "__func__", None) is nn.Linear.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        splitter = self.splitter
        if not splitter.working or splitter.watching or not splitter.ready:
            return self.forward(*args, **kwargs)
        parts: Any = self.layer  # a linear layer's, or not asked for
        weight, bias = getattr(parts, "weight", None), getattr(parts, "bias", None)
        if self._linear and len(args) == 1 and splitter.may_wait(weight, bias):
            return splitter.apply(LINEAR, args[0], parts.weight, bias)
        splitter.watching = True
        try:
            with _Watch(splitter):
                return self.forward(*args, **kwargs)
        finally:
            splitter.watching = False


def _route(module: nn.Module, splitter: Splitter) -> None:
    """Let each layer that owns a matrix obey `splitter`; compiled ones are left alone."""
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        return
    own = vars(module).get("forward")
    if any(p.dim() > 1 for p in module.parameters(recurse=False)):
        forward = own.forward if isinstance(own, _Routed) else module.forward
        module.forward = _Routed(module, splitter, forward)
    for child in module.children():
        _route(child, splitter)
