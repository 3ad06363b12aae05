"""Hanayo: waves of stages over the ranks; each rank runs what is ready, backwards first."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.shape import wave

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.schedules.shape import Shape

Turn = tuple[int, ...]  # of what is ready on a rank, the smallest runs


def hanayo(shape: Shape) -> list[list[Compute]]:
    """Waves over the ranks, v / 2 of them; a free rank runs a ready backward before a forward.

    Drawn for p = 2, m = 2, v = 2, B = 2 F: ::

        rank 0 | 0F0 0F1     3F0 3B0---- 3F1 3B1----     0B0----         0B1----
        rank 1 |     1F0 2F0 1F1 2F1     2B0---- 1B0---- 2B1---- 1B1----

    At most p micro-batches are on their way: one enters when a backward of stage 0 ends. Some rank
    holds all of them in all of its v stages. What is ready depends on the seconds of F and B.

    References: Liu et al., "Hanayo: Harnessing Wave-like Pipeline Parallelism", SC 2023.
    """
    rank_of = wave(shape)
    seconds = {Op.FORWARD: shape.seconds[0], Op.BACKWARD: shape.seconds[1] + shape.seconds[2]}
    orders: list[list[Compute]] = [[] for _ in range(shape.p)]
    ready: list[list[Turn]] = [[] for _ in range(shape.p)]
    free = [0.0] * shape.p
    first = (Compute(Op.FORWARD, 0, m) for m in range(min(shape.p, shape.m)))
    events: list[tuple[float, int, Turn]] = [(0.0, 0, _turn(compute)) for compute in first]
    while events:
        now = events[0][0]
        while events and events[0][0] <= now:
            _, rank, turn = heappop(events)
            if turn:
                heappush(ready[rank], turn)
        for rank in range(shape.p):
            if not ready[rank] or free[rank] > now:
                continue
            compute = _compute(heappop(ready[rank]))
            orders[rank].append(compute)
            free[rank] = now + seconds[compute.op]
            heappush(events, (free[rank], rank, ()))  # free again, which makes nothing ready
            for after in _followers(compute, shape):
                there = rank_of[after.stage]
                hop = shape.hop if there != rank else 0.0
                heappush(events, (free[rank] + hop, there, _turn(after)))
    return orders


def _turn(compute: Compute) -> Turn:
    """Backwards before forwards, and of either the one that is nearest to its end."""
    if compute.op is Op.BACKWARD:
        return 0, compute.stage, compute.microbatch
    return 1, -compute.stage, compute.microbatch


def _compute(turn: Turn) -> Compute:
    return Compute(Op.FORWARD if turn[0] else Op.BACKWARD, abs(turn[1]), turn[2])


def _followers(compute: Compute, shape: Shape) -> Iterator[Compute]:
    """What can start where `compute` has ended."""
    stage, m = compute.stage, compute.microbatch
    if compute.op is Op.FORWARD:
        last = stage == shape.p * shape.v - 1
        yield Compute(Op.BACKWARD, stage, m) if last else Compute(Op.FORWARD, stage + 1, m)
    elif stage:
        yield Compute(Op.BACKWARD, stage - 1, m)
    elif m + shape.p < shape.m:
        yield Compute(Op.FORWARD, 0, m + shape.p)
