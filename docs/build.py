"""Builds what the pages show out of what the simulator says: `python docs/build.py`.

A page is written by hand but for two kinds of places. Between `<!-- build: NAME -->` and
`<!-- end -->` stands what `BLOCKS[NAME]` returns. In a page that teaches, the code runs, and each
block of output stands behind the code that printed it. `pages()` makes all files without writing
any, so that a test can hold them against those that are there.

`--search` first asks the planner for its plans (`choices.py`), a minute or two.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from choices import choices, search_all

from adaptis.check import check
from adaptis.cluster import Link, uniform
from adaptis.files import write_text
from adaptis.lower import lower
from adaptis.notation import parse_order, print_program
from adaptis.plan import Plan, Stage, named_plan
from adaptis.profile import LayerCost, Profile
from adaptis.report import svg
from adaptis.report.text import drawing
from adaptis.schedules import SCHEDULES, Schedule
from adaptis.schedules.shape import Shape, both_ways, loop, wave
from adaptis.simulate import simulate_plan
from adaptis.timeline import CAUSES, Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adaptis.program import Work

HERE = Path(__file__).parent
RANKS, MICROBATCHES = 4, 8  # of the table of all schedules
HOP = 0.5  # the delay of its last columns: half of F

BLOCK = re.compile(r"(<!-- build: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
CODE = re.compile(r"```python\n(.*?)```\n(\n```text\n.*?```\n)?", re.DOTALL)


# --- schedules at F = I = W = 1 ---------------------------------------------------------------


class Run(NamedTuple):
    """A schedule at one shape, simulated; F = I = W = 1 for a rank's share of the layers."""

    schedule: Schedule
    shape: Shape
    timeline: Timeline

    @property
    def bubble(self) -> float:
        """Idle seconds of the rank that computes least."""
        return self.timeline.makespan - float(self.timeline.busy().min())

    @property
    def held(self) -> float:
        """The most activations of a rank, in those of one micro-batch in its share of the layers.

        Each stage keeps one byte.
        """
        return max(self.timeline.peak_bytes) / parts_of(self.schedule, self.shape)


def parts_of(schedule: Schedule, shape: Shape) -> int:
    """Into how many computations a micro-batch's forward on one rank is divided."""
    return shape.v // schedule.copies * shape.s


def shape_of(schedule: Schedule, least: int, ranks: int = RANKS) -> Shape:
    """The smallest shape from `least` micro-batches on: two stages per rank where that is allowed.

    As many slices as ranks, where micro-batches are sliced.
    """
    v = 2 if 2 in schedule.chunks and not schedule.sliced else schedule.chunks[0]
    shape = Shape(ranks, least, v, ranks if schedule.sliced else 1)
    while schedule.lacks(shape):
        shape = replace(shape, m=shape.m + 1)
    return shape


def run(name: str, shape: Shape, hop: float = 0.0) -> Run:
    """Simulate; `hop` is how long a whole micro-batch's value takes to the next rank."""
    schedule = SCHEDULES[name]
    cost = 1.0 / parts_of(schedule, shape)
    shape = replace(shape, seconds=(cost, cost, cost), hop=hop / shape.s)
    length = shape.p * shape.v // schedule.copies
    plan = named_plan(schedule, shape, range(1, length + 1))
    link = Link(bandwidth=shape.s / hop) if hop else Link()
    profile = even_profile(length, cost, output_bytes=int(hop > 0))
    return Run(schedule, shape, simulate_plan(plan, profile, uniform(shape.p, link=link)))


def even_profile(count: int, seconds: float, output_bytes: int = 0) -> Profile:
    """Layers that all cost the same; one saved byte each counts what is held."""
    layer = LayerCost(
        name="",
        kind="mlp",
        forward=seconds,
        backward_input=seconds,
        backward_weight=seconds,
        backward=2 * seconds,
        saved_bytes=1,
        saved_weight_bytes=1,
        output_bytes=output_bytes,
    )
    return Profile("even", 1, tuple(replace(layer, name=str(i)) for i in range(count)))


# --- docs/schedules.md ------------------------------------------------------------------------


