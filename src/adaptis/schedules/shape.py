"""For how many ranks, micro-batches, chunks and slices a schedule is asked, and where stages go.

The letters of the papers: p ranks, m micro-batches, v chunks (stages of one rank), s slices of
each micro-batch. Every generator takes one `Shape`; a sliced micro-batch i is numbers i s to
i s + s - 1, since a slice is a micro-batch that continues another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import TYPE_CHECKING

from adaptis.program import Op, parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from adaptis.program import Work


@dataclass(frozen=True, slots=True)
class Shape:
    """What a schedule is made for; the last three are read by those that look at costs."""

    p: int  # ranks
    m: int  # micro-batches, of all copies together
    v: int = 1  # stages per rank, of all copies together
    s: int = 1  # slices per micro-batch
    seconds: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of F, I and W of one stage
    hop: float = 0.0  # seconds that a value takes to the next rank
    most: int | None = None  # how many micro-batches of one stage a rank may hold; None: any

    @property
    def units(self) -> int:
        """Micro-batches as the program counts them: slices are micro-batches."""
        return self.m * self.s

    @property
    def previous(self) -> tuple[int, ...]:
        """The slice before each micro-batch, as `Layout.previous`."""
        if self.s == 1:
            return ()
        return tuple(i - 1 if i % self.s else -1 for i in range(self.units))

    def __str__(self) -> str:
        text = f"p={self.p} m={self.m}"
        text += f" v={self.v}" if self.v > 1 else ""
        return text + (f" s={self.s}" if self.s > 1 else "")


def by_rank(
    generate: Callable[[int, Shape], Iterator[Work]],
) -> Callable[[Shape], Iterable[Iterable[Work]]]:
    """A schedule that is written for one rank at a time."""

    @wraps(generate)
    def for_all(shape: Shape) -> Iterable[Iterable[Work]]:
        return [generate(rank, shape) for rank in range(shape.p)]

    return for_all


def most_held(order: Iterable[Work]) -> int:
    """The most activations that a rank holds at once, each of one stage and micro-batch."""
    now = most = 0
    for compute in chain.from_iterable(map(parts, order)):
        now += compute.op is Op.FORWARD
        most = max(most, now)
        now -= compute.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)
    return most


def loop(shape: Shape) -> tuple[int, ...]:
    """Stage j on rank j mod p: 0 1 2 0 1 2."""
    return tuple(j % shape.p for j in range(shape.p * shape.v))


def wave(shape: Shape) -> tuple[int, ...]:
    """Down the ranks and up again: 0 1 2 2 1 0; two chunks make a V, more make waves."""
    p = shape.p
    return tuple(j % p if j // p % 2 == 0 else p - 1 - j % p for j in range(p * shape.v))


def both_ways(shape: Shape) -> tuple[int, ...]:
    """Two copies in opposite directions: 0 1 2 for the first, 2 1 0 for the second.

    With four chunks each copy is a V: 0 1 2 2 1 0 and 2 1 0 0 1 2.
    """
    p = shape.p
    one = wave(Shape(p, shape.m, shape.v // 2))
    return (*one, *(p - 1 - rank for rank in one))
