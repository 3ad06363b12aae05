"""The figure of the study: the gap against the devices, the time against the size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from quality.tables import gap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH, HEIGHT, EDGE, GUTTER = 360, 260, 48, 40
STYLE = "font-family='sans-serif' font-size='11' fill='#444'"
OURS, THEIRS, BASELINE = "#1f6fb4", "#d9822b", "#999999"


def _dot(x: float, y: float, colour: str, title: str) -> str:
    return (
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}' fill-opacity='0.6'>"
        f"<title>{title}</title></circle>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {STYLE}>{text}</text>"


class _Panel:
    """One pair of axes; both scales are functions to shares of the width and the height."""

    def __init__(
        self, left: float, across: Callable[[float], float], up: Callable[[float], float]
    ) -> None:
        self.left, self.across, self.up = left, across, up
        self.parts: list[str] = []

    def place(self, x: float, y: float) -> tuple[float, float]:
        across, up = min(max(self.across(x), 0.0), 1.0), min(max(self.up(y), 0.0), 1.0)
        return self.left + across * WIDTH, EDGE + (1 - up) * HEIGHT

    def axes(
        self, title: str, below: str, ticks: Sequence[float], marks: Sequence[tuple[float, str]]
    ) -> None:
        self.parts.append(_text(self.left + WIDTH / 2, EDGE - 24, title))
        self.parts.append(_text(self.left + WIDTH / 2, EDGE + HEIGHT + 34, below))
        for tick in ticks:
            x, _ = self.place(tick, 0)
            self.parts.append(_text(x, EDGE + HEIGHT + 16, f"{tick:g}"))
        for value, label in marks:
            _, y = self.place(ticks[0], value)
            self.parts.append(
                f"<line x1='{self.left}' x2='{self.left + WIDTH}' y1='{y:.1f}' y2='{y:.1f}' "
                "stroke='#ddd'/>"
            )
            self.parts.append(_text(self.left - 6, y + 4, label, "end"))

    def dot(self, x: float, y: float, colour: str, title: str) -> None:
        self.parts.append(_dot(*self.place(x, y), colour, title))


def draw(rows: list[dict[str, Any]]) -> str:
    """Both panels as one SVG."""
    rows = [row for row in rows if row["whole"]["step"] is not None]
    most = max((gap(row, row["whole"]["step"]) for row in rows), default=0.1)
    top = max(0.1, math.ceil(most * 20) / 20)
    gaps = _Panel(EDGE, lambda x: (math.log2(x) - 0.5) / 6, lambda y: y / top)
    marks = [(top * i / 5, f"{top * i / 5:.0%}") for i in range(6)]
    gaps.axes("gap to the lower bound", "devices", (2, 4, 8, 16, 32, 64), marks)
    times = _Panel(
        2 * EDGE + WIDTH + GUTTER,
        lambda x: (math.log10(x) - 1) / 4,
        lambda y: (math.log10(max(y, 1e-3)) + 2) / 4,
    )
    times.axes(
        "seconds until within 1 % of the answer",
        "computations (3 x devices x micro-batches)",
        (10, 100, 1_000, 10_000, 100_000),
        [(10.0**i, f"{10.0**i:g} s") for i in range(-2, 3)],
    )
    for row in rows:
        p = row["devices"]
        series = (
            (row["best_baseline_step"], BASELINE, 0.93),
            (row["published"]["step"], THEIRS, 1.0),
            (row["whole"]["step"], OURS, 1.07),
        )
        for step, colour, shift in series:
            if step:
                share = gap(row, step)
                gaps.dot(p * shift, share, colour, f"{row['case']}: {share:.1%}")
        near = row["whole"]["seconds_to_1_percent"]
        size = 3 * p * row["microbatches"]
        times.dot(size, near, OURS, f"{row['case']}: {near:.2f} s")
    legend = ((OURS, "adaptis"), (THEIRS, "published, anew"), (BASELINE, "best baseline"))
    key = []
    for index, (colour, name) in enumerate(legend):
        x = EDGE + 20 + 110 * index
        key += [_dot(x, EDGE - 8, colour, name), _text(x + 8, EDGE - 4, name, "start")]
    width, height = 3 * EDGE + 2 * WIDTH + GUTTER, 2 * EDGE + HEIGHT
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        f"width='{width}' height='{height}'><rect width='100%' height='100%' fill='white'/>"
        + "".join((*gaps.parts, *times.parts, *key))
        + "</svg>\n"
    )
