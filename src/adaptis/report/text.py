"""Timelines as plain text: to scale for terminals, on a grid for docstrings and golden files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from adaptis.program import OPS, Op
from adaptis.report import palette
from adaptis.report.raster import is_dense, shares

if TYPE_CHECKING:
    from adaptis.timeline import Span, Timeline

FILL = {
    Op.FORWARD: "─",
    Op.BACKWARD: "═",
    Op.BACKWARD_INPUT: "╌",
    Op.BACKWARD_WEIGHT: "░",
    Op.RECOMPUTE: "~",
    Op.SCORES: "·",
    Op.SCORES_GRADIENT: ":",
}
LEAST_WIDTH = 40


def drawing(timeline: Timeline, unit: float = 1.0) -> str:
    """One line a device, one cell for each `unit` seconds, as the docstrings of schedules show it.

    A cell holds the instruction that starts there (`F0`, or `2F0` where a device holds many
    stages); dashes mark the further cells of a longer one, blanks the idle ones.

    Raises:
        ValueError: if the instructions do not start and end on multiples of `unit`.
    """
    if not unit > 0:
        raise ValueError(f"a cell of {unit} seconds is no cell; give a unit above 0")
    many = palette.has_many_stages(timeline)
    rows = [
        [(_cells(s, unit), palette.label(s.compute, many)) for s in timeline.spans(d)]
        for d in range(timeline.num_devices)
    ]
    width = max((len(text) for row in rows for _, text in row), default=2) + 1
    digits = len(str(max(timeline.num_devices - 1, 0)))
    lines = []
    for device, row in enumerate(rows):
        line = ""
        for (first, last), text in row:
            line = line.ljust(first * width) + text.ljust(
                width * (last - first) - 1, "-" if last - first > 1 else " "
            )
        lines.append(f"rank {device:>{digits}} | {line}".rstrip())
    return "\n".join(lines)


def _cells(span: Span, unit: float) -> tuple[int, int]:
    first, last = round(span.start / unit), round(span.end / unit)
    exact = all(
        abs(t / unit - n) < 1e-6 * max(1, n) for t, n in ((span.start, first), (span.end, last))
    )
    if not exact or first == last:
        raise ValueError(
            f"{span.compute} runs from {span.start:g} to {span.end:g} s, which is no whole number "
            f"of cells of {unit:g} s; give a unit that divides both, or use `draw`"
        )
    return first, last


def draw(timeline: Timeline, width: int = 100) -> str:
    """A Gantt chart to scale, at most `width` characters wide: heading, devices, axis, legend.

    A character shows what fills most of its time; an instruction shows its name where it has the
    room. Where there are too many instructions for that, each character is the operation (`F`, `B`,
    ...) that takes the most of its time.
    """
    gutter = len(f"device {max(timeline.num_devices - 1, 0)} ")
    cells = max(width, LEAST_WIDTH) - gutter - 2
    total = max(timeline.makespan, timeline.step)
    heading = (
        f"{timeline.name} · {timeline.source} · step {palette.duration(timeline.step)}"
        f" · bubble {palette.percent(timeline.bubble_fraction)}"
    )
    lines = [_shorten(heading, gutter + cells + 2)]
    if total <= 0:
        return "\n".join([*lines, "(nothing ran)"])
    for device in range(timeline.num_devices):
        name = f"device {device}".ljust(gutter)
        lines.append(f"{name}│{_row(timeline, device, total, cells)}│")
    lines.extend((" " * gutter + line).rstrip() for line in _axis(total, cells))
    lines.append(" " * gutter + " " + _legend(timeline, is_dense(timeline, cells / 2)))
    return "\n".join(lines)


def _row(timeline: Timeline, device: int, total: float, cells: int) -> str:
    share = shares(timeline, device, np.linspace(0.0, total, cells + 1))
    dense = is_dense(timeline, cells / 2)
    marks = [str(op) if dense else FILL[op] for op in OPS]
    best, busy = share.argmax(axis=0), share.sum(axis=0) >= 0.5
    row = [marks[code] if full else " " for code, full in zip(best, busy, strict=True)]
    if dense:
        return "".join(row)
    many = palette.has_many_stages(timeline)
    for span in timeline.spans(device):
        first, last = round(span.start / total * cells), round(span.end / total * cells)
        room = last - first
        text = palette.label(span.compute, many)
        shown = text if len(text) <= room else str(span.compute.op)
        if room > 0:
            row[first : first + len(shown)] = shown
    return "".join(row[:cells])


def _axis(total: float, cells: int) -> tuple[str, str]:
    unit, name = palette.unit_of(total)
    step = palette.nice_step(total / unit, max(cells // 14, 1))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks, numbers = list("└" + "─" * cells + "┘"), " " * (cells + 2)
    for i in range(int(total / unit / step + 1e-9) + 1):
        at = 1 + min(round(i * step * unit / total * cells), cells)
        text = f"{i * step:.{digits}f} {name}" if i == 0 else f"{i * step:.{digits}f}"
        if 1 < at < cells:
            ticks[at] = "┴"
        left = min(at - (0 if i == 0 else len(text) // 2), cells + 2 - len(text))
        numbers = numbers[:left] + text + numbers[left + len(text) :]
    return "".join(ticks), numbers


def _legend(timeline: Timeline, dense: bool) -> str:
    marks = [
        f"{op}{'' if dense else FILL[op] * 2} {palette.NAMES[op]}"
        for op in palette.used_ops([timeline])
    ]
    return "   ".join(marks)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
