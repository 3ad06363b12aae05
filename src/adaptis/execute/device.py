"""Where a rank computes: on the CPU, or on a GPU of its own or shared with other ranks.

NCCL joins GPUs, not processes: it refuses two processes on one. So ranks that all have a GPU of
their own send values by NCCL, and ranks that share one by way of the host (see `wire`). Numbers and
texts between ranks are on the CPU either way.

A GPU's work is queued, not done, when a call returns. Its clock is therefore read by events in the
queue, which become times once, when a step is over.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from adaptis.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

KINDS = ("cpu", "cuda")
CPU = torch.device("cpu")


def refuse_absent(kind: str) -> None:
    """Name a device that is not there.

    Raises:
        InputError: torch sees none of that kind.
    """
    if kind not in KINDS:
        raise InputError(f"the device {kind!r} is not known; give one of {', '.join(KINDS)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"the device 'cuda' was asked for, but torch {torch.__version__} finds no GPU; use a "
            f"machine with one and torch's CUDA build, or the device 'cpu'"
        )


def take_device(kind: str, local_rank: int) -> torch.device:
    """The device of the machine's rank `local_rank`, made the current one of this process.

    Raises:
        InputError: there is none.
    """
    if kind == "cuda":
        # NCCL's transfers are kernels that run until the other rank has its part. Nothing may queue
        # up behind them, so each stream gets a queue of the hardware; and kernels are loaded now,
        # as to load one later may mean to wait for all that run. CUDA reads this when it starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    refuse_absent(kind)
    if kind == "cpu":
        return CPU
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def backend_of(device: torch.device, store: dist.Store, rank: int, size: int) -> str:
    """What joins the ranks, the same on all of them: NCCL too if each has a GPU of its own."""
    if device.type == "cpu":
        return "gloo"
    store.set(f"gpu/{rank}", str(torch.cuda.get_device_properties(device).uuid))
    found = {store.get(f"gpu/{other}") for other in range(size)}
    return "cpu:gloo,cuda:nccl" if len(found) == size else "gloo"


def has_nccl(group: Any = None) -> bool:
    """Whether the GPUs of a process group are joined by NCCL."""
    return "nccl" in dist.get_backend_config(group)


def for_network(tensor: Tensor, group: Any) -> Tensor:
    """What a collective of `group` takes: the tensor, or a copy of it on the host."""
    return tensor.cpu() if tensor.is_cuda and not has_nccl(group) else tensor


def on_device(microbatch: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """The micro-batch there; itself on the CPU."""
    if device.type == "cpu":
        return microbatch
    return {name: tensor.to(device, non_blocking=True) for name, tensor in microbatch.items()}


def synchronise(device: torch.device) -> None:
    """Until the device has done what the current stream was given.

    A receive that nobody waits for yet is not in it: to wait for all streams may take for ever.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Clock(Protocol):
    """Tells when something of a step happened."""

    read: Callable[[], Any]

    def begin(self) -> None:
        """A step begins."""
        ...

    def drain(self) -> None:
        """Until the current stream's work is done."""
        ...

    def seconds(self, rows: list[Any]) -> list[Any]:
        """Rows of (what, reading, reading) with times of the machine's monotonic clock instead."""
        ...


class HostClock:
    """Of a CPU: a call has done its work when it returns."""

    read = staticmethod(time.perf_counter)

    def begin(self) -> None:
        """Nothing to prepare."""

    def drain(self) -> None:
        """Nothing to wait for."""

    def seconds(self, rows: list[Any]) -> list[Any]:
        """Readings are times."""
        return rows


class CudaClock:
    """Of a GPU: a reading is an event in the queue of the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = torch.cuda.Event(enable_timing=True)
        self._zero = 0.0  # the time of `_base`, seconds

    def read(self) -> torch.cuda.Event:
        """Of the moment when all that was queued before is done."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Pair a reading with the machine's clock."""
        self._base.record()
        self._base.synchronize()
        self._zero = time.perf_counter()

    def drain(self) -> None:
        """See `Clock`."""
        synchronise(self._device)

    def seconds(self, rows: list[Any]) -> list[Any]:
        """See `Clock`; waits for the device."""
        self.drain()
        now = time.perf_counter()

        def time_of(event: torch.cuda.Event) -> float:
            # The base was over some microseconds before its time was read.
            return min(self._zero + 1e-3 * self._base.elapsed_time(event), now)

        return [(what, time_of(begin), time_of(end)) for what, begin, end in rows]


def clock_of(device: torch.device) -> Clock:
    """The clock of what is computed on `device`."""
    return CudaClock(device) if device.type == "cuda" else HostClock()
