"""How fast the performance model is.

    python benchmarks/simulator.py [--repeat 7] [--quick]

1. Replay, time and memory, of split 1F1B programs on 16 devices from 10,000 to 10,000,000
   instructions (computations, sends and receives), compiled beside plain Python over the same rows
   in one run; the exponent of a fit says whether the cost is linear.
2. What a search calls, without Python objects, at 16 devices x 2 stages x 128 micro-batches with
   the backward split: replays and list-schedulings per second.
3. Start-up: `adaptis --help`, and a first `adaptis simulate` of a small plan with an empty cache of
   compiled code and with a full one.

One core each; medians of alternating runs. Prints tables, writes
`benchmarks/results/simulator-DATE.json`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.cluster import Link, uniform
from adaptis.costs import RowCosts, price, price_rows
from adaptis.files import write_json
from adaptis.kernels import compiled as machine_code
from adaptis.kernels import peaks, replay
from adaptis.lower import LOOKAHEAD
from adaptis.plan import Plan, Stage, named_plan, save_plan
from adaptis.profile import LayerCost, Overheads, Profile
from adaptis.program import Layout
from adaptis.rows import Columns, F, I, Rows, W, make_rows
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.search.convert import counted
from adaptis.search.greedy import evaluate
from adaptis.search.instance import make_instance
from adaptis.search.placement import starts
from adaptis.search.polish import make_trace, retime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HERE = Path(__file__).parent
DEVICES = 16
PLAIN_ROWS = 1_000_000  # beyond these plain Python takes minutes


def profile_of(num_layers: int) -> Profile:
    layers = tuple(
        LayerCost(
            str(i),
            "mlp",
            0.010 + 0.001 * (i % 3),
            0.010,
            0.008,
            0.018,
            saved_bytes=1 << 20,
            saved_weight_bytes=1 << 19,
            output_bytes=1 << 16,
        )
        for i in range(num_layers)
    )
    return Profile("bench", 1024, layers, Overheads(send=1e-5, receive=1e-5))


def split_1f1b(devices: int, microbatches: int) -> Columns:
    """The columns of 1F1B with F, I and W, written without a Python object an instruction."""
    parts, sizes = [], []
    for rank in range(devices):
        warmup = min(devices - 1 - rank, microbatches)
        steady = np.arange(microbatches - warmup)
        tail = np.arange(microbatches - warmup, microbatches)
        pairs = [np.stack([np.full(warmup, F), np.arange(warmup)])]
        for ops, numbers in (
            ((F, I, W), (steady + warmup, steady, steady)),
            ((I, W), (tail, tail)),
        ):
            block = np.empty((2, len(ops) * len(numbers[0])), dtype=np.int64)
            for k, (op, number) in enumerate(zip(ops, numbers, strict=True)):
                block[0, k :: len(ops)], block[1, k :: len(ops)] = op, number
            pairs.append(block)
        parts.append(np.concatenate(pairs, axis=1))
        sizes.append(parts[-1].shape[1])
    table = np.concatenate(parts, axis=1)
    offsets = np.cumsum([0, *sizes])
    first = np.repeat(offsets[:-1], sizes)
    return Columns(
        offsets,
        table[0].astype(np.int8),
        np.repeat(np.arange(devices), sizes).astype(np.int32),
        table[1].astype(np.int32),
        np.full(table.shape[1], -1, dtype=np.int32),
        np.maximum(np.arange(table.shape[1]) - LOOKAHEAD, first).astype(np.int32),
    )


def plain_replay(rows: Rows, prices: RowCosts, static: Sequence[float]) -> Callable[[], Any]:
    """The same replay, time and memory, in plain Python over lists."""
    offsets, need_offsets, needs = (
        x.tolist() for x in (rows.offsets, rows.need_offsets, rows.needs)
    )
    take, seconds, give, delay = prices.seconds.T.tolist()
    taken, freed = prices.taken.tolist(), prices.freed.tolist()
    devices = rows.num_devices

    def run() -> list[float]:
        n, lanes = len(seconds), len(offsets) - 1
        start, end, there = [0.0] * n, [0.0] * n, [-1.0] * n
        clock, position = [0.0] * lanes, offsets[:-1]
        waiting: dict[int, list[int]] = {}
        stack = list(range(lanes))
        while stack:
            lane = stack.pop()
            i, stop, now = position[lane], offsets[lane + 1], clock[lane]
            while i < stop:
                begin = now
                for k in range(need_offsets[i], need_offsets[i + 1]):
                    arrived = there[needs[k]]
                    if arrived < 0:
                        waiting.setdefault(needs[k], []).append(lane)
                        break
                    begin = max(begin, arrived)
                else:
                    begin += take[i]
                    start[i] = begin
                    end[i] = begin + seconds[i]
                    now = end[i] + give[i]
                    there[i] = now + delay[i]
                    if i in waiting:
                        stack += waiting.pop(i)
                    i += 1
                    continue
                break
            position[lane], clock[lane] = i, now
        peak = list(static)
        for device in range(devices):
            held = static[device]
            for i in range(offsets[device], offsets[device + 1]):
                held += taken[i]
                peak[device] = max(peak[device], held)
                held -= freed[i]
        return [max(end), *peak]

    return run


def timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def study_replay(instructions: int, repeat: int) -> dict[str, Any]:
    microbatches = instructions // (3 * DEVICES + 4 * (DEVICES - 1))
    columns = split_1f1b(DEVICES, microbatches)
    layout = Layout(tuple(range(DEVICES)), microbatches)
    begin = time.perf_counter()
    rows = make_rows(columns, layout)
    lowering = time.perf_counter() - begin
    stages = tuple(Stage(d, d + 1, d) for d in range(DEVICES))
    plan = Plan(microbatches, stages, ((),) * DEVICES)
    cluster = uniform(DEVICES, link=Link(1e-5, 1e10))
    costs = price(plan, profile_of(DEVICES), cluster)
    prices = price_rows(rows, costs, np.ones(microbatches))
    times = np.zeros((len(rows.op), 3))
    found: list[float] = []

    fast_replay, fast_peaks = machine_code(replay), machine_code(peaks)

    def compiled() -> None:
        count = fast_replay(rows.offsets, rows.need_offsets, rows.needs, prices.seconds, times)
        most = fast_peaks(columns.offsets, prices.taken, prices.freed, costs.static_bytes)
        assert count == len(rows.op)
        found[:] = [float(times[:, 1].max()), *most.tolist()]

    count = rows.num_computations + 2 * rows.num_transfers
    plain = plain_replay(rows, prices, costs.static_bytes.tolist())
    compare = len(rows.op) <= PLAIN_ROWS
    compiled()
    ours, theirs = [], []
    for _ in range(repeat):
        ours.append(timed(compiled))
        if compare:
            theirs.append(timed(plain))
    if compare:
        assert plain() == found, "the two replays differ"
    seconds = median(ours)
    return {
        "instructions": count,
        "rows": len(rows.op),
        "seconds": seconds,
        "instructions_per_second": count / seconds,
        "times_plain_python": median(theirs) / seconds if theirs else None,
        "row_making_seconds": lowering,
    }


def study_search_form(repeat: int) -> dict[str, Any]:
    chunks, microbatches = 2, 128
    profile = profile_of(DEVICES * chunks)
    shape = Shape(DEVICES, microbatches, chunks)
    plan = named_plan(SCHEDULES["zb-v"], shape, range(1, DEVICES * chunks + 1), profile)
    instance = make_instance(profile, uniform(DEVICES, link=Link(1e-5, 1e10)), microbatches)
    fixed = counted(plan)
    assert fixed is not None
    trace = make_trace(len(fixed.kind))
    _, candidate = starts(instance)[0]
    split = candidate._replace(
        stop=fixed.stop,
        device=fixed.device,
        split=np.ones(len(fixed.stop), dtype=np.bool_),
        nudge=np.zeros((len(fixed.stop), 3)),
    )

    def many(function: Callable[[], Any], times: int) -> float:
        return times / timed(lambda: [function() for _ in range(times)])

    retime(instance, fixed, trace)
    evaluate(instance, split)
    replays, schedulings = [], []
    for _ in range(repeat):
        replays.append(many(lambda: retime(instance, fixed, trace), 400))
        schedulings.append(many(lambda: evaluate(instance, split), 40))
    return {
        "computations": len(fixed.kind),
        "replays_per_second": median(replays),
        "list_schedulings_per_second": median(schedulings),
    }


def study_start_up(repeat: int) -> dict[str, Any]:
    adaptis = Path(sys.executable).with_name("adaptis")
    profile = HERE.parent / "tests" / "data" / "profiles" / "nemotron-nano-v2-9b.json"
    shape = Shape(4, 8)
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder, "plan.json")
        save_plan(named_plan(SCHEDULES["1f1b"], shape, (15, 29, 43, 58)), plan)

        def run(*words: object, cache: str) -> float:
            environment = os.environ | {"NUMBA_CACHE_DIR": str(Path(folder, cache))}
            command = [str(adaptis), *map(str, words)]
            return timed(
                lambda: subprocess.run(command, env=environment, check=True, capture_output=True)
            )

        simulate = ("simulate", profile, plan, "--json")
        return {
            "help_seconds": median(run("--help", cache="x") for _ in range(repeat)),
            "simulate_cold_seconds": median(
                run(*simulate, cache=f"cold-{k}") for k in range(min(repeat, 3))
            ),
            "simulate_warm_seconds": median(run(*simulate, cache="cold-0") for _ in range(repeat)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="up to 1,000,000 instructions")
    arguments = parser.parse_args()
    sizes = [10**4, 3 * 10**4, 10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7]
    sizes = sizes[:5] if arguments.quick else sizes
    print(f"{'instructions':>12} {'replay':>10} {'M/s':>6} {'plain Python':>13} {'make rows':>10}")
    rows = []
    for size in sizes:
        row = study_replay(size, arguments.repeat)
        rows.append(row)
        ratio = f"{row['times_plain_python']:.0f}x" if row["times_plain_python"] else "-"
        print(
            f"{row['instructions']:>12,} {row['seconds'] * 1e3:8.2f}ms "
            f"{row['instructions_per_second'] / 1e6:6.1f} {ratio:>13} "
            f"{row['row_making_seconds']:9.3f}s",
            flush=True,
        )
    x, y = (np.log([row[name] for row in rows]) for name in ("instructions", "seconds"))
    exponent = float(np.polyfit(x, y, 1)[0])
    print(f"seconds ~ instructions ^ {exponent:.3f}")
    form = study_search_form(arguments.repeat)
    print(
        f"search form, {form['computations']:,} computations: "
        f"{form['replays_per_second']:,.0f} replays/s, "
        f"{form['list_schedulings_per_second']:,.0f} list-schedulings/s"
    )
    start = study_start_up(arguments.repeat)
    print(
        f"adaptis --help {start['help_seconds']:.2f} s; first simulate "
        f"{start['simulate_cold_seconds']:.2f} s cold, {start['simulate_warm_seconds']:.2f} s warm"
    )
    output = HERE / "results" / f"simulator-{time.strftime('%Y-%m-%d')}.json"
    result = {"replay": rows, "exponent": exponent, "search_form": form, "start_up": start}
    write_json(output, result)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
