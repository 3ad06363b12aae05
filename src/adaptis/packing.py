"""How evenly indivisible layers can be dealt out at best: the bottleneck of the fairest deal.

Layers of equal work are interchangeable, so a device's share is a vector of counts, and a dynamic
program over devices and vectors finds the least possible maximum. Where there are too many
different works, neighbouring ones are rounded down to the smaller: still a lower bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MOST_STEPS = 80_000_000  # of the dynamic program, before most are ruled out


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
    sizes = tuple(count + 1 for count in counts)
    loads = np.zeros(())
    for value, size in zip(values, sizes, strict=True):
        loads = loads[..., None] + value * np.arange(size)
    loads = loads + extra
    loads[(0,) * len(sizes)] = 0.0
    most = _one_after_the_other(values, counts, slowness, waits, extra) * (1 + 1e-12)
    nothing = (0,) * len(sizes)
    shares = [waits[d] + loads * slowness[d] for d in range(len(slowness))]
    for share in shares:
        share[nothing] = 0.0
    if len(shares) == 1:
        return float(shares[0].flat[-1])
    least = np.where(shares[0] <= most, shares[0], np.inf)
    for share in shares[1:-1]:
        least = _deal(least, share, most)
    # The last device takes all that the others left.
    return float(np.maximum(least, shares[-1][(slice(None, None, -1),) * len(sizes)]).min())


def _one_after_the_other(
    values: list[float], counts: list[int], slowness: Any, waits: Any, extra: float
) -> float:
    """A deal, so no less than the fairest: each layer, heaviest first, to who is done first."""
    done = np.array(waits, dtype=np.float64) + extra * slowness
    used = np.zeros(len(done), dtype=np.bool_)
    for value, count in zip(reversed(values), reversed(counts), strict=True):
        for _ in range(count):
            d = int(np.argmin(done + value * slowness))
            done[d] += value * slowness[d]
            used[d] = True
    return float(done[used].max())


def _deal(least: Any, share: Any, most: float) -> Any:
    """The least maximum when one more device takes a share of at most `most`."""
    result = np.full_like(least, np.inf)
    for taken in np.argwhere(share <= most):
        into = tuple(slice(t, None) for t in taken)
        left = tuple(slice(0, n - t) for n, t in zip(least.shape, taken, strict=True))
        onto = np.maximum(least[left], share[tuple(taken)])
        np.minimum(result[into], onto, out=result[into])
    return result


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
