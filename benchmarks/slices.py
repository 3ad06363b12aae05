"""What slices of long sequences gain: few, long micro-batches, whole and cut into slices.

    python benchmarks/slices.py [--sequences 4] [--length 1024] [--slices 4] [--steps 12]

Two processes of one thread each train equal attention blocks (8, width 192) side by side under
schedules of whole micro-batches and of slices, a step of each in turn, in an order that changes.
Each has the cut of the model that is best for it by the performance model. The losses must be those
of plain training on whole sequences. Memory is counted in one more step.

The prediction takes a slice for its share of a whole micro-batch: in truth later slices look back
further, and each has the costs of an instruction of its own. Speed-ups are medians of the ratios of
steps side by side. Prints a table, writes `benchmarks/results/slices-DATE.json`.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from running.models import VOCABULARY, attention_chain

from adaptis.cluster import cluster_from_json
from adaptis.console import table
from adaptis.execute.contest import Contest, contest_rank
from adaptis.execute.launch import launch
from adaptis.execute.train import adamw
from adaptis.files import write_json
from adaptis.plan import named_plan, plan_from_json
from adaptis.profile import profile_from_json, typical
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.search import BASELINES
from adaptis.simulate import simulate_plan
from adaptis.timeline import timeline_from_json
from adaptis.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptis.cluster import Cluster
    from adaptis.measure.stage import Microbatch
    from adaptis.plan import Plan
    from adaptis.profile import Profile
    from adaptis.timeline import Timeline

HERE = Path(__file__).parent
WARMUP = 2


def sequences(step: int, count: int, length: int) -> list[Microbatch]:
    """Micro-batches of one sequence."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (count, 1, length + 1), generator=generator)
    return [{"inputs": row[:, :-1], "labels": row[:, 1:]} for row in ids]


def contestants(
    profile: Profile, cluster: Cluster, _: Callable[..., None], *, count: int, slices: int
) -> list[Plan]:
    """Schedules of whole micro-batches, then those of slices, each at its best cut."""
    whole = [BASELINES[name](profile, cluster, count) for name in ("gpipe", "1f1b-uneven")]
    whole.append(BASELINES["interleaved"](profile, cluster, count))
    kinds = [("terapipe", 1), ("seq1f1b", 1), ("seq1f1b", 2), ("slimpipe", 2)]

    def best(name: str, chunks: int) -> Plan:
        layers, shape = profile.num_layers, Shape(2, count, chunks, slices)
        cuts = combinations(range(1, layers), 2 * chunks - 1)
        plans = [named_plan(SCHEDULES[name], shape, (*cut, layers), profile) for cut in cuts]
        return min(plans, key=lambda plan: predicted(plan, profile, cluster).step)

    return [*whole, *(best(name, chunks) for name, chunks in kinds)]


def predicted(plan: Plan, profile: Profile, cluster: Cluster) -> Timeline:
    """A step, where each slice is its share of a whole micro-batch."""
    each = plan.num_sequences / plan.num_microbatches
    return simulate_plan(plan, profile, cluster, Workload((each,) * plan.num_microbatches))


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of every contestant."""
    cluster = cluster_from_json(result["cluster"])
    profile = profile_from_json(result["profile_during_race"])
    base = result["contestants"][1]["step_seconds"]
    rows = []
    for value, found in zip(result["plans"], result["contestants"], strict=True):
        pairs = zip(found["losses"], result["reference_losses"], strict=True)
        assert all(math.isclose(*pair, rel_tol=1e-4) for pair in pairs), "not plain training's loss"
        plan = plan_from_json(value)
        timeline = predicted(plan, profile, cluster)
        seconds = typical(found["step_seconds"])
        rows.append(
            {
                "schedule": plan.schedule,
                "stages": len(plan.stages),
                "slices": plan.num_microbatches // plan.num_sequences,
                "measured_seconds": seconds,
                "predicted_seconds": timeline.step,
                "error": timeline.step / seconds - 1,
                "speedup": median(a / b for a, b in zip(base, found["step_seconds"], strict=True)),
                "counted_peak_bytes": [*timeline_from_json(found["timeline"]).peak_bytes],
                "predicted_peak_bytes": [*timeline.peak_bytes],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--slices", type=int, default=4, help="of each sequence")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each")
    arguments = parser.parse_args()
    contest = Contest(
        model=attention_chain,
        batches=functools.partial(sequences, count=arguments.sequences, length=arguments.length),
        optimizer=adamw(),
        plans=functools.partial(contestants, count=arguments.sequences, slices=arguments.slices),
        steps=WARMUP + arguments.steps,
        num_microbatches=arguments.sequences,
        warmup=WARMUP,
    )
    result = launch(contest_rank, 2, contest)[0]
    rows = judged(result)

    def mib(sizes: list[int]) -> str:
        return " ".join(f"{size / 2**20:.0f}" for size in sizes)

    head = ("schedule", "slices", "stages", "step", "over 1F1B", "predicted", "error")
    table(
        f"{arguments.sequences} sequences of {arguments.length} tokens in two processes",
        (*head, "peaks, MiB", "predicted"),
        [
            (
                row["schedule"],
                str(row["slices"]),
                str(row["stages"]),
                f"{row['measured_seconds'] * 1e3:.0f} ms",
                f"{row['speedup']:.2f}x",
                f"{row['predicted_seconds'] * 1e3:.0f} ms",
                f"{row['error']:+.1%}",
                mib(row["counted_peak_bytes"]),
                mib(row["predicted_peak_bytes"]),
            )
            for row in rows
        ],
    )
    output = HERE / "results" / f"slices-{time.strftime('%Y-%m-%d')}.json"
    write_json(output, {"arguments": vars(arguments), "rows": rows})
    print(f"written to {output}")


if __name__ == "__main__":
    main()
