"""How good the plans are on published layer times: step time against the bound and the baselines.

    python benchmarks/planning.py [--seconds 10] [PROFILE ...]

Every profile is planned for the devices and micro-batches that it names, with free transfers and
unlimited memory. Prints a table and writes `benchmarks/results/planning-DATE.json`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from adaptis.cluster import uniform
from adaptis.comparison import compare_all
from adaptis.files import write_json
from adaptis.profile import load_profile

HERE = Path(__file__).parent
PROFILES = HERE.parent / "tests" / "data" / "profiles"


def study(path: Path, seconds: float) -> dict[str, Any]:
    profile = load_profile(path)
    devices, microbatches = profile.devices or 4, profile.microbatches or 16
    result = compare_all(profile, uniform(devices), microbatches, search_seconds=seconds, seed=0)
    steps = {row["name"]: row["step_seconds"] for row in result["results"]}
    ours = steps.pop("adaptis")
    best = min(steps, key=lambda name: steps[name])
    return {
        "profile": path.stem,
        "devices": devices,
        "microbatches": microbatches,
        "step_seconds": ours,
        "gap": max(ours / result["lower_bound_seconds"] - 1, 0.0),  # sums round
        "over_1f1b": steps["1f1b"] / ours,
        "over_interleaved": steps["interleaved"] / ours if "interleaved" in steps else None,
        "best_baseline": best,
        "over_best_baseline": steps[best] / ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profiles", nargs="*", type=Path, default=sorted(PROFILES.glob("*.json")))
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    print(
        f"{'profile':28} {'P x M':>8} {'step':>10} {'gap':>6} {'1f1b':>6} {'interl.':>7} best "
        f"baseline"
    )
    rows = []
    for path in arguments.profiles:
        row = study(path, arguments.seconds)
        rows.append(row)
        size = f"{row['devices']} x {row['microbatches']}"
        interleaved = f"{row['over_interleaved']:.2f}x" if row["over_interleaved"] else "-"
        print(
            f"{row['profile']:28} {size:>8} {row['step_seconds'] * 1e3:8.1f}ms {row['gap']:6.1%} "
            f"{row['over_1f1b']:5.2f}x {interleaved:>7} {row['over_best_baseline']:.2f}x "
            f"({row['best_baseline']})",
            flush=True,
        )
    gaps = [row["gap"] for row in rows]
    print(f"gap to the bound: median {median(gaps):.1%}, worst {max(gaps):.1%}")
    output = HERE / "results" / f"planning-{time.strftime('%Y-%m-%d')}.json"
    write_json(output, {"seconds": arguments.seconds, "rows": rows})
    print(f"written to {output}")


if __name__ == "__main__":
    main()
