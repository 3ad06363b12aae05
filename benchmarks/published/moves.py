"""The moves of the three phases, each a source of trials in random order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from published.scheduler import Order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from published.problem import Problem

WINDOW = 4  # positions that a computation may be moved by, times the number of devices


class Trial(NamedTuple):
    """A plan to be simulated."""

    stop: Any  # (S,) the layer after the last of each stage
    device: Any  # (S,)
    split: bool  # whether backwards are I and W
    defer: bool  # whether the list scheduler is overlap-aware
    exempt: Any  # (2, M) what it does not defer: F or B of a micro-batch
    order: Order | None = None  # None: the list scheduler's


class Point(NamedTuple):
    """A plan that was simulated."""

    trial: Trial
    order: Order
    start: Any  # (n,)
    end: Any  # (n,)
    step: float

    def edges(self) -> tuple[Any, Any]:
        """When each device begins and ends."""
        offsets = self.order.offsets
        return self.start[offsets[:-1]], self.end[offsets[1:] - 1]

    def busy(self) -> Any:
        """Seconds that each device computes."""
        return np.add.reduceat(self.end - self.start, self.order.offsets[:-1])


def _with_stops(trial: Trial, order: Order, stop: Any) -> Iterator[Trial]:
    """Other borders, in the order as it is and listed anew."""
    yield trial._replace(stop=stop, order=order)
    yield trial._replace(stop=stop, order=None)


def partition_moves(problem: Problem, point: Point, random: np.random.Generator) -> Iterator[Trial]:
    """One layer over one border, or from the busiest device to the least busy, border by border."""
    trial, stop = point.trial, point.trial.stop
    busy = point.busy()
    shifts = [(s, s + 1) for s in range(len(stop) - 1)]
    heavy, light = int(np.argmax(busy)), int(np.argmin(busy))
    for a in np.flatnonzero(trial.device == heavy).tolist():
        shifts += [(min(a, b), max(a, b)) for b in np.flatnonzero(trial.device == light).tolist()]
    for index in random.permutation(2 * len(shifts)):
        a, b = shifts[index // 2]
        changed = stop.copy()
        changed[a:b] += 1 if index % 2 else -1
        if changed[0] > 0 and (np.diff(changed) > 0).all():
            yield from _with_stops(trial, point.order, changed)


def placement_moves(problem: Problem, point: Point, random: np.random.Generator) -> Iterator[Trial]:
    """A stage moves, two change places, one is cut in two, or two neighbours become one."""
    trial, count = point.trial, len(problem.slowness)
    stages = len(trial.stop)
    held = np.bincount(trial.device, minlength=count)
    moves = [(0, s, d) for s in range(stages) for d in range(count)]
    moves += [(1, s, t) for s in range(stages) for t in range(s)]
    moves += [(2, s, d) for s in range(stages) for d in range(count)]
    moves += [(3, s, 0) for s in range(stages - 1)]
    for index in random.permutation(len(moves)):
        what, s, other = moves[index]
        stop, device = trial.stop, trial.device.copy()
        if what == 0 and other != device[s] and held[device[s]] > 1:
            device[s] = other
        elif what == 1 and device[s] != device[other]:
            device[s], device[other] = device[other], device[s]
        elif what == 2 and stop[s] - (stop[s - 1] if s else 0) > 1:
            middle = (stop[s] + (stop[s - 1] if s else 0)) // 2
            stop, device = np.insert(stop, s, middle), np.insert(device, s, other)
        elif what == 3 and held[device[s + 1]] > 1:
            stop, device = np.delete(stop, s), np.delete(device, s + 1)
        else:
            continue
        yield trial._replace(stop=stop, device=device, order=None)


def schedule_moves(problem: Problem, point: Point, random: np.random.Generator) -> Iterator[Trial]:
    """Other settings of the list scheduler; then single computations into and out of gaps."""
    trial = point.trial
    for split in (trial.split, not trial.split):
        for defer in (trial.defer, not trial.defer):
            yield trial._replace(split=split, defer=defer, order=None)
    gaps = _gaps(point)
    offsets, kind, _ = point.order
    counted = _microbatches(point)
    for row in gaps[:8]:  # the overlap's tuning: do not defer what comes after a long gap
        if kind[row] < 2:
            exempt = trial.exempt.copy()
            exempt[kind[row], counted[row]] = True
            yield trial._replace(defer=True, exempt=exempt, order=None)
    window = WINDOW * len(problem.slowness)
    for row in gaps:
        d = int(np.searchsorted(offsets, row, side="right")) - 1
        for source in _advanced(point, row, min(row + window, int(offsets[d + 1]))):
            yield trial._replace(order=_moved(point.order, source, row))
        for source in range(row - 1, max(row - window, int(offsets[d])) - 1, -1):
            if kind[source] == 2:
                yield trial._replace(order=_moved(point.order, source, row - 1))


def _advanced(point: Point, row: int, stop: int) -> Iterator[int]:
    """The first row of each kind and stage after `row`."""
    kind, stage = point.order.kind, point.order.stage
    seen = {(int(kind[row]), int(stage[row]))}
    for source in range(row + 1, stop):
        key = int(kind[source]), int(stage[source])
        if key not in seen:
            seen.add(key)
            yield source


def _gaps(point: Point) -> list[int]:
    """The rows before which their device was idle, the longest idle time first."""
    gap = point.start.copy()
    gap[1:] -= point.end[:-1]
    gap[point.order.offsets[:-1]] = 0.0
    rows = np.argsort(-gap, kind="stable")
    return rows[gap[rows] > 1e-9 * point.step].tolist()


def _microbatches(point: Point) -> Any:
    """The micro-batch of each row, by counting."""
    key = point.order.stage * 3 + point.order.kind
    rows = np.argsort(key, kind="stable")
    sorted_keys = key[rows]
    result = np.empty(len(key), dtype=np.int64)
    result[rows] = np.arange(len(key)) - np.searchsorted(sorted_keys, sorted_keys)
    return result


def _moved(order: Order, source: int, to: int) -> Order:
    """Row `source` taken out and put in so that it stands at `to`, on the same device."""
    index = np.arange(len(order.kind))
    if source < to:
        index[source:to] += 1
    else:
        index[to + 1 : source + 1] -= 1
    index[to] = source
    return Order(order.offsets, order.kind[index], order.stage[index])


MOVES = {
    "partition": partition_moves,
    "placement": placement_moves,
    "schedule": schedule_moves,
}
