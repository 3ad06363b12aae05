"""How much faster training is with the planner's plan than with torch's runtime and schedules.

    python benchmarks/end_to_end.py [--model NAME] [--steps 12]

Two processes of one thread each train a model four times side by side: under the plan that the
planner finds from the measured layers, run by our executor; and by `torch.distributed.pipelining`
under its own 1F1B (as many layers on either rank), interleaved 1F1B (with as many chunks as our
performance model finds best) and ZBV (as many layers in each of its four stages). All begin with
the same weights and get the same batches, a step of each in an order that changes. A step goes from
a barrier to the moment when the last rank has updated its weights and knows the loss. The losses
must be those of plain training in one process; where they are not, the table says so.

Torch's values pass over gloo, ours through memory that the processes share. Tied embeddings, which
torch leaves to its users, are summed by one all-reduce.

Speed-ups are medians of the ratios of steps side by side. Prints a table, writes
`benchmarks/results/end-to-end-DATE.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from running.models import MICROBATCHES, MODELS, batches_of, model_of
from running.rival import CLASSES, Alone, Pipeline, tied_parameters

from adaptis.console import table
from adaptis.execute.launch import launch
from adaptis.execute.prepare import Measurement
from adaptis.execute.reference import Reference
from adaptis.execute.session import Session
from adaptis.execute.train import adamw
from adaptis.execute.world import seated
from adaptis.files import write_json
from adaptis.plan import plan_from_json, plan_to_json
from adaptis.search import BASELINES, Stop, search

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from adaptis.execute.launch import Seat
    from adaptis.execute.prepare import Measured
    from adaptis.execute.world import World
    from adaptis.measure.stage import TorchModel
    from adaptis.plan import Plan

HERE = Path(__file__).parent
ROUNDS, WARMUP, SECONDS = 20, 2, 5.0
OURS = "adaptis"


def plans_of(world: World, measured: Measured) -> dict[str, Plan]:
    """What the planner finds, and how torch's schedules cut the model; the same on every rank."""
    text = None
    if world.rank == 0:
        given = measured.profile, measured.cluster, MICROBATCHES
        with world.every_core():
            plans = {name: BASELINES[name](*given) for name in CLASSES}
            plans[OURS] = search(*given, Stop(seconds=SECONDS)).plan
        text = json.dumps({name: plan_to_json(plan) for name, plan in plans.items()})
    found = json.loads(world.broadcast(text))
    return {name: plan_from_json(value) for name, value in found.items()}


def rival(world: World, model: TorchModel, name: str, plan: Plan, length: int) -> Pipeline:
    """Torch's runtime with the stages of `plan`."""
    stages = {
        s: model.build(stage.start, stage.stop, seed=0)
        for s, stage in enumerate(plan.stages)
        if stage.device == world.rank
    }
    tied = tied_parameters(world, stages)
    modules = {s: Alone(stage, length) for s, stage in stages.items()}
    count = len(plan.stages)
    return Pipeline(world, model, modules, name, count, MICROBATCHES, adamw(), tied)


def race_rank(seat: Seat, connection: Connection, name: str, steps: int) -> dict[str, Any]:
    """Losses of all and of plain training; begin and end of every step on this rank."""
    with seated(seat, connection) as world:
        model, batches = model_of(name), batches_of(name)
        first = batches(0)[0]
        measurement = Measurement(
            world, model, first, optimizer=adamw(), num_microbatches=MICROBATCHES
        )
        measurement.rounds(ROUNDS)
        plans = plans_of(world, measurement.result())
        length = first["inputs"].shape[1]
        session = Session(world, model, plans[OURS], optimizer=adamw())
        runners: dict[str, Callable[..., float]] = {OURS: lambda batch: session.step(batch).loss}
        for each in CLASSES:
            runners[each] = rival(world, model, each, plans[each], length).step
        plain = Reference(model, optimizer=adamw(), seed=0, device=world.device)
        found: dict[str, Any] = {each: {"losses": [], "spans": []} for each in runners}
        found["plain"] = {"losses": []}
        for step in range(WARMUP + steps):
            batch = batches(step)
            if world.rank == 0:
                found["plain"]["losses"].append(plain.step(batch))
            for each in random.Random(step).sample(sorted(runners), len(runners)):
                world.barrier()
                begin = time.perf_counter()
                found[each]["losses"].append(runners[each](batch))
                found[each]["spans"].append((begin, time.perf_counter()))
        return {"runs": found, "stages": {each: len(plan.stages) for each, plan in plans.items()}}


def judged(name: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one model, from what both ranks found."""
    runs = [rank["runs"] for rank in ranks]
    seconds = {}
    for each in (OURS, *CLASSES):
        spans = zip(*(run[each]["spans"] for run in runs), strict=True)
        both = [max(s[1] for s in span) - min(s[0] for s in span) for span in spans]
        seconds[each] = both[WARMUP:]
    plain = runs[0]["plain"]["losses"]
    off = {
        each: max(abs(a / b - 1) for a, b in zip(runs[0][each]["losses"], plain, strict=True))
        for each in seconds
    }
    assert off[OURS] < 1e-4, "our losses are not those of plain training"
    return {
        "model": name,
        "stages": ranks[0]["stages"],
        "step_seconds": {each: median(values) for each, values in seconds.items()},
        "loss_off": off,
        "speedups": {
            each: median(a / b for a, b in zip(seconds[each], seconds[OURS], strict=True))
            for each in CLASSES
        },
    }


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    wrong = [each for each, off in row["loss_off"].items() if off > 1e-4]
    return (
        row["model"],
        f"{row['step_seconds'][OURS] * 1e3:.0f} ms",
        *(f"{row['step_seconds'][each] * 1e3:.0f} ms" for each in CLASSES),
        *(f"{row['speedups'][each]:.2f}x" for each in CLASSES),
        ", ".join(wrong) or "none",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, help="only this one")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each")
    arguments = parser.parse_args()
    rows = []
    for name in [arguments.model] if arguments.model else MODELS:
        rows.append(judged(name, launch(race_rank, 2, name, arguments.steps)))
        print(f"{name} is done", flush=True)
    head = ("model", OURS, *(f"torch {each}" for each in CLASSES))
    head += (*(f"over {each}" for each in CLASSES), "wrong losses")
    table("a step of each, and the speed-up of our plan over torch", head, map(shown, rows))
    output = HERE / "results" / f"end-to-end-{time.strftime('%Y-%m-%d')}.json"
    write_json(output, {"rows": rows})
    print(f"written to {output}")


if __name__ == "__main__":
    main()
