"""One rank's view of the run: who it is, how it talks to the others, and to whoever watches.

The same under our own supervisor and under `torchrun`. Objects never travel pickled between ranks:
texts do, as bytes.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from adaptis.errors import InputError, RankError
from adaptis.execute.device import CPU, backend_of, take_device
from adaptis.execute.guard import Guard
from adaptis.execute.watch import ProgressRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from torch.distributed.device_mesh import DeviceMesh

    from adaptis.execute.launch import Seat

MEETING = timedelta(minutes=10)  # within which all ranks must have come
TIMEOUT = timedelta(days=1)  # of gloo: whoever watches knows sooner and better


@dataclass(slots=True)
class World:
    """This rank among the others."""

    rank: int
    size: int
    progress: ProgressRecord
    tell: Callable[..., None]  # ("say", kind, data) or what `watch.Account` takes
    cores: tuple[int, ...]  # that all ranks of this machine may use
    group: Any = None  # of processes; None: all that there are
    wires: dict[tuple[int, ...], Any] = field(default_factory=dict)  # by ranks, see `wire`
    device: torch.device = CPU  # where this rank computes

    def along(self, mesh: DeviceMesh | None) -> World:
        """This rank among those of a part of a mesh; None: by itself."""
        if mesh is None:
            return replace(self, rank=0, size=1)
        ranks = mesh.mesh.flatten().tolist()
        group = mesh.get_group() if mesh.ndim == 1 else _group_of(ranks)
        return replace(self, rank=ranks.index(dist.get_rank()), size=len(ranks), group=group)

    def ranks(self) -> tuple[int, ...]:
        """The numbers of these ranks among all."""
        if self.size == 1:
            return (dist.get_rank(),)
        return tuple(dist.get_process_group_ranks(self.group))

    def new_group(self) -> Any:
        """Another process group of the same ranks."""
        return _group_of(None if self.group is None else list(self.ranks()))

    def say(self, kind: str, **data: Any) -> None:
        """Tell whoever watches; what other ranks than 0 say is not shown."""
        self.tell("say", kind, data)

    def phase(self, text: str) -> None:
        """What this rank does now, for messages about its death."""
        self.tell("phase", text)

    @contextlib.contextmanager
    def every_core(self) -> Iterator[None]:
        """This rank may use all cores while the others wait for it."""
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, own)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """This rank may stand still, as it needs the others."""
        self.progress.waits()
        yield
        self.progress.resumes()

    def barrier(self) -> None:
        """Wait for all ranks."""
        with self._waiting():
            dist.barrier(group=self.group)

    def sum(self, number: float) -> float:
        """The sum of every rank's number, on every rank."""
        if self.size == 1:
            return number
        total = torch.tensor([number], dtype=torch.float64)
        with self._waiting():
            dist.all_reduce(total, group=self.group)
        return float(total)

    def broadcast(self, text: str | None, source: int = 0) -> str:
        """The source's text, on every rank."""
        with self._waiting():
            return self._broadcast(text, source)

    def _broadcast(self, text: str | None, source: int) -> str:
        data = (text or "").encode()
        size = torch.tensor([len(data)])
        dist.broadcast(size, group_src=source, group=self.group)
        if not int(size):
            return ""
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == source:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, group_src=source, group=self.group)
        return bytes(buffer.numpy()).decode()

    def gather(self, text: str) -> list[str]:
        """Every rank's text, on every rank."""
        return [self.broadcast(text, source) for source in range(self.size)]


def _group_of(ranks: list[int] | None) -> Any:
    return dist.new_group(ranks, timeout=TIMEOUT, use_local_synchronization=ranks is not None)


@contextlib.contextmanager
def seated(seat: Seat, connection: Connection) -> Iterator[World]:
    """Join the run that our own supervisor started.

    Raises:
        InputError: the device that was asked for is not there.
    """
    device = take_device(seat.device, seat.rank)
    torch.set_num_threads(seat.threads)
    progress = ProgressRecord(seat.record, seat.rank)
    store = dist.FileStore(seat.store, seat.num_ranks)
    backend = backend_of(device, store, seat.rank, seat.num_ranks)
    dist.init_process_group(
        backend, store=store, rank=seat.rank, world_size=seat.num_ranks, timeout=TIMEOUT
    )

    def tell(*message: Any) -> None:
        connection.send(message)

    world = World(seat.rank, seat.num_ranks, progress, tell, seat.cores, device=device)
    yield world  # after an error the process ends, which closes all that is open
    world.barrier()
    progress.depart()
    dist.destroy_process_group()


def under_torchrun() -> bool:
    """Whether somebody else has started the ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def launched(say: Callable[[str, dict[str, Any]], None], device: str = "cpu") -> Iterator[World]:
    """Join the run that `torchrun` started; rank 0 says what there is to say.

    Raises:
        InputError: the port of the rendezvous is taken, or `device` is not there.
        RankError: another rank was lost.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        place = take_device(device, int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))))
        store, rank, size = next(dist.rendezvous("env://", timeout=MEETING))
        backend = backend_of(place, store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _rendezvous_error(error) from None
    except ValueError as error:
        raise InputError(
            f"RANK and WORLD_SIZE are set but the rendezvous is not ({error}): start with "
            f"torchrun, or unset RANK and WORLD_SIZE"
        ) from None
    guard = Guard(store, rank, size)
    cores = tuple(sorted(os.sched_getaffinity(0)))

    def tell(*message: Any) -> None:
        if message[0] != "say":
            guard.tell(*message)
        elif rank == 0:
            say(message[1], message[2])

    try:
        with guard.watching():
            world = World(rank, size, guard.record, tell, cores, device=place)
            world.barrier()
            guard.forget_file()
            yield world
            world.barrier()
    finally:
        dist.destroy_process_group()


def _rendezvous_error(error: Exception) -> InputError | RankError:
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    text = str(error)
    if "EADDRINUSE" in text or "address already in use" in text:
        return InputError(
            f"the rendezvous port {address} is in use by another program; give torchrun another "
            f"--master-port"
        )
    return RankError(f"the ranks did not meet at {address}: {text.splitlines()[0]}")
