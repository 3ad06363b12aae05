"""What a layer carries from one slice of a sequence to the next: keys and values, or a state.

Where micro-batches are slices of longer sequences, a layer that mixes tokens asks here for what it
left in the slice before, and leaves its own for the slice after. An attention: ::

    keys, values = carried(self).append(k, v, dim=-2)  # of all tokens up to here

A recurrence: ::

    memory = carried(self)
    state = zeros if memory.earlier is None else memory.earlier
    ...
    memory.later = state

Where nothing is sliced there is nothing earlier, and what is left is forgotten, so a layer needs
only one form. Gradients of what was left come back from the slice after.

This module knows nothing of stages, schedules or models.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from adaptis.errors import InputError
from adaptis.measure.values import (
    entries,
    gradients,
    pack,
    plain_entries,
    roots,
    tensors_of,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from adaptis.measure.stage import Microbatch
    from adaptis.measure.values import Value

# A compiled layer leaves its graph where it asks for another slice's values, as they change. The
# public `torch.compiler.disable` is the same, but imports the compiler for all who import this.
_outside_graphs = _disable_dynamo
Key = tuple[nn.Module, str]  # who carries it, and which of its several things it is


@dataclass(slots=True)
class _Room:
    """Memory for the keys (or values) of a whole sequence, which each slice fills further."""

    buffer: Tensor
    filled: int = 0  # tokens


@dataclass(slots=True)
class Slice:
    """One micro-batch among those of its sequence, as one stage sees it."""

    after: int  # how many slices come after it
    earlier: dict[Key, Value] = field(default_factory=dict)  # what the slice before left
    left: dict[Key, Value] = field(default_factory=dict)  # what this one leaves
    given: dict[Key, Value] = field(default_factory=dict)  # and the gradients of that
    rooms: dict[tuple[Key, int], _Room] = field(default_factory=dict)  # the same for all slices

    def following(self, *, live: bool = False) -> Slice:
        """The next slice; only where `live`, autograd itself goes back from there to this one."""
        earlier = self.left if live else {key: entries(value) for key, value in self.left.items()}
        return Slice(self.after - 1, earlier, rooms=self.rooms)

    def ends(self) -> list[tuple[Tensor, Tensor | None]]:
        """The tensors that were left for the next slice, each with its gradient."""
        if not self.after:
            return []
        return [
            end for key, value in self.left.items() for end in roots(value, self.given.get(key))
        ]

    def gradients(self) -> dict[Key, Value]:
        """Of what the slice before left, after the backward of this one."""
        return {key: gradients(value) for key, value in self.earlier.items()}

    def tensors(self) -> list[Tensor]:
        """What is kept for this slice and for the next."""
        values = (*self.earlier.values(), *self.left.values())
        return [tensor for value in values for tensor in tensors_of(value)]


class Carried:
    """What one layer carries: it reads `earlier`, None in the first slice, and sets `later`."""

    __slots__ = ("_key", "_place", "earlier", "later")

    def __init__(self, place: Slice | None, key: Key) -> None:
        self._place, self._key = place, key
        self.earlier: Any = None
        self.later: Any = None  # a tensor, or a tuple, list or dict of tensors
        if place is not None and key in place.earlier:
            self.earlier = unpack(plain_entries(place.earlier[key]))

    def append(self, *own: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Tensors of this slice's tokens, after those of all earlier slices.

        Args:
            own: keys, values; each with this slice's tokens along `dim`.
            dim: the dimension of tokens.

        Returns:
            As many tensors, as long as the sequence is up to this slice. They lie in memory that is
            taken once for a whole sequence.
        """
        return own if self._place is None else self._append(own, dim)

    @_outside_graphs
    def _append(self, own: tuple[Tensor, ...], dim: int) -> tuple[Tensor, ...]:
        assert self._place is not None
        earlier = self.earlier or (None,) * len(own)
        self.later = tuple(
            _Append.apply(before, tensor, self._place, (self._key, number), dim)
            for number, (before, tensor) in enumerate(zip(earlier, own, strict=True))
        )
        return self.later


