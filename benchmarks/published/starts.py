"""Where the published generator begins: cuts of small variance, and balanced placements of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.kernels import compiled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from published.problem import Problem

KEEP = 4  # cuts of each number of stages
BEAM = 32  # placements of each cut
SWAPS = 64  # random ones that are scored for each cut


@compiled
def cut_table(work: Any, most: int, keep: int) -> Any:
    """The `keep` least sums of squared stage costs: [stages - 1, layers, k], and where from.

    `back` holds (the layers before the last stage, which of their entries), -1 at the end.
    """
    count = len(work)
    prefix = np.zeros(count + 1)
    prefix[1:] = np.cumsum(work)
    best = np.full((most, count + 1, keep), np.inf)
    back = np.full((most, count + 1, keep, 2), -1, np.int16)
    best[0, 1:, 0] = prefix[1:] ** 2
    for n in range(1, most):
        for j in range(n + 1, count + 1):
            for i in range(n, j):
                square = (prefix[j] - prefix[i]) ** 2
                for k in range(keep):
                    cost = best[n - 1, i, k] + square
                    if cost >= best[n, j, keep - 1]:
                        break
                    at = keep - 1
                    while at > 0 and best[n, j, at - 1] > cost:
                        best[n, j, at] = best[n, j, at - 1]
                        back[n, j, at] = back[n, j, at - 1]
                        at -= 1
                    best[n, j, at] = cost
                    back[n, j, at, 0], back[n, j, at, 1] = i, k
    return best, back


def cuts(work: Any, counts: range, keep: int = KEEP) -> Iterator[tuple[int, float, Any]]:
    """(stages, variance, stops) of the `keep` most even cuts into each number of stages."""
    best, back = cut_table(np.asarray(work, dtype=np.float64), counts[-1], keep)
    total = float(np.sum(work))
    for n in counts:
        for k in range(keep):
            value = float(best[n - 1, len(work), k])
            if not np.isfinite(value):
                break
            stops, j, which = [], len(work), k
            for stage in range(n - 1, -1, -1):
                stops.append(j)
                j, which = (int(x) for x in back[stage, j, which])
            yield n, value / n - (total / n) ** 2, np.array(stops[::-1], dtype=np.int64)


def _loads(problem: Problem, cost: Any, devices: Any) -> Any:
    """(K, D) seconds of each device under each of K placements."""
    loads = np.zeros((len(devices), len(problem.slowness)))
    for s in range(len(cost)):
        loads[np.arange(len(devices)), devices[:, s]] += cost[s]
    return loads * problem.slowness


def lightest_first(problem: Problem, cost: Any) -> Any:
    """The heaviest stage left goes to the device that it burdens least."""
    loads = np.zeros(len(problem.slowness))
    device = np.zeros(len(cost), dtype=np.int64)
    for s in np.argsort(-np.asarray(cost), kind="stable"):
        d = int(np.argmin(loads + cost[s] * problem.slowness))
        device[s] = d
        loads[d] += cost[s] * problem.slowness[d]
    return device


def _transfers(device: Any, num_devices: int) -> Any:
    """All placements that differ in one stage; each device keeps one at least."""
    stages, others = np.divmod(np.arange(len(device) * num_devices), num_devices)
    held = np.bincount(device, minlength=num_devices)
    found = np.repeat(device[None], len(stages), axis=0)
    found[np.arange(len(stages)), stages] = others
    return found[(others != device[stages]) & (held[device[stages]] > 1)]


def _swaps(device: Any, random: np.random.Generator) -> Any:
    """Placements of which two stages have changed places."""
    found = np.repeat(device[None], SWAPS, axis=0)
    a, b = random.integers(len(device), size=(2, SWAPS))
    rows = np.arange(SWAPS)
    found[rows, a], found[rows, b] = device[b], device[a]
    return found


def _scored(problem: Problem, cost: Any, devices: Any) -> Any:
    """The order by variance of load, neighbours on one device, largest load."""
    loads = _loads(problem, cost, devices)
    beside = (devices[:, 1:] == devices[:, :-1]).sum(axis=1)
    return np.lexsort((loads.max(axis=1), beside, loads.var(axis=1).round(12)))


def _balanced(problem: Problem, cost: Any, device: Any) -> Any:
    """`device` after greedy transfers of single stages."""
    for _ in range(len(cost)):
        near = _transfers(device, len(problem.slowness))
        if not len(near):
            break
        loads = _loads(problem, cost, np.concatenate([device[None], near])).var(axis=1)
        if loads[1:].min() >= loads[0] * (1 - 1e-9):
            break
        device = near[int(np.argmin(loads[1:]))]
    return device


def placements(problem: Problem, stop: Any, random: np.random.Generator) -> list[Any]:
    """The best scored placements, the interleaved one first."""
    count = len(problem.slowness)
    sums = np.concatenate([[0.0], np.cumsum(problem.work)])
    cost = np.diff(sums[np.concatenate([[0], stop])])
    base = np.arange(len(stop), dtype=np.int64) % count
    even, greedy = _balanced(problem, cost, base), lightest_first(problem, cost)
    pool = [base[None], even[None], greedy[None]]
    for device in (base, even, greedy):
        pool += [_transfers(device, count), _swaps(device, random)]
    found = np.unique(np.concatenate(pool), axis=0)
    found = found[[len(np.unique(device)) == count for device in found]]
    best = found[_scored(problem, cost, found)[: BEAM - 1]]
    return [base, *best]
