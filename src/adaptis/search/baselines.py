"""What others do: named schedules with the cuts that frameworks use, or the best of a family."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adaptis.errors import PlanError
from adaptis.plan import Plan, Stage
from adaptis.schedules import SCHEDULES
from adaptis.search.convert import fixed_of
from adaptis.search.instance import make_instance
from adaptis.search.partition import bottleneck_cut, climb, even_cut
from adaptis.search.polish import make_trace, retime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adaptis.cluster import Cluster
    from adaptis.profile import Profile

REPLAYED_ROWS = 8_000_000  # how much "1f1b-uneven" may simulate: a second or so


def _plan(
    profile: Profile,
    cluster: Cluster,
    num_microbatches: int,
    schedule: str,
    stops: Sequence[int],
    name: str,
) -> Plan:
    """`schedule` over the stages that end before `stops`, looped over the devices."""
    p = cluster.num_devices
    starts = [0, *stops[:-1]]
    return Plan(
        num_microbatches=num_microbatches,
        stages=tuple(
            Stage(a, b, s % p) for s, (a, b) in enumerate(zip(starts, stops, strict=True))
        ),
        programs=SCHEDULES[schedule].orders(p, num_microbatches, len(stops) // p),
        schedule=name,
        model=profile.model,
        fingerprint=profile.fingerprint,
    )


def _even(schedule: str) -> Callable[[Profile, Cluster, int], Plan]:
    """One stage per device, cut evenly."""

    def baseline(profile: Profile, cluster: Cluster, num_microbatches: int) -> Plan:
        stops = even_cut(profile, cluster.num_devices)
        return _plan(profile, cluster, num_microbatches, schedule, stops, schedule)

    return baseline


def interleaved(profile: Profile, cluster: Cluster, num_microbatches: int) -> Plan:
    """As many stages per device as there are blocks for: one block each where they divide evenly.

    Raises:
        PlanError: too few blocks, or the micro-batches are no multiple of the devices.
    """
    p = cluster.num_devices
    chunks = max(len(profile.units()) // p, 1)
    return _plan(
        profile,
        cluster,
        num_microbatches,
        "interleaved",
        even_cut(profile, p * chunks),
        "interleaved",
    )


def interleaved_tuned(
    profile: Profile, cluster: Cluster, num_microbatches: int, least: int = 1
) -> Plan:
    """The best number of stages per device, from `least` on (one stage makes it 1F1B).

    Raises:
        PlanError: fewer blocks than devices need, or micro-batches are no multiple of the devices.
    """
    p = cluster.num_devices
    plans = []
    for chunks in range(least, max(len(profile.units()) // p, 1) + 1):
        if chunks > 1 and num_microbatches % p:
            break
        stops = even_cut(profile, p * chunks)
        plans.append(
            _plan(profile, cluster, num_microbatches, "interleaved", stops, "interleaved-tuned")
        )
    if not plans:
        raise PlanError(
            f"interleaved needs {least} blocks per device and a multiple of {p} micro-batches; "
            f"found {len(profile.units())} blocks for {p} devices, {num_microbatches} micro-batches"
        )
    return min(plans, key=lambda plan: _seconds(plan, profile, cluster))


def uneven(profile: Profile, cluster: Cluster, num_microbatches: int) -> Plan:
    """1F1B over the best contiguous cut: lightest heaviest stages first, then layer by layer.

    Raises:
        PlanError: fewer layers than devices.
    """
    p = cluster.num_devices
    if profile.num_layers < p:
        raise PlanError(
            f"{profile.model} has {profile.num_layers} layers, too few for {p} devices; use fewer"
        )
    instance = make_instance(profile, cluster, num_microbatches)
    free = instance._replace(memory=np.full(p, np.inf))
    work = instance.seconds[0] + instance.seconds[1]
    speed = instance.slowness
    tail = np.where(np.arange(p) == p - 1, 1.1, 1.0)
    seeds = [bottleneck_cut(work, slowness) for slowness in (speed, speed * tail, speed / tail)]
    if p <= len(profile.units()):
        seeds.append(np.array(even_cut(profile, p), dtype=np.int64))
    programs = SCHEDULES["1f1b"].orders(p, num_microbatches)
    rows = 2 * p * num_microbatches
    most = REPLAYED_ROWS // rows // len(seeds) + 1
    found = []
    for problem in (instance, free):  # the second only counts where nothing fits
        for seed in seeds:
            plan = _plan(profile, cluster, num_microbatches, "1f1b", seed.tolist(), "1f1b-uneven")
            fixed = fixed_of(plan.stages, programs)
            cost, _ = climb(problem, fixed, p if p <= 8 else 1, most)
            found.append((float(cost), fixed.stop.tolist()))
        if np.isfinite(min(found)[0]):
            break
    return _plan(profile, cluster, num_microbatches, "1f1b", min(found)[1], "1f1b-uneven")


def _seconds(plan: Plan, profile: Profile, cluster: Cluster) -> float:
    """The step of `plan`, whether it fits or not."""
    instance = make_instance(profile, cluster, plan.num_microbatches)
    free = instance._replace(memory=np.full(cluster.num_devices, np.inf))
    fixed = fixed_of(plan.stages, plan.programs)
    return float(retime(free, fixed, make_trace(len(fixed.kind))))


BASELINES: dict[str, Callable[[Profile, Cluster, int], Plan]] = {
    "gpipe": _even("gpipe"),
    "1f1b": _even("1f1b"),
    "interleaved": interleaved,
    "interleaved-tuned": interleaved_tuned,
    "zb-h1": _even("zb-h1"),
    "1f1b-uneven": uneven,
}
