"""1F1B: warm up, then one forward for one backward."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.shape import by_rank

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptis.schedules.shape import Shape


def alternate(
    forwards: Sequence[Compute], backwards: Sequence[Compute], warmup: int
) -> Iterator[Compute]:
    """`warmup` forwards, then one forward for one backward, then the backwards that are left.

    What 1F1B, interleaved, Seq1F1B and SlimPipe have in common; they differ in the two lists.
    """
    warmup = min(warmup, len(forwards))
    yield from forwards[:warmup]
    yield from chain.from_iterable(zip(forwards[warmup:], backwards, strict=False))
    yield from backwards[len(forwards) - warmup :]


@by_rank
def one_f_one_b(rank: int, shape: Shape) -> Iterator[Compute]:
    """Warm up, then one forward for one backward.

    Drawn for p = 3, m = 4, B = 2 F: ::

        rank 0 | F0 F1 F2             B0--- F3 B1---    B2---    B3---
        rank 1 |    F0 F1       B0--- F2 B1--- F3 B2---    B3---
        rank 2 |       F0 B0--- F1 B1--- F2 B2--- F3 B3---

    Bubble as GPipe's, (p - 1)(F + B); rank r holds at most p - r micro-batches, and where
    `shape.most` is less than that, so many at the price of a longer bubble.

    References: Narayanan et al., "PipeDream", SOSP 2019, section 3.2; Fan et al., "DAPPLE", PPoPP
    2021.
    """
    yield from _limited(rank, shape, shape.p - 1 - rank)


@by_rank
def one_f_one_b_eager(rank: int, shape: Shape) -> Iterator[Compute]:
    """1F1B with about twice the forwards ahead, which hide the time that values travel.

    Drawn for p = 3, m = 4, B = 2 F: ::

        rank 0 | F0 F1 F2 F3          B0---    B1---    B2---    B3---
        rank 1 |    F0 F1 F2    B0--- F3 B1---    B2---    B3---
        rank 2 |       F0 B0--- F1 B1--- F2 B2--- F3 B3---

    Without travelling it takes as long as 1F1B, (p - 1)(F + B) more than without a bubble; rank r
    holds at most 2 (p - r) - 1 micro-batches. With a hop of half an F, 4 ranks and 16 micro-batches
    take 60 F instead of 71 F.

    References: Fan et al., "DAPPLE", PPoPP 2021.
    """
    yield from _limited(rank, shape, 2 * (shape.p - 1 - rank))


def _limited(rank: int, shape: Shape, ahead: int) -> Iterator[Compute]:
    """`ahead` forwards before one for one, or fewer where `shape.most` asks for it."""
    forwards = [Compute(Op.FORWARD, rank, m) for m in range(shape.m)]
    backwards = [Compute(Op.BACKWARD, rank, m) for m in range(shape.m)]
    room = shape.m if shape.most is None else shape.most
    yield from alternate(forwards, backwards, min(ahead, room - 1))
