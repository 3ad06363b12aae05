"""Timelines as a list of shapes: stacked, on one time axis; `svg` and `png` paint it.

Instructions are drawn one by one while there is room; beyond that, columns show the share of each
operation. Painters differ in their fonts, so widths of text are estimated on the safe side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adaptis.program import OPS
from adaptis.report import palette
from adaptis.report.raster import is_dense, shares

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from adaptis.timeline import Timeline

WIDTH, MARGIN, GUTTER = 960, 28, 74
PLOT = WIDTH - 2 * MARGIN - GUTTER  # pixels for the time axis
LEFT = MARGIN + GUTTER
COLUMN, LEVELS = 5, 8  # of dense pictures: pixels of a column (divides PLOT), steps of a share
MEMORY = 44  # height of the memory strip
TEXT, QUIET, GRID, CARD, ROW = "#1b2129", "#5b6673", "#dfe3e8", "#ffffff", "#f0f2f5"
AFTER, IN_USE, IN_USE_EDGE = "#cfd6de", "#e7e1f2", "#7a5bb5"  # optimizer; memory

Box = tuple[float, float, float, float]  # left, top, width, height


@dataclass(frozen=True, slots=True)
class Boxes:
    """Rectangles of one colour."""

    fill: str
    boxes: list[Box]
    opacity: float = 1.0
    stroke: str = ""
    radius: float = 0.0


@dataclass(frozen=True, slots=True)
class Area:
    """A closed polygon."""

    fill: str
    stroke: str
    points: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text on the baseline `y`; `anchor` says which part of it is at `x`."""

    x: float
    y: float
    text: str
    size: float
    fill: str = QUIET
    anchor: str = "start"  # or "middle" or "end"
    bold: bool = False


Shape = Boxes | Area | Text


@dataclass(frozen=True, slots=True)
class Scene:
    """What to paint, in this order, and what it says in words."""

    width: int
    height: int
    title: str
    description: str
    shapes: list[Shape]


@dataclass(frozen=True, slots=True)
class _Scale:
    """Seconds to pixels."""

    total: float

    def x(self, seconds: float) -> float:
        return LEFT + (seconds / self.total * PLOT if self.total else 0.0)


def make_scene(timelines: Iterable[Timeline], title: str = "") -> Scene:
    """The shapes of one picture; the first timeline is what the others are compared with."""
    timelines = list(timelines)
    scale = _Scale(max((max(t.step, t.makespan) for t in timelines), default=0.0))
    body: list[Shape] = []
    top = float(MARGIN)
    if title:
        line = _fit(title, 20, WIDTH - 2 * MARGIN)
        body.append(Text(MARGIN, top + 16, line, 20, TEXT, bold=True))
        top += 36
    legend, height = _legend(timelines, top)
    body.extend(legend)
    top += height
    first_row = top + 30
    for index, timeline in enumerate(timelines):
        body.extend(_heading(timeline, timelines[0] if index else None, top))
        block, height = _block(timeline, scale, top + 30)
        body.extend(block)
        top += 30 + height + 20
    body.extend(_axis(scale, first_row, top - 12))
    height = math.ceil(top) + 34
    frame = Boxes(CARD, [(0.5, 0.5, WIDTH - 1, height - 1)], stroke=GRID, radius=10)
    described = "; ".join(f"{t.name}: {_figures(t)}" for t in timelines)
    return Scene(WIDTH, height, title or "Timelines", described, [frame, *body])


def _figures(timeline: Timeline) -> str:
    return (
        f"{timeline.source} · step {palette.duration(timeline.step)}"
        f" · bubble {palette.percent(timeline.bubble_fraction)}"
    )


def _heading(timeline: Timeline, base: Timeline | None, top: float) -> Iterator[Shape]:
    figures = _figures(timeline)
    if base is not None and base.step > 0:
        change = timeline.step / base.step - 1
        if abs(change) >= 0.0005:
            figures += f" · {palette.percent(abs(change))} {'less' if change < 0 else 'more'} time"
    room = WIDTH - 2 * MARGIN - _width(figures, 12.5) - 24
    yield Text(MARGIN, top + 18, _fit(timeline.name, 14, room), 14, TEXT, bold=True)
    yield Text(WIDTH - MARGIN, top + 18, figures, 12.5, anchor="end")


def _legend(timelines: list[Timeline], top: float) -> tuple[list[Shape], float]:
    """What the colours mean, in as many lines as that takes, and how high they are."""
    ops = palette.used_ops(timelines)
    entries = [(palette.COLOURS[op], f"{palette.NAMES[op]} ({op})") for op in ops]
    entries.append((ROW, "idle"))
    if any(_has_end(t) for t in timelines):
        entries.append((AFTER, "optimizer"))
    if any(map(palette.has_many_stages, timelines)):
        entries.append(("", "shades: the stages of a device"))
    shapes: list[Shape] = []
    x, y = float(MARGIN), top
    for fill, name in entries:
        width = 18 * bool(fill) + _width(name, 12)
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + 20
        if fill:
            shapes.append(Boxes(fill, [(x, y, 12, 12)], stroke=GRID, radius=2.5))
        shapes.append(Text(x + 18 * bool(fill), y + 10, name, 12))
        x += width + 16
    return shapes, y + 30 - top


def _has_end(timeline: Timeline) -> bool:
    return timeline.step > timeline.makespan * 1.001


def _row_height(devices: int) -> int:
    heights = ((4, 30), (8, 24), (16, 18), (32, 12))
    return next((height for most, height in heights if devices <= most), 8)


