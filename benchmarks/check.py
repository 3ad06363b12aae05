"""What lowering and proving cost: microseconds of one core per instruction.

    python benchmarks/check.py [--repeats 5]

The fastest of the repeats counts. Prints a table and writes `benchmarks/results/check-DATE.json`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptis.check import check
from adaptis.files import write_json
from adaptis.lower import lower
from adaptis.plan import named_plan
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
CASES = (
    ("1f1b", Shape(16, 128)),
    ("interleaved", Shape(16, 128, 2)),
    ("zb-h1", Shape(16, 128)),
    ("1f1b", Shape(128, 512)),
)


def fastest(work: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def study(name: str, shape: Shape, repeats: int) -> dict[str, Any]:
    plan = named_plan(SCHEDULES[name], shape, range(1, shape.p * shape.v + 1))
    program = lower(plan)
    count = check(program).num_instructions
    lowering = fastest(lambda: lower(plan), repeats)
    proving = fastest(lambda: check(program), repeats)
    return {
        "program": f"{name} {shape}",
        "instructions": count,
        "computations": sum(map(len, plan.programs)),
        "lower_us_per_instruction": lowering / count * 1e6,
        "check_us_per_instruction": proving / count * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'program':26} {'instructions':>12} {'lower':>8} {'check':>8}  us/instruction")
    rows = []
    for name, shape in CASES:
        row = study(name, shape, arguments.repeats)
        rows.append(row)
        print(
            f"{row['program']:26} {row['instructions']:12} {row['lower_us_per_instruction']:8.2f} "
            f"{row['check_us_per_instruction']:8.2f}",
            flush=True,
        )
    output = HERE / "results" / f"check-{time.strftime('%Y-%m-%d')}.json"
    write_json(output, {"repeats": arguments.repeats, "rows": rows})
    print(f"written to {output}")


if __name__ == "__main__":
    main()
