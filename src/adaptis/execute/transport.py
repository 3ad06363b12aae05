"""How values pass between devices: four verbs over a wire.

Receives are posted ahead and waited for by their reader; sends are started and kept until they are
done. On each directed link messages keep the order of the program, and each value carries a tag of
its own where the backend has tags (gloo), so that an order mistake cannot swap two values. A value
is a tensor or a bundle of several; its form is announced once, before the first message of its
kind, and a sender whose value has another form says so instead of sending it.

What arrives lies in buffers that are used again as soon as nothing refers to their bytes any more,
so there are never more of them than values alive at one moment. It knows nothing of what the values
mean.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from adaptis.errors import RankError
from adaptis.measure.values import Bundle
from adaptis.program import Kind, Value

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptis.execute.wire import Wire, Work
    from adaptis.measure.values import Value as Content

HEADER = 4096  # bytes of an announcement
Shape = tuple[torch.dtype, tuple[int, ...]]


class Transport(Protocol):
    """What the executor needs of a network."""

    def send(self, value: Value, target: int, content: Content) -> None:
        """Start handing `content` over; never blocks."""
        ...

    def post(self, value: Value, source: int) -> None:
        """Get ready for `value`."""
        ...

    def wait(self, value: Value) -> Content:
        """The value, once it is there."""
        ...

    def finish(self) -> None:
        """Wait until everything sent was taken."""
        ...


class _Form(NamedTuple):
    """What both ends know of a value: each tensor's type, sizes and layout, how they hang together.

    The layout is kept, as products of another layout are rounded otherwise.
    """

    shapes: tuple[Shape, ...]
    orders: tuple[tuple[int, ...], ...]  # of dimensions in memory; empty: as they are named
    structure: str  # of a bundle; empty: a bare tensor

    def lying(self) -> Iterator[Shape]:
        """Type and sizes of each tensor as it lies in memory."""
        for (dtype, sizes), order in zip(self.shapes, self.orders, strict=True):
            yield dtype, tuple(sizes[d] for d in order) or sizes


_Key = tuple[Kind, int, int]  # kind, stage, number of the inputs' shapes


@dataclass(slots=True)
class _Posted:
    form: _Form
    tensors: list[Tensor]
    works: list[Work]


class WireTransport:
    """Point-to-point messages."""

    def __init__(
        self,
        num_stages: int,
        num_microbatches: int,
        wire: Wire,
        device: torch.device | str = "cpu",
    ) -> None:
        """Of a program; `wire` knows the ranks."""
        self._num_stages = num_stages
        self._num_microbatches = num_microbatches
        self._wire, self._device = wire, torch.device(device)
        self._forms: dict[_Key, _Form] = {}
        self._announced: set[tuple[_Key, int]] = set()  # what was announced to whom
        self._numbers: dict[object, int] = {}  # signature of inputs -> its number
        self._signatures: list[int] = []
        self._pending: dict[int, deque[Value]] = {}  # per source: asked for, form not known yet
        self._source: dict[Value, int] = {}
        self._posted: dict[Value, _Posted] = {}
        self._sending: deque[tuple[Work, Tensor]] = deque()
        self.buffers = Buffers(self._device)

    def begin(self, signatures: Sequence[object]) -> None:
        """A new step, whose micro-batches have these input shapes.

        Equal signatures mean equal shapes on the way.
        """
        numbers = self._numbers
        self._signatures = [numbers.setdefault(s, len(numbers)) for s in signatures]
        self.buffers.trim()

    def _key(self, value: Value) -> _Key:
        return value.kind, value.stage, self._signatures[value.microbatch]

    def _tag(self, value: Value, header: bool = False) -> int:
        kind = 0 if value.kind is Kind.OUTPUT else 1
        number = (kind * (self._num_stages + 1) + value.stage) * self._num_microbatches
        return 2 * (number + value.microbatch) + header

    def send(self, value: Value, target: int, content: Content) -> None:
        """Start handing `content` over; its form goes first where a receiver cannot know it.

        Raises:
            RankError: its form is not the one that was announced for inputs of these shapes.
        """
        key, tag = self._key(value), self._tag(value)
        known = self._forms.get(key)
        form, tensors = _taken_apart(content, known)
        if known is None:
            self._forms[key] = form
        elif known != form:
            raise RankError(
                f"stage {value.stage}, micro-batch {value.microbatch}: the {value.kind} is "
                f"{_described(form)}, but {_described(known)} was announced for inputs of these "
                f"shapes; a layer's output must have shapes that follow from its inputs'"
            )
        if (key, target) not in self._announced:
            self._announced.add((key, target))
            header = _encode(form).to(self._device)
            self._start(self._wire.isend(header, target, self._tag(value, header=True)), header)
        for tensor in tensors:
            self._start(self._wire.isend(tensor, target, tag), tensor)

    def _start(self, work: Work, tensor: Tensor) -> None:
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        self._sending.append((work, tensor))

    def post(self, value: Value, source: int) -> None:
        """Get ready for `value`; as soon as its form is known if it is not yet."""
        self._source[value] = source
        self._pending.setdefault(source, deque()).append(value)
        self._flush(source)

    def _flush(self, source: int) -> None:
        """Post what can be posted, in the order of the link."""
        pending = self._pending[source]
        while pending:
            form = self._forms.get(self._key(pending[0]))
            if form is None:
                return
            value = pending.popleft()
            tag = self._tag(value)
            tensors = [self.buffers.take(shape) for shape in form.lying()]
            works = [self._wire.irecv(tensor, source, tag) for tensor in tensors]
            self._posted[value] = _Posted(form, tensors, works)

    def wait(self, value: Value) -> Content:
        """The value, once it is there."""
        source = self._source.pop(value)
        while value not in self._posted:
            first = self._pending[source][0]
            header = torch.empty(HEADER, dtype=torch.uint8, device=self._device)
            self._wire.irecv(header, source, self._tag(first, header=True)).wait()
            self._forms[self._key(first)] = _decode(header)
            self._flush(source)
        posted = self._posted.pop(value)
        for work in posted.works:
            work.wait()
        tensors = [
            tensor.permute([order.index(d) for d in range(len(order))]) if order else tensor
            for tensor, order in zip(posted.tensors, posted.form.orders, strict=True)
        ]
        return (
            Bundle(posted.form.structure, tuple(tensors)) if posted.form.structure else tensors[0]
        )

    def finish(self) -> None:
        """Wait until everything sent was taken."""
        while self._sending:
            work, _ = self._sending.popleft()
            work.wait()


class Buffers:
    """Receive buffers by type and sizes.

    Autograd may keep what was received, or a view of it, for as long as it likes: a buffer is free
    again when its storage has no user left but this pool.

    On a GPU the work of former users may still be queued, all of it on the current stream (what
    another stream reads, its reader keeps: see `offload`). No wire writes before that is done: NCCL
    begins a receive after all that was queued when it was asked for, and what comes by way of the
    host is copied by the current stream itself.
    """

    _OWN = 2  # users of a free buffer's storage: the tensor here and the storage's own handle

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[Shape, deque[tuple[Tensor, torch.UntypedStorage]]] = {}
        self._used: set[Shape] = set()  # in this step

    def take(self, shape: Shape) -> Tensor:
        """A tensor whose bytes nobody else looks at."""
        self._used.add(shape)
        buffers = self._buffers.setdefault(shape, deque())
        for _ in range(len(buffers)):
            buffers.rotate(-1)
            tensor, storage = buffers[-1]
            if torch._C._storage_Use_Count(storage._cdata) == self._OWN:
                return tensor.detach()
        tensor = torch.empty(shape[1], dtype=shape[0], device=self._device)
        buffers.append((tensor, tensor.untyped_storage()))
        return tensor.detach()

    def trim(self) -> None:
        """Let go of shapes that the last step did not need."""
        for shape in self._buffers.keys() - self._used:
            del self._buffers[shape]
        self._used.clear()

    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self._buffers.values()))


def _taken_apart(content: Content, known: _Form | None) -> tuple[_Form, Sequence[Tensor]]:
    """The form of a value and its tensors, contiguous; in the layout that is known already."""
    found = (content,) if isinstance(content, Tensor) else content.tensors
    structure = "" if isinstance(content, Tensor) else content.structure
    shapes = tuple((tensor.dtype, tensor.shape) for tensor in found)
    same = known is not None and (shapes, structure) == (known.shapes, known.structure)
    orders = known.orders if known is not None and same else tuple(map(_order, found))
    tensors = [
        (tensor.permute(order) if order else tensor).contiguous()
        for tensor, order in zip(found, orders, strict=True)
    ]
    return _Form(shapes, orders, structure), tensors


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from the farthest apart in memory to the nearest; empty: as they are named."""
    if tensor.is_contiguous():
        return ()
    order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
    return tuple(order) if tensor.permute(order).is_contiguous() else ()


def _described(form: _Form) -> str:
    return ", ".join(f"{tuple(sizes)} of {dtype}" for dtype, sizes in form.shapes) or "nothing"


def _encode(form: _Form) -> Tensor:
    shapes = [[str(dtype).removeprefix("torch."), sizes] for dtype, sizes in form.shapes]
    data = json.dumps([shapes, form.orders, form.structure]).encode()
    if len(data) > HEADER:
        raise RankError(
            f"a value of {len(form.shapes)} tensors crosses devices: its description has "
            f"{len(data)} bytes, at most {HEADER} are possible; hand over fewer tensors"
        )
    return torch.frombuffer(bytearray(data.ljust(HEADER)), dtype=torch.uint8)


def _decode(header: Tensor) -> _Form:
    shapes, orders, structure = json.loads(bytes(header.cpu().numpy()))
    return _Form(
        tuple((getattr(torch, name), tuple(sizes)) for name, sizes in shapes),
        tuple(map(tuple, orders)),
        structure,
    )