def _block(timeline: Timeline, scale: _Scale, top: float) -> tuple[list[Shape], float]:
    """The rows of one timeline and how high they are."""
    height = _row_height(timeline.num_devices)
    gap = 4 if height >= 18 else 2
    every = math.ceil(14 / (height + gap))
    size = 12 if height >= 18 else 10
    draw = _columns if is_dense(timeline, PLOT / 3) else _boxes
    end, stop = scale.x(timeline.makespan), scale.x(timeline.step)
    shapes: list[Shape] = []
    for device in range(timeline.num_devices):
        y = top + device * (height + gap)
        if device % every == 0:
            middle = y + height / 2 + size * 0.36
            shapes.append(Text(LEFT - 10, middle, f"device {device}", size, anchor="end"))
        shapes.append(Boxes(ROW, [(LEFT, y, end - LEFT, height)]))
        if _has_end(timeline):
            shapes.append(Boxes(AFTER, [(end, y, stop - end, height)]))
        shapes.extend(draw(timeline, device, scale, y, height))
    used = timeline.num_devices * (height + gap) - gap
    if timeline.memory and timeline.num_devices:
        shapes.extend(_memory(timeline, scale, top + used + 10))
        used += 10 + MEMORY
    return shapes, used


def _boxes(
    timeline: Timeline, device: int, scale: _Scale, y: float, height: int
) -> Iterator[Shape]:
    """Each instruction as a box, and its name where it has the room."""
    place = palette.positions(timeline.placement)
    many = palette.has_many_stages(timeline)
    size = 11 if height >= 18 else 8.5
    boxes: dict[str, list[Box]] = {}
    names: list[Text] = []
    for span in timeline.spans(device):
        fill = palette.fill(span.compute, place)
        x, width = scale.x(span.start), scale.x(span.end) - scale.x(span.start)
        # A hairline of the background parts neighbours; thin boxes cannot spare it.
        drawn = max(width - (0.75 if width > 3 else 0.0), 0.2)
        boxes.setdefault(fill, []).append((x, y, drawn, height))
        text = palette.label(span.compute, many)
        if height >= 12 and width >= _width(text, size) + 2:
            middle, base = x + drawn / 2, y + height / 2 + size * 0.36
            names.append(Text(middle, base, text, size, palette.ink(fill), "middle"))
    yield from (Boxes(fill, mine) for fill, mine in boxes.items())
    yield from names


def _columns(
    timeline: Timeline, device: int, scale: _Scale, y: float, height: int
) -> Iterator[Shape]:
    """Stacked shares of the operations; neighbouring columns that look the same are one."""
    count = PLOT // COLUMN
    share = shares(timeline, device, np.linspace(0.0, scale.total, count + 1))
    heights = np.rint(np.cumsum(share, axis=0) * LEVELS).astype(int)
    below = np.zeros(count, dtype=int)
    for code, above in enumerate(heights):
        boxes, start = [], 0
        for i in range(1, count + 1):
            if i == count or (above[i], below[i]) != (above[start], below[start]):
                low, high = (float(v[start]) / LEVELS * height for v in (below, above))
                if high > low:
                    x, width = LEFT + start * COLUMN, (i - start) * COLUMN
                    boxes.append((x, y + height - high, width, high - low))
                start = i
        if boxes:
            yield Boxes(palette.COLOURS[OPS[code]], boxes)
        below = above


def _memory(timeline: Timeline, scale: _Scale, top: float) -> Iterator[Shape]:
    """The fullest device's memory over time."""
    peaks = [float(amounts.max()) if len(amounts) else 0.0 for _, amounts in timeline.memory]
    device = int(np.argmax(peaks))
    peak = peaks[device]
    if peak <= 0:
        return
    times, amounts = timeline.memory[device]
    edges = [scale.x(time) for time in (*times.tolist(), timeline.makespan)]
    bottom = top + MEMORY
    points = [(edges[0], bottom)]
    for amount, start, end in zip(amounts.tolist(), edges, edges[1:], strict=False):
        level = bottom - amount / peak * (MEMORY - 4)
        points += [(start, level), (end, level)]
    yield Area(IN_USE, IN_USE_EDGE, [*points, (edges[-1], bottom)])
    yield Text(LEFT - 10, top + 14, "memory", 11, anchor="end")
    yield Text(LEFT - 10, top + 28, palette.size(peak), 10, anchor="end")
    yield Text(LEFT - 10, top + 41, f"device {device}", 10, anchor="end")


def _axis(scale: _Scale, top: float, bottom: float) -> Iterator[Shape]:
    if scale.total <= 0:
        return
    unit, name = palette.unit_of(scale.total)
    total = scale.total / unit
    step = palette.nice_step(total, 10)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    at = [i * step for i in range(int(total / step + 1e-9) + 1)]
    lines = [scale.x(number * unit) - 0.5 for number in at]
    yield Boxes(TEXT, [(x, top, 1, bottom - top) for x in lines], opacity=0.1)
    yield Boxes(QUIET, [(LEFT, bottom, PLOT, 1), *((x, bottom, 1, 5) for x in lines)])
    for x, number in zip(lines, at, strict=True):
        text = f"{number:.{digits}f}" + ("" if number else f" {name}")
        yield Text(x, bottom + 18, text, 11, anchor="middle")


def _width(text: str, size: float) -> float:
    """Pixels that `text` needs at most in a common sans-serif font."""
    return size * sum(map(_em, text))


def _em(character: str) -> float:
    if character in " .,:;'|il()":
        return 0.33
    if character in "mwMW@%…":
        return 0.95
    return 0.58 if character.islower() or character.isdigit() else 0.7


def _fit(text: str, size: float, room: float) -> str:
    if _width(text, size) <= room:
        return text
    while text and _width(text + "…", size) > room:
        text = text[:-1]
    return text + "…"
