"""`search`: the best plan that can be found, with its evidence.

Two islands anneal partition, placement and rule together, then polish the order of what they found;
a run starts anew or from the best so far, and runs grow longer. Between rounds the islands meet:
the best is shared, the stop is asked. An island is a generator of machine code with the lock
released, so that both cores work, and what it does depends on the seed and the number of
evaluations alone, never on time.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from adaptis.bounds import lower_bounds
from adaptis.cluster import uniform
from adaptis.errors import InfeasibleError, PlanError
from adaptis.search.anneal import anneal, even_out
from adaptis.search.baselines import BASELINES
from adaptis.search.convert import counted, plan_of
from adaptis.search.explain import explain
from adaptis.search.greedy import IMPOSSIBLE, Candidate
from adaptis.search.instance import make_instance, price
from adaptis.search.placement import most_stages, starts
from adaptis.search.polish import Fixed, fix, make_trace, polish, retime
from adaptis.simulate import simulate_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adaptis.bounds import Bounds
    from adaptis.cluster import Cluster
    from adaptis.plan import Plan
    from adaptis.profile import Profile
    from adaptis.search.instance import Instance
    from adaptis.timeline import Timeline

ISLANDS = 2
ROWS_A_PIECE = 1_500_000  # computations simulated between two looks at the clock: 0.2 s
FIRST_RUN, LONGEST_RUN = 6_000, 60_000  # trials
EVEN_TRIALS = 5_000  # of layers only, without simulation
# Temperatures at the beginning and the end of a run, shares of the step: anew in turns, or from
# the best so far. Many runs of moderate length beat one long one.
HEATS, WARM = ((0.012, 0.001), (0.006, 0.0003)), (0.003, 0.0003)
PROOF_A_ROW = 4e-5  # seconds that the final proof takes for each computation
POLISH = (0.001, 0.00002)


LARGE = 1 << 13  # stage-micro-batches beyond which writing out every baseline takes seconds
QUICK = ("gpipe", "1f1b", "interleaved", "interleaved-tuned", "zb-h1", "zb-v", "1f1b-uneven")


@dataclass(frozen=True, slots=True)
class Stop:
    """When a search ends: whatever comes first, looked at several times a second."""

    gap: float = 0.0  # to the lower bound, a share of it
    seconds: float = math.inf
    evaluations: float = math.inf  # simulated candidates


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search stands."""

    seconds: float
    evaluated: int
    best: float  # seconds of the step; inf: nothing fits yet
    lower_bound: float
    gap: float


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The best plan found, and how it was found."""

    plan: Plan
    timeline: Timeline
    lower_bound: Bounds
    gap: float
    evaluated: int
    seconds: float
    seed: int
    history: tuple[tuple[float, float], ...]  # (seconds, best step) at each improvement
    memory_bytes: tuple[float, ...]  # what each device has

    def explain(self) -> list[str]:
        """One line per device and a few on what limits the plan."""
        return explain(self.plan, self.timeline, self.lower_bound, self.memory_bytes)


@dataclass
class _Incumbent:
    """The best so far, and what is shared between islands."""

    fixed: Fixed | None
    cost: float
    candidate: Candidate  # the best of the list scheduler, where warm runs begin
    candidate_cost: float


@dataclass(frozen=True, slots=True)
class _Found:
    """What one piece of an island's work brought."""

    evaluations: int
    candidate: Candidate | None = None
    candidate_cost: float = math.inf
    fixed: Fixed | None = None
    cost: float = math.inf


