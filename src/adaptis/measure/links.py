"""What a transfer costs between the running ranks: latency, bandwidth, and the sender's own time.

Needs an initialised process group. One message goes to and fro between each rank and the next,
small and large; the slower of all pairs counts.
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
_TAG = (1 << 30) - 1


@dataclass(frozen=True, slots=True)
class LinkCost:
    """One directed link, and what starting a transfer costs the two ends; seconds."""

    link: Link
    send: float
    receive: float


def measure_links(num_bytes: int, rounds: int = 15) -> LinkCost:
    """Measure with messages of `num_bytes`, those that the model's layers exchange.

    Every rank calls this.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    slowest = LinkCost(Link(), 0.0, 0.0)
    for left in range(size - 1):
        dist.barrier()
        numbers = torch.zeros(4, dtype=torch.float64)
        if rank in (left, left + 1):
            other = 2 * left + 1 - rank
            small, _, _ = _ping(SMALL, other, rounds, first=rank == left)
            large, send, receive = _ping(
                max(num_bytes, 2 * SMALL), other, rounds, first=rank == left
            )
            numbers = torch.tensor([small, large, send, receive], dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        small, large, send, receive = numbers.tolist()
        per_byte = max(large - small, 1e-9) / (max(num_bytes, 2 * SMALL) - SMALL)
        link = Link(max(small - SMALL * per_byte, 0.0), 1.0 / per_byte)
        if link.seconds(num_bytes) >= slowest.link.seconds(num_bytes):
            slowest = LinkCost(link, send, receive)
    return slowest


def _ping(num_bytes: int, other: int, rounds: int, *, first: bool) -> tuple[float, float, float]:
    """Seconds one way, to start a send, and to take what has arrived."""
    out, back = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    ways, starts, takes = [], [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        work: Any = dist.irecv(back, other, tag=_TAG)
        posted = time.perf_counter()
        if first:
            sent = cast("Any", dist.isend(out, other, tag=_TAG))
            starts.append(time.perf_counter() - posted)
            work.wait()
        else:
            work.wait()
            now = time.perf_counter()
            sent = cast("Any", dist.isend(out, other, tag=_TAG))
            starts.append(time.perf_counter() - now)
        sent.wait()
        ways.append((time.perf_counter() - begin) / 2)
        takes.append(posted - begin)
    return median(ways), median(starts), median(takes)
