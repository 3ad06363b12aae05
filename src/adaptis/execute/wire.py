"""How bytes get from one rank to another: two verbs, `isend` and `irecv`, and some ways.

Between machines, `torch.distributed`. Between processes of one machine, memory that they share:
gloo would send over TCP, where each message costs the ranks' processors some 0.2 ms and wakes a
thread that takes the core from the computation. ::

    sender                                        receiver
    copies into a slot of its own memory ──────▶  copies out of it, marks the slot as free
    writes 32 bytes into the receiver's inbox ─▶  reads them when it waits for a message

A send never waits: it takes another slot where none is free, and an inbox holds the notes of 32768
messages. The memory and the inboxes have no names in any file system: the others open them by the
process that made them (`/proc/PID/fd`), and the kernel frees them with the last process.

Between GPUs, NCCL. It has no tags, and between two ranks a communicator does one message after the
other: a send and a receive that each wait for the other rank would stand in each other's way. So
messages to a higher rank have a process group of their own, and those to a lower one another: each
directed link is then a queue by itself, which both ends use in the order of a checked program. The
first message of a link joins its two ends, and both stand still until it does; `prepare` sends it
for all links in one order, so that no two ranks wait for each other, nor does the first step.

NCCL refuses two processes on one GPU. What they exchange goes by way of pinned host memory and one
of the ways between CPUs: the send waits for the device and copies, and so does the wait for what
arrives.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import select
import struct
import sys
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from adaptis.errors import RankError
from adaptis.execute.device import has_nccl
from adaptis.execute.watch import this_machine

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from adaptis.execute.world import World

INBOX = 1 << 20  # bytes; what Linux lets anybody have
PATIENCE = 0.05  # seconds of looking before a rank that has a core of its own goes to sleep
_NOTE = struct.Struct("<4q")  # rank of the sender, tag, slot, bytes
_HEAD = 64  # bytes of a slot before its content; the first one says whether it is taken


class Work(Protocol):
    """A message on its way."""

    def wait(self) -> Any:
        """Until it is there, or gone."""
        ...

    def is_completed(self) -> bool:
        """Whether it is."""
        ...


class Wire(Protocol):
    """What carries messages; those of one sender with one tag arrive in their order."""

    def prepare(self, links: Collection[tuple[int, int]]) -> None:
        """Make the ways from one rank to another ready; every rank calls this with the same."""
        ...

    def isend(self, tensor: Tensor, target: int, tag: int) -> Work:
        """Start handing over a contiguous tensor; it must stay as it is until this is done."""
        ...

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Work:
        """Start filling a contiguous tensor of the same type and sizes."""
        ...


def wire_of(world: World) -> Wire:
    """The way between the ranks of `world`, all of which call this; made once."""
    ranks = world.ranks()
    if ranks not in world.wires:
        world.wires[ranks] = _made(world)
    return world.wires[ranks]


def _made(world: World) -> Wire:
    if world.device.type == "cuda" and has_nccl() and world.size > 1:
        return NcclWire(world)
    wire = _shared(world) or TorchWire(world.group)
    return StagedWire(wire) if world.device.type == "cuda" else wire


class TorchWire:
    """Messages of `torch.distributed`."""

    def __init__(self, group: Any = None) -> None:
        """Between the ranks of `group`; None: all."""
        self._group = group

    def prepare(self, links: Collection[tuple[int, int]]) -> None:
        """They are."""

    def isend(self, tensor: Tensor, target: int, tag: int) -> Any:
        """See `Wire`."""
        return dist.isend(tensor, group_dst=target, group=self._group, tag=tag)

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Any:
        """See `Wire`."""
        return dist.irecv(tensor, group_src=source, group=self._group, tag=tag)


class NcclWire:
    """Messages between GPUs, each rank with one of its own; their order takes the place of tags."""

    def __init__(self, world: World) -> None:
        """Make the groups; every rank of `world` does this."""
        self._rank, self._device = world.rank, world.device
        self._up, self._down = world.new_group(), world.new_group()
        self._ready: set[tuple[int, int]] = set()

    def prepare(self, links: Collection[tuple[int, int]]) -> None:
        """See `Wire`."""
        for source, target in sorted(set(links) - self._ready):
            first = torch.zeros(1, device=self._device)
            if self._rank == source:
                self.isend(first, target, 0).wait()
            elif self._rank == target:
                self.irecv(first, source, 0).wait()
        self._ready.update(links)

    def isend(self, tensor: Tensor, target: int, tag: int) -> Any:
        """See `Wire`; begins after what the current stream was given before."""
        group = self._up if target > self._rank else self._down
        return dist.isend(tensor, group_dst=target, group=group)

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Any:
        """See `Wire`; begins after what the current stream was given before."""
        group = self._up if source < self._rank else self._down
        return dist.irecv(tensor, group_src=source, group=group)


class StagedWire:
    """Tensors of a device, by way of the host's memory and another wire."""

    def __init__(self, wire: Wire) -> None:
        """`wire` carries tensors of the host."""
        self._wire = wire

    def prepare(self, links: Collection[tuple[int, int]]) -> None:
        """See `Wire`."""
        self._wire.prepare(links)

    def isend(self, tensor: Tensor, target: int, tag: int) -> Work:
        """See `Wire`; waits for what the current stream was given before."""
        host = _host(tensor)
        host.copy_(tensor, non_blocking=True)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        return _Leaving(self._wire.isend(host, target, tag), host)

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Work:
        """See `Wire`; nothing is written to `tensor` before the wait."""
        host = _host(tensor)
        return _Landing(self._wire.irecv(host, source, tag), host, tensor)


