"""`search`: the best plan that can be found, with its evidence.

Good starts (balanced cuts, looped, waved and free placements, every named schedule), then islands
that anneal partition, placement and rule together and polish the order of what they found
(`adaptis.search.islands`), until the stop that was asked for. Same seed and evaluations, same plan.
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
from adaptis.search.anneal import anneal
from adaptis.search.baselines import BASELINES
from adaptis.search.convert import counted, plan_of
from adaptis.search.explain import explain
from adaptis.search.greedy import IMPOSSIBLE, RESERVE, Candidate, list_schedule
from adaptis.search.instance import (
    PLANNED,
    RECOMPUTE,
    can_shard,
    make_instance,
    price,
)
from adaptis.search.islands import ISLANDS, POLISH, WARM, Incumbent, island, merge
from adaptis.search.moves import MOST_RESERVED
from adaptis.search.partition import even_cut
from adaptis.search.placement import DEALS, evened, starts
from adaptis.search.polish import Fixed, fix, make_trace, polish, retime
from adaptis.search.room import least_bytes, peak_bytes
from adaptis.simulate import simulate_plan
from adaptis.workload import even

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray

    from adaptis.bounds import Bounds
    from adaptis.cluster import Cluster
    from adaptis.plan import Plan
    from adaptis.profile import Profile
    from adaptis.search.instance import Instance
    from adaptis.timeline import Timeline
    from adaptis.workload import Workload

PROOF_A_ROW = 4e-5  # seconds that the final proof takes for each computation
# Device-micro-batches beyond which a search among orders, then writing out every baseline, takes
# seconds.
SEARCHED, LARGE = 1 << 8, 1 << 13
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


def search(
    profile: Profile,
    cluster: Cluster,
    num_microbatches: int,
    stop: Stop,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    *,
    decide: Collection[str] = PLANNED,
    shard_head: str = "never",
    workload: Workload | None = None,
) -> SearchResult:
    """The best plan that `stop` leaves time to find; never worse than a baseline that fits.

    `decide` names what may differ from a uniform 1F1B: without "partition" all cuts are even,
    without "placement" each device has one stage, without "schedule" backwards are whole and the
    order is that of one rule, without "recompute" everything is saved. `shard_head` says whether
    the last layer may be dealt out to all devices: "never", "auto" where that is faster, "always".
    `workload` gives the micro-batches' weights, in their order; without it they are equal.

    Raises:
        InfeasibleError: nothing that was tried fits the devices' memory.
        PlanError: there is no head to shard.
    """
    warm_up()
    began = time.perf_counter()
    if shard_head == "always" and not can_shard(profile, cluster):
        raise PlanError(
            f"{profile.model} has no head to shard: a last layer of kind 'head' and two devices "
            f"are needed, found {profile.layers[-1].kind!r} and {cluster.num_devices}; leave out "
            f"--shard-head always"
        )
    mode = shard_head if can_shard(profile, cluster) else "never"
    workload = workload or even(num_microbatches)
    bounds = lower_bounds(profile, cluster, workload, mode)
    spare = 0.0
    while True:
        hunt = _Hunt(profile, cluster, workload, frozenset(decide), mode, spare, seed, began)
        hunt.run(stop, bounds, progress)
        answer = hunt.result(bounds)
        pairs = zip(answer.timeline.peak_bytes, answer.memory_bytes, strict=True)
        over = max(peak - most for peak, most in pairs)
        if over <= 0:
            return answer
        # Sums were rounded differently there.
        spare += max(over, 1.0)


class _Hunt:
    """One search that keeps `spare` bytes of each device free."""

    def __init__(
        self,
        profile: Profile,
        cluster: Cluster,
        workload: Workload,
        decide: frozenset[str],
        shard_head: str,
        spare: float,
        seed: int,
        began: float,
    ) -> None:
        self.began = began
        self.profile, self.cluster, self.workload, self.seed = profile, cluster, workload, seed
        decide |= {"head"} if shard_head == "auto" else set()
        cuts = None if "partition" in decide else _even_cuts(profile)
        self.instance = make_instance(
            profile,
            cluster,
            workload.num_microbatches,
            spare,
            decide,
            cuts,
            workload.weights,
        )
        # Few plans need room for all values that may be posted: where it is scarce, keep none.
        for reserve in (MOST_RESERVED, 0):
            self.pool = _pool(self.instance, shard_head, reserve)
            if self.pool[0][0] < IMPOSSIBLE:
                break
        self.best = Incumbent(None, math.inf, self.pool[0][1], self.pool[0][0])
        whole = self.instance.decide[:RECOMPUTE].all() and shard_head != "always"
        self.named = _best_baseline(profile, cluster, self.instance) if whole else None
        if self.named is not None:
            self.best.fixed, self.best.cost = self.named
        if self.best.candidate_cost < min(self.best.cost, IMPOSSIBLE):
            self.best.fixed = fix(self.instance, self.best.candidate)
            self.best.cost = self.best.candidate_cost
        self.evaluated = 10 * len(self.pool) + len(BASELINES)
        self.history = [(self.seconds, self.best.cost)]

    @property
    def seconds(self) -> float:
        """Since the search began."""
        return time.perf_counter() - self.began

    def run(self, stop: Stop, bounds: Bounds, progress: Callable[[Progress], None] | None) -> None:
        """Let the islands work until `stop`."""
        best = self.best
        islands = [
            island(self.instance, best, self.pool, self.seed, number, self.named)
            for number in range(ISLANDS)
        ]
        with ThreadPoolExecutor(min(ISLANDS, os.cpu_count() or 1)) as threads:
            while True:
                seconds, gap = self.seconds, bounds.gap(best.cost)
                if progress is not None:
                    progress(Progress(seconds, self.evaluated, best.cost, bounds.value, gap))
                rest = PROOF_A_ROW * len(best.fixed.kind) if best.fixed is not None else 0.0
                late = seconds + rest >= stop.seconds
                if gap <= stop.gap or late or self.evaluated >= stop.evaluations:
                    return
                for found in threads.map(next, islands):
                    self.evaluated += found.evaluations
                    merge(best, found)
                if best.cost < self.history[-1][1]:
                    self.history.append((self.seconds, best.cost))

    def result(self, bounds: Bounds) -> SearchResult:
        """The typed answer: `simulate_plan` lowers it, proves it and simulates it again.

        Raises:
            InfeasibleError: there is none.
        """
        if self.best.fixed is None:
            raise _infeasible(self.instance, self.best.candidate)
        seconds = self.seconds
        plan = plan_of(self.best.fixed, self.instance.num_microbatches, self.profile, "adaptis")
        timeline = simulate_plan(plan, self.profile, self.cluster, self.workload)
        provenance = {
            "step_seconds": timeline.step,
            "lower_bound_seconds": bounds.value,
            "lower_bound": bounds.binding.name,
            "seed": self.seed,
            "evaluated": self.evaluated,
            "cluster": self.cluster.describe(),
        }
        return SearchResult(
            plan=replace(plan, provenance=provenance),
            timeline=timeline,
            lower_bound=bounds,
            gap=bounds.gap(timeline.step),
            evaluated=self.evaluated,
            seconds=seconds,
            seed=self.seed,
            history=tuple(self.history),
            memory_bytes=tuple(device.memory_bytes for device in self.cluster.devices),
        )


def _pool(instance: Instance, shard_head: str, reserve: int) -> list[tuple[float, Candidate]]:
    """Where islands begin, the best first; few that are sure to take part."""
    modes = {"never": (False,), "auto": (False, True), "always": (True,)}[shard_head]
    pools = [starts(instance, shard, reserve) for shard in modes]
    return sorted((pair for pool in pools for pair in pool), key=lambda pair: pair[0])


def _even_cuts(profile: Profile) -> NDArray[np.int64]:
    """Row k: where k + 1 stages end."""
    count = len(profile.units())
    table = np.zeros((count, count), dtype=np.int64)
    for k in range(count):
        table[k, : k + 1] = even_cut(profile, k + 1)
    return table


def warm_up() -> None:
    """Have everything compiled or read from the cache: half a minute, once on a machine."""
    from adaptis.profile import LayerCost, Profile

    layer = LayerCost("", "", 1.0, 1.0, 1.0, 2.0)
    instance = make_instance(Profile("", 1, (layer,) * 4), uniform(2), 2)
    _, candidate = starts(instance)[0]
    anneal(instance, candidate, candidate, 0, 0, 1, 1, *WARM, 4)
    evened(instance, candidate, 0, *DEALS[0])
    fixed = fix(instance, candidate)
    polish(instance, fixed, fixed, 0, 0, 1, 1, *POLISH)


def _best_baseline(
    profile: Profile, cluster: Cluster, instance: Instance
) -> tuple[Fixed, float] | None:
    """The fastest baseline that exists here and fits."""
    best = None
    size = cluster.num_devices * instance.num_microbatches
    names = set(QUICK if size > LARGE else BASELINES) - ({"v-search"} if size > SEARCHED else set())
    for make in [make for name, make in BASELINES.items() if name in names]:
        try:
            plan = make(profile, cluster, instance.num_microbatches)
        except PlanError:
            continue
        fixed = counted(plan)
        if fixed is None:
            continue
        cost = float(retime(instance, fixed, make_trace(len(fixed.kind))))
        if cost < IMPOSSIBLE and (best is None or cost < best[1]):
            best = fixed, cost
    return best


def _infeasible(instance: Instance, candidate: Candidate) -> InfeasibleError:
    """Name the tightest device of the candidate that misses least."""
    tables = price(instance, candidate.stop, candidate.device)
    needed = least_bytes(instance.heaviest, candidate.split, candidate.again, tables)
    if (needed <= instance.memory).all():
        candidate.knobs[RESERVE] = 0
        orders = list_schedule(instance, candidate, tables, math.inf)
        rows = orders.offsets, orders.kind, orders.stage
        needed = peak_bytes(instance.weights, candidate.split, candidate.again, rows, tables)
    device = int(np.argmax(needed - instance.memory))
    missing = math.ceil(needed[device] - instance.memory[device])
    return InfeasibleError(
        f"nothing fits: at best device {device} misses {missing / 2**30:.3f} GiB ({missing} bytes) "
        f"of {needed[device] / 2**30:.3f} GiB; use more devices, more memory or smaller "
        f"micro-batches",
        device,
        missing,
    )
