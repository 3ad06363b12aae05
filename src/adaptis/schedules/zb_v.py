"""ZB-V: two stages a rank in a V, the backward in halves, 1F1B's memory on every rank."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.shape import by_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.schedules.shape import Shape


@by_rank
def zb_v(rank: int, shape: Shape) -> Iterator[Compute]:
    """A V of two chunks: rank r holds stage r going down and stage 2p - 1 - r going up.

    Drawn for p = 2, m = 3, v = 2, F = I = W: ::

        rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
        rank 1 |     1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2

    Where F = I = W no rank waits once it has begun: bubble (p - 1) F / 2, of which each rank has
    its share before its first F and after its last W. Every rank holds 2 p stages of a micro-batch,
    as much as 1F1B's first rank.

    References: Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024 (its B is
    our I).
    """
    stages = (rank, 2 * shape.p - 1 - rank)
    done: Counter[tuple[Op, int]] = Counter()
    for name in _names(rank, shape):
        key = Op(name[0]), stages[int(name[1])]
        if done[key] < shape.m:
            yield Compute(*key, done[key])
        done[key] += 1


def _names(rank: int, shape: Shape) -> Iterator[str]:
    """Operation and chunk of each computation; the n-th of its kind is that of micro-batch n."""
    p, n = shape.p, max(2 * shape.p - 1, shape.m)
    yield from ["F0"] * (2 * (p - rank) - 1)
    yield from ["F1", "F0"] * rank
    yield from ["F1", "I1", "W1"] * (p - rank)
    down, up = 2 * p - 1 - rank, p
    while up < n:
        if down < n:
            yield "F0"
            down += 1
        yield from ("I0", "W0", "F1", "I1", "W1")
        up += 1
    yield from ["I0", "I1"] * rank
    yield from ["I0", "W0"] * (p - rank)
    yield from ["W1"] * rank
    yield from ["W0"] * rank
