"""How true the predictions are: simulated steps beside executed ones.

    python benchmarks/fidelity.py [--only real|sleeping] [--model NAME] [--steps 12]

1. Real layers, two processes: four models, each under seven schedules, the planner's among them.
   All train side by side, a step of each in turn, and every layer is timed once before each step.
   The machine's speed drifts, so a plan's prediction is that from the times right before and right
   after its own steps: prediction and measurement have the same weather.
   The losses must be those of plain training. Their measured times are the end-to-end speed-ups of
   the planner's plan over uniform 1F1B, the best interleaved schedule and the others. Memory: the
   peak of each device as predicted, beside what was counted in one more step.
2. Layers that sleep for the published times of two models, four and eight processes: what is left
   is the order, the waiting and the transfers. The profile is what was given, plus what a sleep
   takes too long; that and what a message costs are measured beside the run, without it.

Errors are predicted / measured - 1. Real layers: of the typical step, as the layers' times are (the
mean without the outermost tenth on either side). Layers asleep: of the median step, because their
times are given, and what lengthens a step now and then is a core taken away. Prints tables, writes
`benchmarks/results/fidelity-DATE.json` (`fidelity-real-DATE.json` of the first part alone) and the
scatter plots beside it, `.svg` and `.png`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from running.figure import scatter
from running.models import MICROBATCHES, MODELS, batches_of, model_of
from running.sleeping import predict, sleeping_rank

from adaptis.cluster import Cluster, cluster_from_json, uniform
from adaptis.console import table
from adaptis.execute.contest import Contest, contest_rank
from adaptis.execute.launch import launch
from adaptis.execute.train import adamw
from adaptis.files import write_bytes, write_json, write_text
from adaptis.plan import plan_from_json, plan_to_json
from adaptis.profile import Profile, load_profile, profile_from_json, profile_to_json, typical
from adaptis.report import png, svg
from adaptis.search import BASELINES, Stop, search
from adaptis.simulate import simulate_plan
from adaptis.timeline import timeline_from_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adaptis.plan import Plan

HERE = Path(__file__).parent
PROFILES = HERE.parent / "tests" / "data" / "profiles"
WARMUP = 2
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "1f1b-uneven")
ASLEEP = ((4, "nemotron-nano-v2-9b"), (8, "llama3-70b"))


def plans_of(profile: Profile, cluster: Cluster, microbatches: int, seconds: float) -> list[Plan]:
    """The schedules, and what the planner finds."""
    plans = [BASELINES[name](profile, cluster, microbatches) for name in SCHEDULES]
    return [*plans, search(profile, cluster, microbatches, Stop(seconds=seconds)).plan]


def contestants(profile: Profile, cluster: Cluster, say: Callable[..., None]) -> list[Plan]:
    """The same, as a contest asks for them."""
    return plans_of(profile, cluster, MICROBATCHES, seconds=3.0)


def study_real(name: str, steps: int) -> list[dict[str, Any]]:
    """One model under all schedules, in two processes."""
    contest = Contest(
        model=functools.partial(model_of, name),
        batches=batches_of(name),
        optimizer=adamw(),
        plans=contestants,
        steps=WARMUP + steps,
        num_microbatches=MICROBATCHES,
        warmup=WARMUP,
        closely=True,
    )
    result = launch(contest_rank, 2, contest)[0]
    cluster = cluster_from_json(result["cluster"])
    rows = []
    for value, found in zip(result["plans"], result["contestants"], strict=True):
        pairs = zip(found["losses"], result["reference_losses"], strict=True)
        assert all(math.isclose(*pair, rel_tol=1e-4) for pair in pairs), "not plain training's loss"
        profile = profile_from_json(found["profile"])
        predicted = simulate_plan(plan_from_json(value), profile, cluster)
        counted = timeline_from_json(found["timeline"]).peak_bytes
        both = zip(predicted.peak_bytes, counted, strict=True)
        row = judged(name, found["name"], predicted.step, typical(found["step_seconds"]))
        row["predicted_peak_bytes"], row["counted_peak_bytes"] = [*predicted.peak_bytes], [*counted]
        row["peak_error"] = max((p / m - 1 for p, m in both), key=abs)
        rows.append(row)
    return rows


def study_sleeping(size: int, name: str, steps: int) -> list[dict[str, Any]]:
    """All schedules on `size` processes whose layers sleep for the published times of a model."""
    given = load_profile(PROFILES / f"{name}.json")
    plans = plans_of(given, uniform(size), MICROBATCHES, seconds=2.0)
    texts = [json.dumps(plan_to_json(plan)) for plan in plans]
    found = launch(sleeping_rank, size, json.dumps(profile_to_json(given)), texts, steps)[0]
    return [
        judged(
            f"{name} asleep, {size} processes",
            plan.schedule,
            predict(given, plan, each),
            each["measured_seconds"],
        )
        | each
        for plan, each in zip(plans, found, strict=True)
    ]


def judged(model: str, schedule: str, predicted: float, measured: float) -> dict[str, Any]:
    return {
        "model": model,
        "schedule": schedule,
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "error": predicted / measured - 1,
    }


def show(rows: list[dict[str, Any]]) -> None:
    def peak(row: dict[str, Any], name: str) -> str:
        return " ".join(f"{size / 2**20:.1f}" for size in row.get(name, ()))

    table(
        rows[0]["model"],
        ("schedule", "predicted", "measured", "error", "peaks, MiB", "counted", "error"),
        [
            (
                row["schedule"],
                f"{row['predicted_seconds'] * 1e3:.1f} ms",
                f"{row['measured_seconds'] * 1e3:.1f} ms",
                f"{row['error']:+.1%}",
                peak(row, "predicted_peak_bytes"),
                peak(row, "counted_peak_bytes"),
                f"{row['peak_error']:+.1%}" if "peak_error" in row else "",
            )
            for row in rows
        ],
    )


def speedups(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast the planner's plan ran as the others, beside them in the same run."""
    seconds = {row["schedule"]: row["measured_seconds"] for row in rows}
    ours = seconds.pop("adaptis")
    return {name: each / ours for name, each in seconds.items()}


