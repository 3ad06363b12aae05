"""The verbs `plan`, `compare` and `ablation`: a profile becomes a plan."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from adaptis.errors import InputError
from adaptis.options import (
    ClusterFile,
    Counts,
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
    from adaptis.search import SearchResult
    from adaptis.timeline import Timeline
PlanOutput = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write the plan.")]


def plan(
    file: ProfileFile,
    devices: Devices = None,
    microbatches: Counts = None,
    cluster_file: ClusterFile = None,
    memory_gib: Memory = None,
    seconds: Seconds = 10.0,
    seed: Seed = 0,
    shard_head: ShardHead = "never",
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
    from adaptis.jobs import above_zero, check_file, check_shard_head, microbatch_counts, setting
    from adaptis.plan import save_plan

    counts = microbatch_counts(microbatches)
    most = counts[-1] if counts else None
    found, cluster, count = setting(file, devices, most, cluster_file, memory_gib)
    above_zero("--seconds", seconds)
    check_shard_head(shard_head)
    check_file(output)
    if exact:
        _refuse_with_exact(microbatches, shard_head)
        answer = _proven(found, cluster, count, seconds, seed)
    elif "-" in (microbatches or ""):
        answer = _searched(found, cluster, counts, seconds, seed, shard_head)
    else:
        answer = _searched(found, cluster, count, seconds, seed, shard_head)
    if output is not None:
        save_plan(answer.plan, output)
    if not emit(answer.result, as_json):
        count = answer.plan.num_microbatches
        line(f"{found.model} on {cluster.describe()}, {count} micro-batches")
        for text in answer.lines:
            line(text)
        draw_timeline(answer.timeline)
    machine = flags(cluster=cluster_file, memory_gib=memory_gib)
    if output is not None:
        next_command("simulate", file, output, *machine)
    else:
        given = flags(devices=devices, microbatches=microbatches)
        sharded = flags(shard_head=shard_head if shard_head != "never" else None)
        next_command("plan", file, *given, *machine, *sharded, "-o", "plan.json")


def _refuse_with_exact(microbatches: str | None, shard_head: str) -> None:
    if "-" in (microbatches or ""):
        raise InputError(
            f"--microbatches {microbatches}: a proof is for one number of micro-batches; give one, "
            f"or leave --exact out"
        )
    if shard_head != "never":
        raise InputError(
            f"--shard-head {shard_head}: plans with a sharded head cannot be proven; leave it or "
            f"--exact out"
        )


class _Answer(NamedTuple):
    """A plan, and what is printed about it."""

    plan: Plan
    timeline: Timeline
    result: dict[str, Any]  # as --json prints it
    lines: list[str]


def _searched(
    profile: Profile,
    cluster: Cluster,
    microbatches: int | list[int],
    seconds: float,
    seed: int,
    shard_head: str,
) -> _Answer:
    """The best plan that the search finds, for one number of micro-batches or among several."""
    from adaptis.comparison import decisions, figures
    from adaptis.console import Reporter
    from adaptis.search import Stop, search, search_counts

    with Reporter(plans=True) as reporter:

        def progress(state: Any) -> None:
            values = {name: getattr(state, name) for name in ("best", "gap", "seconds")}
            reporter.say("planning", values | {"limit": seconds})

        given = (Stop(seconds=seconds), seed, progress)
        if isinstance(microbatches, int):
            reached = {}
            answer = search(profile, cluster, microbatches, *given, shard_head=shard_head)
        else:
            answer, reached = search_counts(
                profile, cluster, microbatches, *given, shard_head=shard_head
            )
    result = figures(answer.timeline) | {
        "lower_bound_seconds": answer.lower_bound.value,
        "gap": answer.gap,
        "search_seconds": answer.seconds,
        "evaluated": answer.evaluated,
        **decisions(answer.plan),
        **_counts(answer, reached),
    }
    lines = [*_count_lines(reached), *answer.explain()]
    return _Answer(answer.plan, answer.timeline, result, lines)


def _counts(answer: SearchResult, reached: dict[int, float]) -> dict[str, Any]:
    """What a range of micro-batches adds to --json; a step is null where nothing fits."""
    if not reached:
        return {}
    rows = [
        {
            "num_microbatches": count,
            "microbatch_weight": max(reached) / count,
            "step_seconds": step if step < math.inf else None,
        }
        for count, step in reached.items()
    ]
    return {"num_microbatches": answer.plan.num_microbatches, "counts": rows}


def _count_lines(reached: dict[int, float]) -> list[str]:
    from adaptis.console import seconds

    return [
        f"{count} micro-batches of {max(reached) / count:.3g} times the profile's size: "
        f"{f'step {seconds(step)}' if step < math.inf else 'nothing fits'}"
        for count, step in reached.items()
    ]


def _proven(
    profile: Profile, cluster: Cluster, num_microbatches: int, seconds: float, seed: int
) -> _Answer:
    """The best plan of all, or one that is proven to be near it."""
    from adaptis.bounds import lower_bounds
    from adaptis.comparison import decisions, figures
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
        **decisions(answer.plan),
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
    shard_head: ShardHead = "never",
    as_json: Json = False,
) -> None:
    """Every schedule beside the plan, with the lower bound.

    Example: adaptis compare profile.json --devices 4 --microbatches 8
    """
    from adaptis.comparison import compare_all
    from adaptis.console import Reporter, line, show_comparison
    from adaptis.jobs import above_zero, check_shard_head, setting

    found, cluster, count = setting(file, devices, microbatches, cluster_file, memory_gib)
    above_zero("--seconds", seconds)
    check_shard_head(shard_head)
    with Reporter(plans=True) as reporter:
        result = compare_all(
            found,
            cluster,
            count,
            search_seconds=seconds,
            seed=seed,
            shard_head=shard_head,
            say=reporter.say,
        )
    if not emit(result, as_json):
        rows = [row | {"name": _named(row)} for row in result["results"]]
        assumed = f"{found.model} on {cluster.describe()}, {count} micro-batches"
        show_comparison(result | {"results": rows}, assumed)
        if any(row["recomputed"] for row in rows):
            line("* with every stage recomputed")
    given = flags(
        devices=devices,
        microbatches=microbatches,
        cluster=cluster_file,
        memory_gib=memory_gib,
        shard_head=shard_head if shard_head != "never" else None,
    )
    next_command("plan", file, *given, "-o", "plan.json")


def _named(row: dict[str, Any]) -> str:
    return f"{row['name']} *" if row["recomputed"] else row["name"]


def ablation(
    file: ProfileFile,
    devices: Devices = None,
    microbatches: Microbatches = None,
    cluster_file: ClusterFile = None,
    memory_gib: Memory = None,
    seconds: Annotated[float, typer.Option(help="How long each of 8 to 10 searches takes.")] = 3.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What each decision of the planner gains.

    Example: adaptis ablation profile.json --devices 4 --microbatches 8
    """
    from adaptis.console import Reporter, line
    from adaptis.jobs import above_zero, setting
    from adaptis.search import Stop
    from adaptis.search.ablation import ablation as search_each

    found, cluster, count = setting(file, devices, microbatches, cluster_file, memory_gib)
    above_zero("--seconds", seconds)
    with Reporter(plans=True) as reporter:

        def say(done: int, total: int) -> None:
            reporter.update("searching", done, total)

        result = search_each(found, cluster, count, Stop(seconds=seconds), seed, say)
    if not emit(result.to_json(), as_json):
        line(f"{found.model} on {cluster.describe()}, {count} micro-batches")
        for text in result.lines():
            line(text)
    given = flags(
        devices=devices, microbatches=microbatches, cluster=cluster_file, memory_gib=memory_gib
    )
    next_command("plan", file, *given, "-o", "plan.json")
