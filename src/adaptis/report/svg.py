"""Timelines as one static picture for documents: stacked, on one time axis, on own background.

Instructions are drawn one by one while there is room; beyond that, columns show the share of each
operation. Viewers differ in their fonts, so widths of text are estimated on the safe side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from adaptis.report import palette
from adaptis.report.raster import is_dense, shares
from adaptis.timeline import OPS, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WIDTH, MARGIN, GUTTER = 960, 28, 74
PLOT = WIDTH - 2 * MARGIN - GUTTER  # pixels for the time axis
LEFT = MARGIN + GUTTER
COLUMN, LEVELS = 5, 8  # of dense pictures: pixels of a column (divides PLOT), steps of a share
MEMORY = 44  # height of the memory strip
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
TEXT, QUIET, GRID, CARD, ROW = "#1b2129", "#5b6673", "#dfe3e8", "#ffffff", "#f0f2f5"


@dataclass(frozen=True, slots=True)
class _Scale:
    """Seconds to pixels."""

    total: float

    def x(self, seconds: float) -> float:
        return LEFT + (seconds / self.total * PLOT if self.total else 0.0)


def render(timelines: Iterable[Timeline], title: str = "") -> str:
    """One SVG document; the first timeline is what the others are compared with."""
    timelines = list(timelines)
    scale = _Scale(max((max(t.step, t.makespan) for t in timelines), default=0.0))
    body: list[str] = []
    top = MARGIN
    if title:
        body.append(_text(MARGIN, top + 16, _fit(title, 20, WIDTH - 2 * MARGIN), 20, weight=600))
        top += 36
    body.extend(_legend(timelines, top))
    top += 30
    first_row = top + 30
    for index, timeline in enumerate(timelines):
        body.append(_heading(timeline, timelines[0] if index else None, top))
        block, height = _block(timeline, scale, top + 30)
        body.extend(block)
        top += 30 + height + 20
    grid, axis = _axis(scale, first_row, top - 12)
    height = top + 34
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" font-family="{FONT}" font-size="12">'
    )
    described = f"<title>{escape(title or 'Timelines')}</title><desc>{_describe(timelines)}</desc>"
    frame = (
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10" '
        f'fill="{CARD}" stroke="{GRID}"/>'
    )
    return "\n".join([head, described, _DEFS, frame, *body, *grid, *axis, "</svg>"]) + "\n"


_DEFS = (
    '<defs><pattern id="after" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="6" height="6" fill="#e4e8ed"/>'
    '<rect width="2" height="6" fill="#c3cad3"/></pattern></defs>'
)


def _describe(timelines: list[Timeline]) -> str:
    return escape("; ".join(f"{t.name}: {_figures(t)}" for t in timelines))


def _figures(timeline: Timeline) -> str:
    return (
        f"{timeline.source} · step {palette.duration(timeline.step)}"
        f" · bubble {palette.percent(timeline.bubble_fraction)}"
    )


def _heading(timeline: Timeline, base: Timeline | None, top: float) -> str:
    figures = _figures(timeline)
    if base is not None and base.step > 0:
        change = timeline.step / base.step - 1
        if abs(change) >= 0.0005:
            figures += f" · {palette.percent(abs(change))} {'less' if change < 0 else 'more'} time"
    room = WIDTH - 2 * MARGIN - _width(figures, 12.5) - 24
    name = _fit(timeline.name, 14, room)
    return _text(MARGIN, top + 18, name, 14, weight=600) + _text(
        WIDTH - MARGIN, top + 18, figures, 12.5, fill=QUIET, anchor="end"
    )


def _legend(timelines: list[Timeline], top: float) -> Iterator[str]:
    x = float(MARGIN)
    ops = palette.used_ops(timelines)
    entries = [(palette.COLOURS[op], f"{palette.NAMES[op]} ({op})") for op in ops]
    entries.append((ROW, "idle"))
    if any(_has_end(t) for t in timelines):
        entries.append(("url(#after)", "optimizer"))
    for fill, name in entries:
        box = f'<rect x="{x:.1f}" y="{top}" width="12" height="12" rx="2.5"'
        yield f'{box} fill="{fill}" stroke="{GRID}"/>'
        yield _text(x + 18, top + 10, name, 12, fill=QUIET)
        x += 18 + _width(name, 12) + 16
    if any(len(set(t.placement)) < len(t.placement) for t in timelines):
        yield _text(x, top + 10, "shades: the stages of a device", 12, fill=QUIET)


def _has_end(timeline: Timeline) -> bool:
    return timeline.step > timeline.makespan * 1.001


def _row_height(devices: int) -> int:
    heights = ((4, 30), (8, 24), (16, 18), (32, 12))
    return next((height for most, height in heights if devices <= most), 8)


def _block(timeline: Timeline, scale: _Scale, top: float) -> tuple[list[str], float]:
    """The rows of one timeline and how high they are."""
    height = _row_height(timeline.num_devices)
    gap = 4 if height >= 18 else 2
    every = math.ceil(14 / (height + gap))
    parts: list[str] = []
    dense = is_dense(timeline, PLOT / 3)
    for device in range(timeline.num_devices):
        y = top + device * (height + gap)
        if device % every == 0:
            size = 12 if height >= 18 else 10
            parts.append(
                _text(
                    LEFT - 10,
                    y + height / 2 + size * 0.36,
                    f"device {device}",
                    size,
                    fill=QUIET,
                    anchor="end",
                )
            )
        end = max(scale.x(timeline.makespan) - LEFT, 0.0)
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{end:.2f}" height="{height}" fill="{ROW}"/>')
        if _has_end(timeline):
            width = scale.x(timeline.step) - LEFT - end
            parts.append(
                f'<rect x="{LEFT + end:.2f}" y="{y}" width="{width:.2f}" height="{height}" '
                'fill="url(#after)"/>'
            )
        draw = _columns if dense else _boxes
        parts.extend(draw(timeline, device, scale, y, height))
    used = timeline.num_devices * (height + gap) - gap
    if timeline.memory and timeline.num_devices:
        parts.extend(_memory(timeline, scale, top + used + 10))
        used += 10 + MEMORY
    return parts, used


def _boxes(timeline: Timeline, device: int, scale: _Scale, y: float, height: int) -> Iterator[str]:
    """Each instruction as a box: one path for each colour, and a name where it has the room."""
    place = palette.positions(timeline.placement)
    many = palette.has_many_stages(timeline)
    size = 11 if height >= 18 else 8.5
    paths: dict[str, list[str]] = {}
    names: list[str] = []
    for span in timeline.spans(device):
        fill = palette.shade(palette.COLOURS[span.compute.op], *place[span.compute.stage])
        x, width = scale.x(span.start), scale.x(span.end) - scale.x(span.start)
        # A hairline of the background parts neighbours; thin boxes cannot spare it.
        drawn = max(width - (0.75 if width > 3 else 0.0), 0.2)
        paths.setdefault(fill, []).append(f"M{x:.2f} {y}h{drawn:.2f}v{height}h-{drawn:.2f}z")
        text = palette.label(span.compute, many)
        if height >= 12 and width >= _width(text, size) + 2:
            middle, base = x + drawn / 2, y + height / 2 + size * 0.36
            names.append(_text(middle, base, text, size, fill=palette.ink(fill), anchor="middle"))
    for fill, path in paths.items():
        yield f'<path fill="{fill}" d="{"".join(path)}"/>'
    yield from names


def _columns(
    timeline: Timeline, device: int, scale: _Scale, y: float, height: int
) -> Iterator[str]:
    """Stacked shares of the operations; neighbouring columns that look the same are one."""
    count = PLOT // COLUMN
    share = shares(timeline, device, np.linspace(0.0, scale.total, count + 1))
    heights = np.rint(np.cumsum(share, axis=0) * LEVELS).astype(int)
    below = np.zeros(count, dtype=int)
    for code, above in enumerate(heights):
        path, start = [], 0
        for i in range(1, count + 1):
            if i == count or (above[i], below[i]) != (above[start], below[start]):
                low, high = (v[start] / LEVELS * height for v in (below, above))
                if high > low:
                    x, width = LEFT + start * COLUMN, (i - start) * COLUMN
                    bar = f"h{width}v{high - low:g}h-{width}z"
                    path.append(f"M{x} {y + height - high:g}{bar}")
                start = i
        if path:
            yield f'<path fill="{palette.COLOURS[OPS[code]]}" d="{"".join(path)}"/>'
        below = above


def _memory(timeline: Timeline, scale: _Scale, top: float) -> Iterator[str]:
    """The fullest device's memory over time."""
    peaks = [float(amounts.max()) if len(amounts) else 0.0 for _, amounts in timeline.memory]
    device = int(np.argmax(peaks))
    peak = peaks[device]
    if peak <= 0:
        return
    times, amounts = timeline.memory[device]
    edges = [*times.tolist()[1:], timeline.makespan]
    bottom = top + MEMORY
    path = [f"M{scale.x(float(times[0])):.1f} {bottom}"]
    for amount, end in zip(amounts.tolist(), edges, strict=True):
        path.append(f"V{bottom - amount / peak * (MEMORY - 4):.1f}H{scale.x(end):.1f}")
    yield (
        f'<path d="{"".join(path)}V{bottom}z" fill="#7a5bb5" fill-opacity="0.18" stroke="#7a5bb5" '
        'stroke-width="1"/>'
    )
    yield _text(LEFT - 10, top + 14, "memory", 11, fill=QUIET, anchor="end")
    yield _text(LEFT - 10, top + 28, palette.size(peak), 10, fill=QUIET, anchor="end")
    yield _text(LEFT - 10, top + 41, f"device {device}", 10, fill=QUIET, anchor="end")


