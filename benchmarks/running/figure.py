"""Predicted against measured seconds, both axes logarithmic, as one scene for both painters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adaptis.report.palette import duration
from adaptis.report.scene import GRID, TEXT, Area, Boxes, Scene, Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.report.scene import Shape

SIDE, LEFT, TOP, LEGEND = 420, 84, 56, 200
COLOURS = ("#2a66d9", "#d8511d", "#22b08c", "#f6bd48", "#8f3fd0", "#303a52", "#de1f38")
BAND = 0.03  # of the prediction, around the diagonal


def scatter(rows: Sequence[dict[str, Any]], title: str) -> Scene:
    """A dot for each row, a colour for each model."""
    pairs = [(row["measured_seconds"], row["predicted_seconds"]) for row in rows]
    low = math.log(min(min(pair) for pair in pairs)) - 0.15
    high = math.log(max(max(pair) for pair in pairs)) + 0.15

    def place(measured: float, predicted: float) -> tuple[float, float]:
        x, y = ((math.log(value) - low) / (high - low) * SIDE for value in (measured, predicted))
        return LEFT + x, TOP + SIDE - y

    ends = math.exp(low), math.exp(high)
    corners = [
        place(x, x * (1 + off))
        for x, off in zip((*ends, *ends[::-1]), (BAND,) * 2 + (-BAND,) * 2, strict=True)
    ]
    shapes: list[Shape] = [
        Boxes("#ffffff", [(0, 0, LEFT + SIDE + LEGEND, TOP + SIDE + 60)]),
        Area("#e7e1f2", "#d3cbe6", corners),
        *frame(place, ends),
        Text(LEFT, 30, title, 15, TEXT, bold=True),
        Text(LEFT + SIDE / 2, TOP + SIDE + 44, "measured step", 12, anchor="middle"),
        Text(LEFT - 8, TOP - 10, "predicted step", 12, anchor="middle"),
    ]
    models = dict.fromkeys(row["model"] for row in rows)
    for number, model in enumerate(models):
        colour, y = COLOURS[number % len(COLOURS)], TOP + 14 + 20 * number
        mine = [
            place(*pair) for row, pair in zip(rows, pairs, strict=True) if row["model"] == model
        ]
        mine.append((LEFT + SIDE + 20, y - 4))
        dots = [(x - 3.5, y - 3.5, 7.0, 7.0) for x, y in mine]
        shapes.append(Boxes(colour, dots, opacity=0.75, radius=3.5))
        shapes.append(Text(LEFT + SIDE + 30, y, model, 12, TEXT))
    shapes.append(Text(LEFT + SIDE + 14, TOP + SIDE, f"band: {BAND:.0%} off", 11))
    words = f"{len(rows)} steps, predicted against measured"
    return Scene(LEFT + SIDE + LEGEND, TOP + SIDE + 60, title, words, shapes)


def frame(place: Any, ends: tuple[float, float]) -> list[Shape]:
    """The axes, with marks at 1, 2 and 5 times powers of ten."""
    decades = range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])) + 1)
    marks = [k * 10.0**n for n in decades for k in (1, 2, 5)]
    shapes: list[Shape] = [Boxes(GRID, [(LEFT, TOP, 1, SIDE), (LEFT, TOP + SIDE, SIDE, 1)])]
    for mark in (m for m in marks if ends[0] <= m <= ends[1]):
        x, y = place(mark, mark)
        shapes.append(Boxes(GRID, [(x, TOP, 0.6, SIDE), (LEFT, y, SIDE, 0.6)]))
        shapes.append(Text(x, TOP + SIDE + 18, duration(mark), 11, anchor="middle"))
        shapes.append(Text(LEFT - 8, y + 4, duration(mark), 11, anchor="end"))
    return shapes
