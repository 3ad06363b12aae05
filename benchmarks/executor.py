"""How fast the executor is, beside `torch.distributed.pipelining`.

    python benchmarks/executor.py [--steps 100] [--only small] [--gloo]

Two processes of one thread each train the same model from the same weights on the same batches
under the same schedule, a step of ours and a step of torch's in turn; whoever was first is second
the next time. A step goes from a barrier to the moment when the last rank has updated its weights
and knows the loss of the batch. Both must have the same weights in the end. `ratio` is the median
of the pairs' ratios, `CPU` the ratio of the processor seconds that both ranks spend on a step with
all their threads.

Torch's values pass over gloo; ours through memory that the processes share, or with `--gloo` over
gloo as well.

1F1B is torch's own class; interleaved and ZBV are dumped by torch and read by us. The trivial
layers show what an instruction costs beside its arithmetic: `us/instr` is the step divided by the
computations, sends and receives of one rank. `loop` is what our loop adds to an instruction in one
process, outside of the computation itself. `the timeline` is what recording costs: two clock
readings and a row for each computation, as a share of our step where that is largest.

Prints a table, writes `benchmarks/results/executor-DATE.json`.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from running.models import Block, Perceptron, Trivial, numbers, squares
from running.rival import Pipeline
from torch import nn

from adaptis.exchange.torch_csv import read_schedule
from adaptis.execute.launch import launch
from adaptis.execute.session import Session
from adaptis.execute.wire import TorchWire
from adaptis.execute.world import seated
from adaptis.files import write_json
from adaptis.lower import lower
from adaptis.measure.stage import Chain
from adaptis.plan import Plan, Stage, named_plan
from adaptis.program import Compute, Op, parts
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from adaptis.execute.launch import Seat
    from adaptis.execute.world import World
    from adaptis.measure.stage import Microbatch

HERE = Path(__file__).parent
LAYERS, MICROBATCHES, WARMUP = 8, 8, 5
PLACEMENTS = {"1f1b": (0, 1), "interleaved": (0, 1, 0, 1), "zb-v": (0, 1, 1, 0)}
sgd = functools.partial(torch.optim.SGD, lr=0.1)


class Size(NamedTuple):
    """A model of equal layers and the shape of a micro-batch's input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


MODELS = {
    "trivial": Size(Trivial, (1, 2)),
    "small": Size(functools.partial(Perceptron, 64, 2), (32, 64)),
    "medium": Size(functools.partial(Block, 256, 4), (1, 128, 256)),
}


def batch_of(size: Size, step: int) -> list[Microbatch]:
    torch.manual_seed(step)
    return [
        {"inputs": torch.randn(size.shape), "labels": torch.randn(size.shape)}
        for _ in range(MICROBATCHES)
    ]


def model_of(size: Size) -> Chain:
    return Chain([size.make] * LAYERS, squares, weight=numbers)


def layers_of(model: Chain, start: int, stop: int) -> list[nn.Module]:
    """The same layers with the same weights as our stage has them, without the stage."""
    return [model.build(i, i + 1, seed=0).get_submodule(f"layers.{i}") for i in range(start, stop)]


def rival(world: World, size: Size, name: str) -> Pipeline:
    """The same training by torch's runtime, with the layers as they are."""
    placement, model = PLACEMENTS[name], model_of(size)
    each = LAYERS // len(placement)
    modules = {
        s: nn.Sequential(*layers_of(model, s * each, (s + 1) * each))
        for s, device in enumerate(placement)
        if device == world.rank
    }
    return Pipeline(world, model, modules, name, len(placement), MICROBATCHES, sgd)


def plan_of(name: str, theirs: Pipeline) -> Plan:
    """What torch runs, as a plan of ours."""
    count = len(PLACEMENTS[name])
    each = LAYERS // count
    if name == "1f1b":  # torch's description of it differs from what its class runs
        stops = range(each, LAYERS + 1, each)
        return named_plan(SCHEDULES[name], Shape(2, MICROBATCHES), stops)
    plan = read_schedule(theirs.dumped(), count)
    assert plan.placement == PLACEMENTS[name]
    stages = [Stage(s * each, (s + 1) * each, d) for s, d in enumerate(plan.placement)]
    return replace(plan, stages=tuple(stages), schedule=name)


