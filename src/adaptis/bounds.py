"""What no plan can beat, whatever its partition, placement and order: the measure of every result.

Each bound holds under the simulator's semantics, overheads included, transfers at 0 seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adaptis.packing import fairest
from adaptis.workload import even

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from adaptis.cluster import Cluster
    from adaptis.profile import Profile
    from adaptis.workload import Workload

    Floats = NDArray[np.float64]


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
        if self.value == 0:
            return 0.0 if step < math.inf else math.inf
        gap = step / self.value - 1.0
        return gap if gap > ROUNDING else 0.0


def lower_bounds(
    profile: Profile, cluster: Cluster, workload: Workload | int, shard_head: str = "never"
) -> Bounds:
    """The bounds on a step of `workload`, or of so many equal micro-batches.

    `shard_head` says whether the last layer may ("auto"), must ("always") or must not ("never") be
    dealt out to all devices.
    """
    weights = np.array((even(workload) if isinstance(workload, int) else workload).weights)
    whole = _bounds(_costs(profile, cluster, weights, 0), cluster)
    if shard_head == "never":
        return whole
    sharded = _bounds(_costs(profile, cluster, weights, 1), cluster)
    return sharded if shard_head == "always" else min(whole, sharded, key=lambda b: b.value)


class _Costs(NamedTuple):
    """Seconds at speed 1 of the layers that stages consist of, for a micro-batch of weight 1."""

    names: list[str]
    weights: Floats  # (m,)
    forward: Floats
    back: Floats  # all of the backward
    first: Floats  # what of it comes before the gradient can go on
    extra: tuple[float, float, float]  # overheads of the three, whatever the weight
    part: float  # seconds of one device's part of a sharded head
    part_first: float  # of S, before the gradient can go back
    part_extra: tuple[float, float]  # overheads of both, and of S
    update: float
    saved: Floats  # bytes
    state: float  # bytes that all devices hold together


def _costs(profile: Profile, cluster: Cluster, weights: Floats, shared: int) -> _Costs:
    """`shared` is 1 where the last layer is sharded."""
    extra, p = profile.overheads, cluster.num_devices
    layers, head = profile.layers[: profile.num_layers - shared], profile.layers[-1]
    scores, gradient = (head.forward + head.backward_input) / p, head.backward_weight / p
    twice = sum((len(s.layers) - 1) * profile.shared_state(s) for s in profile.shared)
    return _Costs(
        names=[layer.name for layer in layers],
        weights=weights,
        forward=np.array([layer.forward for layer in layers]),
        # A stage may run B, or I and W: the cheaper, layer by layer, is below both.
        back=np.array([min(x.backward, x.backward_input + x.backward_weight) for x in layers]),
        first=np.array([min(x.backward, x.backward_input) for x in layers]),
        extra=(
            extra.forward,
            min(extra.backward, extra.backward_input + extra.backward_weight),
            min(extra.backward, extra.backward_input),
        ),
        part=shared * (scores + gradient),
        part_first=shared * scores,
        part_extra=(shared * (extra.forward + extra.backward_weight), shared * extra.forward),
        update=sum(layer.update for layer in profile.layers),
        saved=np.array([layer.saved_bytes for layer in layers], dtype=np.float64),
        state=sum(layer.state_bytes for layer in profile.layers) - twice,
    )


def _bounds(costs: _Costs, cluster: Cluster) -> Bounds:
    m, least = float(costs.weights.sum()), float(costs.weights.min())
    speeds = np.sort([device.speed for device in cluster.devices])[::-1]
    # F of all layers before, of the smallest micro-batch
    reach = least * np.concatenate([[0.0], np.cumsum(costs.forward)[:-1]])
    total = m * float((costs.forward + costs.back).sum()) + costs.update
    total += _parts(costs) * len(speeds)
    work = _work(total, len(costs.weights) * sum(costs.extra[:2]), speeds)
    mean = max(float(np.min(work / _used(speeds, costs))), 0.0)
    fill = _fill(work, reach, costs, speeds)
    at, heavy = _heaviest(costs, reach)
    share = (
        m * float(costs.forward[at] + costs.back[at]) * len(speeds) / work[0] if work[0] else 0.0
    )
    fair = _packing(costs, reach, cluster)
    path = float(costs.weights.max()) * (
        float((costs.forward + costs.first).sum()) + costs.part_first
    )
    path += costs.extra[0] + costs.extra[2] + costs.part_extra[1]
    memory = _memory(costs, cluster, mean * float(speeds.sum()))
    fastest = float(speeds[0])
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
                heavy / fastest,
                f"{costs.names[at]} alone is {share:.2f}x the average device's work, indivisible",
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
            Bound(
                "memory",
                memory,
                "activations need more room, or recomputation more time, than there is",
            ),
        )
    )


def _parts(costs: _Costs) -> float:
    """Seconds of one device's part of a sharded head in a step."""
    return float(costs.weights.sum() * costs.part + len(costs.weights) * costs.part_extra[0])


