"""What others do: named schedules with the cuts that frameworks use, or the best of a family."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adaptis.errors import PlanError
from adaptis.plan import Plan, Stage, named_plan
from adaptis.schedules import MANY, SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.search.convert import counted, fixed_of
from adaptis.search.greedy import IMPOSSIBLE
from adaptis.search.instance import make_instance
from adaptis.search.partition import bottleneck_cut, climb, even_cut
from adaptis.search.polish import make_trace, retime
from adaptis.simulate import simulate_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adaptis.cluster import Cluster
    from adaptis.profile import Profile
    from adaptis.schedules import Schedule
    from adaptis.timeline import Timeline

REPLAYED_ROWS = 8_000_000  # how much "1f1b-uneven" may simulate: a second or so
SEARCHED = ("zb-auto", "v-search")  # that look at costs, in plain Python
SEARCHED_ROWS = 3 * 2 * 16 * 64  # and take seconds for more computations than these


def _plan(
    profile: Profile,
    cluster: Cluster,
    num_microbatches: int,
    schedule: Schedule,
    num_chunks: int,
) -> Plan:
    """`schedule` over an even cut into `num_chunks` stages per device."""
    p = cluster.num_devices
    stops = even_cut(profile, p * num_chunks // schedule.copies)
    shape = Shape(p, num_microbatches, num_chunks)
    if schedule.name in SEARCHED:
        if 3 * p * num_chunks * num_microbatches > SEARCHED_ROWS:
            raise PlanError(
                f"{schedule.name} is made for up to {SEARCHED_ROWS} computations, "
                f"{3 * p * num_chunks * num_microbatches} are needed"
            )
        shape = _with_costs(shape, stops, profile, cluster)
    return named_plan(schedule, shape, stops, profile)


def _with_costs(shape: Shape, stops: Sequence[int], profile: Profile, cluster: Cluster) -> Shape:
    """What the average stage costs, the slowest hop, and how many micro-batches fit everywhere."""
    layers = profile.layers
    count, starts = len(stops), (0, *stops[:-1])
    names = ("forward", "backward_input", "backward_weight")
    forward, half, weight = (sum(getattr(x, name) for x in layers) / count for name in names)
    hops = [cluster.link(d, d + 1) for d in range(shape.p - 1)]
    size = max(layer.output_bytes for layer in layers)
    hop = max((link.seconds(size) for link in hops), default=0.0)
    room = []
    for d, device in enumerate(cluster.devices):
        mine = [(starts[s], stops[s]) for s in range(d, count, shape.p)]
        static = sum(layer.state_bytes for a, b in mine for layer in layers[a:b])
        held = max(sum(layer.saved_bytes for layer in layers[a:b]) for a, b in mine)
        if held and math.isfinite(device.memory_bytes):
            room.append(int((device.memory_bytes - static) // held))
    most = max(min(room), 1) if room else None
    return replace(shape, seconds=(forward, half, weight), hop=hop, most=most)


def _tuned(name: str) -> Callable[[Profile, Cluster, int], Plan]:
    """A named schedule, cut evenly, with the best of the numbers of stages that it allows."""
    schedule = SCHEDULES[name]

    def baseline(profile: Profile, cluster: Cluster, num_microbatches: int) -> Plan:
        return _best(schedule, schedule.chunks, profile, cluster, num_microbatches)

    return baseline


def _best(
    schedule: Schedule, chunks: range, profile: Profile, cluster: Cluster, num_microbatches: int
) -> Plan:
    """The best number of stages per device among `chunks`.

    Raises:
        PlanError: there is no such plan; why the one with the fewest stages is none.
    """
    p, blocks = cluster.num_devices, len(profile.units())
    least = Shape(p, num_microbatches, chunks[0])
    if p * chunks[0] // schedule.copies > blocks:
        raise PlanError(
            f"{profile.model} has {blocks} blocks, too few for the "
            f"{p * chunks[0] // schedule.copies} stages of {schedule.name}; use fewer devices"
        )
    if schedule.lacks(least):
        raise PlanError(f"{schedule.name} needs {schedule.lacks(least)}")
    plans = [
        _plan(profile, cluster, num_microbatches, schedule, v)
        for v in chunks[: blocks * schedule.copies // p]
        if p * v // schedule.copies <= blocks and not schedule.lacks(Shape(p, num_microbatches, v))
    ]
    if len(plans) == 1:
        return plans[0]
    return min(plans, key=lambda plan: _standing(plan, profile, cluster))


def interleaved(profile: Profile, cluster: Cluster, num_microbatches: int) -> Plan:
    """As many stages per device as there are blocks for: one block each where they divide evenly.

    Raises:
        PlanError: too few blocks, or the micro-batches are no multiple of the devices.
    """
    chunks = max(len(profile.units()) // cluster.num_devices, 1)
    return _plan(profile, cluster, num_microbatches, SCHEDULES["interleaved"], chunks)


def interleaved_tuned(
    profile: Profile, cluster: Cluster, num_microbatches: int, least: int = 1
) -> Plan:
    """The best number of stages per device, from `least` on (one stage makes it 1F1B).

    Raises:
        PlanError: fewer blocks than devices need, or micro-batches are no multiple of the devices.
    """
    chunks = range(least, MANY)
    plan = _best(SCHEDULES["interleaved"], chunks, profile, cluster, num_microbatches)
    return replace(plan, schedule="interleaved-tuned")


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
    programs = SCHEDULES["1f1b"].orders(Shape(p, num_microbatches))
    rows = 2 * p * num_microbatches
    most = REPLAYED_ROWS // rows // len(seeds) + 1
    found = []
    for problem in (instance, free):  # the second only counts where nothing fits
        for seed in seeds:
            fixed = fixed_of(_stages(seed.tolist()), programs)
            cost, _ = climb(problem, fixed, p if p <= 8 else 1, most)
            found.append((float(cost), fixed.stop.tolist()))
        if min(found)[0] < IMPOSSIBLE:
            break
    shape = Shape(p, num_microbatches)
    plan = named_plan(SCHEDULES["1f1b"], shape, min(found)[1], profile)
    return replace(plan, schedule="1f1b-uneven")


def _stages(stops: Sequence[int]) -> list[Stage]:
    """One stage a device."""
    return [Stage(a, b, d) for d, (a, b) in enumerate(pairwise((0, *stops)))]


def _standing(plan: Plan, profile: Profile, cluster: Cluster) -> tuple[bool, float]:
    """Whether `plan` misses memory, and its step: less is better."""
    fixed = counted(plan)
    if fixed is None:
        timeline = simulate_plan(plan, profile, cluster)
        return not _fits(timeline, cluster), timeline.step
    instance = make_instance(profile, cluster, plan.num_microbatches)
    seconds = float(retime(instance, fixed, make_trace(len(fixed.kind))))
    if seconds < IMPOSSIBLE:
        return False, seconds
    free = instance._replace(memory=np.full(cluster.num_devices, np.inf))
    return True, float(retime(free, fixed, make_trace(len(fixed.kind))))


def _fits(timeline: Timeline, cluster: Cluster) -> bool:
    memory = (device.memory_bytes for device in cluster.devices)
    return all(peak <= most for peak, most in zip(timeline.peak_bytes, memory, strict=True))


class Fitted(NamedTuple):
    """A baseline as it was made to fit, or as it is where nothing helps."""

    plan: Plan
    timeline: Timeline
    fits: bool


def fitted(
    make: Callable[[Profile, Cluster, int], Plan],
    profile: Profile,
    cluster: Cluster,
    num_microbatches: int,
) -> Fitted:
    """What `make` makes; with every stage recomputed where only that fits the memory.

    Raises:
        PlanError: it does not apply; why.
    """
    plan = make(profile, cluster, num_microbatches)
    plain = _simulated(plan, profile, cluster)
    if plain.fits:
        return plain
    stages = tuple(replace(stage, recompute=True) for stage in plan.stages)
    again = _simulated(replace(plan, stages=stages), profile, cluster)
    return again if again.fits else plain


def _simulated(plan: Plan, profile: Profile, cluster: Cluster) -> Fitted:
    timeline = simulate_plan(plan, profile, cluster)
    return Fitted(plan, timeline, _fits(timeline, cluster))


def _table() -> dict[str, Callable[[Profile, Cluster, int], Plan]]:
    """Every schedule of whole micro-batches, interleaved in both ways, and 1F1B cut at its best."""
    table: dict[str, Callable[[Profile, Cluster, int], Plan]] = {}
    for name, schedule in SCHEDULES.items():
        if schedule.sliced:
            continue
        table[name] = _tuned(name)
        if name == "interleaved":
            table |= {name: interleaved, "interleaved-tuned": interleaved_tuned}
    return table | {"1f1b-uneven": uneven}


BASELINES = _table()
