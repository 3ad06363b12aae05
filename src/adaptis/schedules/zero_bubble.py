"""Zero bubble H1: the backward in two halves, the weight half where a rank would idle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import Compute, Op

if TYPE_CHECKING:
    from collections.abc import Iterator


def zb_h1(
    rank: int, num_ranks: int, num_microbatches: int, num_chunks: int = 1
) -> Iterator[Compute]:
    """1F1B with the backward split; W waits until more than r of them are due.

    Drawn for p = 3, m = 4, F = I = W: ::

        rank 0 | F0 F1 F2       I0 W0 F3 I1 W1 I2 W2 I3 W3
        rank 1 |    F0 F1    I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        rank 2 |       F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    Bubble (p - 1)(F + I - W) where W <= min(F, I); p micro-batches on every rank.

    References: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.1 (its B is our
    I).
    """
    del num_chunks
    warmup = min(num_ranks - 1 - rank, num_microbatches)
    for m in range(warmup):
        yield Compute(Op.FORWARD, rank, m)
    weights = 0
    for m in range(num_microbatches):
        if warmup + m < num_microbatches:
            yield Compute(Op.FORWARD, rank, warmup + m)
        yield Compute(Op.BACKWARD_INPUT, rank, m)
        if m + 1 - weights > rank:
            yield Compute(Op.BACKWARD_WEIGHT, rank, weights)
            weights += 1
    for m in range(weights, num_microbatches):
        yield Compute(Op.BACKWARD_WEIGHT, rank, m)
