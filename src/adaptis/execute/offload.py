"""Activations go to the host's memory after F and come back before the backward.

What autograd saved for one micro-batch is found by walking its graph from the stage's output. Each
saved tensor is replaced by a handle, and so is the stage's input; each storage is copied once,
however many tensors look into it. Parameters, buffers, the micro-batch itself and what slices of a
sequence leave to each other stay: they are not freed by it. On an accelerator the copies run on a
stream of their own, through pinned memory; on a CPU the host is another buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.measure.compute import StageCompute


class _Bytes:
    """The bytes of one storage, on the device or on the host."""

    __slots__ = ("bytes", "home", "ready")

    def __init__(self, device: Tensor) -> None:
        self.bytes = device
        self.home = device.device
        self.ready: Any = None  # an event: they have arrived

    def move(self, stream: torch.cuda.Stream | None, out: bool) -> None:
        """To the host (`out`) or back, on `stream` where there is one."""
        source = self.bytes
        if stream is None:
            self.bytes = source.clone()
            return
        with torch.cuda.stream(stream):
            place = torch.device("cpu") if out else self.home
            target = torch.empty_like(source, device=place, pin_memory=out)
            self.bytes = target.copy_(source, non_blocking=True)
            self.ready = stream.record_event()


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor that looks into a storage, wherever that is."""

    storage: _Bytes
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The tensor, once its bytes are back."""
        kept = self.storage
        if kept.ready is not None:
            kept.ready.wait()
            kept.bytes.record_stream(torch.cuda.current_stream(kept.home))
        empty = torch.empty(0, dtype=self.dtype, device=kept.home)
        return empty.set_(kept.bytes.untyped_storage(), self.offset, self.size, self.stride)


@dataclass(frozen=True, slots=True)
class _Away:
    storages: list[_Bytes]
    inputs: list[tuple[Tensor, _View]]


class HostMemory:
    """The host's side of one device."""

    def __init__(self) -> None:
        self.num_bytes = 0  # on the host now
        self.moved_bytes = 0  # that have ever gone there
        self._away: dict[tuple[StageCompute, int], _Away] = {}
        self._stream: torch.cuda.Stream | None = None
        self._leaving: list[tuple[Any, Tensor]] = []  # until an event: what is being copied

    def offload(self, stage: StageCompute, m: int) -> None:
        """OFFLOAD: what `stage` keeps of micro-batch `m` leaves the device's memory."""
        outputs, inputs, others = stage.graph(m)
        module = stage.module
        stay = {_address(t) for t in (*module.parameters(), *module.buffers(), *others)}
        found: dict[int, _Bytes] = {}

        def pack(tensor: Tensor) -> _View:
            address = _address(tensor)
            if address not in found:
                found[address] = _Bytes(_all_bytes(tensor))
            offset = int(tensor.storage_offset())
            return _View(found[address], tensor.dtype, tensor.size(), tensor.stride(), offset)

        for saved, tensor in _saved_tensors(outputs):
            if _address(tensor) not in stay:
                saved.register_hooks(pack, _View.tensor)
        leaves = [(leaf, pack(leaf)) for leaf in inputs]
        for leaf, _ in leaves:
            leaf.data = leaf.data.new_empty(0)
        self._forget()
        for kept in found.values():
            source, stream = kept.bytes, self._stream_for(kept)
            kept.move(stream, out=True)
            if stream is not None:
                self._leaving.append((kept.ready, source))
            self.num_bytes += kept.bytes.numel()
            self.moved_bytes += kept.bytes.numel()
        self._away[stage, m] = _Away(list(found.values()), leaves)

    def reload(self, stage: StageCompute, m: int) -> None:
        """RELOAD: it comes back."""
        away = self._away.pop((stage, m))
        self._forget()
        for kept in away.storages:
            kept.move(self._stream_for(kept), out=False)
            self.num_bytes -= kept.bytes.numel()
        for leaf, view in away.inputs:
            leaf.data = view.tensor()

    def _forget(self) -> None:
        """Let go of what has left: neither torch nor the receive buffers may use it before."""
        self._leaving = [(ready, source) for ready, source in self._leaving if not ready.query()]

    def _stream_for(self, kept: _Bytes) -> torch.cuda.Stream | None:
        """What copies these bytes, after whatever fills them; None: the CPU itself."""
        if kept.home.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(kept.home)
        if kept.bytes.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(kept.home))
        return self._stream


def _saved_tensors(outputs: list[Tensor]) -> Iterator[tuple[Any, Tensor]]:
    """Everything that autograd keeps for `outputs`, with the handle that takes hooks.

    What has hooks already is left alone: its owner keeps something else in its place.
    """
    todo: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = {None}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
        for name in _names(type(node)):
            kept = getattr(node, name)
            for handle in kept if isinstance(kept, tuple) else (kept,):
                tensor = None if handle is None or handle.unpack_hook else handle.data
                if isinstance(tensor, Tensor):
                    yield handle, tensor


@cache
def _names(kind: type) -> list[str]:
    """Where a kind of node keeps tensors."""
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _all_bytes(tensor: Tensor) -> Tensor:
    """The whole storage that `tensor` looks into."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
