"""How values pass between devices: four verbs over `torch.distributed`.

Receives are posted ahead and waited for by their reader; sends are started and kept until they are
done. On each directed link messages keep the order of the program, and each carries a tag of its
own where the backend has tags (gloo), so that an order mistake cannot swap two values. The shape
of a value is announced once, before the first message of its kind; after that it is known at both
ends.

It knows nothing of what the values mean.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from adaptis.errors import RankError
from adaptis.program import Kind, Value

if TYPE_CHECKING:
    from torch import Tensor

HEADER = 10  # dtype, number of dimensions, up to 8 sizes
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.complex64,
)
Shape = tuple[torch.dtype, tuple[int, ...]]


class Transport(Protocol):
    """What the executor needs of a network."""

    def send(self, value: Value, target: int, tensor: Tensor) -> None:
        """Start handing `tensor` over; never blocks."""
        ...

    def post(self, value: Value, source: int) -> None:
        """Get ready for `value`."""
        ...

    def wait(self, value: Value) -> Tensor:
        """The value, once it is there."""
        ...

    def finish(self) -> None:
        """Wait until everything sent was taken."""
        ...


@dataclass(slots=True)
class _Posted:
    tensor: Tensor
    work: Any


class TorchTransport:
    """Point-to-point messages of `torch.distributed`."""

    def __init__(
        self, num_stages: int, num_microbatches: int, device: torch.device | str = "cpu"
    ) -> None:
        self._num_stages = num_stages
        self._num_microbatches = num_microbatches
        self._device = torch.device(device)
        self._shapes: dict[
            tuple[Kind, int, object], Shape
        ] = {}  # (kind, stage, inputs' shapes) -> shape
        self._signatures: list[object] = []
        self._pending: dict[int, deque[Value]] = {}  # per source: asked for, shape not known yet
        self._source: dict[Value, int] = {}
        self._posted: dict[Value, _Posted] = {}
        self._sending: deque[tuple[Any, Tensor]] = deque()

    def begin(self, signatures: list[object]) -> None:
        """A new step, whose micro-batches have these input shapes.

        Equal signatures mean equal shapes on the way.
        """
        self._signatures = signatures

    def _key(self, value: Value) -> tuple[Kind, int, object]:
        return value.kind, value.stage, self._signatures[value.microbatch]

    def _tag(self, value: Value, header: bool = False) -> int:
        kind = 0 if value.kind is Kind.OUTPUT else 1
        number = (kind * self._num_stages + value.stage) * self._num_microbatches + value.microbatch
        return 2 * number + header

    def send(self, value: Value, target: int, tensor: Tensor) -> None:
        """Start handing `tensor` over; its shape goes first where the receiver cannot know it."""
        tensor = tensor.contiguous()
        key = self._key(value)
        shape = (tensor.dtype, tuple(tensor.shape))
        if self._shapes.get(key) != shape:
            if key in self._shapes:
                raise RankError(
                    f"stage {value.stage}, micro-batch {value.microbatch}: the {value.kind} has "
                    f"shape "
                    f"{shape[1]}, {self._shapes[key][1]} was announced for inputs of this shape"
                )
            self._shapes[key] = shape
            header = _encode(shape).to(self._device)
            self._start(dist.isend(header, target, tag=self._tag(value, header=True)), header)
        self._start(dist.isend(tensor, target, tag=self._tag(value)), tensor)

    def _start(self, work: Any, tensor: Tensor) -> None:
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        self._sending.append((work, tensor))

    def post(self, value: Value, source: int) -> None:
        """Get ready for `value`; as soon as its shape is known if it is not yet."""
        self._source[value] = source
        self._pending.setdefault(source, deque()).append(value)
        self._flush(source)

    def _flush(self, source: int) -> None:
        """Post what can be posted, in the order of the link."""
        pending = self._pending[source]
        while pending:
            shape = self._shapes.get(self._key(pending[0]))
            if shape is None:
                return
            value = pending.popleft()
            tensor = torch.empty(shape[1], dtype=shape[0], device=self._device)
            self._posted[value] = _Posted(tensor, dist.irecv(tensor, source, tag=self._tag(value)))

    def wait(self, value: Value) -> Tensor:
        """The value, once it is there."""
        source = self._source.pop(value)
        while value not in self._posted:
            first = self._pending[source][0]
            header = torch.empty(HEADER, dtype=torch.int64, device=self._device)
            _wait(dist.irecv(header, source, tag=self._tag(first, header=True)))
            self._shapes[self._key(first)] = _decode(header)
            self._flush(source)
        posted = self._posted.pop(value)
        posted.work.wait()
        return posted.tensor

    def finish(self) -> None:
        """Wait until everything sent was taken."""
        while self._sending:
            work, _ = self._sending.popleft()
            work.wait()


def _wait(work: Any) -> None:
    """Torch's stubs say that a message of our own group may come without its work; it does not."""
    work.wait()


def _encode(shape: Shape) -> Tensor:
    dtype, sizes = shape
    if len(sizes) > HEADER - 2:
        raise RankError(
            f"a value of {len(sizes)} dimensions crosses devices, at most {HEADER - 2} are possible"
        )
    numbers = [_DTYPES.index(dtype), len(sizes), *sizes]
    return torch.tensor(numbers + [0] * (HEADER - len(numbers)), dtype=torch.int64)


def _decode(header: Tensor) -> Shape:
    dtype, count, *sizes = header.tolist()
    return _DTYPES[dtype], tuple(sizes[:count])
