"""The main job: two real models, measured, planned, trained under several plans, and shown.

For each model the contestants train side by side in the same two processes, step by step in turn,
on the same text from the same weights; a plain single process trains it too, and the losses must
agree. What comes out is one folder: a report to open, a picture, a trace, and every plan, profile
and timeline as JSON.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from adaptis.cluster import cluster_from_json, cluster_to_json
from adaptis.console import seconds
from adaptis.errors import PlanError
from adaptis.files import write_json, write_text
from adaptis.plan import plan_from_json, plan_to_json
from adaptis.profile import profile_from_json, profile_to_json
from adaptis.report import chrome, html, svg
from adaptis.search import BASELINES, Stop, interleaved_tuned, search
from adaptis.simulate import simulate_plan
from adaptis.timeline import timeline_from_json, timeline_to_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from adaptis.cluster import Cluster
    from adaptis.plan import Plan
    from adaptis.profile import Profile
    from adaptis.timeline import Timeline

PRESETS = ("demo-hybrid", "demo-large-vocabulary")
# Interleaved at its best number of stages per device, and the best cut that 1F1B can have.
CONTESTANTS: dict[str, Callable[[Profile, Cluster, int], Plan]] = {
    "1f1b": BASELINES["1f1b"],
    "interleaved-tuned": functools.partial(interleaved_tuned, least=2),
    "1f1b-uneven": BASELINES["1f1b-uneven"],
}
DEVICES = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """How large the demo is."""

    steps: int = 16
    microbatches: int = 8
    search_seconds: float = 4.0
    seed: int = 0
    learning_rate: float = 2e-3


@dataclass(frozen=True, slots=True)
class Entry:
    """One contestant on one model."""

    plan: Plan
    planned_step: float  # seconds, predicted before the race
    predicted: Timeline  # from the layers as measured during the race
    measured: Timeline  # of the step of median length
    step_seconds: tuple[float, ...]  # of every timed step
    losses: tuple[float, ...]

    @property
    def measured_step(self) -> float:
        """The median, seconds."""
        return median(self.step_seconds)

    @property
    def error(self) -> float:
        """How far the prediction is off, relative to the measurement; negative.

        Predicted too short.
        """
        return self.predicted.step / self.measured_step - 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything about one model."""

    preset: str
    profile: Profile
    cluster: Cluster
    reference_losses: tuple[float, ...]
    entries: tuple[Entry, ...]

    def loss_difference(self) -> float:
        """The largest relative difference of any contestant's loss from plain training's."""
        return max(
            abs(loss - expected) / abs(expected)
            for entry in self.entries
            for loss, expected in zip(entry.losses, self.reference_losses, strict=True)
        )

    def summary(self) -> dict[str, Any]:
        """The figures of the table, as JSON."""
        base = self.entries[0]
        return {
            "preset": self.preset,
            "model": self.profile.model,
            "loss_first": self.reference_losses[0],
            "loss_last": self.reference_losses[-1],
            "loss_largest_relative_difference": self.loss_difference(),
            "contestants": [
                {
                    "name": entry.plan.schedule,
                    "planned_step_seconds": entry.planned_step,
                    "predicted_step_seconds": entry.predicted.step,
                    "measured_step_seconds": entry.measured_step,
                    "prediction_error": entry.error,
                    "predicted_bubble_fraction": entry.predicted.bubble_fraction,
                    "measured_bubble_fraction": entry.measured.bubble_fraction,
                    "predicted_peak_bytes": list(entry.predicted.peak_bytes),
                    "measured_peak_bytes": list(entry.measured.peak_bytes),
                    "speedup_over_1f1b": base.measured_step / entry.measured_step,
                    "step_seconds": list(entry.step_seconds),
                }
                for entry in self.entries
            ],
        }


def contestants(
    profile: Profile, cluster: Cluster, say: Callable[..., None], *, settings: Settings
) -> list[Plan]:
    """The baselines at their best setting, then what the planner finds; runs on rank 0."""
    plans = []
    for name, make in CONTESTANTS.items():
        try:
            plans.append(make(profile, cluster, settings.microbatches))
        except PlanError as error:
            say("left_out", name=name, reason=str(error))

    def progress(found: Any) -> None:
        limit = settings.search_seconds
        say("planning", best=found.best, gap=found.gap, seconds=found.seconds, limit=limit)

    stop = Stop(seconds=settings.search_seconds)
    answer = search(
        profile, cluster, settings.microbatches, stop, seed=settings.seed, progress=progress
    )
    return [*plans, answer.plan]


def run_model(
    preset: str, settings: Settings, say: Callable[[str, dict[str, Any]], None]
) -> Outcome:
    """One model's contest, in processes of its own."""
    from adaptis.execute.contest import Contest, contest_rank
    from adaptis.execute.data import TextBatches
    from adaptis.execute.launch import launch
    from adaptis.execute.train import adamw
    from adaptis.measure.zoo import load_preset, read_preset

    recipe = read_preset(preset)
    batches = TextBatches(
        settings.microbatches,
        recipe.batch_size,
        recipe.sequence,
        recipe.tokenizer,
        recipe.vocabulary,
        seed=settings.seed,
    )
    batches.corpus()  # trains the tokenizer at first use: once, not in every process
    contest = Contest(
        model=functools.partial(load_preset, preset),
        batches=batches,
        optimizer=adamw(settings.learning_rate),
        plans=functools.partial(contestants, settings=settings),
        steps=settings.steps,
        num_microbatches=settings.microbatches,
        seed=settings.seed,
    )
    return _outcome(recipe.name, launch(contest_rank, DEVICES, contest, say=say)[0])


