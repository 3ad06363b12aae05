"""Breadth-first: several stages per rank, all micro-batches through each of them in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.shape import by_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.schedules.shape import Shape


@by_rank
def breadth_first(rank: int, shape: Shape) -> Iterator[Compute]:
    """GPipe over v chunks per rank; stage c p + r is chunk c of rank r.

    Drawn for p = 2, m = 2, v = 2, B = 2 F: ::

        rank 0 | 0F0 0F1 2F0 2F1             2B0---- 2B1---- 0B0---- 0B1----
        rank 1 |     1F0 1F1 3F0 3F1 3B0---- 3B1---- 1B0---- 1B1----

    Bubble (p - 1)(F + B) / v of the rank's work where m >= p; every rank holds m v chunks. The
    parameters of each stage are in use twice a step, in one run each: sharded ones are gathered
    twice, and gradients are reduced beside the stages that follow.

    References: Lamy-Poirier, "Breadth-First Pipeline Parallelism", MLSys 2023.
    """
    stages = range(rank, shape.p * shape.v, shape.p)
    for op, row in ((Op.FORWARD, stages), (Op.BACKWARD, reversed(stages))):
        for stage in row:
            for m in range(shape.m):
                yield Compute(op, stage, m)
