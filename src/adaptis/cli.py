"""The command line: each verb reads and writes files, and says what to do next.

Results go to stdout (`--json`: one object), the rest to stderr; status 0 done, 1 a clear "no", 2
bad input. `docs/design/walkthrough.md` follows one micro-batch from here to a gradient.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from adaptis import cli_exchange, cli_plan
from adaptis.errors import Error, InputError
from adaptis.options import (
    ClusterFile,
    Json,
    Memory,
    PlanFile,
    ProfileFile,
    Seconds,
    Seed,
    emit,
    flags,
    next_command,
)

app = typer.Typer(
    name="adaptis",
    help="Adaptive pipeline parallelism: measure a model, plan its pipeline, train it, look at it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# What the option parser raises: click's own, or (typer 0.26 and later) that of the copy in typer.
_Usage = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _print_version(asked: bool) -> None:
    if asked:
        from adaptis import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass  # `main` looks for --debug, anywhere in the line


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
    from adaptis.console import Reporter, line, table, warn
    from adaptis.jobs import above_zero, check_folder

    if steps < 4:
        raise InputError(f"--steps {steps}: at least 4 are needed, the first two are not timed")
    above_zero("--seconds", seconds)
    if only not in (None, *main_job.PRESETS):
        raise InputError(f"--only {only}: one of {', '.join(main_job.PRESETS)} is needed")
    folder = folder or Path("adaptis-runs", time.strftime("demo-%Y%m%d-%H%M%S"))
    check_folder(folder)
    settings = main_job.Settings(steps=steps, search_seconds=seconds, seed=seed)
    outcomes = []
    for preset in [only] if only else main_job.PRESETS:
        warn(f"{preset}: {main_job.DEVICES} processes, {settings.microbatches} micro-batches")
        with Reporter("  ", plans=True) as reporter:
            outcomes.append(main_job.run_model(preset, settings, reporter.say))
        if not as_json:
            table(preset, main_job.COLUMNS, main_job.rows(outcomes[-1]))
            line(main_job.verdict(outcomes[-1]))
    summary = main_job.write_outputs(outcomes, folder)
    first = folder / outcomes[0].preset
    if not emit(summary | {"folder": str(folder)}, as_json):
        error = summary["mean_absolute_prediction_error"]
        line(f"\nPredictions are off by {error:.1%} on the average. All results: {folder}")
        for outcome in outcomes:
            line(f"  {folder}/{outcome.preset}/report.html   open it: predicted beside measured")
        line("  beside each: before-and-after.svg, trace.json (ui.perfetto.dev), plans, timelines")
    next_command("compare", first / "profile.json", "--devices", 4)


_MeasuredFile = Annotated[
    Path | None,
    typer.Option(help="Correct the profile by this measured timeline instead of measuring."),
]
_TimedPlan = Annotated[
    Path | None,
    typer.Option("--plan", help="The plan that was timed; default: plan.json beside it."),
]


@app.command()
def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A preset, its TOML file, or a config.json; with --refine a profile file.",
        ),
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
    refine: _MeasuredFile = None,
    plan_file: _TimedPlan = None,
    as_json: Json = False,
) -> None:
    """Measure each layer of a model here, or compute it, or correct a profile by a measured step.

    Example: adaptis profile demo-hybrid -o profile.json
    """
    from adaptis.cluster import cluster_to_json
    from adaptis.console import Reporter, show_profile
    from adaptis.files import write_json
    from adaptis.jobs import ProfileJob, check_file, compute_profile, measure_profile
    from adaptis.profile import profile_to_json
    from adaptis.refine import refined_file

    job = ProfileJob(model, devices, microbatches, rounds, sequence, batch_size)
    check_file(output)
    if refine is not None:
        if analytic is not None:
            raise InputError("--refine and --analytic exclude each other; leave one of the two out")
        found, cluster = refined_file(Path(model), refine, plan_file), None
    elif analytic is not None:
        found, cluster = compute_profile(job, analytic), None
    else:
        with Reporter() as reporter:
            found, cluster = measure_profile(job, reporter.say)
    value = profile_to_json(found)
    write_json(output, value)
    beside = None
    if cluster is not None and devices > 1:
        beside = output.with_name(f"{output.stem}.cluster.json")
        write_json(beside, cluster_to_json(cluster))
    if not emit(value, as_json):
        show_profile(found)
    next_command("plan", output, *flags(cluster=beside), "-o", "plan.json")


app.command("plan")(cli_plan.plan)
app.command("compare")(cli_plan.compare)
app.command("ablation")(cli_plan.ablation)


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
    from adaptis.comparison import simulation
    from adaptis.console import show_timeline, warn
    from adaptis.files import write_json
    from adaptis.jobs import check_file, simulated_setting
    from adaptis.timeline import timeline_to_json

    loaded, found, cluster = simulated_setting(file, plan_file, cluster_file, memory_gib)
    check_file(timeline)
    answer, result, lacking = simulation(loaded, found, cluster)
    if timeline is not None:
        write_json(timeline, timeline_to_json(answer))
    if not emit(result, as_json):
        count, bound = loaded.num_microbatches, result["lower_bound_seconds"]
        show_timeline(answer, count, cluster.describe(), bound)
    if lacking:  # the result above already holds the "no"
        warn(f"adaptis: {lacking}")
        raise typer.Exit(lacking.exit_status)
    if timeline is not None:
        next_command("report", timeline, "-o", "report.html")
    else:
        given = flags(cluster=cluster_file, memory_gib=memory_gib)
        next_command("simulate", file, plan_file, *given, "-o", "timeline.json")


@app.command()
def check(
    plan_file: PlanFile,
    profile_file: Annotated[
        Path | None, typer.Option("--profile", help="A profile file: prove the memory as well.")
    ] = None,
    cluster_file: ClusterFile = None,
    memory_gib: Memory = None,
    as_json: Json = False,
) -> None:
    """Prove a plan, or say exactly what is wrong.

    Example: adaptis check plan.json
    """
    from adaptis.check import Semantics
    from adaptis.check import check as prove
    from adaptis.console import line
    from adaptis.errors import DeadlockError
    from adaptis.jobs import fits_memory
    from adaptis.lower import lower
    from adaptis.measure.zoo import preset_names
    from adaptis.plan import load_plan

    loaded = load_plan(plan_file)
    program = lower(loaded)
    proof = prove(program)
    blocking = True
    try:
        prove(program, Semantics.RENDEZVOUS)
    except DeadlockError:
        blocking = False
    if profile_file is not None:
        fits_memory(profile_file, plan_file, cluster_file, memory_gib)
    result = {
        "ok": True,
        "memory_proven": profile_file is not None,
        "num_instructions": proof.num_instructions,
        "num_transfers": proof.num_transfers,
        "runs_with_blocking_transfers": blocking,
    }
    if not emit(result, as_json):
        line(
            f"{plan_file}: proven. {proof.num_instructions} instructions, {proof.num_transfers} "
            f"transfers: each computation once, each value written before it is read, sends and "
            f"receives in order, no deadlock{', memory suffices' * (profile_file is not None)}."
        )
    if loaded.model in preset_names():
        sizes = {"devices": loaded.num_devices, "microbatches": loaded.num_microbatches}
        words = [word for name, n in sizes.items() for word in (f"--train.{name}", n)]
        next_command("train", "--plan", plan_file, "--model.preset", loaded.model, *words)
    else:
        next_command("train", "--help")


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [--section.key VALUE]...",
            help="A training file in TOML, and keys that take precedence over it.",
        ),
    ] = None,
    plan_file: Annotated[
        str | None, typer.Option("--plan", help="A plan file; default: plan first.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in the folder.")
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="Start from the weights in this folder of transformers.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train, by itself or under torchrun.

    Example: adaptis train train.toml --train.steps 50

    Every key of the training file can be given as --section.key value.
    """
    from adaptis.config import load_config, parse_words
    from adaptis.console import Reporter, show_training
    from adaptis.jobs import check_folder, check_training, train_config

    config, overrides = parse_words(words or [])
    if plan_file is not None:
        overrides["train.plan"] = json.dumps(plan_file)
    if resume:
        overrides["train.resume"] = "true"
    if weights is not None:
        overrides["model.weights"] = json.dumps(weights)
    loaded = load_config(config, overrides)
    check_folder(Path(loaded.train.folder))
    check_training(loaded)
    with Reporter(plans=loaded.train.plan == "auto") as reporter:
        result = train_config(loaded, reporter.say)
    if result is None:
        return  # another rank than 0
    if not emit(result, as_json):
        show_training(result)
    if result["losses"]:
        next_command("report", Path(loaded.train.folder, "timeline.json"), "-o", "report.html")
    else:
        more = ["--resume", "--train.steps", 2 * loaded.train.steps]
        next_command("train", *(words or []), *flags(plan=plan_file), *more)


