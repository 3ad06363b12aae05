"""Every schedule beside the plan, honestly: each at its best legal setting, in one simulator."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from adaptis.bounds import lower_bounds
from adaptis.check import check_memory
from adaptis.errors import InfeasibleError, InputError, PlanError
from adaptis.simulate import simulate_plan
from adaptis.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptis.cluster import Cluster
    from adaptis.plan import Plan
    from adaptis.profile import Profile
    from adaptis.timeline import Timeline


def compare_all(
    profile: Profile,
    cluster: Cluster,
    num_microbatches: int,
    *,
    search_seconds: float,
    seed: int,
    shard_head: str = "never",
    say: Callable[[str, dict[str, Any]], None] = lambda kind, data: None,
) -> dict[str, Any]:
    """The baselines in the order of their table, then `adaptis`, found with `shard_head`.

    A baseline that fits only with every stage recomputed is shown so. What does not apply comes
    with the reason.

    Raises:
        InfeasibleError: no plan fits the memory.
        PlanError: there is no head to shard.
    """
    from adaptis.search import BASELINES, Stop, fitted, search  # compiled code: not for `simulate`

    rows, refused = [], {}
    for name, make in BASELINES.items():
        try:
            found = fitted(make, profile, cluster, num_microbatches)
        except PlanError as error:
            refused[name] = str(error)
            continue
        rows.append(_row(name, found.plan, found.timeline, cluster))

    def progress(state: Any) -> None:
        values = {name: getattr(state, name) for name in ("best", "gap", "seconds")}
        say("planning", values | {"limit": search_seconds})

    stop = Stop(seconds=search_seconds)
    answer = search(profile, cluster, num_microbatches, stop, seed, progress, shard_head=shard_head)
    rows.append(_row("adaptis", answer.plan, answer.timeline, cluster))
    whole = lower_bounds(
        profile, cluster, num_microbatches
    )  # of the baselines, whose head is whole
    return {
        "lower_bound_seconds": min(answer.lower_bound.value, whole.value),
        "results": rows,
        "not_applicable": refused,
    }


def _row(name: str, plan: Plan, timeline: Timeline, cluster: Cluster) -> dict[str, Any]:
    return {
        "name": name,
        **figures(timeline),
        "recomputed": all(stage.recompute for stage in plan.stages),
        "fits": excess(timeline, cluster) is None,
    }


def simulation(
    plan: Plan, profile: Profile, cluster: Cluster
) -> tuple[Timeline, dict[str, Any], InfeasibleError | None]:
    """One plan: its timeline, its figures, and why it does not fit, where it does not."""
    workload = workload_of(plan)
    answer = simulate_plan(plan, profile, cluster, workload)
    mode = "always" if plan.head_reductions else "never"
    bound = lower_bounds(profile, cluster, workload, mode).value
    lacking = excess(answer, cluster)
    summary = answer.summary()
    result = figures(answer) | {
        "lower_bound_seconds": bound,
        "gap": max(answer.step / bound - 1, 0.0) if bound else 0.0,
        "bubble_seconds": summary["bubble_seconds"],
        "busy_seconds": summary["busy_seconds"],
        "fits": lacking is None,
    }
    if lacking:
        result |= {"error": str(lacking), "exit_status": lacking.exit_status}
    return answer, result, lacking


def workload_of(plan: Plan) -> Workload:
    """The micro-batches that `plan` was made for: of the profile's size, or as it notes.

    Raises:
        InputError: what it notes is no weight.
    """
    weight = plan.provenance.get("microbatch_weight", 1.0)
    if type(weight) not in (int, float) or not 0 < weight <= sys.float_info.max:
        raise InputError(
            f"the plan's provenance has the microbatch_weight {weight!r}; a finite number above 0 "
            f"is needed"
        )
    return Workload((float(weight),) * plan.num_microbatches)


def decisions(plan: Plan) -> dict[str, Any]:
    """What `plan` decides beside stages and order, for JSON."""
    return {
        "head_reductions": plan.head_reductions,
        "recomputed_stages": [s for s, stage in enumerate(plan.stages) if stage.recompute],
    }


def figures(timeline: Timeline) -> dict[str, Any]:
    """The keys that scripts rely on."""
    return {
        "step_seconds": timeline.step,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_bytes": list(timeline.peak_bytes),
    }


def excess(timeline: Timeline, cluster: Cluster) -> InfeasibleError | None:
    """Why a timeline does not fit: the device that misses most, and what it misses."""
    try:
        check_memory(timeline.peak_bytes, [device.memory_bytes for device in cluster.devices])
    except InfeasibleError as error:
        return error
    return None