class _Append(torch.autograd.Function):
    """Writes a slice's tokens behind those that are there; all of them lie in one buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        earlier: Tensor | None,
        own: Tensor,
        place: Slice,
        name: tuple[Key, int],
        dim: int,
    ) -> Tensor:
        start = 0 if earlier is None else earlier.shape[dim]
        count = own.shape[dim]
        ctx.cut = dim, start, count
        room = place.rooms.get(name)
        if room is None or room.buffer.shape[dim] < start + count:
            room = place.rooms[name] = _room(own, earlier, dim, start + count * (place.after + 1))
        if room.filled < start + count:  # else this is a repetition
            # `.data`: what lies in front of it does not change, so graphs that hold it are right.
            room.buffer.data.narrow(dim, start, count).copy_(own)
            room.filled = start + count
        return room.buffer.data.narrow(dim, 0, start + count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        dim, start, count = ctx.cut
        (gradient,) = gradients
        before = gradient.narrow(dim, 0, start) if ctx.needs_input_grad[0] else None
        return before, gradient.narrow(dim, start, count), None, None, None


def _room(own: Tensor, earlier: Tensor | None, dim: int, length: int) -> _Room:
    shape = list(own.shape)
    shape[dim] = length
    room = _Room(own.new_empty(shape))
    if earlier is not None:
        room.filled = earlier.shape[dim]
        room.buffer.narrow(dim, 0, room.filled).copy_(earlier.detach())
    return room


_slice: Slice | None = None  # whose layers run; None: nothing is sliced
_asked: dict[Key, Carried] = {}


def carried(owner: nn.Module, name: str = "") -> Carried:
    """What `owner` left in the slice before this one, and where it leaves its own.

    Args:
        owner: the layer that asks, in its forward.
        name: which of several things it carries, or at which of several uses of the layer.

    Raises:
        InputError: if it asked for the same before in this forward.
    """
    return Carried(None, (owner, name)) if _slice is None else _carried((owner, name))


@_outside_graphs
def _carried(key: Key) -> Carried:
    if key in _asked:
        raise InputError(
            f"a {type(key[0]).__name__} asks twice in one forward for what it carries from slice "
            f"to slice; give each use a name of its own: carried(self, name)"
        )
    found = _asked[key] = Carried(_slice, key)
    return found


def is_sliced() -> bool:
    """Whether the micro-batch at hand is a slice of a longer sequence."""
    return _slice is not None


@contextmanager
def slicing(place: Slice | None, *, keep: bool = True) -> Iterator[None]:
    """Around a forward of `place`, or without `keep` a backward that may repeat some of it."""
    global _slice, _asked
    outer = _slice, _asked
    _slice, _asked = place, {}
    try:
        yield
        if keep and place is not None:
            asked = _asked.items()
            place.left = {key: pack(one.later) for key, one in asked if one.later is not None}
    finally:
        _slice, _asked = outer


def slice_of(
    m: int, previous: Sequence[int], others: Mapping[int, Slice | None], *, live: bool = False
) -> Slice | None:
    """Micro-batch `m` as a slice; None where it is a sequence by itself.

    Args:
        m: the number of the micro-batch.
        previous: the slice before each micro-batch, -1: none; empty: nothing is sliced.
        others: the slices that have had their forward, by number.
        live: whether autograd itself goes back from a slice to the one before it.
    """
    if not previous:
        return None
    before = others[previous[m]] if previous[m] >= 0 else None
    if before is not None:
        return before.following(live=live)
    after = slices_after(previous)[m]
    return Slice(after) if after else None


def slices_after(previous: Sequence[int]) -> list[int]:
    """How many slices of the same sequence come after each micro-batch."""
    result = [0] * len(previous)
    for m in reversed(range(len(previous))):
        if previous[m] >= 0:
            result[previous[m]] = result[m] + 1
    return result


def cut(sequences: Sequence[Microbatch], previous: Sequence[int]) -> list[Microbatch]:
    """Micro-batches of whole sequences as slices of about equal length.

    What is as long in its second dimension as the inputs are is cut there, all else is given to
    every slice.

    Args:
        sequences: in the order of their first slices.
        previous: the slice before each micro-batch, -1 where a sequence begins.

    Raises:
        InputError: if a sequence has fewer tokens than slices.
    """
    after = slices_after(previous)
    chosen = iter(sequences)
    waiting: dict[int, list[Microbatch]] = {}  # last slice so far -> the rest of its sequence
    result: list[Microbatch] = []
    for m, before in enumerate(previous):
        rest = _cut(next(chosen), after[m] + 1) if before < 0 else waiting.pop(before)
        result.append(rest[0])
        waiting[m] = rest[1:]
    return result


def _cut(sequence: Microbatch, count: int) -> list[Microbatch]:
    length = sequence["inputs"].shape[1]
    if length < count:
        raise InputError(
            f"a sequence of {length} tokens cannot be cut into {count} slices; give longer ones"
        )
    stops = [length * (k + 1) // count for k in range(count)]
    return [
        {
            name: tensor[:, a:b] if tensor.dim() > 1 and tensor.shape[1] == length else tensor
            for name, tensor in sequence.items()
        }
        for a, b in zip([0, *stops[:-1]], stops, strict=True)
    ]
