"""Interleaved 1F1B: several stages per rank, looped, in Megatron's order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.one_f_one_b import alternate
from adaptis.schedules.shape import by_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.schedules.shape import Shape


@by_rank
def interleaved(rank: int, shape: Shape) -> Iterator[Compute]:
    """1F1B over v chunks per rank; stage c p + r is chunk c of rank r.

    Drawn for p = 2, m = 2, v = 2, B = 2 F: ::

        rank 0 | 0F0 0F1 2F0 2F1         2B0----     2B1---- 0B0---- 0B1----
        rank 1 |     1F0 1F1 3F0 3B0---- 3F1 3B1---- 1B0---- 1B1----

    Micro-batches go in groups of p, so m must be a multiple of p. Bubble (p - 1)(F + B) / v of the
    rank's work; rank 0 holds p v + p - 1 chunks. With one chunk it is 1F1B.

    References: Narayanan et al., "Efficient Large-Scale Language Model Training", SC 2021, section
    2.2.
    """
    p, v = shape.p, shape.v
    forwards, backwards = [], []
    for k in range(shape.m * v):
        chunk, microbatch = k % (p * v) // p, k // (p * v) * p + k % p
        forwards.append(Compute(Op.FORWARD, chunk * p + rank, microbatch))
        backwards.append(Compute(Op.BACKWARD, (v - 1 - chunk) * p + rank, microbatch))
    ahead = (2 if v > 1 else 1) * (p - 1 - rank) + (v - 1) * p
    yield from alternate(forwards, backwards, ahead)