def summary() -> str:
    """All schedules at one setting, without and with a delay."""
    shapes = {name: shape_of(schedule, MICROBATCHES) for name, schedule in SCHEDULES.items()}
    free = {name: run(name, shape) for name, shape in shapes.items()}
    slow = {name: run(name, shape, HOP) for name, shape in shapes.items()}
    fast_places, slow_places = places(free), places(slow)
    rows = [
        "| schedule | stages per rank | copies of the weights | transfers per micro-batch "
        "| peak | bubble | place | bubble, hop 1/2 | place |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in free.items():
        shape = one.shape
        slices = f" of 1/{shape.s}" if shape.s > 1 else ""
        count = sum(len(list(cross(one, m))) for m in range(shape.units)) * 2 // shape.m
        rows.append(
            f"| [{name}](#{name}) | {shape.v} | {one.schedule.copies} | {count}{slices} "
            f"| {one.held:g} | {one.bubble:g} | {fast_places[name]} "
            f"| {slow[name].bubble:g} | {slow_places[name]} |"
        )
    lost = {name: slow_places[name] - place for name, place in fast_places.items()}
    down, up = max(lost, key=lost.__getitem__), min(lost, key=lost.__getitem__)
    rows += [
        "",
        f"The delay reorders them: {down} falls from place {fast_places[down]} to place "
        f"{slow_places[down]}, {up} rises from place {fast_places[up]} to place {slow_places[up]}.",
    ]
    return "\n".join(rows)


def cross(one: Run, microbatch: int) -> Sequence[int]:
    """The stages of a micro-batch whose output goes to another rank."""
    layout, placement = one.timeline.layout, one.timeline.placement
    stages = layout.stages_of(microbatch)
    return [s for s in stages[:-1] if placement[s] != placement[s + 1]]


def places(runs: dict[str, Run]) -> dict[str, int]:
    """1 for the least bubble; the same bubble is the same place."""
    bubbles = {name: round(one.bubble, 6) for name, one in runs.items()}
    return {
        name: 1 + sum(other < mine for other in bubbles.values()) for name, mine in bubbles.items()
    }


def gallery() -> str:
    """A section for each schedule."""
    return "\n\n".join(section(name) for name in SCHEDULES)


def drawn(name: str) -> Run:
    """The run that the page shows: small enough for names in most boxes."""
    schedule = SCHEDULES[name]
    plain = not schedule.sliced and 2 not in schedule.chunks and 4 not in schedule.chunks
    return run(name, shape_of(schedule, 8 if plain else 2 if schedule.sliced else 4))


def section(name: str) -> str:
    """Picture, paper, formulas, numbers."""
    one = drawn(name)
    schedule, shape = one.schedule, one.shape
    source = schedule.generate.__module__.split(".")[-1]
    lines = [
        f"### {name}",
        "",
        f"![{name}, {shape}](schedules/{name}.svg)",
        "",
        f"- Paper: {schedule.paper}. Code: [{source}.py](../src/adaptis/schedules/{source}.py).",
        f"- Take it for: {schedule.use}.",
        f"- Bubble: {schedule.bubble}. Memory: {schedule.memory}.",
        f"- {where(one.timeline.placement, schedule.copies)}.",
    ]
    if schedule.copies > 1:
        lines.append(
            "- **Two copies of the weights**, their gradients and the optimizer's state. Once a "
            "step the gradients of the copies are summed, which is not in the numbers here."
        )
    base = Shape(shape.p, shape.m)
    columns = {f"{name}, {shape}": one, f"1f1b, {base}": run("1f1b", base)}
    return "\n".join([*lines, "", *figures(columns)])


def figures(columns: dict[str, Run]) -> list[str]:
    """Runs side by side; the same one only once."""
    runs = columns.values()
    return [
        f"| | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
        f"| makespan | {' | '.join(f'{one.timeline.makespan:g}' for one in runs)} |",
        f"| bubble | {' | '.join(f'{one.bubble:g}' for one in runs)} |",
        f"| peak activations | {' | '.join(f'{one.held:g}' for one in runs)} |",
    ]


def where(placement: Sequence[int], copies: int) -> str:
    """On which rank stage 0, 1, ... is, copy by copy."""
    length = len(placement) // copies
    each = [placement[i : i + length] for i in range(0, len(placement), length)]
    return "Stages on ranks " + ", and of the second copy ".join(
        " ".join(map(str, copy)) for copy in each
    )


def picture(name: str) -> str:
    """The SVG of a schedule."""
    one = drawn(name)
    plain = replace(one.timeline, memory=())  # its bytes are units, which the page explains
    return svg.render([plain], f"{name}, {one.shape}, F = I = W = 1")


# --- docs/concepts.md -------------------------------------------------------------------------


def draw(name: str, shape: Shape) -> str:
    """A schedule as text; a cell is F of one stage and micro-batch or slice."""
    one = run(name, shape)
    return fenced(drawing(one.timeline, 1.0 / parts_of(one.schedule, shape)))


def fenced(text: str) -> str:
    """Text as it stands."""
    return f"```text\n{text.rstrip()}\n```"


def simulated(plan: Plan, memory: float = math.inf) -> Timeline:
    """Any plan at F = I = W = 1."""
    return simulate_plan(plan, even_profile(plan.num_layers, 1), uniform(plan.num_devices, memory))


def orders(*lines: str) -> tuple[tuple[Work, ...], ...]:
    """Orders of computations from text."""
    return tuple(parse_order(line.split(), f"device {d}") for d, line in enumerate(lines))


def causes() -> str:
    """Idle seconds of two runs, by cause."""
    shape = Shape(3, 4)
    tight = named_plan(SCHEDULES["1f1b"], replace(shape, most=2), range(1, 4))
    runs = {
        "1f1b, free transfers": run("1f1b", shape).timeline,
        "1f1b, hop 1/2": run("1f1b", shape, HOP).timeline,
        "1f1b, room for two micro-batches": simulated(tight, memory=2),
    }
    rows = [f"| | device | {' | '.join(CAUSES)} |", "|---" * (len(CAUSES) + 2) + "|"]
    for name, timeline in runs.items():
        for device, idle in enumerate(timeline.bubbles()):
            rows.append(f"| {name} | {device} | {' | '.join(f'{idle[c]:g}' for c in CAUSES)} |")
    return "\n".join(rows)


def placements() -> str:
    """The three ways to lay stages on four ranks."""
    shape = Shape(4, 4, 2)
    both = both_ways(shape)
    ways = {
        "loop": loop(shape),
        "wave": wave(shape),
        "both ways": (*both[:4], "and", *both[4:], "for the second copy"),
    }
    return fenced("\n".join(f"{name:10} {' '.join(map(str, way))}" for name, way in ways.items()))


TWO = (Stage(0, 1, 0), Stage(1, 2, 1))  # one layer each on two devices
RECOMPUTED = Plan(
    2, (Stage(0, 1, 0, recompute=True), TWO[1]), SCHEDULES["1f1b"].orders(Shape(2, 2))
)
OFFLOADED = Plan(4, (Stage(0, 1, 0, offload=True),), orders("0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3"))
FUSED = Plan(2, TWO, orders("0F0 0F1 0B0 0B1", "1F0 (1F1;1B0)OVERLAP_F_B 1B1"))
SHARDED = Plan(
    2,
    TWO,
    orders("0F0 0F1 2S0 2S1 0B0 2T0 0B1 2T1", "1F0 1F1 2S0 1B0 2T0 2S1 1B1 2T1"),
    head_reductions=1,
)


def printed(plan: Plan) -> str:
    """The program of a plan in the text form, proven."""
    program = lower(plan)
    check(program)
    return fenced(print_program(program))


# --- docs/how-to-choose.md ------------------------------------------------------------------


def long_sequences() -> str:
    """Few micro-batches in slices beside whole ones."""
    shapes = {
        "1f1b": Shape(8, 4),
        "zb-h1": Shape(8, 4),
        "zb-v": Shape(8, 4, 2),
        "terapipe": Shape(8, 4, 1, 8),
        "seq1f1b": Shape(8, 4, 1, 8),
        "slimpipe": Shape(8, 4, 1, 8),
    }
    runs = [(name, run(name, shape)) for name, shape in shapes.items()]
    rows = ["| schedule | slices | makespan | bubble | peak activations |", "|---|---|---|---|---|"]
    for name, one in runs:
        numbers = f"{one.timeline.makespan:g} | {one.bubble:g} | {one.held:g}"
        rows.append(f"| {name} | {one.shape.s} | {numbers} |")
    return "\n".join(rows)


# --- all pages --------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "gallery": gallery,
    "phases": lambda: draw("1f1b", Shape(3, 5)),
    "split": lambda: draw("zb-h1", Shape(3, 5)),
    "interleaved": lambda: draw("interleaved", Shape(2, 2, 2)),
    "wave": lambda: draw("zb-v", Shape(2, 3, 2)),
    "copies": lambda: draw("chimera", Shape(2, 4, 2)),
    "slices": lambda: draw("seq1f1b", Shape(2, 2, 1, 2)),
    "causes": causes,
    "placements": placements,
    "recomputed": lambda: fenced(drawing(simulated(RECOMPUTED))),
    "offloaded": lambda: printed(OFFLOADED),
    "fused": lambda: printed(FUSED),
    "sharded": lambda: printed(SHARDED),
    "program": lambda: printed(Plan(2, TWO, SCHEDULES["1f1b"].orders(Shape(2, 2)))),
    "choices": choices,
    "long sequences": long_sequences,
}


