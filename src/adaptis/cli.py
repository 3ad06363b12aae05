"""The command line: each verb reads and writes files, and says what to do next.

Results go to stdout (with `--json` as one JSON object), progress and messages to stderr. Exit
status: 0 done, 1 a clear "no", 2 bad input. One micro-batch's way from here to a gradient is told
in `docs/design/walkthrough.md`.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptis.errors import Error, InputError

if TYPE_CHECKING:
    from adaptis.cluster import Cluster
    from adaptis.profile import Profile
    from adaptis.timeline import Timeline

app = typer.Typer(
    name="adaptis",
    help="Adaptive pipeline parallelism: measure a model, plan its pipeline, train it, look at it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
ProfileFile = Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile file.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")]
Devices = Annotated[int | None, typer.Option(help="How many devices; default: the profile's hint.")]
Microbatches = Annotated[
    int | None, typer.Option(help="Micro-batches per step; default: the profile's hint.")
]
ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", help="A cluster file: devices and links.")
]
Memory = Annotated[float | None, typer.Option("--memory-gib", help="Memory of each device, GiB.")]
Seconds = Annotated[float, typer.Option(help="How long to search.")]
Seed = Annotated[int, typer.Option(help="Of the search.")]
ShardHead = Annotated[str, typer.Option(help="Shard the vocabulary head: auto, never or always.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of a failure.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    global _debug  # noqa: PLW0603 - set once, before the verb runs
    _debug = debug
    if version:
        from adaptis import __version__

        typer.echo(__version__)
        raise typer.Exit


def _emit(value: dict[str, Any], as_json: bool) -> bool:
    """Print `value` if JSON was asked for; whether it was."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
    return as_json


def _next(text: str) -> None:
    from adaptis.console import err

    err.print(f"next: {text}", soft_wrap=True, markup=False)


def _setting(
    path: Path,
    devices: int | None,
    microbatches: int | None,
    cluster_file: Path | None,
    memory_gib: float | None,
    shard_head: str = "auto",
) -> tuple[Profile, Cluster, int]:
    """What most verbs start from: a profile, a cluster, a number of micro-batches."""
    from adaptis.cluster import load_cluster, uniform
    from adaptis.profile import load_profile
    from adaptis.workload import even

    if shard_head not in ("auto", "never", "always"):
        raise InputError(f"--shard-head {shard_head}: auto, never or always is needed")
    if shard_head == "always":
        raise InputError(
            "--shard-head always: this version cannot shard the head yet; use auto or never"
        )
    profile = load_profile(path)
    cluster = load_cluster(cluster_file) if cluster_file else None
    if cluster and devices not in (None, cluster.num_devices):
        raise InputError(
            f"--devices {devices}, but {cluster_file} describes {cluster.num_devices}; leave one "
            f"of the two out"
        )
    if cluster is None:
        count = devices if devices is not None else profile.devices
        if count is None:
            raise InputError(f"{path} has no hint for the number of devices; give --devices")
        cluster = uniform(count)
    if memory_gib is not None:
        if not memory_gib > 0:
            raise InputError(f"--memory-gib {memory_gib:g}: a number above 0 is needed")
        limited = tuple(replace(d, memory_bytes=memory_gib * 2**30) for d in cluster.devices)
        cluster = replace(cluster, devices=limited)
    if cluster.num_devices > profile.num_layers:
        raise InputError(
            f"{cluster.num_devices} devices for {profile.num_layers} layers: each device needs a "
            f"layer; "
            f"use at most {profile.num_layers} devices"
        )
    count = microbatches if microbatches is not None else profile.microbatches
    if count is None:
        raise InputError(f"{path} has no hint for the number of micro-batches; give --microbatches")
    return profile, cluster, even(count).num_microbatches


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the results.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each contestant.")] = 16,
    seconds: Seconds = 4.0,
    seed: Seed = 0,
    only: Annotated[str | None, typer.Option(help="Only this one of the two presets.")] = None,
    as_json: Json = False,
) -> None:
    """Train two real models under a plan found here, against the usual schedules.

    Example: adaptis demo
    """
    from adaptis import demo as main_job
    from adaptis.console import Reporter, err, out, table

    if steps < 4:
        raise InputError(f"--steps {steps}: at least 4 are needed, the first two are not timed")
    if only not in (None, *main_job.PRESETS):
        raise InputError(f"--only {only}: one of {', '.join(main_job.PRESETS)} is needed")
    folder = folder or Path("adaptis-runs", time.strftime("demo-%Y%m%d-%H%M%S"))
    settings = main_job.Settings(steps=steps, search_seconds=seconds, seed=seed)
    outcomes = []
    for preset in [only] if only else main_job.PRESETS:
        err.print(
            f"[bold]{preset}[/bold]: {main_job.DEVICES} processes of 1 thread, "
            f"{settings.microbatches} micro-batches"
        )
        with Reporter("  ") as reporter:
            outcomes.append(main_job.run_model(preset, settings, reporter.say))
        if not as_json:
            table(outcomes[-1].profile.model, main_job.COLUMNS, main_job.rows(outcomes[-1]))
            out.print(main_job.verdict(outcomes[-1]), soft_wrap=True)
    summary = main_job.write_outputs(outcomes, folder)
    if not _emit(summary | {"folder": str(folder)}, as_json):
        out.print(f"\nAll results are in [bold]{folder}[/bold]:", soft_wrap=True)
        out.print(
            f"  {folder}/report.html   open it in a browser: predicted and measured, side by side",
            soft_wrap=True,
        )
        out.print(
            f"  {folder}/{outcomes[0].preset}/before-and-after.svg   the picture", soft_wrap=True
        )
        out.print(
            f"  {folder}/trace.json    for ui.perfetto.dev or chrome://tracing", soft_wrap=True
        )
    _next(f"adaptis compare {folder}/{outcomes[0].preset}/profile.json --devices 4")


