"""The verbs `plan` and `compare`: a profile becomes a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from adaptis.options import (
    ClusterFile,
    Devices,
    Json,
    Memory,
    Microbatches,
    ProfileFile,
    Seconds,
    Seed,
    ShardHead,
    emit,
    flags,
    next_command,
)

if TYPE_CHECKING:
    from adaptis.cluster import Cluster
    from adaptis.plan import Plan
    from adaptis.profile import Profile
    from adaptis.timeline import Timeline
PlanOutput = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write the plan.")]


def plan(
    file: ProfileFile,
    devices: Devices = None,
    microbatches: Microbatches = None,
    cluster_file: ClusterFile = None,
    memory_gib: Memory = None,
    seconds: Seconds = 10.0,
    seed: Seed = 0,
    shard_head: ShardHead = "auto",
    exact: Annotated[
        bool, typer.Option("--exact", help="Prove how good the plan of a small model is.")
    ] = False,
    output: PlanOutput = None,
    as_json: Json = False,
) -> None:
    """Find the fastest plan.

    Example: adaptis plan profile.json --devices 4 --microbatches 8 -o plan.json
    """
    from adaptis.console import draw_timeline, line
    from adaptis.jobs import above_zero, check_file, setting
    from adaptis.plan import save_plan

    found, cluster, count = setting(
        file, devices, microbatches, cluster_file, memory_gib, shard_head
    )
    above_zero("--seconds", seconds)
    check_file(output)
    answer = (_proven if exact else _searched)(found, cluster, count, seconds, seed)
    if output is not None:
        save_plan(answer.plan, output)
    if not emit(answer.result, as_json):
        line(f"{found.model} on {cluster.describe()}, {count} micro-batches")
        for text in answer.lines:
            line(text)
        draw_timeline(answer.timeline)
    machine = flags(cluster=cluster_file, memory_gib=memory_gib)
    if output is not None:
        next_command("simulate", file, output, *machine)
    else:
        given = flags(devices=devices, microbatches=microbatches)
        next_command("plan", file, *given, *machine, "-o", "plan.json")


class _Answer(NamedTuple):
    """A plan, and what is printed about it."""

    plan: Plan
    timeline: Timeline
    result: dict[str, Any]  # as --json prints it
    lines: list[str]


def _searched(
    profile: Profile, cluster: Cluster, num_microbatches: int, seconds: float, seed: int
) -> _Answer:
    """The best plan that the search finds."""
    from adaptis.comparison import figures
    from adaptis.console import Reporter
    from adaptis.search import Stop, search

    with Reporter(plans=True) as reporter:

        def progress(state: Any) -> None:
            values = {name: getattr(state, name) for name in ("best", "gap", "seconds")}
            reporter.say("planning", values | {"limit": seconds})

        stop = Stop(seconds=seconds)
        answer = search(profile, cluster, num_microbatches, stop, seed=seed, progress=progress)
    result = figures(answer.timeline) | {
        "lower_bound_seconds": answer.lower_bound.value,
        "gap": answer.gap,
        "search_seconds": answer.seconds,
        "evaluated": answer.evaluated,
    }
    return _Answer(answer.plan, answer.timeline, result, answer.explain())


def _proven(
    profile: Profile, cluster: Cluster, num_microbatches: int, seconds: float, seed: int
) -> _Answer:
    """The best plan of all, or one that is proven to be near it."""
    from adaptis.bounds import lower_bounds
    from adaptis.comparison import figures
    from adaptis.search.exact import exact_plan
    from adaptis.search.explain import explain
    from adaptis.simulate import simulate_plan

    answer = exact_plan(profile, cluster, num_microbatches, seconds, seed=seed)
    timeline = simulate_plan(answer.plan, profile, cluster)
    result = figures(timeline) | {
        "lower_bound_seconds": answer.bound_seconds,
        "gap": answer.gap,
        "search_seconds": answer.seconds,
        "optimal": answer.optimal,
    }
    bounds = lower_bounds(profile, cluster, num_microbatches)
    memory = [device.memory_bytes for device in cluster.devices]
    lines = explain(answer.plan, timeline, bounds, memory)
    return _Answer(answer.plan, timeline, result, [*lines, answer.verdict])


def compare(
    file: ProfileFile,
    devices: Devices = None,
    microbatches: Microbatches = None,
    cluster_file: ClusterFile = None,
    memory_gib: Memory = None,
    seconds: Seconds = 10.0,
    seed: Seed = 0,
    shard_head: ShardHead = "auto",
    as_json: Json = False,
) -> None:
    """Every schedule beside the plan, with the lower bound.

    Example: adaptis compare profile.json --devices 4 --microbatches 8
    """
    from adaptis.comparison import compare_all
    from adaptis.console import Reporter, show_comparison
    from adaptis.jobs import above_zero, setting

    found, cluster, count = setting(
        file, devices, microbatches, cluster_file, memory_gib, shard_head
    )
    above_zero("--seconds", seconds)
    with Reporter(plans=True) as reporter:
        result = compare_all(
            found, cluster, count, search_seconds=seconds, seed=seed, say=reporter.say
        )
    if not emit(result, as_json):
        show_comparison(result, f"{found.model} on {cluster.describe()}, {count} micro-batches")
    given = flags(
        devices=devices, microbatches=microbatches, cluster=cluster_file, memory_gib=memory_gib
    )
    next_command("plan", file, *given, "-o", "plan.json")
