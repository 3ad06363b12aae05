"""What each stage costs on its device: a profile, a cut and a cluster, multiplied out once.

`StageCosts` holds arrays over stages, the form that the kernels and the search read; a `Profile`
is never looked at inside a loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from adaptis.cluster import Cluster
    from adaptis.plan import Stage
    from adaptis.profile import Profile

    Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StageCosts:
    """Seconds and bytes per stage s and one micro-batch of weight 1; D devices, S stages."""

    placement: NDArray[np.int64]  # (S,)
    forward: Floats  # (S,)
    backward: Floats
    backward_input: Floats
    backward_weight: Floats
    recomputed: NDArray[np.bool_]  # whether the stage keeps only its input
    recompute: Floats  # F again; 0 where the stage keeps its activations
    kept: Floats  # bytes from F on: all activations, or the input alone
    saved: Floats  # bytes from F or R to B or I
    saved_weight: Floats  # bytes from I to W
    forward_busy: Floats  # seconds that stage s's output occupies its link, 0 on one device
    forward_latency: Floats  # and the seconds on top until it arrives
    backward_busy: Floats  # likewise for the input gradient of stage s, towards stage s - 1
    backward_latency: Floats
    send: float  # seconds that a transfer costs the sender
    receive: float  # and the receiver
    static_bytes: Floats  # (D,) parameters, gradients and optimizer
    update: Floats  # (D,) seconds of the optimizer's step
    shared: tuple[
        tuple[tuple[int, ...], float], ...
    ]  # devices that sum a shared gradient, and its seconds

    @property
    def num_devices(self) -> int:
        """How many devices there are."""
        return len(self.static_bytes)


def price(stages: Sequence[Stage], profile: Profile, cluster: Cluster) -> StageCosts:
    """The costs of `stages` on `cluster`."""
    placement = np.array([stage.device for stage in stages], dtype=np.int64)
    slowness = np.array([1.0 / cluster.devices[stage.device].speed for stage in stages])
    extra = profile.overheads

    def total(name: str) -> Floats:
        prefix = np.concatenate(
            [[0.0], np.cumsum([getattr(layer, name) for layer in profile.layers])]
        )
        return np.array([prefix[stage.stop] - prefix[stage.start] for stage in stages])

    recompute = np.array([stage.recompute for stage in stages])
    forward = (total("forward") + extra.forward) * slowness
    saved = total("saved_bytes")
    inputs = np.array(
        [profile.layers[s.start - 1].output_bytes if s.start else 0 for s in stages], dtype=float
    )
    hops = [
        _hop(cluster, stages, profile.layers[stage.stop - 1].output_bytes, s, s + 1)
        for s, stage in enumerate(stages)
    ]
    back = [_hop(cluster, stages, inputs[s], s, s - 1) for s in range(len(stages))]
    return StageCosts(
        placement=placement,
        forward=forward,
        backward=(total("backward") + extra.backward) * slowness,
        backward_input=(total("backward_input") + extra.backward_input) * slowness,
        backward_weight=(total("backward_weight") + extra.backward_weight) * slowness,
        recomputed=recompute,
        recompute=np.where(recompute, forward, 0.0),
        kept=np.where(recompute, inputs, saved),
        saved=saved,
        saved_weight=total("saved_weight_bytes"),
        forward_busy=np.array([busy for busy, _ in hops]),
        forward_latency=np.array([latency for _, latency in hops]),
        backward_busy=np.array([busy for busy, _ in back]),
        backward_latency=np.array([latency for _, latency in back]),
        send=extra.send,
        receive=extra.receive,
        static_bytes=_per_device(cluster, stages, total("state_bytes"))
        - _held_twice(profile, stages, cluster),
        update=_per_device(cluster, stages, total("update") * slowness),
        shared=_shared(profile, stages, cluster),
    )


def _hop(
    cluster: Cluster, stages: Sequence[Stage], size: float, s: int, other: int
) -> tuple[float, float]:
    """How long `size` bytes keep the link between two neighbours busy, and its latency."""
    if not 0 <= other < len(stages) or stages[s].device == stages[other].device:
        return 0.0, 0.0
    link = cluster.link(stages[s].device, stages[other].device)
    return size / link.bandwidth, link.latency


def _per_device(cluster: Cluster, stages: Sequence[Stage], values: Floats) -> Floats:
    result = np.zeros(cluster.num_devices)
    np.add.at(result, [stage.device for stage in stages], values)
    return result


def _held_twice(profile: Profile, stages: Sequence[Stage], cluster: Cluster) -> Floats:
    """(D,) bytes of shared parameters that were counted for more than one layer of a device."""
    result = np.zeros(cluster.num_devices)
    for shared in profile.shared:
        holders = [s.device for s in stages for i in shared.layers if s.start <= i < s.stop]
        again = np.bincount(holders, minlength=cluster.num_devices) - 1
        result += np.maximum(again, 0) * profile.shared_state(shared)
    return result


def _shared(
    profile: Profile, stages: Sequence[Stage], cluster: Cluster
) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Each parameter that layers on different devices share.

    Both ways over the slowest of their links.
    """
    result = []
    for shared in profile.shared:
        owners = {
            stage.device
            for stage in stages
            for layer in shared.layers
            if stage.start <= layer < stage.stop
        }
        if len(owners) > 1:
            first, *others = sorted(owners)
            slowest = max(cluster.link(first, other).seconds(shared.bytes) for other in others)
            result.append((tuple(sorted(owners)), 2 * slowest))
    return tuple(result)
