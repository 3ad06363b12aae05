"""How far the planner is from the proven optimum, on small random problems.

    python benchmarks/optimality.py [--count 100] [--first 0] [--search 3] [--seconds 60]

Each problem has 2 to 4 devices, up to 12 layers of uneven cost and 8 micro-batches; some have
devices of two speeds, links that take time, or tight memory. The planner searches for a few
seconds; then every plan is refuted or improved on. Prints a table and writes
`benchmarks/results/optimality-DATE.json`.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from adaptis.cluster import Cluster, Device, Link
from adaptis.errors import InfeasibleError
from adaptis.files import write_json
from adaptis.profile import LayerCost, Overheads, Profile
from adaptis.program import Op, parts
from adaptis.search import Stop, search
from adaptis.search.exact import exact_plan
from adaptis.search.tune import warm_up

if TYPE_CHECKING:
    from adaptis.plan import Plan

HERE = Path(__file__).parent
TICK = 1e-5  # all seconds are multiples: what is proven is proven exactly
BYTES = 1000
MOST = {2: (12, 8), 3: (8, 6), 4: (7, 6)}  # layers and micro-batches: what can mostly be proven


def make_problem(seed: int) -> tuple[Profile, Cluster, int]:
    """A few kinds of layers in a random chain, a light first and a heavy last one."""
    rng = random.Random(seed)
    num_devices = rng.choice((2, 2, 3, 3, 4))
    most_layers, most_microbatches = MOST[num_devices]
    num_layers, microbatches = rng.randint(4, most_layers), rng.randint(2, most_microbatches)
    kinds = [[rng.randint(20, 200) for _ in range(3)] for _ in range(3)]
    chosen = [rng.choice(kinds) for _ in range(num_layers)]
    chosen[0] = [rng.randint(5, 60) for _ in range(3)]
    chosen[-1] = [rng.randint(50, 400) for _ in range(3)]
    layers = tuple(
        LayerCost(
            name=str(i),
            kind="mlp",
            forward=f * TICK,
            backward_input=b * TICK,
            backward_weight=w * TICK,
            backward=(b + w) * TICK,
            update=rng.randint(0, 40) * TICK,
            saved_bytes=10 * BYTES,
            saved_weight_bytes=4 * BYTES,
            output_bytes=BYTES,
        )
        for i, (f, b, w) in enumerate(chosen)
    )
    extra = rng.randint(2, 8) * TICK
    profile = Profile("random", 1, layers, overheads=Overheads(extra, extra, extra, extra))
    link = Link()
    if rng.random() < 0.5:
        link = Link(rng.randint(0, 20) * TICK, BYTES / (rng.randint(1, 20) * TICK))
    speeds = [1.0] * num_devices if rng.random() < 0.7 else rng.choices((0.5, 1.0), k=num_devices)
    memory = math.inf
    if rng.random() < 0.3:  # room for a few micro-batches of an even share of the layers
        memory = (
            rng.uniform(2.0, 4.0) * 10 * BYTES * num_layers / num_devices * min(2, microbatches)
        )
    devices = tuple(Device(speed, memory) for speed in speeds)
    return profile, Cluster(devices, link, link), microbatches


def shape(plan: Plan) -> str:
    """The layers of each stage with its device, * where the backward is split."""
    works = [work for order in plan.programs for work in order]
    split = {c.stage for work in works for c in parts(work) if c.op is Op.BACKWARD_WEIGHT}
    return " ".join(
        f"{stage.start}-{stage.stop - 1}@{stage.device}{'*' * (s in split)}"
        for s, stage in enumerate(plan.stages)
    )


def study(seed: int, search_seconds: float, seconds: float) -> dict[str, Any] | None:
    profile, cluster, microbatches = make_problem(seed)
    stop = Stop(seconds=search_seconds)
    try:
        found = search(profile, cluster, microbatches, stop, seed=0)
        start, step = found.plan, found.timeline.step
    except InfeasibleError:
        start, step = None, math.inf
    try:
        exact = exact_plan(profile, cluster, microbatches, seconds, start=start, workers=2)
    except InfeasibleError:
        return None
    return {
        "seed": seed,
        "devices": cluster.num_devices,
        "layers": profile.num_layers,
        "microbatches": microbatches,
        "speeds": sorted({device.speed for device in cluster.devices}),
        "free_transfers": cluster.free_transfers,
        "memory_limited": math.isfinite(cluster.devices[0].memory_bytes),
        "found_seconds": step,
        "best_seconds": exact.step_seconds,
        "over_best": max(step / exact.step_seconds - 1, 0.0),  # at least this much is lost
        "bound_seconds": exact.bound_seconds,
        "optimal": exact.optimal,
        "gap": max(step / exact.bound_seconds - 1, 0.0),
        "proof_seconds": exact.seconds,
        "deals": exact.deals,
        "found": shape(start) if start else "nothing",
        "best": shape(exact.plan),
    }


def show(row: dict[str, Any]) -> None:
    size = f"{row['devices']} x {row['layers']} x {row['microbatches']}"
    signs = f"{'slow ' * (len(row['speeds']) > 1)}{'links ' * (not row['free_transfers'])}"
    signs += "memory" * row["memory_limited"]
    verdict = "optimum" if row["optimal"] else "bound"
    print(
        f"{row['seed']:5} {size:>11} {row['found_seconds'] * 1e3:9.2f} {verdict:>8} "
        f"{row['bound_seconds'] * 1e3:9.2f} {row['gap']:7.2%} {row['over_best']:9.2%} "
        f"{row['deals']:6} {row['proof_seconds']:6.1f} s  {signs}",
        flush=True,
    )
    if row["gap"] > 0.01:
        print(f"      found {row['found']}\n      best  {row['best']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--search", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    warm_up()
    print(
        f"{'seed':>5} {'P x L x M':>11} {'found ms':>9} {'':8} {'ms':>9} {'gap':>7} "
        f"{'over best':>9} {'deals':>6} {'proof':>8}"
    )
    rows = []
    for seed in range(arguments.first, arguments.first + arguments.count):
        row = study(seed, arguments.search, arguments.seconds)
        if row is None:
            print(f"{seed:5} nothing fits its memory")
            continue
        rows.append(row)
        show(row)
    summary = {}
    for name, verdict in (("optimum", True), ("bound", False)):
        gaps = [row["gap"] for row in rows if row["optimal"] == verdict]
        if gaps:
            summary[name] = {"number": len(gaps), "mean_gap": mean(gaps), "worst_gap": max(gaps)}
            print(
                f"{len(gaps)} against the proven {name}: gap {mean(gaps):.2%} on the average, "
                f"{max(gaps):.2%} at worst"
            )
    output = HERE / "results" / f"optimality-{time.strftime('%Y-%m-%d')}.json"
    settings = {"search_seconds": arguments.search, "proof_seconds": arguments.seconds}
    write_json(output, settings | summary | {"rows": rows})
    print(f"written to {output}")


if __name__ == "__main__":
    main()