@app.command()
def profile(
    model: Annotated[
        str, typer.Argument(help="A preset, a preset's TOML file, or a Hugging Face config.json.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where to write the profile.")
    ] = Path("profile.json"),
    devices: Annotated[
        int, typer.Option(help="Processes that measure at once, as they will train.")
    ] = 2,
    microbatches: Annotated[int, typer.Option(help="A hint that goes into the profile.")] = 8,
    rounds: Annotated[int, typer.Option(help="How often each layer is timed.")] = 9,
    sequence: Annotated[
        int | None, typer.Option(help="Tokens per sequence; default: the preset's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences per micro-batch; default: the preset's.")
    ] = None,
    analytic: Annotated[
        str | None, typer.Option(help="Compute instead, for this accelerator (e.g. h100).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure each layer of a model here, or compute it.

    Example: adaptis profile demo-hybrid -o profile.json
    """
    from adaptis.cluster import cluster_to_json
    from adaptis.files import write_json
    from adaptis.jobs import compute_profile, measure_profile
    from adaptis.profile import profile_to_json

    for name, value in {"devices": devices, "microbatches": microbatches, "rounds": rounds}.items():
        if value < 1:
            raise InputError(f"--{name} {value}: at least 1 is needed")
    if analytic is not None:
        found = compute_profile(model, analytic, sequence, batch_size)
        cluster = None
    else:
        from adaptis.console import Reporter

        with Reporter() as reporter:
            found, cluster = measure_profile(
                model, devices, microbatches, rounds, sequence, batch_size, reporter.say
            )
    value = profile_to_json(found)
    write_json(output, value)
    extra = ""
    if cluster is not None and devices > 1:
        beside = output.with_name(f"{output.stem}.cluster.json")
        write_json(beside, cluster_to_json(cluster))
        extra = f" --cluster {beside}"
    if not _emit(value, as_json):
        from adaptis.console import show_profile

        show_profile(found)
    _next(f"adaptis plan {output}{extra} -o plan.json")


@app.command()
def plan(
    file: ProfileFile,
    devices: Devices = None,
    microbatches: Microbatches = None,
    cluster_file: ClusterFile = None,
    memory_gib: Memory = None,
    seconds: Seconds = 10.0,
    seed: Seed = 0,
    shard_head: ShardHead = "auto",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the plan.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest plan.

    Example: adaptis plan profile.json --devices 4 --microbatches 8 -o plan.json
    """
    from adaptis.console import Reporter, draw_timeline, out
    from adaptis.plan import save_plan
    from adaptis.search import Stop, search

    found, cluster, count = _setting(
        file, devices, microbatches, cluster_file, memory_gib, shard_head
    )
    if not seconds > 0:
        raise InputError(f"--seconds {seconds:g}: a number above 0 is needed")
    with Reporter() as reporter:

        def progress(state: Any) -> None:
            data = {
                "best": state.best,
                "gap": state.gap,
                "seconds": state.seconds,
                "limit": seconds,
            }
            reporter.say("planning", data)

        answer = search(found, cluster, count, Stop(seconds=seconds), seed=seed, progress=progress)
    if output is not None:
        save_plan(answer.plan, output)
    result = _figures(answer.timeline) | {
        "lower_bound_seconds": answer.lower_bound.value,
        "gap": answer.gap,
        "search_seconds": answer.seconds,
        "evaluated": answer.evaluated,
    }
    if not _emit(result, as_json):
        out.print(f"{found.model} on {cluster.describe()}, {count} micro-batches", soft_wrap=True)
        for line in answer.explain():
            out.print(line, soft_wrap=True, markup=False)
        draw_timeline(answer.timeline)
    _next(
        f"adaptis simulate {file} {output}, or adaptis compare {file}"
        if output
        else f"adaptis compare {file}; give -o plan.json to keep the plan"
    )


def _figures(timeline: Timeline) -> dict[str, Any]:
    """The keys that scripts rely on."""
    return {
        "step_seconds": timeline.step,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_bytes": list(timeline.peak_bytes),
    }


@app.command()
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

    Example: adaptis compare profile.json --devices 4
    """
    from adaptis.comparison import compare_all
    from adaptis.console import out, size, table
    from adaptis.console import seconds as text

    found, cluster, count = _setting(
        file, devices, microbatches, cluster_file, memory_gib, shard_head
    )
    result = compare_all(found, cluster, count, search_seconds=seconds, seed=seed)
    if _emit(result, as_json):
        return
    out.print(f"{found.model} on {cluster.describe()}, {count} micro-batches", soft_wrap=True)
    best = result["results"][-1]["step_seconds"]
    bound = result["lower_bound_seconds"]
    table(
        "",
        ("schedule", "step", "above the bound", "adaptis is", "bubble", "peak memory", "fits"),
        [
            (
                row["name"],
                text(row["step_seconds"]),
                f"{row['step_seconds'] / bound - 1:.1%}",
                f"{row['step_seconds'] / best:.2f}x" if row["name"] != "adaptis" else "",
                f"{row['bubble_fraction']:.1%}",
                size(max(row["peak_bytes"])),
                "yes" if row["fits"] else "no",
            )
            for row in result["results"]
        ],
    )
    for name, reason in result["not_applicable"].items():
        out.print(f"{name}: {reason}", soft_wrap=True, markup=False)
    out.print(f"lower bound {text(bound)}", soft_wrap=True)
    _next(f"adaptis plan {file} -o plan.json")


@app.command()
def simulate(
    file: ProfileFile,
    plan_file: PlanFile,
    cluster_file: ClusterFile = None,
    memory_gib: Memory = None,
    timeline: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the timeline.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Step time, idle time by cause, memory, per device.

    Example: adaptis simulate profile.json plan.json
    """
    from adaptis.comparison import within_memory
    from adaptis.console import show_timeline
    from adaptis.files import write_json
    from adaptis.plan import load_plan
    from adaptis.search import lower_bounds
    from adaptis.simulate import simulate_plan
    from adaptis.timeline import timeline_to_json

    loaded = load_plan(plan_file)
    found, cluster, _ = _setting(
        file,
        None if cluster_file else loaded.num_devices,
        loaded.num_microbatches,
        cluster_file,
        memory_gib,
    )
    if cluster.num_devices != loaded.num_devices:
        raise InputError(
            f"{plan_file} is for {loaded.num_devices} devices, {cluster_file} has "
            f"{cluster.num_devices}"
        )
    answer = simulate_plan(loaded, found, cluster)
    bound = lower_bounds(found, cluster, loaded.num_microbatches).value
    if timeline is not None:
        write_json(timeline, timeline_to_json(answer))
    result = _figures(answer) | {
        "lower_bound_seconds": bound,
        "gap": answer.step / bound - 1 if bound else 0.0,
        "bubble_seconds": answer.summary()["bubble_seconds"],
        "busy_seconds": answer.summary()["busy_seconds"],
    }
    if not _emit(result, as_json):
        show_timeline(answer, loaded.num_microbatches, cluster.describe(), bound)
    within_memory(answer, cluster)
    _next(f"adaptis simulate {file} {plan_file} -o timeline.json && adaptis report timeline.json")


@app.command()
def check(plan_file: PlanFile, as_json: Json = False) -> None:
    """Prove a plan, or say exactly what is wrong.

    Example: adaptis check plan.json
    """
    from adaptis.check import Semantics
    from adaptis.check import check as prove
    from adaptis.console import out
    from adaptis.errors import DeadlockError
    from adaptis.lower import lower
    from adaptis.plan import load_plan

    program = lower(load_plan(plan_file))
    proof = prove(program)
    blocking = True
    try:
        prove(program, Semantics.RENDEZVOUS)
    except DeadlockError:
        blocking = False
    result = {
        "ok": True,
        "num_instructions": proof.num_instructions,
        "num_transfers": proof.num_transfers,
        "runs_with_blocking_transfers": blocking,
    }
    if not _emit(result, as_json):
        out.print(
            f"{plan_file}: proven. {proof.num_instructions} instructions, {proof.num_transfers} "
            f"transfers: each "
            f"computation once, each value written before it is read, sends and receives in "
            f"order, no deadlock.",
            soft_wrap=True,
        )
    _next(f"adaptis train --plan {plan_file} CONFIG")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="A training file in TOML.")] = None,
    plan_file: Annotated[
        str | None, typer.Option("--plan", help="A plan file; default: plan first.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue from the newest checkpoint in the run's folder.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train, by itself or under torchrun.

    Example: adaptis train train.toml --train.steps 50

    Every key of the training file can be given as --section.key value.
    """
    from adaptis.config import load_config, parse_overrides
    from adaptis.console import Reporter, out, seconds
    from adaptis.jobs import train_config

    overrides = parse_overrides(context.args)
    if plan_file is not None:
        overrides["train.plan"] = json.dumps(plan_file)
    if resume:
        overrides["train.resume"] = "true"
    loaded = load_config(config, overrides)
    with Reporter() as reporter:
        result = train_config(loaded, reporter.say)
    if result is None:
        return  # another rank than 0
    if not _emit(result, as_json):
        for key in ("step", "loss_first", "loss_last"):
            if result[key] is not None:
                out.print(f"{key.replace('_', ' ')}: {result[key]:.6g}")
        if result["step_seconds"] is not None:
            out.print(f"step time: {seconds(result['step_seconds'])} (median)")
        out.print(f"checkpoint: {result['checkpoint']}", soft_wrap=True)
    _next(f"adaptis report {loaded.train.folder}/timeline.json -o report.html")


@app.command()
def report(
    timelines: Annotated[list[Path], typer.Argument(metavar="TIMELINE...", help="Timeline files.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help=".html, .svg, .json (Chrome trace) or .txt.")
    ] = Path("report.html"),
    title: Annotated[str, typer.Option(help="The heading.")] = "Timelines",
    as_json: Json = False,
) -> None:
    """Draw timelines.

    Example: adaptis report predicted.json measured.json -o report.html
    """
    from adaptis.files import write_text
    from adaptis.report import chrome, html, svg, text
    from adaptis.timeline import load_timeline

    renderers = {
        ".html": lambda rows: html.render(rows, title),
        ".svg": lambda rows: svg.render(rows, title),
        ".json": chrome.render,
        ".txt": lambda rows: "\n".join(text.draw(row) for row in rows) + "\n",
    }
    if output.suffix not in renderers:
        raise InputError(f"-o {output}: a name that ends in {', '.join(renderers)} is needed")
    loaded = [load_timeline(path) for path in timelines]
    write_text(output, renderers[output.suffix](loaded))
    _emit(
        {"output": str(output), "timelines": [timeline.summary() for timeline in loaded]}, as_json
    )
    hints = {
        ".html": "open it in a browser",
        ".json": "open it in ui.perfetto.dev or chrome://tracing",
    }
    _next(f"{output}: {hints.get(output.suffix, 'look at it')}")


def main() -> None:
    """Run the command line; every failure is one sentence and an exit status."""
    import click

    as_json = "--json" in sys.argv
    try:
        app(standalone_mode=False)
    except Error as error:
        _refuse(str(error), error.exit_status, as_json, getattr(error, "detail", ""))
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.exceptions.Abort:
        _refuse("interrupted; every process of the run has ended", 130, as_json)
    except KeyboardInterrupt:
        _refuse("interrupted; every process of the run has ended", 130, as_json)
    except click.ClickException as error:
        _refuse(f"{error.format_message()} See adaptis --help", 2, as_json)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _refuse(message: str, status: int, as_json: bool, detail: str = "") -> None:
    if _debug:
        traceback.print_exc()
        if detail:
            sys.stderr.write(detail)
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit_status": status}) + "\n")
    sys.stderr.write(f"adaptis: {message}\n")
    sys.exit(status)
