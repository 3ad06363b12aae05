"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.shape import by_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.schedules.shape import Shape


@by_rank
def gpipe(rank: int, shape: Shape) -> Iterator[Compute]:
    """All forwards, then all backwards: the simplest order, and the most activations.

    Drawn for p = 3, m = 4, B = 2 F: ::

        rank 0 | F0 F1 F2 F3                   B0--- B1--- B2--- B3---
        rank 1 |    F0 F1 F2 F3          B0--- B1--- B2--- B3---
        rank 2 |       F0 F1 F2 F3 B0--- B1--- B2--- B3---

    Bubble (p - 1)(F + B); every rank holds all m micro-batches.

    References: Huang et al., "GPipe", NeurIPS 2019, section 2.3.
    """
    for m in range(shape.m):
        yield Compute(Op.FORWARD, rank, m)
    for m in range(shape.m):
        yield Compute(Op.BACKWARD, rank, m)
