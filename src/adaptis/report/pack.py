"""Timelines as compact JSON for the script of the report.

Times are integers of a power of ten of seconds, fine enough for nine digits of the step. Each
column holds differences from what is expected, so that most numbers are one digit: 200,000
instructions take 2 to 3 MB.

    kinds       the distinct (stage * number of operations + operation) of a device
    kind        index into `kinds`, one an instruction, in order of start
    microbatch  minus the successor of the last one of the same kind
    gap         idle ticks since the end of the instruction before
    length      ticks, minus those of the last one of the same kind
    held        [row, ticks] of what memory held back

`timeline.js` holds the inverse.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.program import HEAD_OPS, OPS, Compute, Join, Layout, Together, Value
from adaptis.report import palette

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from adaptis.timeline import Timeline

DIGITS = 9
MEMORY_POINTS = 1000  # a longer curve is reduced to the most in each of so many intervals


def pack(timelines: Iterable[Timeline], layers: object = None) -> dict[str, Any]:
    """Everything that the script draws; `layers` describes the stages of timelines that do not."""
    timelines = list(timelines)
    packed = [_timeline(t, t.notes.get("layers", layers)) for t in timelines]
    for entry, pair in zip(packed, pairs(timelines), strict=True):
        entry["pair"] = pair
    return {
        "ops": [str(op) for op in OPS],
        "head": [OPS.index(op) for op in HEAD_OPS],
        "names": [palette.NAMES[op] for op in OPS],
        "colours": [palette.COLOURS[op] for op in OPS],
        "timelines": packed,
    }


def pairs(timelines: list[Timeline]) -> list[str | None]:
    """The prediction and the measurement that each timeline is of, or None.

    The notes say it ("pair"); else two of one name, one of each source, are a pair.
    """
    sources: dict[str, list[str]] = {}
    for timeline in timelines:
        sources.setdefault(timeline.name, []).append(timeline.source)
    return [
        str(t.notes["pair"])
        if t.notes.get("pair") is not None
        else t.name
        if sorted(sources[t.name]) == ["measured", "simulated"]
        else None
        for t in timelines
    ]


@cache
def _writers(reductions: int) -> list[list[tuple[int, int]]]:
    """Per operation: which ones write what it reads, and how many stages further on.

    What a collective hands over was written by those that it waits for.
    """
    stages = range(3)  # neighbours on both sides, and both ends
    found: list[set[tuple[int, int]]] = [set() for _ in OPS]
    for recomputed in (frozenset[int](), frozenset(stages)):
        layout = Layout((0,) * len(stages), 1, recomputed, reductions=reductions)
        computes = [Compute(op, s, 0) for op in OPS if op not in HEAD_OPS for s in stages]
        joins: list[Join] = []
        if reductions:
            computes += [Compute(op, layout.num_stages, 0) for op in HEAD_OPS]
            joins = [Join(what, layout.num_stages, 0) for what in (Together.SUM_S, Together.SUM_T)]
        writers: dict[Value, list[Compute]] = {}
        for compute in computes:
            for value in layout.writes(compute):
                writers.setdefault(value, []).append(compute)
        for join in joins:
            behind = [c for value in layout.reads(join) for c in writers.get(value, ())]
            writers |= dict.fromkeys(layout.writes(join), behind)
        for reader in computes:
            for value in layout.reads(reader):
                for writer in writers.get(value, ()):
                    code, offset = OPS.index(writer.op), writer.stage - reader.stage
                    found[OPS.index(reader.op)].add((code, offset))
    return [sorted(entries) for entries in found]


def _timeline(timeline: Timeline, layers: object) -> dict[str, Any]:
    span = max(timeline.step, timeline.makespan)
    tick = 10.0 ** (math.floor(math.log10(span)) + 1 - DIGITS) if span > 0 else 1.0
    place = palette.positions(timeline.placement)
    known = sorted(set(place))
    return {
        "name": timeline.name,
        "source": timeline.source,
        "reads": _writers(timeline.reductions),
        "tick": tick,
        "step": timeline.step,
        "makespan": timeline.makespan,
        "placement": list(timeline.placement),
        "many": palette.has_many_stages(timeline),
        "fills": [[palette.shade(palette.COLOURS[op], *p) for op in OPS] for p in known],
        "inks": [
            [palette.ink(palette.shade(palette.COLOURS[op], *p)) for op in OPS] for p in known
        ],
        "shade": [known.index(p) for p in place],
        "layers": [str(text) for text in layers] if isinstance(layers, list | tuple) else [],
        "devices": [_device(timeline, d, tick) for d in range(timeline.num_devices)],
        "memory": [_curve(times, amounts, span, tick) for times, amounts in timeline.memory],
        "peaks": list(timeline.peak_bytes),
    }


def _device(timeline: Timeline, device: int, tick: float) -> dict[str, list[Any]]:
    rows = timeline.rows(device)
    order = np.argsort(timeline.start[rows], kind="stable")
    start = np.rint(timeline.start[rows][order] / tick).astype(np.int64)
    end = np.rint(timeline.end[rows][order] / tick).astype(np.int64)
    code = timeline.stage[rows][order].astype(np.int64) * len(OPS) + timeline.op[rows][order]
    microbatch = timeline.microbatch[rows][order].astype(np.int64)
    kinds, kind = np.unique(code, return_inverse=True)
    length = end - start
    for index in range(len(kinds)):
        mine = kind == index
        microbatch[mine] = np.diff(microbatch[mine], prepend=-1) - 1
        length[mine] = np.diff(length[mine], prepend=0)
    return {
        "held": _held(timeline, rows, order, tick),
        "kinds": kinds.tolist(),
        "kind": kind.tolist(),
        "microbatch": microbatch.tolist(),
        "gap": (start - np.concatenate([[0], end[:-1]])).tolist() if len(start) else [],
        "length": length.tolist(),
    }


def _held(
    timeline: Timeline, rows: slice, order: NDArray[np.int64], tick: float
) -> list[list[int]]:
    """[row, ticks] of those rows that memory held back."""
    if timeline.held_back is None:
        return []
    seconds = timeline.held_back[rows]
    if not len(seconds):
        return []
    ticks = np.rint(seconds[order] / tick).astype(np.int64)
    return [[int(row), int(ticks[row])] for row in np.flatnonzero(ticks)]


def _curve(
    times: NDArray[np.float64], amounts: NDArray[np.float64], span: float, tick: float
) -> dict[str, list[int]]:
    """Times and bytes, each as differences; long curves keep their peaks, not their every step."""
    if len(times) > 2 * MEMORY_POINTS:
        cell = np.clip(times / span * MEMORY_POINTS, 0, MEMORY_POINTS - 1).astype(np.int64)
        first = np.concatenate([[0], np.flatnonzero(np.diff(cell)) + 1])
        times, amounts = times[first], np.maximum.reduceat(amounts, first)
    ticks = np.rint(times / tick).astype(np.int64)
    count = np.rint(amounts).astype(np.int64)
    return {"time": np.diff(ticks, prepend=0).tolist(), "bytes": np.diff(count, prepend=0).tolist()}