def _outcome(preset: str, result: dict[str, Any]) -> Outcome:
    cluster = cluster_from_json(result["cluster"])
    before = profile_from_json(result["profile"])
    during = profile_from_json(result["profile_during_race"])
    entries = []
    for value, found in zip(result["plans"], result["contestants"], strict=True):
        plan = plan_from_json(value)
        entries.append(
            Entry(
                plan=plan,
                planned_step=simulate_plan(plan, before, cluster).step,
                predicted=simulate_plan(plan, during, cluster),
                measured=timeline_from_json(found["timeline"]),
                step_seconds=tuple(found["step_seconds"]),
                losses=tuple(found["losses"]),
            )
        )
    return Outcome(preset, during, cluster, tuple(result["reference_losses"]), tuple(entries))


def write_outputs(outcomes: list[Outcome], folder: Path) -> dict[str, Any]:
    """All files of the demo; returns the summary that is also written."""
    for outcome in outcomes:
        home = folder / outcome.preset
        write_json(home / "profile.json", profile_to_json(outcome.profile))
        write_json(home / "cluster.json", cluster_to_json(outcome.cluster))
        for entry in outcome.entries:
            name = entry.plan.schedule
            write_json(home / f"{name}.plan.json", plan_to_json(entry.plan))
            for timeline in (entry.predicted, entry.measured):
                write_json(home / f"{name}.{timeline.source}.json", timeline_to_json(timeline))
        pictures = _labelled(outcome)
        title = f"{outcome.preset}: predicted and measured"
        write_text(home / "report.html", html.render(pictures, title, _facts(outcome, home)))
        write_text(home / "trace.json", chrome.render(pictures))
        before, after = outcome.entries[0].measured, outcome.entries[-1].measured
        title = f"{outcome.preset}: one training step, measured"
        write_text(home / "before-and-after.svg", svg.render([before, after], title))
    summary = {
        "mean_absolute_prediction_error": mean_error(outcomes),
        "models": [outcome.summary() for outcome in outcomes],
    }
    write_json(folder / "summary.json", summary)
    return summary


def _labelled(outcome: Outcome) -> list[Timeline]:
    """Predicted and measured pairs, as the report pairs them."""
    result = []
    for entry in outcome.entries:
        layers = [f"layers {s.start} to {s.stop - 1}" for s in entry.plan.stages]
        notes = {"pair": entry.plan.schedule, "layers": layers}
        result += [
            replace(timeline, name=notes["pair"], notes=notes)
            for timeline in (entry.predicted, entry.measured)
        ]
    return result


def mean_error(outcomes: list[Outcome]) -> float:
    """How far predictions are off on the average, over all models and contestants."""
    return fmean(abs(entry.error) for outcome in outcomes for entry in outcome.entries)


COLUMNS = ("contestant", "predicted", "measured", "error", "bubble", "peak MiB", "speed-up")


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """The table of one model, as text."""
    base = outcome.entries[0].measured_step
    return [
        (
            entry.plan.schedule,
            seconds(entry.predicted.step),
            seconds(entry.measured_step),
            f"{entry.error:+.1%}",
            f"{entry.predicted.bubble_fraction:.0%} / {entry.measured.bubble_fraction:.0%}",
            "{:.0f} / {:.0f}".format(
                *(max(t.peak_bytes) / 2**20 for t in (entry.predicted, entry.measured))
            ),
            f"{base / entry.measured_step:.2f}x",
        )
        for entry in outcome.entries
    ]


def verdict(outcome: Outcome) -> str:
    """One sentence about exactness."""
    difference = outcome.loss_difference()
    first, last = outcome.reference_losses[0], outcome.reference_losses[-1]
    same = "bitwise equal to" if difference == 0 else f"within {difference:.1e} (relative) of"
    return (
        f"{outcome.preset}: every contestant's losses are {same} plain single-process training, "
        f"all {len(outcome.reference_losses)} steps; loss {first:.3f} -> {last:.3f}"
    )


def _facts(outcome: Outcome, home: Path) -> dict[str, Any]:
    profile = outcome.profile
    return {
        "tables": [
            {
                "title": "The race",
                "columns": list(COLUMNS),
                "rows": [list(r) for r in rows(outcome)],
            }
        ],
        "notes": [
            verdict(outcome),
            f"{outcome.cluster.describe()}; {profile.source}; {profile.machine}",
            "bubble and peak: predicted / measured",
        ],
        "commands": [
            f"adaptis compare {home}/profile.json",
            f"adaptis simulate {home}/profile.json {home}/adaptis.plan.json",
        ],
    }
