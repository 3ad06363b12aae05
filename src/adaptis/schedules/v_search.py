"""The best V for given costs and memory: many repeats, each moved forward where ranks are idle.

A computation is one integer here, (kind 2p + stage) m + micro-batch with kinds F, I, W = 0, 1, 2:
a search over orders needs arrays, not objects. Links have no queue; the simulator judges in full.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

from adaptis.program import Compute, Op, parts
from adaptis.schedules.shape import wave
from adaptis.schedules.v_family import PERIOD, Starts, repeat, v_half, v_min
from adaptis.schedules.zb_v import zb_v

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from adaptis.program import Work
    from adaptis.schedules.shape import Shape

KINDS = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
STEPS = range(1, 6)  # slots from one rank to the next on the way down; on the way up it is one
REPEATS, TRIED = 32, 12  # how many repeats are timed, and how many of all are moved forward
ROUNDS = 4
CLOSE = 1e-9  # of a step: two times that are the same but for rounding

Orders = list[list[int]]


def v_search(shape: Shape) -> list[list[Compute]]:
    """The fastest known V for the seconds of F, I, W and a hop, under a limit on activations.

    Drawn for p = 3, m = 2, v = 2, F = I = W: ::

        rank 0 | 0F0 0F1             5F0 5I0 5F1 5I1 5W0 5W1 0I0 0W0 0I1 0W1
        rank 1 |     1F0 1F1     4F0     4F1 4I0 4W0 4I1 1I0 4W1 1I1 1W0 1W1
        rank 2 |         2F0 3F0 2F1 3F1         3I0 2I0 3I1 2I1 3W0 2W0 3W1 2W1

    No slower than ZB-V, V-Half and V-Min as far as these fit into `shape.most` micro-batches of a
    stage on each rank (2 p of them where it is None); it is ZB-V where nothing can be better.

    References: Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024.
    """
    times = Times(shape)
    found = times.fitting([zb_v(shape), v_half(shape), v_min(shape)])
    found.sort(key=times.makespan)
    if times.makespan(found[0]) > times.bound * (1 + CLOSE):
        orders = [times.numbers(repeat(shape, rows)) for rows in _repeats(shape.p, times.limit)]
        filled = map(times.filled, found + orders)
        found += [o for o in orders if times.peak(o) <= times.limit] + [o for o in filled if o]
        found.sort(key=times.makespan)
        found = sorted((times.improved(orders) for orders in found[:TRIED]), key=times.makespan)
    return [[times.compute(number) for number in order] for order in found[0]]


def room_for_a_v(shape: Shape) -> str:
    """What limit would do where `shape.most` is too low; empty where it is not."""
    times = Times(shape)
    named = (zb_v(shape), v_half(shape), v_min(shape))
    least = min(times.peak(times.numbers(orders)) for orders in named)
    if times.limit >= least:
        return ""
    return f"room for at least {least} micro-batches of a stage on each device, found {times.limit}"


@cache
def _repeats(p: int, limit: int) -> list[list[Starts]]:
    """Patterns of slots that hold about `limit`: the fullest below it, then those one above it.

    A pattern is `first` slots a rank on the way down for some ranks, `then` for the others, and
    the slots from F0 to F1 and from I1 to I0 on the last rank and from F1 to I1 on the first.
    """
    kept: dict[tuple[Starts, ...], tuple[bool, int, int]] = {}
    for first, then, ranks in product(STEPS, STEPS, range(p)):
        if then > first:
            continue
        down = [min(r, ranks) * first + max(r - ranks, 0) * then for r in range(p)]
        for turn, loss, back in product(range(1, PERIOD), repeat=3):
            late = down[-1] + turn + p - 1 + loss
            end = late + down[-1] + back + p - 1
            rows = tuple(
                (f, down[-1] + turn + p - 1 - r, late + f, end - r) for r, f in enumerate(down)
            )
            if all(len({slot % PERIOD for slot in row}) == len(row) for row in rows):
                held = max(map(_held, rows))
                if held <= limit + 1:  # which W's at better places can still lower by one
                    kept[rows] = (held > limit, -held, end)
    return [list(rows) for rows in sorted(kept, key=lambda rows: kept[rows])][:REPEATS]


def _held(row: Starts) -> int:
    """How many micro-batches of both stages a repeat holds, each until the slot after its W."""
    f0, f1, i1, i0 = row
    return -(-(i0 + 2 - f0) // PERIOD) - (-(i1 + 2 - f1) // PERIOD)


class Times:
    """What each computation takes and waits for, and the orders that follow from it."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.limit = 2 * shape.p if shape.most is None else shape.most
        p, m = shape.p, shape.m
        self.size = size = 2 * p * m  # computations of one kind
        self.seconds = [seconds for seconds in shape.seconds for _ in range(size)]
        # What a computation waits for: -1 is nothing, and all others stand on a line of hops.
        forwards = [n - m if n >= m else -1 for n in range(size)]
        inputs = [n + m if n < 2 * size - m else n - size for n in range(size, 2 * size)]
        self.needs = forwards + inputs + list(range(size, 2 * size))
        rank_of = wave(shape)
        self.rank = [rank_of[n % size // m] for n in range(3 * size)]
        self.hop = [
            shape.hop if need >= 0 and self.rank[need] != self.rank[n] else 0.0
            for n, need in enumerate(self.needs)
        ]
        forward, half, weight = shape.seconds
        # The last rank waits for its first input and then computes all that it has.
        self.bound = (p - 1) * (forward + shape.hop) + 2 * m * (forward + half + weight)
        self.close = CLOSE * self.bound

    def compute(self, number: int) -> Compute:
        """The computation that `number` stands for."""
        m = self.shape.m
        return Compute(KINDS[number // self.size], number % self.size // m, number % m)

    def numbers(self, orders: Iterable[Iterable[Work]]) -> Orders:
        """The inverse of `compute`, for whole orders."""
        m, base = self.shape.m, {op: kind * self.size for kind, op in enumerate(KINDS)}
        return [
            [base[c.op] + c.stage * m + c.microbatch for work in order for c in parts(work)]
            for order in orders
        ]

    def fitting(self, candidates: Iterable[Iterable[Iterable[Work]]]) -> list[Orders]:
        """Those that hold no more than the limit."""
        return [o for o in map(self.numbers, candidates) if self.peak(o) <= self.limit]

    def peak(self, orders: Orders) -> int:
        """The most that a rank holds: one more at F, one fewer at W."""
        most = 0
        for order in orders:
            held = 0
            for number in order:
                held += self.change(number)
                most = max(most, held)
        return most

    def change(self, number: int) -> int:
        """What a computation adds to what its rank holds."""
        return (1, 0, -1)[number // self.size]

    def starts(self, orders: Orders) -> list[float]:
        """When each computation starts, in these orders and as early as possible."""
        starts, ends = [0.0] * (3 * self.size), [-1.0] * (3 * self.size)
        free = [0.0] * len(orders)
        for rank, number in self.walk(orders, ends):
            starts[number] = max(free[rank], self.arrival(number, ends))
            free[rank] = ends[number] = starts[number] + self.seconds[number]
        return starts

    def makespan(self, orders: Orders) -> float:
        """When the last computation ends."""
        starts = self.starts(orders)
        return max(starts[order[-1]] + self.seconds[order[-1]] for order in orders)

    def arrival(self, number: int, ends: list[float]) -> float:
        """When what a computation waits for is on its rank."""
        need = self.needs[number]
        return ends[need] + self.hop[number] if need >= 0 else 0.0

    def walk(self, orders: Orders, ends: list[float]) -> Iterator[tuple[int, int]]:
        """Each rank and computation, once the caller knows in `ends` what it waits for."""
        position, left = [0] * len(orders), sum(map(len, orders))
        while left:
            for rank, order in enumerate(orders):
                for number in order[position[rank] :]:
                    if self.needs[number] >= 0 and ends[self.needs[number]] < 0:
                        break
                    yield rank, number
                    position[rank] += 1
                    left -= 1

    def filled(self, orders: Orders) -> Orders | None:
        """The same F and I, and W's in gaps that hold one, or where an F needs the room.

        None: an F finds no room and no W.
        """
        size, weight = self.size, self.shape.seconds[2]
        result: Orders = [[] for _ in orders]
        due: list[deque[int]] = [deque() for _ in orders]
        free, held, ends = [0.0] * len(orders), [0] * len(orders), [-1.0] * (2 * size)
        without = [[number for number in order if number < 2 * size] for order in orders]
        for rank, number in self.walk(without, ends):
            arrival, full = self.arrival(number, ends), self.limit if number < size else size + 1
            while held[rank] >= full or arrival - free[rank] >= weight - self.close:
                if not due[rank]:
                    break
                result[rank].append(due[rank].popleft())
                free[rank] += weight
                held[rank] -= 1
            if held[rank] >= full:
                return None
            free[rank] = ends[number] = max(free[rank], arrival) + self.seconds[number]
            result[rank].append(number)
            if number < size:
                held[rank] += 1
            else:
                due[rank].append(number + size)
        return [order + list(weights) for order, weights in zip(result, due, strict=True)]

    def improved(self, orders: Orders) -> Orders:
        """`orders` moved forward, then W placed anew, for as long as that makes them faster."""
        best = self.makespan(orders)
        for _ in range(ROUNDS):
            moved = self.forward(orders)
            filled = self.filled(moved)
            options = [option for option in (moved, filled) if option]
            option = min(options, key=self.makespan)
            if self.makespan(option) >= best - self.close:
                break
            best, orders = self.makespan(option), option
        return orders

    def forward(self, orders: Orders) -> Orders:
        """Each computation in the first gap that holds it, where that stays under the limit.

        In the order of their starts: what comes later can only profit.
        """
        starts = self.starts(orders)
        turns = sorted(
            (starts[number], rank, position, number)
            for rank, order in enumerate(orders)
            for position, number in enumerate(order)
        )
        ends = [-1.0] * (3 * self.size)
        rows: list[list[int]] = [[] for _ in orders]
        held = [0] * len(orders)
        for _, rank, _, number in turns:
            row = rows[rank]
            place, start = self._gap(row, ends, number, held[rank])
            row.insert(place, number)
            ends[number] = start + self.seconds[number]
            held[rank] += self.change(number)
        return rows

    def _gap(self, row: list[int], ends: list[float], number: int, held: int) -> tuple[int, float]:
        """Where in `row` the computation can first run, and when, seen from the end of `row`."""
        arrival, change = self.arrival(number, ends), self.change(number)
        place = len(row)
        start = max(arrival, ends[row[-1]]) if row else arrival
        for position in range(len(row) - 1, -1, -1):
            later = row[position]
            # Before `later`, what is held after it rises as well.
            if ends[later] <= arrival or (change > 0 and held + change > self.limit):
                break
            held -= self.change(later)
            if change > 0 and held + change > self.limit:
                break
            before = ends[row[position - 1]] if position else 0.0
            begin = max(arrival, before)
            if begin + self.seconds[number] <= ends[later] - self.seconds[later] + self.close:
                place, start = position, begin
        return place, start
