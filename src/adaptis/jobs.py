"""What the verbs do that need torch: measure or compute a profile, train from a training file.

Each function takes what the command line was given and returns what it prints; torch is imported
when they run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from adaptis.errors import InputError
from adaptis.files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from adaptis.cluster import Cluster
    from adaptis.config import Config
    from adaptis.execute.launch import Seat
    from adaptis.profile import Profile


@dataclass(frozen=True, slots=True)
class _Job:
    preset: str
    num_microbatches: int
    rounds: int
    sequence: int
    batch_size: int
    tokenizer: str
    vocabulary: int


def measure_profile(
    preset: str,
    devices: int,
    microbatches: int,
    rounds: int,
    sequence: int | None,
    batch_size: int | None,
    say: Callable[[str, dict[str, Any]], None],
) -> tuple[Profile, Cluster]:
    """Measure in `devices` processes at once, as they would train.

    Raises:
        InputError: there is no such model.
    """
    from adaptis.execute.launch import launch
    from adaptis.measure.zoo import read_preset

    recipe = read_preset(preset)
    job = _Job(
        preset,
        microbatches,
        rounds,
        sequence or recipe.sequence,
        batch_size or recipe.batch_size,
        recipe.tokenizer,
        recipe.vocabulary,
    )
    return launch(_rank, devices, job, say=say)[0]


def _rank(seat: Seat, connection: Connection, job: _Job) -> tuple[Profile, Cluster]:
    from adaptis.execute.data import TextBatches
    from adaptis.execute.prepare import Measurement
    from adaptis.execute.train import adamw
    from adaptis.execute.world import seated
    from adaptis.measure.zoo import load_preset

    with seated(seat, connection) as world:
        batches = TextBatches(1, job.batch_size, job.sequence, job.tokenizer, job.vocabulary)
        measurement = Measurement(
            world,
            load_preset(job.preset),
            batches(0)[0],
            optimizer=adamw(),
            num_microbatches=job.num_microbatches,
        )
        measurement.rounds(job.rounds)
        found = measurement.result()
        return found.profile, found.cluster


def compute_profile(
    preset: str, accelerator: str, sequence: int | None, batch_size: int | None
) -> Profile:
    """Compute the profile of a model on a named accelerator, with no device.

    Raises:
        InputError: there is no such model or accelerator.
    """
    from adaptis.measure.analytic import ACCELERATORS, analytic_profile
    from adaptis.measure.zoo import read_preset

    if accelerator not in ACCELERATORS:
        raise InputError(f"--analytic {accelerator}: one of {', '.join(ACCELERATORS)} is needed")
    recipe = read_preset(preset)
    return analytic_profile(
        recipe.model(),
        ACCELERATORS[accelerator],
        sequence or recipe.sequence,
        batch_size or recipe.batch_size,
    )


def train_config(
    config: Config, say: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any] | None:
    """Run `config`; the figures of the run, or None on another rank than 0.

    Raises:
        Error: one sentence about what was wrong.
    """
    from adaptis.execute.data import TextBatches
    from adaptis.execute.train import adamw, train
    from adaptis.measure.zoo import load_preset

    settings, data = config.train, config.data
    batches = TextBatches(
        settings.microbatches,
        data.batch_size,
        data.sequence,
        data.tokenizer,
        data.vocabulary,
        data.text,
        settings.seed,
    )
    model = load_preset(config.model.preset)
    batches.corpus()  # trains the tokenizer at first use: once, not in every process
    result = train(
        model,
        batches,
        devices=settings.devices,
        steps=settings.steps,
        plan=settings.plan,
        optimizer=adamw(settings.learning_rate),
        seed=settings.seed,
        search_seconds=settings.search_seconds,
        folder=settings.folder,
        save_every=settings.save_every,
        resume=settings.resume,
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
    write_json(folder / "result.json", figures)
    return figures
