"""The verbs `export`, `import` and `export-weights`: what other systems read and write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaptis.errors import InputError
from adaptis.options import Json, PlanFile, emit, next_command

if TYPE_CHECKING:
    from adaptis.plan import Plan
    from adaptis.profile import Profile

_LOAD = "schedule = _PipelineScheduleRuntime(...); schedule._load_csv"
_USES = {  # what `export` can write, and what to do with the file
    "torch": f'{_LOAD}("{{file}}")',
    "torch-comms": f'{_LOAD}("{{file}}", format="compute_comms")',
    "megatron": '--pipeline-model-parallel-layout "$(cat {file})"',
    "torchtitan": "put its keys under `parallelism`; write the CSV it names with --to torch",
    "automodel": "put its keys into the pipeline config; write the CSV it names with --to torch",
    "deepspeed": "set `self.parts` to it in a PipelineModule of your own",
    "octopipe": "give {file} to OctoPipe as its configuration",
    "text": "read {file}: one line a device",
}
_WHOLE = ("torch-comms", "text")  # say all that a plan says of its stages
_SUFFIXES = {"torch": "csv", "torch-comms": "csv", "octopipe": "yaml"} | dict.fromkeys(
    ("torchtitan", "automodel", "deepspeed"), "json"
)
_SOURCES = ("torch", "octopipe", "slackpipe")
ModelFile = Annotated[
    Path | None, typer.Option("--profile", metavar="PROFILE", help="The model's profile file.")
]


def export(
    plan_file: PlanFile,
    target: Annotated[str, typer.Option("--to", help=f"One of {', '.join(_USES)}.")],
    profile_file: ModelFile = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write; default: print it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a plan for another system.

    Example: adaptis export plan.json --to torch -o schedule.csv
    """
    from adaptis.check import check
    from adaptis.console import warn
    from adaptis.exchange.orders import lost
    from adaptis.files import write_text
    from adaptis.jobs import check_file
    from adaptis.lower import lower
    from adaptis.plan import load_plan
    from adaptis.profile import load_profile

    if target not in _USES:
        raise InputError(f"--to {target}: one of {', '.join(_USES)} is needed")
    _spare(plan_file, output)
    plan = load_plan(plan_file)
    check(lower(plan))
    profile = load_profile(profile_file) if profile_file else None
    check_file(output)
    csv = output.with_suffix(".csv").name if output else "schedule.csv"
    text = _written(plan, target, profile, csv)
    if output is not None:
        write_text(output, text)
    result = {"to": target, "output": str(output) if output else None, "text": text}
    note = "" if target in _WHOLE else lost(plan)
    if note:
        result["note"] = note
    if not emit(result, as_json):
        sys.stdout.write(text if output is None else f"{plan_file} for {target}: {output}\n")
    if note:
        warn(f"note: {note}")
    if target == "torch-comms" and not _blocking(plan):
        warn("note: on NCCL these transfers can wait for each other; with --to torch they cannot")
    if output is not None:
        warn(f"next: {_USES[target].format(file=output)}")
    else:
        more = ("--profile", profile_file) if profile_file else ()
        name = f"{plan_file.stem}-{target}.{_SUFFIXES.get(target, 'txt')}"
        next_command("export", plan_file, "--to", target, *more, "-o", name)


def _written(plan: Plan, target: str, profile: Profile | None, csv: str) -> str:
    """The text of `plan` for `target`."""
    from adaptis.exchange import layouts, octopipe, torch_csv
    from adaptis.lower import lower
    from adaptis.notation import print_program

    if target in ("megatron", "torchtitan", "automodel"):
        return _laid_out(plan, target, profile, csv)
    if profile is not None:
        plan.fits(profile)
    match target:
        case "torch":
            return torch_csv.write_orders(plan)
        case "torch-comms":
            return torch_csv.write_program(plan)
        case "deepspeed":
            return layouts.deepspeed(plan)
        case "octopipe":
            return octopipe.write_plan(plan, profile)
        case _:
            return print_program(lower(plan))


def _laid_out(plan: Plan, target: str, profile: Profile | None, csv: str) -> str:
    """The cut of `plan` in the names of a system that has names for layers."""
    from adaptis.exchange import layouts

    if profile is None:
        raise InputError(f"--to {target} needs the kinds of the layers; give --profile PROFILE")
    if target == "megatron":
        return layouts.megatron(plan, profile)
    write = layouts.torchtitan if target == "torchtitan" else layouts.automodel
    return write(plan, profile, csv)


