"""Interleaved 1F1B: several stages per rank, looped, in Megatron's order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.one_f_one_b import one_f_one_b

if TYPE_CHECKING:
    from collections.abc import Iterator


def interleaved(
    rank: int, num_ranks: int, num_microbatches: int, num_chunks: int
) -> Iterator[Compute]:
    """1F1B over v chunks per rank; stage c p + r is chunk c of rank r.

    Drawn for p = 2, m = 2, v = 2, B = 2 F: ::

        rank 0 | 0F0 0F1 2F0 2F1         2B0----     2B1---- 0B0---- 0B1----
        rank 1 |     1F0 1F1 3F0 3B0---- 3F1 3B1---- 1B0---- 1B1----

    Micro-batches go in groups of p, so m must be a multiple of p. Bubble (p - 1)(F + B) / v of the
    rank's work; rank 0 holds p v + p - 1 chunks. With one chunk it is 1F1B.

    References: Narayanan et al., "Efficient Large-Scale Language Model Training", SC 2021, section
    2.2.
    """
    if num_chunks == 1:
        yield from one_f_one_b(rank, num_ranks, num_microbatches)
        return
    p, v, total = num_ranks, num_chunks, num_microbatches * num_chunks

    def compute(op: Op, k: int) -> Compute:
        chunk = k % (p * v) // p
        chunk = chunk if op is Op.FORWARD else v - 1 - chunk
        return Compute(op, chunk * p + rank, k // (p * v) * p + k % p)

    warmup = min(2 * (p - rank - 1) + (v - 1) * p, total)
    for k in range(warmup):
        yield compute(Op.FORWARD, k)
    for k in range(total - warmup):
        yield compute(Op.FORWARD, warmup + k)
        yield compute(Op.BACKWARD, k)
    for k in range(total - warmup, total):
        yield compute(Op.BACKWARD, k)