def with_blocks(text: str) -> str:
    """A page with its blocks made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}", text)


def with_outputs(text: str) -> tuple[str, dict[str, str]]:
    """A page whose code has run, top to bottom, and the pictures that the code wrote."""
    names: dict[str, object] = {}

    def ran(found: re.Match[str]) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(found[1], "page", "exec"), names)
        output = f"\n{fenced(said.getvalue())}\n" if said.getvalue() else ""
        return f"```python\n{found[1]}```\n{output}"

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = CODE.sub(ran, text)
        return text, {path.name: path.read_text("utf-8") for path in Path(folder).glob("*.svg")}


def pages() -> dict[Path, str]:
    """Every file that is built, and what it should hold."""
    texts = {path: path.read_text("utf-8") for path in HERE.glob("*.md")}
    built = {path: with_blocks(text) for path, text in texts.items() if BLOCK.search(text)}
    taught = HERE / "write-a-schedule.md"
    built[taught], pictures = with_outputs(texts[taught])
    built |= {HERE / "schedules" / f"{name}.svg": picture(name) for name in SCHEDULES}
    return built | {HERE / name: text for name, text in pictures.items()}


def main() -> None:
    """Write all; with `--search` ask the planner first."""
    if "--search" in sys.argv[1:]:
        search_all()
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        write_text(path, text)


if __name__ == "__main__":
    main()
