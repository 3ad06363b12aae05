"""Automatic zero bubble: an order for given costs and memory, the best of several rules."""

from __future__ import annotations

from itertools import product
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from adaptis.program import Compute, Op
from adaptis.schedules.zero_bubble import zb_h1, zb_h2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adaptis.program import Work
    from adaptis.schedules.shape import Shape

F, I, W = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741 - the field's letters
CLOSE = 1e-9  # times that differ by less, in parts of W, are the same


class Rules(NamedTuple):
    """What the rules may do; no choice is best for all costs, so all eight are tried."""

    late: bool  # one warm-up forward may end after the first I could have started
    greedy: bool  # W goes into every gap, even if it delays what comes next
    backward_first: bool  # no F on a rank that is two ahead of the next


def zb_auto(shape: Shape) -> Iterable[Iterable[Work]]:
    """The shortest of eight greedy orders, ZB-H1 and ZB-H2 for `seconds`, `hop` and `most`.

    Drawn for p = 3, m = 6, most = 2, F = I = W: ::

        rank 0 | F0 F1          I0 W0 F2    I1 W1 F3    I2 W2 F4    I3 W3 F5    I4 W4       I5 W5
        rank 1 |    F0       I0 F1 W0    I1 F2 W1    I2 F3 W2    I3 F4 W3    I4 F5 W4    I5 W5
        rank 2 |       F0 I0 W0    F1 I1 W1    F2 I2 W2    F3 I3 W3    F4 I4 W4    F5 I5 W5

    Each greedy order is played forward in time: warm-up forwards until the first I arrives, then
    one I and one F on every rank in turn, and W where a rank would idle or is full. No rank holds
    more than `most` micro-batches, 2p - 1 if it is None. With room for p it is never slower than
    ZB-H1, with room for 2p - 1 never slower than ZB-H2.

    References: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 3.1.
    """
    most = 2 * shape.p - 1 if shape.most is None else shape.most
    plays = [_by_hand(shape, generate(shape)) for generate in (zb_h1, zb_h2)]
    plays += [_greedy(shape, most, Rules(*rules)) for rules in product((False, True), repeat=3)]
    fitting = [play for play in plays if play.peak <= most]
    return min(fitting, key=lambda play: (max(play.clock), play.peak)).orders


class _Play:
    """All ranks up to now. Each operation of a rank goes through the micro-batches in order."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.orders: list[list[Compute]] = [[] for _ in range(shape.p)]
        self.clock = [0.0] * shape.p
        self.idle = [0.0] * shape.p  # since the rank's first computation
        self.peak = 0
        self.ends: dict[Op, list[list[float]]] = {
            op: [[] for _ in range(shape.p)] for op in (F, I, W)
        }
        self.seconds = dict(zip((F, I, W), shape.seconds, strict=True))

    def count(self, rank: int, op: Op) -> int:
        return len(self.ends[op][rank])

    def held(self, rank: int) -> int:
        return self.count(rank, F) - self.count(rank, W)

    def due(self, rank: int) -> int:
        """How many W could run at once."""
        return self.count(rank, I) - self.count(rank, W)

    def ready(self, rank: int, op: Op) -> float:
        """When the next `op` of `rank` has what it reads; infinity: nobody knows yet."""
        if op is F and rank == 0:
            return 0.0 if self.count(0, F) < self.shape.m else inf
        if op is W or (op is I and rank == self.shape.p - 1):
            source, hop = self.ends[I if op is W else F][rank], 0.0
        else:
            source, hop = self.ends[op][rank - 1 if op is F else rank + 1], self.shape.hop
        done = self.count(rank, op)
        return source[done] + hop if done < len(source) else inf

    def gap(self, rank: int, op: Op) -> float:
        """How long `rank` would wait for its next `op`."""
        return max(0.0, self.ready(rank, op) - self.clock[rank])

    def run(self, rank: int, op: Op) -> None:
        """The next `op` of `rank`, as early as it can."""
        wait = self.gap(rank, op)
        self.idle[rank] += wait if self.orders[rank] else 0.0
        self.orders[rank].append(Compute(op, rank, self.count(rank, op)))
        self.clock[rank] += wait + self.seconds[op]
        self.ends[op][rank].append(self.clock[rank])
        self.peak = max(self.peak, self.held(rank))


def _by_hand(shape: Shape, orders: Iterable[Iterable[Work]]) -> _Play:
    """Given orders, played."""
    play = _Play(shape)
    left = [[c.op for c in order if isinstance(c, Compute)][::-1] for order in orders]
    while any(left):
        for rank, ops in enumerate(left):
            while ops and play.ready(rank, ops[-1]) < inf:
                play.run(rank, ops.pop())
    return play


def _greedy(shape: Shape, most: int, rules: Rules) -> _Play:
    play = _Play(shape)
    _warm_up(play, most, rules.late)
    last = shape.p - 1
    while play.count(0, I) < shape.m:
        for rank in reversed(range(shape.p)):
            _step(play, rank, I, rules.greedy)
        for rank in range(shape.p):
            lead = play.count(rank, F) - play.count(rank + 1, F) if rank < last else 0
            if rules.backward_first and lead >= 2:
                continue
            if play.held(rank) == most and play.due(rank):
                play.run(rank, W)
            if play.held(rank) < most:
                _step(play, rank, F, rules.greedy)
        if play.count(0, F) == shape.m:
            _flush(play, 0)  # nobody waits for its I
    for rank in range(shape.p):
        _flush(play, rank)
    return play


def _warm_up(play: _Play, most: int, late: bool) -> None:
    """Forwards until the first I could arrive; on each rank fewer than on the one before."""
    shape = play.shape
    forward, half, _ = shape.seconds
    limit = min(most, shape.m)
    for rank in range(shape.p):
        hops = 2 * (shape.p - 1) - rank
        arrival = shape.p * forward + (shape.p - 1 - rank) * half + hops * shape.hop
        arrival += CLOSE * forward
        play.run(rank, F)
        while play.count(rank, F) < limit and play.clock[rank] < arrival:
            if not late and play.clock[rank] + play.gap(rank, F) + forward > arrival:
                break
            play.run(rank, F)
        limit = max(1, play.count(rank, F) - 1)


def _step(play: _Play, rank: int, op: Op, greedy: bool) -> None:
    """The next F or I of a rank if its input is known, after the W that fit into the gap before."""
    if play.ready(rank, op) == inf:
        return
    weight = play.seconds[W]
    while play.due(rank) and play.gap(rank, op) >= weight * (1 - CLOSE):
        play.run(rank, W)
    gap = play.gap(rank, op)
    worst = greedy or play.idle[rank] + gap > max(play.idle)
    if play.due(rank) and gap > weight * CLOSE and worst:
        play.run(rank, W)
    play.run(rank, op)


def _flush(play: _Play, rank: int) -> None:
    while play.due(rank):
        play.run(rank, W)
