"""Every schedule beside the plan, honestly: each at its best legal setting, in one simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptis.errors import InfeasibleError, PlanError
from adaptis.search import BASELINES, Stop, lower_bounds, search
from adaptis.simulate import simulate_plan

if TYPE_CHECKING:
    from adaptis.cluster import Cluster
    from adaptis.profile import Profile
    from adaptis.timeline import Timeline


def compare_all(
    profile: Profile, cluster: Cluster, num_microbatches: int, *, search_seconds: float, seed: int
) -> dict[str, Any]:
    """The baselines in the order of their table, then `adaptis`.

    What does not apply, with the reason.
    """
    rows, refused = [], {}
    for name, make in BASELINES.items():
        try:
            timeline = simulate_plan(make(profile, cluster, num_microbatches), profile, cluster)
        except PlanError as error:
            refused[name] = str(error)
            continue
        rows.append(_row(name, timeline, cluster))
    answer = search(profile, cluster, num_microbatches, Stop(seconds=search_seconds), seed=seed)
    rows.append(_row("adaptis", answer.timeline, cluster))
    return {
        "lower_bound_seconds": lower_bounds(profile, cluster, num_microbatches).value,
        "results": rows,
        "not_applicable": refused,
    }


def _row(name: str, timeline: Timeline, cluster: Cluster) -> dict[str, Any]:
    return {
        "name": name,
        "step_seconds": timeline.step,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_bytes": list(timeline.peak_bytes),
        "fits": not _lacking(timeline, cluster),
    }


def _lacking(timeline: Timeline, cluster: Cluster) -> list[tuple[float, int]]:
    """(bytes missing, device) for each device whose memory does not suffice, worst first."""
    pairs = zip(timeline.peak_bytes, cluster.devices, strict=True)
    missing = [(peak - device.memory_bytes, d) for d, (peak, device) in enumerate(pairs)]
    return sorted((item for item in missing if item[0] > 0), reverse=True)


def within_memory(timeline: Timeline, cluster: Cluster) -> None:
    """Refuse a timeline that does not fit.

    Raises:
        InfeasibleError: naming the tightest device and what it misses.
    """
    lacking = _lacking(timeline, cluster)
    if lacking:
        missing, device = lacking[0]
        raise InfeasibleError(
            f"device {device} would need {timeline.peak_bytes[device] / 2**30:.3f} GiB at its "
            f"peak, "
            f"{missing / 2**30:.3f} GiB more than it has; plan with --memory-gib",
            device,
            int(missing),
        )
