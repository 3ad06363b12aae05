"""The proven optimum of small planning problems: what the search is measured against.

`exact_order` finds the best order for given stages; `exact_plan` also cuts the model and places the
stages. The latter starts from the search's plan, lists every deal of stages to devices that could
still be faster, and has the constraint solver refute or improve on each, in rounds of growing
patience. Every plan that is found is simulated; a bound is in seconds of the simulator.

Known limit: what the backward of a stage runs (B, or I and W) is the same for all micro-batches.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from adaptis.bounds import lower_bounds
from adaptis.errors import InfeasibleError, InputError, PlanError
from adaptis.plan import Plan
from adaptis.program import Op, parts
from adaptis.search import tune
from adaptis.search.exact_order import FUSED, SPLIT, make_problem, solve, solver_module
from adaptis.search.exact_stages import Deal, deals_below, make_costs, warm_up
from adaptis.simulate import simulate_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptis.cluster import Cluster
    from adaptis.profile import Profile
    from adaptis.program import Work

MOST_LAYERS, MOST_DEVICES, MOST_MICROBATCHES = 16, 6, 16
FINEST = 1e-6  # of the step: the tick where no coarser one makes all seconds whole
TOLERANCE = 5e-4  # share of the step that rounding to such ticks may hide
SEARCH_SHARE, SEARCH_SECONDS = 0.2, 3.0  # of the time goes to the search, and no more than that
PATIENCE = (1.0, 5.0, 25.0)  # seconds for one deal, round by round


@dataclass(frozen=True, eq=False, slots=True)
class Exact:
    """A plan, and what no plan can beat."""

    plan: Plan
    step_seconds: float  # simulated
    bound_seconds: float  # proven
    seconds: float  # that it took
    deals: int  # ways to cut and place that the solver was asked about
    most_stages: int  # that a plan might have

    @property
    def gap(self) -> float:
        """How far the plan may be above the optimum, as a share of the bound."""
        return max(self.step_seconds / self.bound_seconds - 1, 0.0) if self.bound_seconds else 0.0

    @property
    def optimal(self) -> bool:
        """Whether no plan is faster by more than rounding to ticks can hide."""
        return self.gap <= 2 * TOLERANCE

    @property
    def verdict(self) -> str:
        """One sentence for the reader."""
        among = f"among all plans of at most {self.most_stages} stages"
        if self.optimal:
            return f"proven optimal {among}"
        return (
            f"proven within {self.gap:.2%} of the optimum {among}; more seconds bring them closer"
        )


class _Best:
    """The best plan so far, and how finely time is measured."""

    def __init__(self, profile: Profile, cluster: Cluster, num_microbatches: int) -> None:
        self.profile, self.cluster, self.num_microbatches = profile, cluster, num_microbatches
        self.plan: Plan | None = None
        self.lock = Lock()
        self.step = _one_after_the_other(profile, cluster, num_microbatches)
        self.tick, self.whole = _tick(profile, cluster, self.step)

    def offer(self, plan: Plan) -> bool:
        """Take `plan` if it fits and is faster; whether it fits."""
        timeline = simulate_plan(plan, self.profile, self.cluster)
        limits = (device.memory_bytes for device in self.cluster.devices)
        if any(peak > most for peak, most in zip(timeline.peak_bytes, limits, strict=True)):
            return False
        with self.lock:
            if self.plan is None or timeline.step < self.step:
                self.plan, self.step = plan, timeline.step
                if not self.whole:
                    self.tick = FINEST * self.step
        return True

    @property
    def target(self) -> float:
        """Seconds that a plan must not exceed to count as better."""
        return self.step - self.tick / 2 if self.whole else self.step * (1 - TOLERANCE)

    def proven(self, open_bound: float) -> float:
        """The bound once nothing is left below `open_bound` seconds."""
        closed = self.step if self.whole else self.target
        return min(closed, open_bound)


def exact_order(
    plan: Plan, profile: Profile, cluster: Cluster, seconds: float = 60.0, workers: int = 2
) -> Exact:
    """The best order of `plan`'s computations: its stages and their B, or I and W, stay.

    Raises:
        PlanError: the plan makes decisions that this does not.
        InputError: it is too large.
        InfeasibleError: no order fits the memory.
    """
    began = time.perf_counter()
    backward = _backward(plan)
    _small(profile, cluster, plan.num_microbatches, most_layers=profile.num_layers)
    best = _Best(profile, cluster, plan.num_microbatches)
    best.offer(plan)
    rest = _refine(best, [Deal(0.0, plan.stages)], began, seconds, workers, backward)
    bound = min((deal.bound for deal in rest), default=math.inf)
    return _answer(best, bound, began, 1, len(plan.stages))


def exact_plan(
    profile: Profile,
    cluster: Cluster,
    num_microbatches: int,
    seconds: float = 60.0,
    *,
    most_stages: int | None = None,
    seed: int = 0,
    workers: int = 2,
    start: Plan | None = None,
) -> Exact:
    """The best plan of at most `most_stages` stages (default: three a device).

    It begins with the plan `start`, or with one that the search finds.

    Raises:
        InputError: the problem is too large.
        InfeasibleError: no plan fits the memory.
    """
    _small(profile, cluster, num_microbatches, MOST_LAYERS)
    warm_up()
    tune.warm_up()
    began = time.perf_counter()
    best = _Best(profile, cluster, num_microbatches)
    if start is None:
        start = _searched(profile, cluster, num_microbatches, seconds, seed)
    if start is not None:
        best.offer(start)
    most = min(profile.num_layers, most_stages or 3 * cluster.num_devices)
    costs = make_costs(profile, cluster, num_microbatches, most)
    lower = lower_bounds(profile, cluster, num_microbatches).value
    deals, reached = deals_below(costs, best.target, lower)
    missing = math.inf if reached >= best.target else reached
    rest = _refine(best, deals, began, seconds, workers)
    bound = min((deal.bound for deal in rest), default=math.inf)
    return _answer(best, max(min(bound, missing), lower), began, len(deals), most)


def _small(profile: Profile, cluster: Cluster, num_microbatches: int, most_layers: int) -> None:
    """Refuse what cannot be proven, or not in this model of the simulator."""
    solver_module()
    sizes = (
        (profile.num_layers, most_layers, "layers"),
        (cluster.num_devices, MOST_DEVICES, "devices"),
        (num_microbatches, MOST_MICROBATCHES, "micro-batches"),
    )
    for number, most, name in sizes:
        if number > most:
            raise InputError(
                f"{number} {name} are too many for a proof: it takes at most {most_layers} layers, "
                f"{MOST_DEVICES} devices and {MOST_MICROBATCHES} micro-batches"
            )
    if not cluster.overlap:
        raise InputError(
            "the cluster does not compute while it transfers ('overlap' is false), which the proof "
            "cannot express; leave --exact out"
        )


def _backward(plan: Plan) -> tuple[str, ...]:
    """What the backward of each stage of `plan` runs.

    Raises:
        PlanError: the plan makes decisions of other kinds; which.
    """
    stages, works = plan.stages, [work for order in plan.programs for work in order]
    found = {
        "recomputation": any(stage.recompute for stage in stages),
        "offloaded activations": any(stage.offload for stage in stages),
        "sharded parameters": any(stage.sharded for stage in stages),
        "fused pairs": any(len(parts(work)) > 1 for work in works),
        "slices": bool(plan.previous),
        "copies of the model": plan.copies > 1,
        "replicas": plan.replicas > 1,
        "a sharded head": plan.head_reductions > 0,
        "clipped gradients": plan.clipped,
    }
    names = [name for name, there in found.items() if there]
    split = {c.stage for work in works for c in parts(work) if c.op is Op.BACKWARD_WEIGHT}
    whole = {c.stage for work in works for c in parts(work) if c.op is Op.BACKWARD}
    if split & whole:
        names.append(f"B as well as I and W on stage {min(split & whole)}")
    if names:
        raise PlanError(f"the plan has {', '.join(names)}, which the proof cannot express")
    return tuple(SPLIT if s in split else FUSED for s in range(len(stages)))


def _searched(
    profile: Profile, cluster: Cluster, num_microbatches: int, seconds: float, seed: int
) -> Plan | None:
    """The plan of a short search, if it finds one."""
    stop = tune.Stop(seconds=min(SEARCH_SHARE * seconds, SEARCH_SECONDS))
    try:
        return tune.search(profile, cluster, num_microbatches, stop, seed=seed).plan
    except InfeasibleError:
        return None


def _refine(
    best: _Best,
    deals: list[Deal],
    began: float,
    seconds: float,
    workers: int,
    backward: Sequence[str] | None = None,
) -> list[Deal]:
    """Improve on `best` with orders of `deals`; returns those that may still be better."""

    def attempt(deal: Deal, patience: float, threads: int) -> Deal:
        left = seconds - (time.perf_counter() - began)
        if left <= 0 or deal.bound > best.target:
            return deal
        return deal._replace(bound=_try(best, deal, min(patience, left), threads, backward))

    for patience in (*PATIENCE, math.inf):
        # The solver makes little of a second thread: rather two deals at a time.
        threads = max(1, workers // max(len(deals), 1))
        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(partial(attempt, patience=patience, threads=threads), deals))
        deals = [deal for deal in done if deal.bound <= best.target]
    return deals


def _try(
    best: _Best, deal: Deal, seconds: float, threads: int, backward: Sequence[str] | None
) -> float:
    """Look for an order of `deal` that is better; returns the seconds that it takes at least."""
    tick = best.tick
    problem = make_problem(
        deal.stages, best.profile, best.cluster, best.num_microbatches, tick, backward
    )
    least, most = math.floor(deal.bound / tick - 1e-6), math.floor(best.target / tick + 1e-6)
    solved = solve(problem, least, most, seconds, threads)
    if solved.orders is not None and not best.offer(_plan(best, deal, solved.orders)):
        least = max(least, math.ceil(solved.bound))
        solved = solve(problem, least, most, seconds, threads, posted=True)
        if solved.orders is not None:
            best.offer(_plan(best, deal, solved.orders))
    return max(deal.bound, solved.bound * tick)


def _plan(best: _Best, deal: Deal, orders: tuple[tuple[Work, ...], ...]) -> Plan:
    return Plan(
        num_microbatches=best.num_microbatches,
        stages=deal.stages,
        programs=orders,
        schedule="exact",
        model=best.profile.model,
        fingerprint=best.profile.fingerprint,
    )


def _answer(best: _Best, open_bound: float, began: float, deals: int, most: int) -> Exact:
    """The typed answer; `open_bound` is what anything not yet refuted takes at least."""
    if best.plan is None:
        known = "it is proven that" if math.isinf(open_bound) else "in the time that was given"
        raise InfeasibleError(
            f"{known} nothing fits; use more devices, more memory or smaller micro-batches"
        )
    bound = best.proven(open_bound)
    provenance = {
        "step_seconds": best.step,
        "proven_seconds": bound,
        "cluster": best.cluster.describe(),
    }
    return Exact(
        plan=replace(best.plan, provenance=provenance),
        step_seconds=best.step,
        bound_seconds=bound,
        seconds=time.perf_counter() - began,
        deals=deals,
        most_stages=most,
    )


def _seconds(profile: Profile, cluster: Cluster) -> Iterator[float]:
    """Every duration of which those of a plan are sums, but for a choice of devices."""
    extra = profile.overheads
    links = (cluster.within_node, cluster.between_nodes)
    for device in {device.speed for device in cluster.devices}:
        for layer in profile.layers:
            for name in ("forward", "backward", "backward_input", "backward_weight", "update"):
                yield getattr(layer, name) / device
        for name in ("forward", "backward", "backward_input", "backward_weight"):
            yield getattr(extra, name) / device
    yield from (extra.send, extra.receive)
    yield from (shared.seconds for shared in profile.shared)
    for link in links:
        yield link.latency
        yield from (layer.output_bytes / link.bandwidth for layer in profile.layers)
        yield from (shared.bytes / link.bandwidth for shared in profile.shared)


def _one_after_the_other(profile: Profile, cluster: Cluster, num_microbatches: int) -> float:
    """More seconds than any plan takes whose devices idle only while something else goes on."""
    slowest = 1 / min(device.speed for device in cluster.devices)
    extra, links = profile.overheads, (cluster.within_node, cluster.between_nodes)
    each = extra.forward + extra.backward + extra.backward_input + extra.backward_weight
    total = 0.0
    for layer in profile.layers:
        work = layer.forward + layer.backward + layer.backward_input + layer.backward_weight
        hop = max(link.seconds(layer.output_bytes) for link in links) + extra.send + extra.receive
        total += num_microbatches * (slowest * (work + each) + 2 * hop) + slowest * layer.update
    summing = sum(shared.seconds for shared in profile.shared)
    return total + summing + sum(2 * x.seconds(s.bytes) for s in profile.shared for x in links)


def _tick(profile: Profile, cluster: Cluster, step: float) -> tuple[float, bool]:
    """The longest tick of which all seconds are multiples, or a fine one; and which it is."""
    finest = 10.0 ** math.ceil(math.log10(step * FINEST)) if step > 0 else 1.0
    counts = [seconds / finest for seconds in _seconds(profile, cluster)]
    if all(abs(count - round(count)) < 1e-6 for count in counts):
        return finest * math.gcd(*map(round, counts)), True
    return FINEST * step, False
