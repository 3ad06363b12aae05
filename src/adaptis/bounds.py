"""What no plan can beat, whatever its partition, placement and order: the measure of every result.

Each bound holds under the simulator's semantics, overheads included, transfers at 0 seconds. Memory
is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adaptis.packing import fairest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from adaptis.cluster import Cluster
    from adaptis.profile import Profile


ROUNDING = 1e-9  # bounds and simulations add in different orders


@dataclass(frozen=True, slots=True)
class Bound:
    """One reason why a step takes at least `seconds`."""

    name: str
    seconds: float
    reason: str  # one sentence


@dataclass(frozen=True, slots=True)
class Bounds:
    """All bounds of one planning problem."""

    all: tuple[Bound, ...]

    @property
    def binding(self) -> Bound:
        """The largest."""
        return max(self.all, key=lambda bound: bound.seconds)

    @property
    def value(self) -> float:
        """Seconds that every plan takes at least."""
        return self.binding.seconds

    def gap(self, step: float) -> float:
        """How far `step` seconds are above the bound, as a share of it."""
        gap = step / self.value - 1.0 if self.value > 0 else 0.0
        return gap if gap > ROUNDING else 0.0


def lower_bounds(profile: Profile, cluster: Cluster, num_microbatches: int) -> Bounds:
    """The bounds on a step of `num_microbatches` equal micro-batches."""
    layers, extra, m = profile.layers, profile.overheads, num_microbatches
    forward = np.array([layer.forward for layer in layers])
    # A stage may run B, or I and W: the cheaper, layer by layer, is below both.
    back = np.array([min(x.backward, x.backward_input + x.backward_weight) for x in layers])
    first = np.array(
        [min(x.backward, x.backward_input) for x in layers]
    )  # before the gradient can go on
    extra_back = min(extra.backward, extra.backward_input + extra.backward_weight)
    extra_first = min(extra.backward, extra.backward_input)
    speeds = np.sort([device.speed for device in cluster.devices])[::-1]
    update = sum(layer.update for layer in layers)
    reach = np.concatenate([[0.0], np.cumsum(forward)[:-1]])  # F of all layers before
    work = _work(
        m * float((forward + back).sum()) + update, m * (extra.forward + extra_back), speeds
    )
    fill = _fill(work, reach, extra.forward, speeds)
    fastest = float(speeds[0])
    whole = m * (forward + back + extra.forward + extra_back) + reach
    inside = m * (forward + first + extra.forward + extra_first) + reach
    inside += np.concatenate([[0.0], np.cumsum(first)[:-1]])
    heavy = np.maximum(whole, inside) / fastest
    at = int(np.argmax(heavy))
    share = m * float(forward[at] + back[at]) * len(speeds) / work[0] if work[0] else 0.0
    fair = _packing(
        m * (forward + back), m * (extra.forward + extra_back), reach, extra.forward, cluster
    )
    path = float((forward + first).sum()) + extra.forward + extra_first
    mean = max(float(np.min(work / np.cumsum(speeds))), 0.0)
    return Bounds(
        (
            Bound(
                "work", mean, f"all work shared evenly by {len(speeds)} devices takes {mean:.6g} s"
            ),
            Bound(
                "fill",
                fill,
                f"besides the work, each further device waits for the first layers: {fill:.6g} s",
            ),
            Bound(
                "layer",
                float(heavy[at]),
                f"{layers[at].name} alone is {share:.2f}x the average device's work, indivisible",
            ),
            Bound(
                "packing",
                fair,
                f"whole layers, dealt out as evenly as can be, leave {fair:.6g} s to one device",
            ),
            Bound(
                "path",
                path / fastest,
                "one micro-batch goes through all layers, forward and backward",
            ),
        )
    )


def _work(total: float, per_device: float, speeds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds at speed 1 if 1, 2, ... devices are used: each runs at least one stage."""
    return np.asarray(total + per_device * np.arange(1, len(speeds) + 1), dtype=np.float64)


def _fill(
    work: NDArray[np.float64],
    reach: NDArray[np.float64],
    extra: float,
    speeds: NDArray[np.float64],
) -> float:
    """Work, and the time until each device has something to do.

    A device begins with F of some stage, after F of all layers before it; stages begin with
    different layers. So the k-th device to begin waits for k layers at least, and with k devices,
    sum of speed x (T - wait) >= work.
    """
    starts = np.sort(reach + extra * (np.arange(len(reach)) > 0)) / speeds[0]
    best = np.inf
    for used in range(1, min(len(speeds), len(starts)) + 1):
        waits = float((speeds[:used] * starts[:used]).sum())
        best = min(best, (float(work[used - 1]) + waits) / float(speeds[:used].sum()))
    return best


def _packing(
    work: NDArray[np.float64],
    per_device: float,
    reach: NDArray[np.float64],
    extra: float,
    cluster: Cluster,
) -> float:
    """The fairest deal of whole layers; on equal devices the k-th to begin waits for k layers."""
    slowness = np.array([1.0 / device.speed for device in cluster.devices])
    waits = np.zeros(len(slowness))
    if np.ptp(slowness) == 0:
        starts = (reach + extra * (np.arange(len(reach)) > 0)) * slowness[0]
        waits[: len(starts)] = starts[: len(waits)]
    return fairest(work, slowness, waits, per_device)
