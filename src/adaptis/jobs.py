"""What the verbs do: what a question is about, a profile measured or computed, a training run.

Each function takes what the command line was given and returns what it prints; torch is imported
when they run. What can be refused before any process starts is refused here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from adaptis.check import check
from adaptis.errors import InputError, PlanError
from adaptis.files import write_bytes, write_json
from adaptis.lower import lower
from adaptis.plan import load_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from adaptis.cluster import Cluster
    from adaptis.config import Config, TrainSection
    from adaptis.execute.launch import Seat
    from adaptis.measure.zoo import Preset
    from adaptis.plan import Plan
    from adaptis.profile import Profile
    from adaptis.timeline import Timeline


def setting(
    path: Path,
    devices: int | None,
    microbatches: int | None,
    cluster_file: Path | None,
    memory_gib: float | None,
) -> tuple[Profile, Cluster, int]:
    """What most verbs start from: a profile, a cluster, a number of micro-batches.

    Raises:
        Error: one sentence about what was wrong.
    """
    from adaptis.profile import load_profile
    from adaptis.workload import even

    profile = load_profile(path)
    cluster = _cluster(path, profile, devices, cluster_file)
    if memory_gib is not None:
        above_zero("--memory-gib", memory_gib)
        if not any(layer.state_bytes or layer.saved_bytes for layer in profile.layers):
            raise InputError(
                f"--memory-gib {memory_gib:g}: {path} holds no sizes, so nothing can be said about "
                f"memory; leave it out, or give a profile with state_bytes and saved_bytes"
            )
        limited = tuple(replace(d, memory_bytes=memory_gib * 2**30) for d in cluster.devices)
        cluster = replace(cluster, devices=limited)
    if cluster.num_devices > profile.num_layers:
        raise InputError(
            f"{cluster.num_devices} devices for {profile.num_layers} layers: each device needs a "
            f"layer; use at most {profile.num_layers} devices"
        )
    count = microbatches if microbatches is not None else profile.microbatches
    if count is None:
        raise InputError(f"{path} has no hint for the number of micro-batches; give --microbatches")
    return profile, cluster, even(count).num_microbatches


def microbatch_counts(text: str | None) -> list[int]:
    """The numbers that "8" or "4-16" allows, in order: of a range, the divisors of its end.

    Raises:
        InputError: it is neither.
    """
    from adaptis.workload import even

    if text is None:
        return []
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    if found is None:
        raise InputError(f"--microbatches {text}: a number, or a range such as 4-16, is needed")
    least, most = int(found[1]), int(found[2] or found[1])
    if least > most:
        raise InputError(f"--microbatches {text}: the smaller number must come first")
    counts = range(even(least).num_microbatches, even(most).num_microbatches + 1)
    return [count for count in counts if most % count == 0]


def check_shard_head(mode: str) -> None:
    """Refuse what is none of the modes of `search`.

    Raises:
        InputError: naming the option.
    """
    if mode not in ("never", "auto", "always"):
        raise InputError(f"--shard-head {mode}: never, auto or always is needed")


def _cluster(
    path: Path, profile: Profile, devices: int | None, cluster_file: Path | None
) -> Cluster:
    from adaptis.cluster import load_cluster, uniform

    if cluster_file:
        cluster = load_cluster(cluster_file)
        if devices not in (None, cluster.num_devices):
            raise InputError(
                f"--devices {devices}, but {cluster_file} describes {cluster.num_devices}; leave "
                f"one of the two out"
            )
        return cluster
    count = devices if devices is not None else profile.devices
    if count is None:
        raise InputError(f"{path} has no hint for the number of devices; give --devices")
    return uniform(count)


def simulated_setting(
    file: Path, plan_file: Path, cluster_file: Path | None, memory_gib: float | None
) -> tuple[Plan, Profile, Cluster]:
    """A plan with the profile and the cluster that it is simulated on.

    Raises:
        Error: one sentence about what was wrong, or how they differ.
    """
    plan = load_plan(plan_file)
    count = None if cluster_file else plan.num_devices
    found, cluster, _ = setting(file, count, plan.num_microbatches, cluster_file, memory_gib)
    if cluster.num_devices != plan.num_devices:
        raise InputError(
            f"{plan_file} is for {plan.num_devices} devices, {cluster_file} has "
            f"{cluster.num_devices}; give a cluster file for {plan.num_devices}"
        )
    return plan, found, cluster


def fits_memory(
    file: Path, plan_file: Path, cluster_file: Path | None, memory_gib: float | None
) -> None:
    """Prove that the devices' memory suffices for a plan.

    Raises:
        InfeasibleError: it does not; which device misses how much.
    """
    from adaptis.comparison import excess, workload_of
    from adaptis.simulate import simulate_plan

    plan, found, cluster = simulated_setting(file, plan_file, cluster_file, memory_gib)
    timeline = simulate_plan(plan, found, cluster, workload_of(plan))
    lacking = excess(timeline, cluster)
    if lacking:
        raise lacking


def above_zero(name: str, value: float) -> None:
    """Refuse what is no finite number above 0.

    Raises:
        InputError: naming the option.
    """
    if not 0 < value < math.inf:
        raise InputError(f"{name} {value:g}: a finite number above 0 is needed")


def check_file(path: Path | None) -> None:
    """Refuse, before the work is done, an output file that cannot be written.

    Raises:
        InputError: saying why.
    """
    if path is None:
        return
    check_folder(path.parent)
    with contextlib.suppress(OSError):
        if path.is_dir():
            raise InputError(f"{path}: is a folder; give the name of a file")


def check_folder(path: Path) -> None:
    """Refuse, before the work is done, a folder that cannot be written to.

    Raises:
        InputError: saying why.
    """
    there = path
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        is_folder = there.is_dir()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    if not is_folder:
        raise InputError(f"{path}: cannot be written ({there} is no folder)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written (no permission to write in {there})")


@dataclass(frozen=True, slots=True)
class ProfileJob:
    """What is profiled, and how; None stands for the preset's own."""

    preset: str
    devices: int = 2
    microbatches: int = 8
    rounds: int = 9
    sequence: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "microbatches", "rounds", "sequence", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")


