"""How evenly indivisible layers can be dealt out at best: the bottleneck of the fairest deal.

Layers of equal work are interchangeable, so a device's share is a vector of counts, and a dynamic
program over devices and vectors finds the least possible maximum. Where there are too many
different works, neighbouring ones are rounded down to the smaller: still a lower bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptis.kernels import compiled

MOST_STEPS = 80_000_000  # of the dynamic program: about a quarter of a second


def fairest(work: Any, slowness: Any, waits: Any, extra: float) -> float:
    """The least possible max over d of waits[d] + (its layers' work + extra, if any) * slowness[d].

    Args:
        work: (L,) seconds of each layer.
        slowness: (D,) factor of each device.
        waits: (D,) seconds before each device can begin.
        extra: seconds that a device with layers needs besides.
    """
    values, counts = _groups(work, len(slowness))
    if not len(values):
        return 0.0
    loads = np.zeros(1)
    for value, count in zip(values, counts, strict=True):
        loads = (loads[:, None] + value * np.arange(count + 1)).reshape(-1)
    loads[1:] += extra
    least = np.full(len(loads), np.inf)
    least[0] = 0.0
    for d in range(len(slowness)):
        share = waits[d] + loads * slowness[d]
        share[0] = 0.0
        least = _deal(least, share, np.asarray(counts) + 1, d == len(slowness) - 1)
    return float(least[-1])


def _groups(work: Any, num_devices: int) -> tuple[list[float], list[int]]:
    """Distinct works and how often each occurs, few enough; free layers are left out."""
    distinct, number = np.unique(np.asarray(work)[np.asarray(work) > 0], return_counts=True)
    values, counts = distinct.tolist(), number.tolist()
    while len(values) > 1 and _steps(counts, num_devices) > MOST_STEPS:
        # What rounding the next group down to this one gives away.
        lost = [(values[i + 1] - values[i]) * counts[i + 1] for i in range(len(values) - 1)]
        i = int(np.argmin(lost))
        counts[i] += counts.pop(i + 1)
        values.pop(i + 1)
    return values, counts


def _steps(counts: list[int], num_devices: int) -> float:
    pairs = 1.0
    for count in counts:
        pairs *= (count + 1) * (count + 2) / 2
    return pairs * num_devices


@compiled
def _deal(least: Any, share: Any, sizes: Any, last: bool) -> Any:
    """The least maximum when one more device takes a share; on the last only all counts."""
    n, k = len(least), len(sizes)
    result = np.full(n, np.inf)
    taken = np.empty(k, np.int64)
    most = np.empty(k, np.int64)
    for whole in range(n - 1 if last else 0, n):
        rest = whole
        for t in range(k - 1, -1, -1):
            most[t] = rest % sizes[t]
            rest //= sizes[t]
        taken[:] = 0
        index, best = 0, np.inf
        while True:
            best = min(best, max(share[index], least[whole - index]))
            t, unit = k - 1, 1
            while t >= 0 and taken[t] == most[t]:
                index -= taken[t] * unit
                taken[t] = 0
                unit *= sizes[t]
                t -= 1
            if t < 0:
                break
            taken[t] += 1
            index += unit
        result[whole] = best
    return result