def search(
    profile: Profile,
    cluster: Cluster,
    num_microbatches: int,
    stop: Stop,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    *,
    spare: float = 0.0,
) -> SearchResult:
    """The best plan that `stop` leaves time to find; never worse than a baseline that fits.

    `spare` bytes of each device's memory stay free.

    Raises:
        InfeasibleError: nothing that was tried fits the devices' memory.
    """
    warm_up()
    began = time.perf_counter()
    bounds = lower_bounds(profile, cluster, num_microbatches)
    instance = make_instance(profile, cluster, num_microbatches, spare)
    pool = starts(instance)
    best = _Incumbent(None, math.inf, pool[0][1], pool[0][0])
    named = _best_baseline(profile, cluster, instance)
    if named is not None:
        best.fixed, best.cost = named
    if best.candidate_cost < min(best.cost, IMPOSSIBLE):
        best.fixed, best.cost = fix(instance, best.candidate), best.candidate_cost
    evaluated = 10 * len(pool) + len(BASELINES)
    history = [(time.perf_counter() - began, best.cost)]
    islands = [_island(instance, best, pool, seed, number, named) for number in range(ISLANDS)]
    with ThreadPoolExecutor(min(ISLANDS, os.cpu_count() or 1)) as threads:
        while True:
            seconds = time.perf_counter() - began
            gap = bounds.gap(best.cost)
            if progress is not None:
                progress(Progress(seconds, evaluated, best.cost, bounds.value, gap))
            rest = PROOF_A_ROW * len(best.fixed.kind) if best.fixed is not None else 0.0
            if gap <= stop.gap or seconds + rest >= stop.seconds or evaluated >= stop.evaluations:
                break
            for found in threads.map(next, islands):
                evaluated += found.evaluations
                _merge(best, found)
            if best.cost < history[-1][1]:
                history.append((time.perf_counter() - began, best.cost))
    if best.fixed is None:
        raise _infeasible(instance, best.candidate)
    answer = _result(
        best.fixed, profile, cluster, bounds, evaluated, time.perf_counter() - began, seed, history
    )
    pairs = zip(answer.timeline.peak_bytes, answer.memory_bytes, strict=True)
    over = max(peak - most for peak, most in pairs)
    if over <= 0:
        return answer
    # More received values wait at a time than `instance` keeps room for: leave that room as well.
    return search(
        profile, cluster, num_microbatches, stop, seed, progress, spare=spare + max(over, 1.0)
    )


def warm_up() -> None:
    """Have everything compiled or read from the cache: half a minute, once on a machine."""
    from adaptis.profile import LayerCost, Profile

    layer = LayerCost("", "", 1.0, 1.0, 1.0, 2.0)
    instance = make_instance(Profile("", 1, (layer,) * 4), uniform(2), 2)
    _, candidate = starts(instance)[0]
    anneal(instance, candidate, candidate, 0, 0, 1, 1, *WARM, 4)
    even_out(instance, candidate, 0, 1, 4)
    fixed = fix(instance, candidate)
    polish(instance, fixed, fixed, 0, 0, 1, 1, *POLISH)


def _merge(best: _Incumbent, found: _Found) -> None:
    if found.candidate is not None and found.candidate_cost < best.candidate_cost:
        best.candidate, best.candidate_cost = found.candidate, found.candidate_cost
    if found.fixed is not None and found.cost < best.cost:
        best.fixed, best.cost = found.fixed, found.cost