def needs_torch() -> None:
    """Refuse, before processes are started, what the base installation cannot do.

    Raises:
        InputError: saying what to install.
    """
    for name in ("torch", "transformers", "tokenizers", "safetensors"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f'this needs {name}: pip install "adaptis[torch]"')


def measure_profile(
    job: ProfileJob, say: Callable[[str, dict[str, Any]], None]
) -> tuple[Profile, Cluster]:
    """Measure in `job.devices` processes at once, as they would train.

    Raises:
        InputError: there is no such model.
    """
    from adaptis.execute.launch import launch
    from adaptis.measure.zoo import read_preset

    needs_torch()
    recipe = read_preset(job.preset)
    fits_vocabulary(recipe, recipe.tokenizer, recipe.vocabulary)
    say("starting", {"processes": job.devices})
    return launch(_rank, job.devices, job, recipe, say=say)[0]


def _rank(
    seat: Seat, connection: Connection, job: ProfileJob, recipe: Preset
) -> tuple[Profile, Cluster]:
    from adaptis.execute.data import TextBatches
    from adaptis.execute.prepare import Measurement
    from adaptis.execute.train import adamw
    from adaptis.execute.world import seated

    with seated(seat, connection) as world:
        batches = TextBatches(
            1,
            job.batch_size or recipe.batch_size,
            job.sequence or recipe.sequence,
            recipe.tokenizer,
            recipe.vocabulary,
        )
        measurement = Measurement(
            world,
            recipe.model(),
            batches(0)[0],
            optimizer=adamw(),
            num_microbatches=job.microbatches,
        )
        measurement.rounds(job.rounds)
        found = measurement.result()
        return found.profile, found.cluster


def compute_profile(job: ProfileJob, accelerator: str) -> Profile:
    """Compute the profile of a model on a named accelerator, with no device.

    Raises:
        InputError: there is no such model or accelerator.
    """
    from adaptis.measure.analytic import ACCELERATORS, analytic_profile
    from adaptis.measure.zoo import read_preset

    if accelerator not in ACCELERATORS:
        raise InputError(f"--analytic {accelerator}: one of {', '.join(ACCELERATORS)} is needed")
    recipe = read_preset(job.preset)
    found = analytic_profile(
        recipe.model(),
        ACCELERATORS[accelerator],
        job.sequence or recipe.sequence,
        job.batch_size or recipe.batch_size,
    )
    return replace(found, devices=job.devices, microbatches=job.microbatches)


def fits_vocabulary(recipe: Preset, tokenizer: str, vocabulary: int) -> None:
    """Refuse a tokenizer with more tokens than the model knows, where that is known beforehand.

    Raises:
        InputError: with both numbers.
    """
    known = recipe.config.get("vocab_size")
    tokens = {"bytes": 257, "bpe": vocabulary}.get(tokenizer, 0)
    if isinstance(known, int) and tokens > known:
        raise InputError(
            f"the tokenizer {tokenizer!r} has {tokens} tokens, but {recipe.name} knows {known}; "
            f"give another tokenizer or vocabulary"
        )


