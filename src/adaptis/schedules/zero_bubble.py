"""Zero bubble H1 and H2: the backward in two halves, the weight half where a rank would idle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.shape import by_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.schedules.shape import Shape


@by_rank
def zb_h1(rank: int, shape: Shape) -> Iterator[Compute]:
    """1F1B with the backward split; W waits until more than r of them are due.

    Drawn for p = 3, m = 4, F = I = W: ::

        rank 0 | F0 F1 F2       I0 W0 F3 I1 W1 I2 W2 I3 W3
        rank 1 |    F0 F1    I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        rank 2 |       F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    Bubble (p - 1)(F + I - W) where W <= min(F, I); p micro-batches on every rank.

    References: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.1 (its B is our
    I).
    """
    warmup = min(shape.p - 1 - rank, shape.m)
    for m in range(warmup):
        yield Compute(Op.FORWARD, rank, m)
    weights = 0
    for m in range(shape.m):
        if warmup + m < shape.m:
            yield Compute(Op.FORWARD, rank, warmup + m)
        yield Compute(Op.BACKWARD_INPUT, rank, m)
        if m + 1 - weights > rank:
            yield Compute(Op.BACKWARD_WEIGHT, rank, weights)
            weights += 1
    for m in range(weights, shape.m):
        yield Compute(Op.BACKWARD_WEIGHT, rank, m)


@by_rank
def zb_h2(rank: int, shape: Shape) -> Iterator[Compute]:
    """As many forwards ahead as fill the warm-up; W waits until 2p - 1 micro-batches are held.

    Drawn for p = 3, m = 6, F = I = W: ::

        rank 0 | F0 F1 F2 F3 F4 I0 W0 F5 I1 W1 I2 W2 I3 W3 I4 W4 I5 W5
        rank 1 |    F0 F1 F2 I0 F3 I1 F4 I2 W0 F5 I3 W1 I4 W2 I5 W3 W4 W5
        rank 2 |       F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 F5 I5 W1 W2 W3 W4 W5

    From its first to its last computation a rank idles (p - 1)(F + I - 2W), at least 0, where
    W <= F: the bubble is only in the ranks' starts, r F, and ends. 2p - 1 micro-batches on every
    rank.

    References: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.2 (its B is our
    I).
    """
    forwards = min(2 * (shape.p - rank) - 1, shape.m)
    for m in range(forwards):
        yield Compute(Op.FORWARD, rank, m)
    weights = 0
    for m in range(shape.m):
        yield Compute(Op.BACKWARD_INPUT, rank, m)
        full = forwards - weights >= 2 * shape.p - 1
        if full if forwards < shape.m else m + 1 - weights > rank:
            yield Compute(Op.BACKWARD_WEIGHT, rank, weights)
            weights += 1
        if forwards < shape.m:
            yield Compute(Op.FORWARD, rank, forwards)
            forwards += 1
    for m in range(weights, shape.m):
        yield Compute(Op.BACKWARD_WEIGHT, rank, m)
