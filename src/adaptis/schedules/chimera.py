"""Chimera: two copies of the model, whose pipelines run in opposite directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.shape import by_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.schedules.shape import Shape


def whole_units(shape: Shape) -> str:
    """What is missing to units of p micro-batches, half of them in each direction."""
    if shape.p % 2:
        return f"an even number of devices, found {shape.p}"
    if shape.m % shape.p:
        return f"a multiple of {shape.p} micro-batches on {shape.p} devices, found {shape.m}"
    return ""


@by_rank
def chimera(rank: int, shape: Shape) -> Iterator[Compute]:
    """Half of the micro-batches goes down the ranks, half up; each fills the other's bubble.

    Drawn for p = 4, m = 4, v = 2, B = 2 F: ::

        rank 0 | 0F0 0F2     7F1 7B1---- 7F3 7B3----     0B0----         0B2----
        rank 1 |     1F0 6F1 1F2 6F3     6B1---- 1B0---- 6B3---- 1B2----
        rank 2 |     5F1 2F0 5F3 2F2     2B0---- 5B1---- 2B2---- 5B3----
        rank 3 | 4F1 4F3     3F0 3B0---- 3F2 3B2----     4B1----         4B3----

    Stage s of the copy that goes up has the number p + s, and its micro-batches are odd. Counted in
    steps, F of a direction's i-th micro-batch is at 2 i + s and B at 2 i + 2 p - 1 - s, so that the
    two directions never meet on a rank. Micro-batches go in units of p, one unit after the other.

    Bubble (p - 2) max(F, B) a unit; p / 2 + 1 micro-batches on the first and last rank, p in the
    middle. The weights are there twice, and their gradients are summed over the two copies.

    References: Li and Hoefler, "Chimera", SC 2021, section 3.1.
    """
    p = shape.p
    steps = []
    for copy, stage in enumerate((rank, p - 1 - rank)):
        for i in range(p // 2):
            steps.append((2 * i + stage, Op.FORWARD, copy, stage, i))
            steps.append((2 * i + 2 * p - 1 - stage, Op.BACKWARD, copy, stage, i))
    for unit in range(0, shape.m, p):
        for _, op, copy, stage, i in sorted(steps):
            yield Compute(op, copy * p + stage, unit + 2 * i + copy)
