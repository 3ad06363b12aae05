"""1F1B: warm up, then one forward for one backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import Compute, Op

if TYPE_CHECKING:
    from collections.abc import Iterator


def one_f_one_b(
    rank: int, num_ranks: int, num_microbatches: int, num_chunks: int = 1
) -> Iterator[Compute]:
    """Warm up, then one forward for one backward.

    Drawn for p = 3, m = 4, B = 2 F: ::

        rank 0 | F0 F1 F2             B0--- F3 B1---    B2---    B3---
        rank 1 |    F0 F1       B0--- F2 B1--- F3 B2---    B3---
        rank 2 |       F0 B0--- F1 B1--- F2 B2--- F3 B3---

    Bubble as GPipe's, (p - 1)(F + B); rank r holds at most p - r micro-batches.

    References: Narayanan et al., "PipeDream", SOSP 2019, section 3.2; Fan et al., "DAPPLE", PPoPP
    2021.
    """
    del num_chunks
    warmup = min(num_ranks - 1 - rank, num_microbatches)
    for m in range(warmup):
        yield Compute(Op.FORWARD, rank, m)
    for m in range(warmup, num_microbatches):
        yield Compute(Op.FORWARD, rank, m)
        yield Compute(Op.BACKWARD, rank, m - warmup)
    for m in range(num_microbatches - warmup, num_microbatches):
        yield Compute(Op.BACKWARD, rank, m)
