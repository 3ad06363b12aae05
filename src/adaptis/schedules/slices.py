"""Schedules of slices: a long sequence goes through the pipeline piece by piece.

A slice is a micro-batch that continues another one: forwards go in order, since a slice reads the
keys and values of those before it, and backwards in reverse.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.one_f_one_b import alternate
from adaptis.schedules.shape import by_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.schedules.shape import Shape


@by_rank
def terapipe(rank: int, shape: Shape) -> Iterator[Compute]:
    """GPipe over slices: all forwards, then all backwards from the last slice to the first.

    Drawn for p = 3, m = 2, s = 2, B = 2 F: ::

        rank 0 | F0 F1 F2 F3                   B3--- B2--- B1--- B0---
        rank 1 |    F0 F1 F2 F3          B3--- B2--- B1--- B0---
        rank 2 |       F0 F1 F2 F3 B3--- B2--- B1--- B0---

    Bubble (p - 1)(F + B) / s where the slices cost the same; every rank holds all m micro-batches.

    References: Li et al., "TeraPipe", ICML 2021, section 3.
    """
    for unit in range(shape.units):
        yield Compute(Op.FORWARD, rank, unit)
    for unit in reversed(range(shape.units)):
        yield Compute(Op.BACKWARD, rank, unit)


@by_rank
def seq1f1b(rank: int, shape: Shape) -> Iterator[Compute]:
    """1F1B over slices: first in, first out over micro-batches, last in, first out inside one.

    Drawn for p = 3, m = 2, s = 2, B = 2 F: ::

        rank 0 | F0 F1 F2 F3             B1---    B0---    B3--- B2---
        rank 1 |    F0 F1 F2       B1--- F3 B0---    B3--- B2---
        rank 2 |       F0 F1 B1--- F2 B0--- F3 B3--- B2---

    Bubble (p - 1)(F + B) / (v s) where the slices cost the same; with one chunk, rank r holds
    p - 1 - r + s slices. With more it is interleaved 1F1B in groups of at least p slices: whole
    micro-batches, since the backward of a micro-batch begins with its last slice.

    References: Sun et al., "Seq1F1B", 2024, section 3.
    """
    p, v, s = shape.p, shape.v, shape.s
    group = whole_group(shape)
    ahead = (2 if v > 1 else 1) * (p - 1 - rank) + (v - 1) * group + s - 1
    yield from _interleaved(rank, shape, group, ahead)


@by_rank
def slimpipe(rank: int, shape: Shape) -> Iterator[Compute]:
    """Interleaved 1F1B over slices, a whole micro-batch on one chunk, then on the next.

    Drawn for p = 2, m = 2, s = 2, B = 2 F: ::

        rank 0 | F0 F1 F2 F3    B1---    B0---    B3--- B2---
        rank 1 |    F0 F1 B1--- F2 B0--- F3 B3--- B2---

    Bubble (p - 1)(F + B) / (v s) where the slices cost the same; rank 0 holds v s + 2 (p - 1)
    slices of a chunk, little more than one micro-batch whatever p is. A micro-batch has a multiple
    of p slices.

    References: Li et al., "SlimPipe", SC 2025.
    """
    ahead = 2 * (shape.p - 1 - rank) + shape.v * shape.s - 1
    yield from _interleaved(rank, shape, shape.s, ahead)


def whole_group(shape: Shape) -> int:
    """How many slices whole micro-batches of at least p slices have."""
    return shape.s * ceil(shape.p / shape.s)


def _interleaved(rank: int, shape: Shape, group: int, ahead: int) -> Iterator[Compute]:
    """1F1B, where `group` slices are run on one chunk, then on the next."""
    p, v, s = shape.p, shape.v, shape.s
    forwards, backwards = [], []
    for k in range(shape.units * v):
        chunk, unit = k % (group * v) // group, k // (group * v) * group + k % group
        last_first = unit // s * s + s - 1 - unit % s
        forwards.append(Compute(Op.FORWARD, chunk * p + rank, unit))
        backwards.append(Compute(Op.BACKWARD, (v - 1 - chunk) * p + rank, last_first))
    yield from alternate(forwards, backwards, ahead)


def whole_groups(shape: Shape) -> str:
    """What is missing to groups of micro-batches with at least p slices."""
    each = ceil(shape.p / shape.s)
    if shape.v == 1 or shape.m % each == 0:
        return ""
    return (
        f"a multiple of {each} micro-batches of {shape.s} slices on {shape.p} devices, "
        f"found {shape.m}"
    )


def whole_rounds(shape: Shape) -> str:
    """What is missing to a slice on every rank at any time."""
    if shape.s % shape.p == 0:
        return ""
    return f"a multiple of {shape.p} slices on {shape.p} devices, found {shape.s}"