def _spare(file: Path, output: Path | None) -> None:
    """Refuse to write over what is read."""
    if output is not None and output.resolve() == file.resolve():
        raise InputError(f"{output}: is what is read; give another name")


def _blocking(plan: Plan) -> bool:
    """Whether the transfers of `plan` pass even where each end waits for the other."""
    from adaptis.check import Semantics, check
    from adaptis.errors import DeadlockError
    from adaptis.lower import lower

    try:
        check(lower(plan), Semantics.RENDEZVOUS)
    except DeadlockError:
        return False
    return True


def import_plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of another system.")],
    source: Annotated[str, typer.Option("--from", help=f"One of {', '.join(_SOURCES)}.")],
    profile_file: ModelFile = None,
    layers: Annotated[
        int | None, typer.Option(help="How many layers the model has, without a profile.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the plan.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a plan or a schedule of another system, and prove it.

    Example: adaptis import schedule.csv --from torch --layers 32 -o plan.json
    """
    from adaptis.console import line
    from adaptis.jobs import check_file
    from adaptis.plan import save_plan

    if source not in _SOURCES:
        raise InputError(f"--from {source}: one of {', '.join(_SOURCES)} is needed")
    if profile_file is not None and layers is not None:
        raise InputError("--profile tells how many layers there are; leave --layers out")
    if layers is not None and layers < 1:
        raise InputError(f"--layers {layers}: at least 1 is needed")
    _spare(file, output)
    check_file(output)
    plan = _read(file, source, profile_file, layers)
    if output is not None:
        save_plan(plan, output)
    facts = {
        "num_devices": plan.num_devices,
        "num_stages": len(plan.stages),
        "num_layers": plan.num_layers,
        "num_microbatches": plan.num_microbatches,
        "output": str(output) if output else None,
    }
    if not emit(facts, as_json):
        line(
            f"{file}: proven. {plan.num_layers} layers in {len(plan.stages)} stages on "
            f"{plan.num_devices} devices, {plan.num_microbatches} micro-batches."
        )
    if output is None:
        given = ("--layers", layers) if layers else ("--profile", profile_file)
        more = given if given[1] else ()
        next_command("import", file, "--from", source, *more, "-o", "plan.json")
    elif profile_file is not None:
        next_command("simulate", profile_file, output)
    else:
        next_command("check", output)


def _read(file: Path, source: str, profile_file: Path | None, layers: int | None) -> Plan:
    """The plan in `file`."""
    from adaptis.errors import PlanError
    from adaptis.exchange import octopipe, slackpipe, torch_csv
    from adaptis.exchange.orders import read_text
    from adaptis.files import read_json
    from adaptis.profile import load_profile

    profile = load_profile(profile_file) if profile_file else None
    if source == "torch":
        cut = profile or layers
        if cut is None:
            raise InputError(
                "a schedule of torch's says nothing of layers; give --profile or --layers"
            )
        return torch_csv.read_schedule(read_text(file, "schedule"), cut, str(file))
    if source == "octopipe":
        plan = octopipe.read_plan(read_text(file, "plan"), profile, str(file))
    else:
        plan = slackpipe.read_plan(read_json(file, "plan"), profile, str(file))
    if layers not in (None, plan.num_layers):
        raise PlanError(f"{file}: cuts {plan.num_layers} layers, but --layers says {layers}")
    return plan


def export_weights(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a folder of them.")
    ],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset, its TOML file, or a config.json.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder to write; it must be new.")
    ] = Path("weights"),
    as_json: Json = False,
) -> None:
    """Write trained weights as a folder that transformers can load.

    Example: adaptis export-weights adaptis-runs/train/checkpoints demo-hybrid -o weights
    """
    from adaptis.console import line, warn
    from adaptis.execute.pretrained import export_pretrained
    from adaptis.execute.storage import newest
    from adaptis.measure.zoo import load_preset

    found = newest(checkpoint)
    export_pretrained(found, load_preset(model), output)
    if not emit({"checkpoint": str(found), "output": str(output)}, as_json):
        line(f"{found}: its weights are in {output}")
    warn(f"next: transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})")
