"""What F, B, I, W and R mean on one stage: the only place where gradients are computed.

A stage's forward is the same wherever it runs: random numbers depend on (seed, step, layer,
micro-batch) alone, buffers move once a micro-batch, auxiliary losses count by their share of the
tokens. How the backward is split stands in `split`, what slices of a sequence hand on in `slices`.

It knows nothing of schedules, devices or processes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptis.measure.random import drawing
from adaptis.measure.slices import slice_of, slicing
from adaptis.measure.split import Pending, Splitter
from adaptis.measure.stage import collecting_losses
from adaptis.measure.values import (
    entries,
    gradients,
    pack,
    plain_entries,
    replaced,
    roots,
    tensors_of,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptis.measure.slices import Slice
    from adaptis.measure.stage import Microbatch, StageModule, TorchModel
    from adaptis.measure.values import Value

Buffers = dict[tuple[nn.Module, str], Tensor]
# What is handed on (None on the last stage), and what the stage adds to the step's loss (None where
# it is not the last and no layer adds one).
Result = tuple["Value | None", Tensor | None]


@dataclass(slots=True)
class _Saved:
    """What a stage keeps of one micro-batch from F to B or I."""

    microbatch: Microbatch
    number: int  # of the micro-batch in the step
    step: int
    weight: float
    inputs: Value | None  # leaves; None on the first stage
    place: Slice | None  # among the slices of a sequence; None: it is one by itself
    output: Result | None = None  # the graph's ends; None until R where the stage recomputes
    buffers: Buffers | None = None  # those that move, as F found them, for R


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
        seed: int = 0,
        autocast: torch.dtype | None = None,
        first: int = 0,
        device: torch.device | str = "cpu",
        previous: Sequence[int] = (),
    ) -> None:
        """Take a stage.

        Args:
            model: whose stage it is.
            module: the stage.
            last: whether the loss is computed here.
            split: whether forwards prepare for I and W.
            recompute: whether F keeps its input alone and R repeats it.
            seed: of the random numbers that layers draw.
            autocast: what products are computed in, where it is not the parameters' own type.
            first: the number that micro-batch 0 has in the step, among those of all replicas.
            device: where a stage without parameters computes; others do where those are.
            previous: the slice before each micro-batch, -1: none; empty: nothing is sliced.
        """
        self.module = module
        self.losses: dict[int, Tensor] = {}  # micro-batch -> this stage's share of the step's loss
        self._model = model
        self._last = last
        self._recompute = recompute
        self._seed, self._autocast, self._first = seed, autocast, first
        self._device = next((p.device for p in module.parameters()), torch.device(device))
        self._previous = previous
        self._saved: dict[int, _Saved] = {}
        self._evaluated: dict[int, Slice | None] = {}  # slices that others still follow
        self._pending: dict[int, Pending] = {}
        self._moving: set[tuple[nn.Module, str]] | None = None  # buffers; None before the first F
        self._splitter = Splitter(module, on=split)

    def split(self, on: bool) -> None:
        """Whether the next forwards prepare for I and W."""
        self._splitter.on = on

    def forward(
        self, m: int, inputs: Any, microbatch: Microbatch, weight: float, step: int = 0
    ) -> Any:
        """F: the stage's output, detached; None on the last stage, which adds to `losses`.

        What is handed from stage to stage, here and below, is a tensor or a `values.Bundle`.
        `weight` multiplies the summed loss: 1 / (tokens of the whole step).
        """
        number, given = self._first + m, None if inputs is None else entries(inputs)
        saved = _Saved(microbatch, number, step, weight, given, self._place(m))
        self._saved[m] = saved
        if self._recompute:
            saved.buffers = self._buffers()
            with torch.no_grad():
                output, loss = self._run(saved)
            self._learn(saved.buffers)
        else:
            output, loss = saved.output = self._graph(saved, self._all_buffers_once())
        if loss is not None:
            self.losses[m] = loss.detach()
        if output is None:
            return None
        return replaced(output, [t.detach() for t in tensors_of(output)])

    def _place(self, m: int) -> Slice | None:
        if not self._previous:
            return None
        before = self._previous[m]
        done = {before: self._saved[before].place} if before >= 0 else {}
        return slice_of(m, self._previous, done)

    def _all_buffers_once(self) -> Buffers:
        """Copies, while the first forward may have to be repeated."""
        return {} if self._splitter.sure else self._buffers()

    def _graph(self, saved: _Saved, start: Buffers) -> Result:
        """Run with a graph; `start` is the buffers before."""
        output, loss = self._run(saved)
        left = saved.place.tensors() if saved.place else []
        if self._splitter.learn([*tensors_of(output), *([] if loss is None else [loss]), *left]):
            return output, loss
        with _other_buffers(start, self.module):
            return self._run(saved)

    def _run(self, saved: _Saved) -> Result:
        place = (saved.step, self.module.start, saved.number)
        with (
            drawing(self._seed, *place, self._device),
            self._splitter.prepared(),
            self._casting(),
            self._slicing(saved.place),
            collecting_losses() as terms,
        ):
            inputs = None if saved.inputs is None else unpack(plain_entries(saved.inputs))
            value: Any = self.module(inputs, saved.microbatch)
            loss = self._model.loss(value, saved.microbatch) * saved.weight if self._last else None
        if terms:
            share = self._model.weight(saved.microbatch) * saved.weight
            extra = sum(terms[1:], terms[0]) * share
            loss = extra if loss is None else loss + extra
        return None if self._last else pack(value), loss

    def _casting(self) -> AbstractContextManager[Any]:
        if self._autocast is None:  # torch's own context costs as much as a small layer
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast)

    def _slicing(self, place: Slice | None, *, keep: bool = True) -> AbstractContextManager[Any]:
        return nullcontext() if place is None else slicing(place, keep=keep)

    def recompute(self, m: int) -> None:
        """R: what F would have kept, from the kept input and the same random numbers."""
        saved = self._saved[m]
        start = saved.buffers or {}
        with _other_buffers(start, self.module):
            saved.output = self._graph(saved, start)
        saved.buffers = None

    def evaluate(self, inputs: Any, microbatch: Microbatch, m: int = 0) -> Any:
        """The output, or on the last stage the summed loss, without anything kept or changed.

        Of a slice, what it leaves is kept for the slice after.
        """
        training = self.module.training
        self.module.eval()
        place = slice_of(m, self._previous, self._evaluated)
        if place is not None:
            self._evaluated.pop(self._previous[m], None)
            if place.after:
                self._evaluated[m] = place
        try:
            with (
                torch.no_grad(),
                _other_buffers({}, self.module),
                self._casting(),
                self._slicing(place),
            ):
                value: Any = self.module(None if inputs is None else unpack(inputs), microbatch)
                return self._model.loss(value, microbatch) if self._last else pack(value)
        finally:
            self.module.train(training)

    def backward(self, m: int, gradient: Any) -> Any:
        """B.

        Accumulate the weight gradients, return the gradient of the input (None on the first stage).
        """
        if not self._splitter.on:
            return self._backward(m, gradient)
        result = self.backward_input(m, gradient)
        self.backward_weight(m)
        return result

    def _backward(self, m: int, gradient: Value | None) -> Value | None:
        saved = self._saved.pop(m)
        if saved.output is None:
            raise RuntimeError(f"micro-batch {m} has no activations: F or R has not run")
        output, loss = saved.output
        ends = [] if output is None else roots(output, gradient)
        if loss is not None and loss.requires_grad:
            ends.append((loss, None))
        if saved.place is not None:
            ends += saved.place.ends()
        if ends:  # a stage of frozen layers at the start of the chain has nothing to do
            with self._slicing(saved.place, keep=False):
                torch.autograd.backward([end for end, _ in ends], [given for _, given in ends])
        if saved.place is not None and saved.place.earlier:
            before = self._saved[self._previous[m]].place
            assert before is not None
            before.given = saved.place.gradients()
        return None if saved.inputs is None else gradients(saved.inputs)

    def backward_input(self, m: int, gradient: Any) -> Any:
        """I: the gradient of the input.

        What the weights of products need is left for `backward_weight`.
        """
        with self._splitter.collecting() as pending:
            self._pending[m] = pending
            return self._backward(m, gradient)

    def backward_weight(self, m: int) -> None:
        """W: the weight gradients that I left."""
        self._pending.pop(m).run()

    def graph(self, m: int) -> tuple[list[Tensor], tuple[Tensor, ...], list[Tensor]]:
        """What is kept from F to the backward: the graph's ends, its leaves, what others keep too.

        The last are the micro-batch, and what slices of a sequence leave to each other.
        """
        saved = self._saved[m]
        output, loss = saved.output or (None, None)
        ends = [*tensors_of(output), *tensors_of(loss)]
        others = [t for t in saved.microbatch.values() if isinstance(t, Tensor)]
        if saved.place is not None:
            ends += saved.place.tensors()
            others += saved.place.tensors()
        return ends, tensors_of(saved.inputs), others

    def pending_bytes(self, m: int) -> int:
        """Bytes kept from I to W."""
        return self._pending[m].num_bytes()

    def held(self) -> list[Tensor]:
        """What is kept beside autograd's own: operands for W, inputs, and moving buffers."""
        found: list[Tensor] = []
        for saved in self._saved.values():
            found += [*tensors_of(saved.inputs), *(saved.buffers or {}).values()]
            found += saved.place.tensors() if saved.place else []
        return found + [t for pending in self._pending.values() for t in pending.tensors()]

    def parameters(self) -> dict[str, nn.Parameter]:
        """By global name."""
        return self.module.global_parameters()

    def idle(self) -> bool:
        """Whether nothing is left over from a step."""
        return not self._saved and not self._pending and not self._evaluated

    def reset(self) -> None:
        """Forget the losses of the last step."""
        self.losses.clear()

    def _buffers(self) -> Buffers:
        """Copies of the buffers that forwards change; of all of them before the first forward."""
        if self._moving is not None:
            kept = _all_buffers(self.module) if self._moving else {}
            return {key: kept[key].clone() for key in self._moving}
        return {key: buffer.clone() for key, buffer in _all_buffers(self.module).items()}

    def _learn(self, before: Buffers) -> None:
        """Keep of `before` what this forward changed; the first one shows which buffers move."""
        if self._moving is None:
            now = _all_buffers(self.module)
            self._moving = {key for key, old in before.items() if not torch.equal(now[key], old)}
            for key in before.keys() - self._moving:
                del before[key]


def _all_buffers(module: nn.Module) -> Buffers:
    return {
        (owner, name): buffer
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    }


@contextmanager
def _other_buffers(start: Buffers, module: nn.Module) -> Iterator[None]:
    """Run on copies of the buffers, or on those given in `start`; then put the own ones back."""
    own = _all_buffers(module)
    for (owner, name), buffer in own.items():
        owner._buffers[name] = start.get((owner, name), buffer).clone()
    try:
        yield
    finally:
        for (owner, name), buffer in own.items():
            owner._buffers[name] = buffer