def _axis(scale: _Scale, top: float, bottom: float) -> tuple[list[str], list[str]]:
    if scale.total <= 0:
        return [], []
    unit, name = palette.unit_of(scale.total)
    total = scale.total / unit
    step = palette.nice_step(total, 10)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    grid = [f'<path d="M{LEFT} {bottom}h{PLOT}" stroke="{QUIET}" stroke-width="1"/>']
    numbers = []
    for i in range(int(total / step + 1e-9) + 1):
        x = scale.x(i * step * unit)
        grid.append(
            f'<path d="M{x:.2f} {top}V{bottom}" stroke="{TEXT}" stroke-opacity="0.1"/>'
            f'<path d="M{x:.2f} {bottom}v5" stroke="{QUIET}"/>'
        )
        text = f"{i * step:.{digits}f}" + (f" {name}" if i == 0 else "")
        numbers.append(_text(x, bottom + 18, text, 11, fill=QUIET, anchor="middle"))
    return grid, numbers


def _text(
    x: float,
    y: float,
    text: str,
    size: float,
    *,
    fill: str = TEXT,
    anchor: str = "start",
    weight: int = 400,
) -> str:
    extra = "" if anchor == "start" else f' text-anchor="{anchor}"'
    extra += "" if weight == 400 else f' font-weight="{weight}"'
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}"'
    return f'<text {place} fill="{fill}"{extra}>{escape(text)}</text>'


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
