"""How good the plans are: beside the bound, every baseline and the published generator.

    python benchmarks/plan_quality.py [--full] [--only cells] [--seconds 10] [--total SECONDS]

Plans the 18 cells of the first AdaPtis paper and models of eight families for 2 to 64 devices,
with the head whole and sharded where that pays, with free and priced transfers, loose and tight
memory, equal and unequal devices. Results are kept while the sources that they depend on stay as
they are, so that the study goes on where it was stopped; several processes share the work. Prints a
line a case, tables, and writes `benchmarks/results/plan-quality-DATE.json` with a figure beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from published import publish
from published.generator import warm_up as warm_up_published
from quality.cases import cells, design, quick
from quality.figure import draw
from quality.keep import claimed, digest, kept, path_of
from quality.tables import line, summary

from adaptis.errors import Error, PlanError
from adaptis.files import write_json, write_text
from adaptis.search import BASELINES, Stop, lower_bounds, search
from adaptis.search.tune import warm_up
from adaptis.simulate import simulate_plan

if TYPE_CHECKING:
    from quality.cases import Case

    from adaptis.timeline import Timeline

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
MARK = "<!-- results: written by benchmarks/plan_quality.py --document -->\n"
MODEL = (
    "src/adaptis/[bkp]*.py",  # bounds, kernels, packing, plan, profile, program
    "src/adaptis/cluster.py",
    "src/adaptis/costs.py",
    "src/adaptis/lower.py",
    "src/adaptis/rows.py",
    "src/adaptis/simulate.py",
    "benchmarks/quality/models.py",
    "benchmarks/quality/cases.py",
)
SOURCES = {
    "baselines": (*MODEL, "src/adaptis/schedules/*.py", "src/adaptis/search/baselines.py"),
    "published": (*MODEL, "benchmarks/published/*.py"),
    "whole": (*MODEL, "src/adaptis/search/*.py", "src/adaptis/schedules/*.py"),
    "sharded": (*MODEL, "src/adaptis/search/*.py", "src/adaptis/schedules/*.py"),
}
FIGURE = "![gap against devices, time against size](plan-quality.svg)"
SLOW_BASELINES = ("zb-auto", "v-search")  # plain Python: left out beyond this many computations
SLOW_FROM = 4_000


def fits(case: Case, timeline: Timeline) -> bool:
    pairs = zip(timeline.peak_bytes, case.cluster.devices, strict=True)
    return all(peak <= device.memory_bytes for peak, device in pairs)


def baselines(case: Case, _: float) -> dict[str, Any]:
    """Seconds of the step under each baseline that exists and fits."""
    began, found = time.perf_counter(), {}
    for name, make in BASELINES.items():
        if name in SLOW_BASELINES and case.computations > SLOW_FROM:
            continue
        try:
            plan = make(case.profile, case.cluster, case.microbatches)
            timeline = simulate_plan(plan, case.profile, case.cluster)
        except PlanError:
            continue
        if fits(case, timeline):
            found[name] = timeline.step
    return {"steps": found, "seconds": time.perf_counter() - began}


def published(case: Case, seconds: float) -> dict[str, Any]:
    """The published generator in the same time."""
    warm_up_published()
    began = time.perf_counter()
    answer = publish(case.profile, case.cluster, case.microbatches, seconds)
    used = {"seconds": time.perf_counter() - began}
    if answer is None:
        return used | {"step": None}
    stages = len(answer.plan.stages)
    return used | {"step": answer.step, "evaluated": answer.evaluated, "stages": stages}


def ours(case: Case, seconds: float, shard_head: str) -> dict[str, Any]:
    """What `search` finds, and when it came within 1 % of that."""
    warm_up()
    stop = Stop(seconds=seconds)
    began = time.perf_counter()
    try:
        result = search(case.profile, case.cluster, case.microbatches, stop, shard_head=shard_head)
    except Error as error:
        used = time.perf_counter() - began
        return {"step": None, "seconds": used, "error": f"{type(error).__name__}: {error}"}
    step, bound = result.timeline.step, result.lower_bound
    near = [when for when, value in result.history if value <= 1.01 * step]
    return {
        "step": step,
        "seconds": time.perf_counter() - began,
        "seconds_to_1_percent": min(near, default=result.seconds),
        "evaluated": result.evaluated,
        "stages": len(result.plan.stages),
        "head_reductions": result.plan.head_reductions,
        "gap": result.gap,
        "bound": bound.value,
        "binding": bound.binding.name,
        "bounds": {one.name: one.seconds for one in bound.all},
    }


WORK = {
    "baselines": baselines,
    "published": published,
    "whole": lambda case, seconds: ours(case, seconds, "never"),
    "sharded": lambda case, seconds: ours(case, seconds, "auto"),
}


def key(case: Case, part: str, seconds: float) -> str:
    """The name under which one part of a case is kept."""
    return f"{case.name}/{part}-{seconds:g}s-{digest(*SOURCES[part])}"


def row(case: Case, seconds: float) -> dict[str, Any]:
    """All figures of one case, made now or kept."""
    found = {
        part: kept(key(case, part, seconds), lambda part=part: WORK[part](case, seconds))
        for part in WORK
    }
    steps = found["baselines"]["steps"]
    best = min(steps, key=lambda name: steps[name]) if steps else None
    bound = lower_bounds(case.profile, case.cluster, case.microbatches)
    return {
        "case": case.name,
        "group": case.group,
        "model": case.model,
        "devices": case.devices,
        "microbatches": case.microbatches,
        "layers": case.profile.num_layers,
        "priced": case.priced,
        "tight": case.tight,
        "unequal": case.unequal,
        "given_seconds": seconds,
        "bound": bound.value,
        "binding": bound.binding.name,
        "measured": case.measured,
        "interleaved": steps.get("interleaved"),
        "best_baseline": best,
        "best_baseline_step": steps[best] if best else None,
        **found,
    }


def is_done(case: Case, seconds: float) -> bool:
    return all(path_of(key(case, part, seconds)).exists() for part in WORK)


def run(cases: list[Case], seconds: float, total: float) -> list[dict[str, Any]]:
    """Do what no other process does, until `total` seconds have gone; then gather what is there."""
    began = time.perf_counter()
    for number, case in enumerate(cases, 1):
        if time.perf_counter() - began > total:
            break
        with claimed(case.name) as mine:
            if mine:
                minutes = (time.perf_counter() - began) / 60
                print(f"[{number}/{len(cases)} {minutes:5.1f} min] ", end="")
                print(line(row(case, seconds)), flush=True)
    return [row(case, seconds) for case in cases if is_done(case, seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="all cases, not two a model")
    parser.add_argument("--only", choices=("cells", "models"), help="only these, not both")
    parser.add_argument("--match", default="", help="only these; writes nothing")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a search, at most")
    parser.add_argument("--total", type=float, default=float("inf"), help="begin none after this")
    parser.add_argument("--document", action="store_true", help="write docs/plan-quality.md, too")
    arguments = parser.parse_args()
    papers = cells() if arguments.only != "models" else []
    models = (design if arguments.full else quick)() if arguments.only != "cells" else []
    cases = [case for case in (*papers, *models) if arguments.match in case.name]
    rows = run(cases, arguments.seconds, arguments.total)
    print()
    text, figure, date = summary(rows), draw(rows), time.strftime("%Y-%m-%d")
    print(text)
    if arguments.match:
        return
    output = RESULTS / f"plan-quality-{date}.json"
    write_json(output, {"seconds": arguments.seconds, "cases": len(cases), "rows": rows})
    write_text(output.with_suffix(".svg"), figure)
    if arguments.document:
        page = DOCS / "plan-quality.md"
        above = page.read_text(encoding="utf-8").partition(MARK)[0]
        how = f"{len(rows)} cases, {arguments.seconds:g} s a search at most, {date}."
        write_text(page, f"{above}{MARK}\n{how}\n\n{FIGURE}\n\n{text}\n")
        write_text(page.with_suffix(".svg"), figure)
    print(f"{len(rows)} of {len(cases)} cases; written to {output}")


if __name__ == "__main__":
    main()
