"""Grouped interleaving: several stages per rank, the distance between them chosen by the memory."""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING

from adaptis.program import Compute, Op
from adaptis.schedules.shape import most_held

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adaptis.program import Work
    from adaptis.schedules.shape import Shape


def gis(shape: Shape) -> Iterable[Iterable[Work]]:
    """Interleaved with halved backwards, and a chunk starts k micro-batches after the one before.

    Drawn for p = 2, m = 3, v = 2, F = I = W: ::

        rank 0 | 0F0 0F1 2F0 0F2     2I0 2W0 2F1         2I1 2W1 2F2 0I0 0W0 2I2 2W2 0I1 0W1 0I2 0W2
        rank 1 |     1F0 1F1 3F0 3I0 3W0 1F2     3F1 3I1 3W1 1I0 1W0 3F2 3I2 3W2 1I1 1W1 1I2 1W2

    A small distance k gives back the activations of the last chunks early. It is the greatest from
    p down to p / 2 whose activations `shape.most` has room for, so p where that is None; below
    p / 2 the last rank's output comes too late. With two chunks per rank and an even p, rank 0
    holds 2p + 1 of them at k = p and 3p / 2 + 1 at k = p / 2, each further rank one less. The first
    chunks live far longer than the last, which makes them worth sending to the host.

    References: Wan et al., "PipeOffload", ICML 2025.
    """
    distance = _distance(shape)
    return [_order(rank, shape, distance) for rank in range(shape.p)]


def room_for_half(shape: Shape) -> str:
    """What is missing to the least distance between chunks that keeps the ranks busy."""
    if shape.most is None:
        return ""
    least = most_held(_order(0, shape, (shape.p + 1) // 2))  # rank 0 holds the most
    if least <= shape.most:
        return ""
    return f"room for {least} micro-batches of a stage, found {shape.most}"


def _distance(shape: Shape) -> int:
    """The greatest distance whose activations fit however many micro-batches there are."""
    least = (shape.p + 1) // 2
    if shape.most is None:
        return shape.p
    many = replace(shape, m=4 * shape.p)  # more than are ever held at once
    fitting = (k for k in range(shape.p, least, -1) if most_held(_order(0, many, k)) <= shape.most)
    return next(fitting, least)


def _order(rank: int, shape: Shape, distance: int) -> list[Compute]:
    """Rank `rank` sorted by time slots of one third of a micro-batch's F, I and W of a stage.

    A micro-batch enters every 3 v slots. Its chunks are 3 `distance` slots apart, and one further
    where they would meet chunks of another micro-batch.
    """
    p, v = shape.p, shape.v
    period = v // gcd(v, distance)
    starts = [3 * (distance * c + c // period) for c in range(v)]
    back = starts[-1] + rank + 3 * (p - 1 - rank) + 1  # rank 0 to the last rank's last chunk, back
    slots = []
    for m in range(shape.m):
        for chunk, start in enumerate(starts):
            slot = start + 3 * v * m
            ahead, behind = chunk * p + rank, (v - 1 - chunk) * p + rank
            slots.append((slot + rank, Op.FORWARD, ahead, m))
            slots.append((slot + back, Op.BACKWARD_INPUT, behind, m))
            slots.append((slot + back + 1, Op.BACKWARD_WEIGHT, behind, m))
    return [Compute(op, stage, m) for _, op, stage, m in sorted(slots)]
