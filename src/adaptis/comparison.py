"""Every schedule beside the plan, honestly: each at its best legal setting, in one simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptis.bounds import lower_bounds
from adaptis.check import check_memory
from adaptis.errors import InfeasibleError, PlanError
from adaptis.simulate import simulate_plan

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
    say: Callable[[str, dict[str, Any]], None] = lambda kind, data: None,
) -> dict[str, Any]:
    """The baselines in the order of their table, then `adaptis`.

    What does not apply, with the reason.

    Raises:
        InfeasibleError: no plan fits the memory.
    """
    from adaptis.search import BASELINES, Stop, search  # compiled code: not for `simulate`

    rows, refused = [], {}
    for name, make in BASELINES.items():
        try:
            timeline = simulate_plan(make(profile, cluster, num_microbatches), profile, cluster)
        except PlanError as error:
            refused[name] = str(error)
            continue
        rows.append(_row(name, timeline, cluster))

    def progress(state: Any) -> None:
        values = {name: getattr(state, name) for name in ("best", "gap", "seconds")}
        say("planning", values | {"limit": search_seconds})

    stop = Stop(seconds=search_seconds)
    answer = search(profile, cluster, num_microbatches, stop, seed=seed, progress=progress)
    rows.append(_row("adaptis", answer.timeline, cluster))
    return {
        "lower_bound_seconds": lower_bounds(profile, cluster, num_microbatches).value,
        "results": rows,
        "not_applicable": refused,
    }


def _row(name: str, timeline: Timeline, cluster: Cluster) -> dict[str, Any]:
    return {"name": name, **figures(timeline), "fits": excess(timeline, cluster) is None}


def simulation(
    plan: Plan, profile: Profile, cluster: Cluster
) -> tuple[Timeline, dict[str, Any], InfeasibleError | None]:
    """One plan: its timeline, its figures, and why it does not fit, where it does not."""
    answer = simulate_plan(plan, profile, cluster)
    bound = lower_bounds(profile, cluster, plan.num_microbatches).value
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