def _host(tensor: Tensor) -> Tensor:
    """A place on the host for its content; torch keeps pinned ones until a copy has read them."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class _Leaving(NamedTuple):
    """A copy on the host that is being sent, and stays until it is."""

    work: Work
    host: Tensor

    def wait(self) -> None:
        """Until it is gone."""
        self.work.wait()

    def is_completed(self) -> bool:
        """Whether it is."""
        return self.work.is_completed()


class _Landing(NamedTuple):
    """A message that arrives on the host, and goes to the device from there."""

    work: Work
    host: Tensor
    tensor: Tensor

    def wait(self) -> None:
        """Until it is there, for what the current stream is given from now on."""
        self.work.wait()
        self.tensor.copy_(self.host, non_blocking=True)

    def is_completed(self) -> bool:
        """Only `wait` looks."""
        return False


class SharedWire:
    """Memory between the processes of one machine."""

    def __init__(self, rank: int, patience: float) -> None:
        """One rank's end; `meet` opens the others'.

        It looks for `patience` seconds before it sleeps until a message comes.
        """
        self._rank, self._patience = rank, patience
        self._inbox, door = os.pipe()
        fcntl.fcntl(self._inbox, fcntl.F_SETPIPE_SZ, INBOX)
        os.set_blocking(self._inbox, False)
        file = os.memfd_create("adaptis")
        self.address = os.getpid(), door, file  # what the others need in order to open this end
        self._memory, self._end = _Memory(file), 0
        self._slots: dict[int, deque[int]] = {}  # own ones by capacity, the longest unused first
        self._inboxes: list[int] = []  # by rank, to write to
        self._memories: list[_Memory] = []  # by rank, to read from
        self._arrived: dict[tuple[int, int], deque[tuple[int, int]]] = {}  # rank, tag: slot, bytes
        self._files = [self._inbox, door, file]
        weakref.finalize(self, _close, self._files)

    def meet(self, addresses: Sequence[tuple[int, int, int]]) -> bool:
        """Open all ends, by rank; False: the system does not let us."""
        for process, *numbers in addresses:
            try:
                opened = [os.open(f"/proc/{process}/fd/{n}", os.O_RDWR) for n in numbers]
            except OSError:
                return False
            self._files += opened
            self._inboxes.append(opened[0])
            self._memories.append(_Memory(opened[1]))
        return True

    def prepare(self, links: Collection[tuple[int, int]]) -> None:
        """They are."""

    def isend(self, tensor: Tensor, target: int, tag: int) -> Work:
        """See `Wire`."""
        if type(tensor) is not torch.Tensor:  # the result of a collective may still be on its way
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        size, memory = tensor.nbytes, self._memory
        slot = self._free_slot(_HEAD + size)
        content = memory.address(slot + _HEAD, size)
        memory.flags[slot] = 1
        ctypes.memmove(content, tensor.data_ptr(), size)
        os.write(self._inboxes[target], _NOTE.pack(self._rank, tag, slot, size))
        return _SENT

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Work:
        """See `Wire`."""
        return _Arrival(self, tensor, source, tag)

    def take(self, tensor: Tensor, source: int, tag: int) -> None:
        """Fill `tensor` with the next message of `tag`; waits for it.

        Raises:
            RankError: the message has another size.
        """
        key = source, tag
        while key not in self._arrived:
            for sender, what, slot, size in _NOTE.iter_unpack(self._notes()):
                self._arrived.setdefault((sender, what), deque()).append((slot, size))
        notes = self._arrived[key]
        slot, size = notes.popleft()
        if not notes:
            del self._arrived[key]
        if size != tensor.nbytes:
            raise RankError(
                f"a message of rank {source} has {size} bytes, {tensor.nbytes} were expected"
            )
        memory = self._memories[source]
        ctypes.memmove(tensor.data_ptr(), memory.address(slot + _HEAD, size), size)
        memory.flags[slot] = 0

    def _notes(self) -> bytes:
        """What is in the inbox, once there is something.

        To wake a sleeping core takes 0.1 ms, and at times 1 ms where the machine is virtual.
        """
        end = time.perf_counter() + self._patience
        while True:
            try:
                return os.read(self._inbox, 64 * _NOTE.size)
            except BlockingIOError:
                if time.perf_counter() > end:
                    select.select([self._inbox], [], [])  # whoever watches knows of those who died

    def _free_slot(self, size: int) -> int:
        capacity = max(1 << (size - 1).bit_length(), mmap.PAGESIZE)
        slots = self._slots.setdefault(capacity, deque())
        for _ in range(len(slots)):
            slots.rotate(-1)
            if not self._memory.flags[slots[-1]]:
                return slots[-1]
        slots.append(self._end)
        self._end += capacity
        self._memory.reserve(self._end)
        return slots[-1]


class _Memory:
    """A file that is nowhere but in memory, as one process sees it; it grows and never shrinks.

    A page takes room once something is written to it.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._size = self._start = 0  # of what is mapped
        self.flags = memoryview(b"")  # all bytes of it

    def reserve(self, size: int) -> None:
        """Make it at least so long."""
        if size > self._size:
            os.ftruncate(self._file, 1 << (size - 1).bit_length())

    def address(self, offset: int, size: int) -> int:
        """Where the bytes from `offset` on are."""
        if offset + size > self._size:
            pages = mmap.mmap(self._file, 0)  # the whole file, as long as it is by now
            self.flags, self._size = memoryview(pages), len(pages)
            self._start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        return self._start + offset


class _Sent:
    """A message that was copied when it was sent."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def is_completed(self) -> bool:
        """It is."""
        return True


_SENT = _Sent()


class _Arrival(NamedTuple):
    """A message that is awaited."""

    wire: SharedWire
    tensor: Tensor
    source: int
    tag: int

    def wait(self) -> None:
        """Until it is in the tensor."""
        self.wire.take(self.tensor, self.source, self.tag)

    def is_completed(self) -> bool:
        """Only `wait` looks."""
        return False


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _shared(world: World) -> SharedWire | None:
    """This rank's end; None: the ranks are not on one machine, or not allowed to share."""
    machines = set(world.gather(_machine()))
    if world.size == 1 or len(machines) > 1 or "" in machines:
        return None
    crowded = dist.get_world_size() * torch.get_num_threads() > len(world.cores)
    wire = SharedWire(world.rank, 0.0 if crowded else PATIENCE)
    addresses = [json.loads(text) for text in world.gather(json.dumps(wire.address))]
    return wire if world.sum(wire.meet(addresses)) == world.size else None


def _machine() -> str:
    """Equal for two processes that may share memory; empty: nobody can."""
    return this_machine() if sys.platform == "linux" else ""