def summary(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """The mean and the worst of the absolute errors."""
    errors = [abs(row[key]) for row in rows if key in row]
    return {"cases": len(errors), "mean": fmean(errors), "worst": max(errors)} if errors else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("real", "sleeping"))
    parser.add_argument("--model", choices=MODELS, help="only this one of the real models")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each plan")
    arguments = parser.parse_args()
    real: list[dict[str, Any]] = []
    sleeping: list[dict[str, Any]] = []
    if arguments.only != "sleeping":
        for name in [arguments.model] if arguments.model else MODELS:
            rows = study_real(name, arguments.steps)
            real += rows
            show(rows)
    if arguments.only != "real":
        for size, name in ASLEEP:
            rows = study_sleeping(size, name, max(3, arguments.steps // 2))
            sleeping += rows
            show(rows)
    faster = {}
    for name in dict.fromkeys(row["model"] for row in real):
        faster[name] = speedups([row for row in real if row["model"] == name])
    if faster:
        names = list(next(iter(faster.values())))
        ratios = [(model, *(f"{found[n]:.2f}x" for n in names)) for model, found in faster.items()]
        table("the planner's plan, times as fast as", ("model", *names), ratios)
    figures = {
        "real": summary(real, "error"),
        "peak_memory": summary(real, "peak_error"),
        "sleeping": summary(sleeping, "error"),
    }
    for name, found in figures.items():
        if found:
            mean, worst = found["mean"], found["worst"]
            print(f"{name}: {found['cases']} cases, mean {mean:.2%}, worst {worst:.2%}")
    part = f"fidelity-{arguments.only}" if arguments.only else "fidelity"
    output = HERE / "results" / f"{part}-{time.strftime('%Y-%m-%d')}.json"
    write_json(output, {"summary": figures, "speedups": faster, "rows": real + sleeping})
    scene = scatter(real + sleeping, "Training steps: predicted against measured")
    write_text(output.with_suffix(".svg"), svg.paint(scene))
    write_bytes(output.with_suffix(".png"), png.paint(scene))
    print(f"written to {output}, and .svg and .png beside it")


if __name__ == "__main__":
    main()
