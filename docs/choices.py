"""Which named schedule is the fastest in which situation: numbers for `how-to-choose.md`.

A model of the AdaPtis paper, on eight devices; what its profile does not say is assumed here, and
said on the page. `search_all` asks the planner as well and keeps its times in `planned.json`: they
depend on the machine, so they are not made anew with the pages.
"""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

from adaptis.cluster import Cluster, Link, uniform
from adaptis.errors import PlanError
from adaptis.files import read_json, write_json
from adaptis.profile import LayerCost, Profile, load_profile
from adaptis.search import BASELINES, Stop, search
from adaptis.simulate import simulate_plan

HERE = Path(__file__).parent
PLANNED = HERE / "planned.json"
GEMMA = HERE.parent / "tests" / "data" / "profiles" / "v1-gemma-medium-2k.json"
SECONDS = 10.0  # of each search
HIDDEN = 0.4  # of F that a fused pair hides, where it does
MB = 10**6


class Situation(NamedTuple):
    """What a row of the page is about."""

    title: str
    profile: Profile
    num_microbatches: int
    cluster: Cluster


def situations() -> dict[str, Situation]:
    """A model of the paper, on eight devices; what its profile does not say is assumed here."""
    gemma = load_profile(GEMMA)
    gemma = replace(gemma, layers=tuple(map(with_bytes, gemma.layers)))
    even = replace(gemma, layers=gemma.layers[:-1])
    fused = tuple(replace(layer, overlapped=HIDDEN * layer.forward) for layer in even.layers)
    free, slow = uniform(8), uniform(8, link=Link(bandwidth=25e9))
    return {
        "even": Situation("even layers, fast links", even, 32, free),
        "even-slow": Situation("even layers, slow links", even, 32, slow),
        "even-tight": Situation("even layers, memory tight", even, 32, uniform(8, 28e9)),
        "few": Situation("even layers, few micro-batches", even, 8, free),
        "fused": Situation("F fused with B hides much", replace(even, layers=fused), 32, free),
        "head": Situation("big head, fast links", gemma, 32, free),
        "head-slow": Situation("big head, slow links", gemma, 32, slow),
        "head-tight": Situation("big head, memory tight", gemma, 32, uniform(8, 34e9)),
    }


def with_bytes(layer: LayerCost) -> LayerCost:
    """Sizes for a layer of which only times are known; its parameters go with its forward."""
    share = layer.forward / 1e-3
    return replace(
        layer,
        output_bytes=25 * MB,
        saved_bytes=320 * MB,
        saved_weight_bytes=160 * MB,
        parameter_bytes=int(222 * MB * share),
        state_bytes=int(2000 * MB * share),
    )


class Named(NamedTuple):
    """What a named schedule takes; in the order of what is better."""

    milliseconds: float
    gigabytes: float
    name: str
    copies: int

    def __str__(self) -> str:
        copies = ", two copies" if self.copies > 1 else ""
        return f"{self.name} {self.milliseconds:.0f} ms ({self.gigabytes:.0f} GB{copies})"


def ranked(case: Situation) -> list[Named]:
    """All named schedules that exist for this and fit, the fastest first."""
    found = []
    for name, baseline in BASELINES.items():
        if name == "interleaved":  # interleaved-tuned is it at its best
            continue
        if name == "v-search" and case.cluster.devices[0].memory_bytes == math.inf:
            continue  # a second or more of search for what zb-v does as well
        try:
            plan = baseline(case.profile, case.cluster, case.num_microbatches)
        except PlanError:
            continue
        timeline = simulate_plan(plan, case.profile, case.cluster)
        peak = max(timeline.peak_bytes)
        if peak <= case.cluster.devices[0].memory_bytes:
            found.append(Named(round(timeline.step * 1e3, 3), peak / 1e9, name, plan.copies))
    return sorted(found)


def choices() -> str:
    """The fastest named schedules of each situation, 1F1B and the planner's plan."""
    kept = read_json(PLANNED, "plans' times")
    rows = [
        "| situation | fastest | second | third | fourth | 1f1b | `adaptis plan` |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, case in situations().items():
        found = ranked(case)
        fastest = " | ".join([*map(str, found[:4]), *["none"] * 4][:4])
        usual = next((str(n).removeprefix("1f1b ") for n in found if n.name == "1f1b"), "too large")
        plan = f"{kept['milliseconds'][key]:.0f} ms"
        rows.append(f"| {case.title} | {fastest} | {usual} | {plan} |")
    rows += [
        "",
        f"The last column was searched on {kept['date']}, {kept['seconds']:g} s a row on two "
        f"cores, and depends on the machine; all else is computed again by each build.",
    ]
    return "\n".join(rows)


def search_all() -> None:
    """Ask the planner, and keep what it found."""
    found = {}
    for key, case in situations().items():
        result = search(case.profile, case.cluster, case.num_microbatches, Stop(seconds=SECONDS))
        found[key] = round(result.timeline.step * 1e3, 1)
        print(f"{case.title}: {found[key]} ms, {result.gap:.1%} above the bound")
    today = date.today().isoformat()
    write_json(PLANNED, {"date": today, "seconds": SECONDS, "milliseconds": found})