def _used(speeds: Floats, costs: _Costs) -> Floats:
    """The speed of 1, 2, ... devices; all of them have parts of a sharded head."""
    return np.full(len(speeds), speeds.sum()) if costs.part else np.cumsum(speeds)


def _heaviest(costs: _Costs, reach: Floats) -> tuple[int, float]:
    """The layer that keeps its device longest, and for how many seconds, from the step's start."""
    m, least, count = costs.weights.sum(), costs.weights.min(), len(costs.weights)
    forward, back, first = costs.extra
    whole = m * (costs.forward + costs.back) + count * (forward + back) + reach
    inside = m * (costs.forward + costs.first) + count * (forward + first) + reach
    inside += least * np.concatenate([[0.0], np.cumsum(costs.first)[:-1]])
    heavy = np.maximum(whole, inside) + _parts(costs)
    at = int(np.argmax(heavy))
    return at, float(heavy[at])


def _work(total: float, per_device: float, speeds: Floats) -> Floats:
    """Seconds at speed 1 if 1, 2, ... devices are used: each runs at least one stage."""
    return np.asarray(total + per_device * np.arange(1, len(speeds) + 1), dtype=np.float64)


def _fill(work: Floats, reach: Floats, costs: _Costs, speeds: Floats) -> float:
    """Work, and the time until each device has something to do.

    A device begins with F of some stage, after F of all layers before it; stages begin with
    different layers. So the k-th device to begin waits for k layers at least, and with k devices,
    sum of speed x (T - wait) >= work. Parts of a sharded head begin later than any stage.
    """
    starts = np.sort(reach + costs.extra[0] * (np.arange(len(reach)) > 0)) / speeds[0]
    best = np.inf
    for used in range(1, min(len(speeds), len(starts)) + 1):
        waiting = min(len(speeds), len(starts)) if costs.part else used
        waits = float((speeds[:waiting] * starts[:waiting]).sum())
        best = min(best, (float(work[used - 1]) + waits) / float(_used(speeds, costs)[used - 1]))
    return best


def _packing(costs: _Costs, reach: Floats, cluster: Cluster) -> float:
    """The fairest deal of whole layers; on equal devices the k-th to begin waits for k layers."""
    m, extra = costs.weights.sum(), len(costs.weights) * sum(costs.extra[:2])
    slowness = np.array([1.0 / device.speed for device in cluster.devices])
    waits = np.zeros(len(slowness))
    if np.ptp(slowness) == 0:
        starts = (reach + costs.extra[0] * (np.arange(len(reach)) > 0)) * slowness[0]
        waits[: len(starts)] = starts[: len(waits)]
    waits += _parts(costs) * slowness
    work = m * (costs.forward + costs.back)
    return fairest(work, slowness, waits, extra)


def _memory(costs: _Costs, cluster: Cluster, work: float) -> float:
    """Byte-seconds of activations against those that the devices have in a step.

    A layer's activations live at least until the micro-batch has gone on to the end and come back;
    a recomputed layer's while it computes, but it computes F once more. Which layers to recompute
    is a fractional knapsack: those that free most byte-seconds for each second of work, until both
    bounds meet.
    """
    speeds = [device.speed for device in cluster.devices]
    room = sum(device.memory_bytes for device in cluster.devices) - costs.state
    if not 0 < room < math.inf:
        return 0.0
    m, fastest = costs.weights.sum(), max(speeds)
    square = (costs.weights**2).sum()  # both bytes and seconds grow with the weight
    short = (costs.forward + costs.first) / fastest
    stay = np.cumsum(short[::-1])[::-1]
    seconds, busy = float((costs.saved * stay).sum()) * square / room, work / sum(speeds)
    gain = square * costs.saved * (stay - short) / room
    price = m * costs.forward / sum(speeds)
    for k in np.argsort(-gain / np.maximum(price, 1e-300), kind="stable"):
        if seconds <= busy or gain[k] <= 0:
            break
        part = min(1.0, (seconds - busy) / float(gain[k] + price[k]))
        seconds -= part * float(gain[k])
        busy += part * float(price[k])
    return seconds