def _island(
    instance: Instance,
    best: _Incumbent,
    pool: list[tuple[float, Candidate]],
    base_seed: int,
    number: int,
    named: tuple[Fixed, float] | None,
) -> Iterator[_Found]:
    """Runs for ever, a piece of work each `next`; `best` changes only between rounds."""
    random = np.random.default_rng([base_seed, number])
    if named is not None and number == 0:
        yield from _polish_run(instance, named[0], FIRST_RUN // 2, random)
    for run in range(1 << 30):
        length = min(FIRST_RUN << (run // 2), LONGEST_RUN)
        if run % 3 == 2:
            start, heat = best.candidate, WARM
        else:
            start, heat = pool[(2 * run + number) % min(len(pool), 8)][1], HEATS[run % 2]
            if (run + number) % 2:
                seed = int(random.integers(1 << 31))
                start = even_out(instance, start, seed, EVEN_TRIALS, most_stages(instance))
        candidate, cost = start, math.inf
        for found in _anneal_run(instance, start, length, heat, random):
            yield found
            if found.candidate is not None:
                candidate, cost = found.candidate, found.candidate_cost
        if cost < IMPOSSIBLE and cost < best.cost * 1.02:
            yield from _polish_run(instance, fix(instance, candidate), length // 4, random)


def _piece(instance: Instance, num_stages: int) -> int:
    """How many trials fit between two looks at the clock."""
    rows = 3 * num_stages * instance.num_microbatches
    return max(ROWS_A_PIECE // rows, 16)


def _anneal_run(
    instance: Instance,
    start: Candidate,
    length: int,
    heat: tuple[float, float],
    random: np.random.Generator,
) -> Iterator[_Found]:
    current, best = start, start
    most, first = most_stages(instance), 0
    while first < length:
        stop = min(first + _piece(instance, len(current.stop)), length)
        seed = int(random.integers(1 << 31))
        current, best, least = anneal(
            instance, current, best, seed, first, stop, length, *heat, most
        )
        fixed = fix(instance, best) if least < IMPOSSIBLE else None
        yield _Found(stop - first, best, least, fixed, least if fixed is not None else math.inf)
        first = stop


def _polish_run(
    instance: Instance, start: Fixed, length: int, random: np.random.Generator
) -> Iterator[_Found]:
    current, best, first = start, start, 0
    while first < length:
        stop = min(first + _piece(instance, len(start.stop)), length)
        seed = int(random.integers(1 << 31))
        current, best, least = polish(instance, current, best, seed, first, stop, length, *POLISH)
        yield _Found(stop - first, fixed=best, cost=least)
        first = stop


def _best_baseline(
    profile: Profile, cluster: Cluster, instance: Instance
) -> tuple[Fixed, float] | None:
    """The fastest baseline that exists here and fits."""
    best = None
    large = cluster.num_devices * instance.num_microbatches > LARGE
    for make in [BASELINES[name] for name in (QUICK if large else BASELINES)]:
        try:
            plan = make(profile, cluster, instance.num_microbatches)
        except PlanError:
            continue
        fixed = counted(plan)
        if fixed is None:
            continue
        cost = float(retime(instance, fixed, make_trace(len(fixed.kind))))
        if math.isfinite(cost) and (best is None or cost < best[1]):
            best = fixed, cost
    return best


def _infeasible(instance: Instance, candidate: Candidate) -> InfeasibleError:
    """Name the tightest device of the candidate that misses least."""
    tables = price(instance, candidate.stop, candidate.device)
    needed = tables.static.copy()
    np.add.at(needed, candidate.device, np.maximum(tables.saved, tables.kept))
    device = int(np.argmax(needed - instance.memory))
    missing = math.ceil(needed[device] - instance.memory[device])
    return InfeasibleError(
        f"nothing fits: at best device {device} misses {missing / 2**30:.3f} GiB ({missing} bytes) "
        f"of {needed[device] / 2**30:.3f} GiB; use more devices, more memory or smaller "
        f"micro-batches",
        device,
        missing,
    )


def _result(
    fixed: Fixed,
    profile: Profile,
    cluster: Cluster,
    bounds: Bounds,
    evaluated: int,
    seconds: float,
    seed: int,
    history: list[tuple[float, float]],
) -> SearchResult:
    """The typed answer: `simulate_plan` lowers it, proves it and simulates it again."""
    num_microbatches = int(np.bincount(fixed.stage[fixed.kind == 0])[0])
    plan = plan_of(fixed, num_microbatches, profile, "adaptis")
    timeline = simulate_plan(plan, profile, cluster)
    provenance = {
        "step_seconds": timeline.step,
        "lower_bound_seconds": bounds.value,
        "lower_bound": bounds.binding.name,
        "seed": seed,
        "evaluated": evaluated,
        "cluster": cluster.describe(),
    }
    return SearchResult(
        plan=replace(plan, provenance=provenance),
        timeline=timeline,
        lower_bound=bounds,
        gap=bounds.gap(timeline.step),
        evaluated=evaluated,
        seconds=seconds,
        seed=seed,
        history=tuple(history),
        memory_bytes=tuple(device.memory_bytes for device in cluster.devices),
    )
