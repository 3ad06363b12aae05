"""The V family: two stages a rank in a V, and the same six slots for every micro-batch.

Micro-batch m on rank r runs in the slots of `starts` plus 6 m. Rows further apart hold more
activations and wait less: V-Min steps one slot a rank, V-Half two on the way down.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from adaptis.program import Compute, Op

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptis.schedules.shape import Shape

PERIOD = 6  # F, I and W of two chunks
Starts = tuple[int, int, int, int]  # the first slots of F0, F1, I1 and I0 of one rank


def v_min(shape: Shape) -> list[list[Compute]]:
    """A V with a third of the activations of ZB-V: each way takes one slot a rank.

    Drawn for p = 3, m = 2, v = 2, F = I = W: ::

        rank 0 | 0F0                 5F0 0F1 5I0 5W0         5F1     0I0 5I1 0W0 5W1         0I1 0W1
        rank 1 |     1F0         4F0         1F1 4I0     4F1 4W0 1I0 1W0     4I1 4W1     1I1 1W1
        rank 2 |         2F0 3F0                 2F1 3F1 3I0 2I0 3W0 2W0         3I1 2I1 3W1 2W1

    Ranks hold 2 (p + 4) // 3 stages of a micro-batch at most, a third of ZB-V's 2 p. Where F, I and
    W differ they wait for each other in every period, and the bubble grows with m.

    References: Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024 (its B is
    our I).
    """
    p = shape.p
    late = 2 if p % 3 == 0 else 0  # where the way back would meet the way down
    return repeat(
        shape, [(r, 2 * p - 1 - r, 2 * p + late + r, 4 * p + late - 1 - r) for r in range(p)]
    )


def v_half(shape: Shape) -> list[list[Compute]]:
    """A V with half of the activations of ZB-V: the way down takes two slots a rank.

    Drawn for p = 3, m = 2, v = 2, F = I = W: ::

        rank 0 | 0F0 0F1             5F0 5I0 5W0         5F1 5I1 5W1 0I0 0W0         0I1 0W1
        rank 1 |     1F0         4F0 1F1     4I0 4W0 4F1     1I0 4I1 1W0 4W1     1I1 1W1
        rank 2 |         2F0 3F0         2F1 3F1 3I0 3W0 2I0 2W0     3I1 3W1 2I1 2W1

    Ranks hold p + 2 stages of a micro-batch, for odd p one fewer. Unequal F, I and W cost a bubble
    that does not grow with m.

    References: Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024 (its B is
    our I).
    """
    p = shape.p
    late = 3 if p % 2 == 0 else 0
    return repeat(
        shape,
        [(2 * r, 3 * p - 2 - r, 3 * p + late - 1 + 2 * r, 6 * p + late - 2 - r) for r in range(p)],
    )


def repeat(shape: Shape, starts: Sequence[Starts]) -> list[list[Compute]]:
    """Each rank's order: its four slots for each micro-batch, and W where a slot is free."""
    return [list(_row(rank, shape, row)) for rank, row in enumerate(starts)]


def _row(rank: int, shape: Shape, starts: Starts) -> Iterator[Compute]:
    down, up = rank, 2 * shape.p - 1 - rank
    kinds = (
        (Op.FORWARD, down),
        (Op.FORWARD, up),
        (Op.BACKWARD_INPUT, up),
        (Op.BACKWARD_INPUT, down),
    )
    taken = {
        start + PERIOD * m: Compute(*kind, m)
        for kind, start in zip(kinds, starts, strict=True)
        for m in range(shape.m)
    }
    weights: deque[Compute] = deque()
    for slot in range(max(taken) + 1):
        if compute := taken.get(slot):
            yield compute
            if compute.op is Op.BACKWARD_INPUT:
                weights.append(Compute(Op.BACKWARD_WEIGHT, compute.stage, compute.microbatch))
        elif weights:
            yield weights.popleft()
    yield from weights