def race(world: World, model: str, name: str, steps: int) -> dict[str, Any]:
    """(begin, end, processor seconds) of every step on this rank, ours and torch's."""
    size = MODELS[model]
    theirs = rival(world, size, name)
    plan = plan_of(name, theirs)
    ours = Session(world, model_of(size), plan, optimizer=sgd, key=0)
    runners = {"ours": lambda b: ours.step(b).loss, "torch": theirs.step}
    times: dict[str, list[tuple[float, float, float]]] = {"ours": [], "torch": []}
    for step in range(WARMUP + steps):
        batch = batch_of(size, step)
        losses = []
        for key in ("ours", "torch") if step % 2 else ("torch", "ours"):
            world.barrier()
            begin, work = time.perf_counter(), time.process_time()
            losses.append(runners[key](batch))
            if step >= WARMUP:
                spent = time.process_time() - work
                times[key].append((begin, time.perf_counter(), spent))
        off = abs(losses[0] / losses[1] - 1)
        assert off < 1e-4, f"{model}, {name}, step {step}: the losses are off by {off:.1e}"
    pairs = zip(ours.parameters.values(), theirs.parameters, strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
    row = lower(plan).devices[world.rank]
    computations = sum(len(parts(instruction)) for instruction in row)
    return {"times": times, "instructions": len(row) - 1, "computations": computations}


def recording_cost(count: int = 10_000) -> float:
    """Seconds that one row of the timeline costs."""
    clock, compute, found = time.perf_counter, Compute(Op.FORWARD, 0, 0), []
    for _ in range(21):
        rows: list[tuple[Compute, float, float]] = []
        start = clock()
        for _ in range(count):
            begin = clock()
            rows.append((compute, begin, clock()))
        found.append((clock() - start) / count)
    return median(found)


def loop_cost(world: World, steps: int) -> float:
    """Seconds an instruction that the loop adds in one process: 1F1B over two stages here."""
    size = MODELS["trivial"]
    stops = (LAYERS // 2, LAYERS)
    plan = named_plan(SCHEDULES["1f1b"], Shape(2, MICROBATCHES), stops)
    order = [c for row in plan.programs for c in row if isinstance(c, Compute)]
    order.sort(key=lambda c: (c.op is not Op.FORWARD, c.stage * (1 if c.op is Op.FORWARD else -1)))
    stages = tuple(replace(stage, device=0) for stage in plan.stages)
    session = Session(
        world,
        model_of(size),
        replace(plan, stages=stages, programs=(tuple(order),)),
        optimizer=sgd,
    )
    found = []
    for step in range(WARMUP + steps):
        result = session.step(batch_of(size, step))
        rows = result.rows
        computing = sum(end - begin for _, begin, end in rows)
        found.append((rows[-1][2] - result.begin - computing) / len(rows))
    return median(found[WARMUP:])


def executor_rank(
    seat: Seat, connection: Connection, cases: list[tuple[str, str]], steps: int, gloo: bool
) -> list[dict[str, Any]]:
    with seated(seat, connection) as world:
        if gloo:
            world.wires[world.ranks()] = TorchWire()
        return [
            race(world, model, name, steps // 4 if model == "medium" else steps)
            for model, name in cases
        ]


def loop_rank(seat: Seat, connection: Connection, steps: int) -> float:
    with seated(seat, connection) as world:
        return loop_cost(world, steps)


def judged(model: str, name: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one case, from what both ranks found."""

    def steps(key: str) -> list[float]:
        spans = zip(*(rank["times"][key] for rank in ranks), strict=True)
        return [max(x[1] for x in span) - min(x[0] for x in span) for span in spans]

    def processor(key: str) -> float:
        return sum(median(x[2] for x in rank["times"][key]) for rank in ranks)

    ours, theirs = steps("ours"), steps("torch")
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    count = ranks[0]["instructions"]
    return {
        "model": model,
        "schedule": name,
        "steps": len(ours),
        "ours_seconds": median(ours),
        "torch_seconds": median(theirs),
        "ratio": median(ratios),
        "processor_ratio": processor("ours") / processor("torch"),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "instructions_per_rank": count,
        "computations_per_rank": ranks[0]["computations"],
        "ours_microseconds_per_instruction": median(ours) / count * 1e6,
        "torch_microseconds_per_instruction": median(theirs) / count * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=100, help="timed steps of each; medium: a quarter"
    )
    parser.add_argument("--only", choices=[*MODELS], help="only this model")
    parser.add_argument("--gloo", action="store_true", help="our values pass over gloo, too")
    arguments = parser.parse_args()
    models = [arguments.only] if arguments.only else [*MODELS]
    cases = [(model, name) for model in models for name in PLACEMENTS]
    print(
        f"{'model':8} {'schedule':12} {'ours':>10} {'torch':>10} {'ratio':>6} "
        f"{'middle half':>13} {'CPU':>6} {'us/instr':>9} {'torch':>7}"
    )
    ranks = launch(executor_rank, 2, cases, arguments.steps, arguments.gloo)
    results = []
    for index, case in enumerate(cases):
        row = judged(*case, [rank[index] for rank in ranks])
        results.append(row)
        low, high = row["ratio_quartiles"]
        print(
            f"{row['model']:8} {row['schedule']:12} {row['ours_seconds'] * 1e3:8.2f}ms "
            f"{row['torch_seconds'] * 1e3:8.2f}ms {row['ratio']:6.3f} {low:6.3f}-{high:6.3f} "
            f"{row['processor_ratio']:6.3f} {row['ours_microseconds_per_instruction']:9.1f} "
            f"{row['torch_microseconds_per_instruction']:7.1f}"
        )
    (loop,) = launch(loop_rank, 1, arguments.steps)
    print(f"the loop adds {loop * 1e6:.1f} us to an instruction")
    recording = recording_cost()
    share = max(r["computations_per_rank"] * recording / r["ours_seconds"] for r in results)
    print(
        f"the timeline costs {recording * 1e6:.2f} us a computation, at most {share:.3%} of a step"
    )
    name = "executor-gloo" if arguments.gloo else "executor"
    output = HERE / "results" / f"{name}-{time.strftime('%Y-%m-%d')}.json"
    result = {
        "torch": torch.__version__,
        "rows": results,
        "loop_seconds_per_instruction": loop,
        "recording_seconds_per_computation": recording,
        "recording_share_of_step": share,
    }
    write_json(output, result)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