@app.command()
def report(
    timelines: Annotated[list[Path], typer.Argument(metavar="TIMELINE...", help="Timeline files.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help=".html, .svg, .json (Chrome trace) or .txt.")
    ] = Path("report.html"),
    title: Annotated[str, typer.Option(help="The heading.")] = "Timelines",
    as_json: Json = False,
) -> None:
    """Draw timelines; a prediction and its measurement are compared, instruction by instruction.

    Example: adaptis report predicted.json measured.json -o report.html
    """
    from adaptis.console import line, table, warn
    from adaptis.jobs import draw_report
    from adaptis.report.deviation import COLUMNS, cells, deviations, headline

    drawn = draw_report(timelines, output, title)
    compared = deviations(drawn)
    result = {"output": str(output), "timelines": [row.summary() for row in drawn]}
    if not emit(result | {"comparisons": compared}, as_json):
        for entry in compared:
            if "not_compared" in entry:
                line(f"{entry['name']}: not compared: {entry['not_compared']}")
            else:
                table(headline(entry), COLUMNS, cells(entry))
    hints = {".json": "in ui.perfetto.dev or chrome://tracing", ".txt": "in a terminal or editor"}
    warn(f"next: open {output} {hints.get(output.suffix, 'in a browser')}")


app.command("export")(cli_exchange.export)
app.command("import")(cli_exchange.import_plan)
app.command("export-weights")(cli_exchange.export_weights)


def main() -> None:
    """Run the command line; every failure is one sentence and an exit status."""
    debug = "--debug" in sys.argv[1:]
    words = [word for word in sys.argv[1:] if word != "--debug"] or ["--help"]
    as_json = "--json" in words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a drawing must not fail for want of a sign
    try:
        status = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our results has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _refuse(error, *_explain(error), as_json=as_json, debug=debug)
    except KeyboardInterrupt as stop:
        _refuse(stop, *_INTERRUPTED, as_json=as_json, debug=debug)
    sys.exit(status)


_INTERRUPTED = ("interrupted; every process of the run has ended", 130)


def _run(words: list[str]) -> int:
    """The exit status of a run that went as it should."""
    status = app(words, prog_name="adaptis", standalone_mode=False)
    if status == _INTERRUPTED[1]:
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0


def _explain(error: Exception) -> tuple[str, int]:
    """One sentence and a status for whatever was raised."""
    if isinstance(error, Error):
        return str(error), error.exit_status
    if isinstance(error, typer.Abort):
        return _INTERRUPTED
    if isinstance(error, _Usage):
        text = getattr(error, "format_message", error.__str__)()
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "adaptis"
        return f"{' '.join(text.split()).rstrip('.')}; see {where} --help", 2
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] in _OPTIONAL:
        return f'this needs {error.name}: pip install "adaptis[torch]"', 2
    text = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {text} (the traceback: add --debug)", 1


_OPTIONAL = ("torch", "transformers", "tokenizers", "safetensors")


def _refuse(
    error: BaseException, message: str, status: int, *, as_json: bool, debug: bool
) -> NoReturn:
    if debug:
        traceback.print_exception(error)
        sys.stderr.write(getattr(error, "detail", ""))
    if as_json and os.environ.get("RANK", "0") == "0":
        sys.stdout.write(json.dumps({"error": message, "exit_status": status}) + "\n")
    sys.stderr.write(f"adaptis: {message}\n")
    sys.exit(status)