def check_training(config: Config) -> None:
    """Refuse, before any process starts, a plan that is for other settings.

    Raises:
        Error: saying how they differ.
    """
    from adaptis.measure.zoo import read_preset

    recipe, data, settings = read_preset(config.model.preset), config.data, config.train
    fits_vocabulary(
        recipe, data.tokenizer or recipe.tokenizer, data.vocabulary or recipe.vocabulary
    )
    length, rest = divmod(_running(settings), settings.replicas)
    if rest:
        raise InputError(
            f"{_running(settings)} processes for {settings.replicas} replicas of the pipeline; "
            f"give a multiple of {settings.replicas}"
        )
    if settings.plan == "auto":
        return
    plan = load_plan(settings.plan)
    if plan.num_devices != length:
        each = f" for each of {settings.replicas} replicas" if settings.replicas > 1 else ""
        raise PlanError(
            f"{settings.plan} is for {plan.num_devices} devices, {length} are to run{each}; give "
            f"--train.devices {plan.num_devices * settings.replicas}, or torchrun as many processes"
        )
    if plan.num_sequences != settings.microbatches:
        raise PlanError(
            f"{settings.plan} is for {plan.num_sequences} micro-batches, train.microbatches is "
            f"{settings.microbatches}; give --train.microbatches {plan.num_sequences}"
        )
    check(lower(plan))


def _running(settings: TrainSection) -> int:
    return int(os.environ.get("WORLD_SIZE", settings.devices))


def _plan(settings: TrainSection) -> Plan | str:
    """A run that is resumed goes on under its own plan, where that suits."""
    if settings.plan != "auto":
        return load_plan(settings.plan)
    own = Path(settings.folder, "plan.json")
    if settings.resume and own.is_file():
        plan = load_plan(own)
        wanted = settings.replicas, _running(settings), settings.microbatches
        if (plan.replicas, plan.num_devices * plan.replicas, plan.num_sequences) == wanted:
            return plan
    return "auto"


def train_config(
    config: Config, say: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any] | None:
    """Run `config`; the figures of the run, or None on another rank than 0.

    Raises:
        Error: one sentence about what was wrong.
    """
    from adaptis.execute.data import TextBatches
    from adaptis.execute.train import adamw, autocast_type, train
    from adaptis.measure.zoo import load_preset, read_preset

    settings, data, recipe = config.train, config.data, read_preset(config.model.preset)
    replicas = settings.replicas
    batches = TextBatches(
        settings.microbatches * replicas,
        data.batch_size or recipe.batch_size,
        data.sequence or recipe.sequence,
        data.tokenizer or recipe.tokenizer,
        data.vocabulary or recipe.vocabulary,
        data.text,
        settings.seed,
    )
    batches.corpus()  # trains the tokenizer at first use: once, not in every process
    if "RANK" not in os.environ:
        say("starting", {"processes": settings.devices})
    result = train(
        functools.partial(load_preset, config.model.preset),  # built by the ranks alone
        batches,
        devices=settings.devices,
        device=settings.device,
        steps=settings.steps,
        plan=_plan(settings),
        optimizer=adamw(settings.learning_rate),
        seed=settings.seed,
        search_seconds=settings.search_seconds,
        max_norm=settings.max_norm,
        autocast=autocast_type(settings.autocast),
        folder=settings.folder,
        save_every=settings.save_every,
        resume=settings.resume,
        weights=config.model.weights,
        mesh={"dp": replicas, "pp": _running(settings) // replicas} if replicas > 1 else None,
        say=say,
    )
    if int(os.environ.get("RANK", "0")):
        return None
    folder = Path(settings.folder)
    if result.timeline:
        write_json(folder / "timeline.json", result.timeline)
    figures = {
        "step": settings.steps,
        "loss_first": result.losses[0] if result.losses else None,
        "loss_last": result.losses[-1] if result.losses else None,
        "losses": result.losses,
        "step_seconds": median(result.step_seconds) if result.step_seconds else None,
        "checkpoint": result.checkpoint,
        "folder": str(folder),
    }
    if result.losses:  # else there was nothing left to do, and the files stay as they are
        write_json(folder / "result.json", figures)
    return figures


def draw_report(paths: Sequence[Path], output: Path, title: str) -> list[Timeline]:
    """Draw timelines into `output`, whose ending says how.

    Raises:
        InputError: an unknown ending, or no timelines.
    """
    from adaptis.report import chrome, html, png, svg, text
    from adaptis.timeline import load_timeline

    renderers: dict[str, Callable[[list[Timeline]], str | bytes]] = {
        ".html": lambda rows: html.render(rows, title),
        ".svg": lambda rows: svg.render(rows, title),
        ".png": lambda rows: png.render(rows, title),
        ".json": chrome.render,
        ".txt": lambda rows: "\n".join(text.draw(row) for row in rows) + "\n",
    }
    if output.suffix not in renderers:
        raise InputError(f"-o {output}: a name that ends in {', '.join(renderers)} is needed")
    if output in paths:
        raise InputError(f"-o {output}: is one of the timelines; give another name")
    timelines = [load_timeline(path) for path in paths]
    drawn = renderers[output.suffix](timelines)
    write_bytes(output, drawn if isinstance(drawn, bytes) else drawn.encode())
    return timelines
