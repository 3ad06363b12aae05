"""What a transfer costs between the running ranks, while they compute.

Needs an initialised process group. A transfer between idle processes is fast; between processes
whose cores are busy, the network's own threads have to wait for a core, and starting a transfer
takes longer. So both ends compute meanwhile. Each rank is measured with the next one; the slowest
pair counts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist

from adaptis.cluster import Link

SMALL = 4096  # bytes
ROUNDS = 15
BUSY = 2e-3  # seconds of computation beside each transfer
_TAG = (1 << 30) - 1


@dataclass(frozen=True, slots=True)
class LinkCost:
    """One directed link, and what a transfer costs the two ends' processors; seconds."""

    link: Link
    send: float
    receive: float


def measure_links(num_bytes: int) -> LinkCost:
    """Measure with messages of `num_bytes`, those that the layers exchange.

    Every rank calls this.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    num_bytes = max(num_bytes, 2 * SMALL)
    slowest = LinkCost(Link(), 0.0, 0.0)
    for left in range(size - 1):
        dist.barrier()
        numbers = torch.zeros(4, dtype=torch.float64)
        if rank in (left, left + 1):
            pair = _Pair(other=2 * left + 1 - rank, first=rank == left)
            ways = (pair.one_way(SMALL), pair.one_way(num_bytes))
            numbers = torch.tensor([*ways, *pair.exchange(num_bytes)], dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        small, large, send, receive = numbers.tolist()
        per_byte = max(large - small, 1e-9) / (num_bytes - SMALL)
        link = Link(max(small - SMALL * per_byte, 0.0), 1.0 / per_byte)
        if link.seconds(num_bytes) >= slowest.link.seconds(num_bytes):
            slowest = LinkCost(link, send, receive)
    return slowest


class _Pair:
    """This rank and its neighbour."""

    def __init__(self, other: int, *, first: bool) -> None:
        self.other, self.first = other, first
        self._matrix = torch.ones(128, 128)
        self._offset = self._clock_offset()

    def _isend(self, tensor: torch.Tensor) -> Any:
        return cast("Any", dist.isend(tensor, self.other, tag=_TAG))

    def _irecv(self, tensor: torch.Tensor) -> Any:
        return cast("Any", dist.irecv(tensor, self.other, tag=_TAG))

    def _compute(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self._matrix.mm(self._matrix)

    def _clock_offset(self) -> float:
        """The other's clock minus ours, seconds; from the fastest of several round trips."""
        stamp = torch.zeros(1, dtype=torch.float64)
        trips = []
        for _ in range(ROUNDS):
            if self.first:
                begin = time.perf_counter()
                self._isend(stamp).wait()
                self._irecv(stamp).wait()
                end = time.perf_counter()
                trips.append((end - begin, float(stamp) - (begin + end) / 2))
            else:
                self._irecv(stamp).wait()
                stamp[0] = time.perf_counter()
                self._isend(stamp).wait()
        return min(trips)[1] if trips else 0.0

    def one_way(self, num_bytes: int) -> float:
        """Seconds from the start of a send to the arrival at a waiting rank; 0 on that one."""
        message, token = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(1)
        stamps = torch.zeros(ROUNDS, dtype=torch.float64)
        for i in range(ROUNDS):
            if self.first:
                self._irecv(token).wait()
                stamps[i] = time.perf_counter()
                work = self._isend(message)
                self._compute(BUSY)
                work.wait()
            else:
                work = self._irecv(message)
                self._isend(token).wait()
                work.wait()
                stamps[i] = time.perf_counter()
        if not self.first:
            self._isend(stamps).wait()
            return 0.0
        arrivals = torch.zeros_like(stamps)
        self._irecv(arrivals).wait()
        return max(median((arrivals - stamps - self._offset).tolist()), 0.0)

    def exchange(self, num_bytes: int) -> tuple[float, float]:
        """Seconds that a send and a receive cost, when both ends compute and nobody waits."""
        out, back = (torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2))
        sends, receives = [], []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            arriving = self._irecv(back)
            posted = time.perf_counter() - begin
            self._compute(BUSY)
            begin = time.perf_counter()
            leaving = self._isend(out)
            sends.append(time.perf_counter() - begin)
            self._compute(2 * BUSY)
            begin = time.perf_counter()
            arriving.wait()
            receives.append(posted + time.perf_counter() - begin)
            leaving.wait()
        return median(sends), median(receives)
