"""BitPipe: two copies of the model, each a V, in opposite directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.one_f_one_b import alternate
from adaptis.schedules.shape import by_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.schedules.shape import Shape


@by_rank
def bitpipe(rank: int, shape: Shape) -> Iterator[Compute]:
    """Chimera with a V in each direction: chunks half as long, and half the bubble.

    Drawn for p = 2, m = 2, v = 4, B = 2 F: ::

        rank 0 | 0F0 5F1 6F1 3F0 3B0---- 6B1---- 5B1---- 0B0----
        rank 1 | 4F1 1F0 2F0 7F1 7B1---- 2B0---- 1B0---- 4B1----

    Stage s of the copy that goes up has the number 2 p + s, and its micro-batches are odd.
    Micro-batches go in units of p, one unit after the other: one list of forwards and backwards
    for all units would idle for longer.

    Bubble (p - 2) max(F, B) / 2 a unit; the first and last rank hold 1.5 p + 1 chunks, the middle
    2 p, as many bytes as p micro-batches of a whole stage. The weights are there twice.

    References: Wu, Chen and Yu, "BitPipe", 2024, section 3.
    """
    p, half = shape.p, shape.p // 2
    near = min(rank, p - 1 - rank)
    down, up = (rank, 2 * p - 1 - rank), (3 * p - 1 - rank, 3 * p + rank)  # there and back
    (x, x_back), (y, y_back) = (down, up) if rank < half else (up, down)  # x comes first

    def weave(op: Op, unit: int, ahead: tuple[int, int], after: tuple[int, int]) -> list[Compute]:
        first, second = (
            [Compute(op, s, unit + 2 * i + s // (2 * p)) for s in stages for i in range(half)]
            for stages in (ahead, after)
        )
        return [*alternate(first, second, half - 1 - near)]

    for unit in range(0, shape.m, p):
        forwards = weave(Op.FORWARD, unit, (x, y_back), (y, x_back))
        backwards = weave(Op.BACKWARD, unit, (x_back, y), (y_back, x))
        yield from alternate(forwards, backwards, p + half + near)
