"""Timelines as compact JSON for the script of the report.

Times are integers of a power of ten of seconds, fine enough for nine digits of the step. Each
column holds differences from what is expected, so that most numbers are one digit: 200,000
instructions take 2 to 3 MB.

    kinds       the distinct (stage * number of operations + operation) of a device
    kind        index into `kinds`, one an instruction, in order of start
    microbatch  minus the successor of the last one of the same kind
    gap         idle ticks since the end of the instruction before
    length      ticks, minus those of the last one of the same kind

`timeline.js` holds the inverse.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.program import Compute, reads, writes
from adaptis.report import palette
from adaptis.timeline import OPS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from adaptis.timeline import Timeline

DIGITS = 9
MEMORY_POINTS = 1000  # a longer curve is reduced to the most in each of so many intervals


def pack(timelines: Iterable[Timeline], layers: object = None) -> dict[str, Any]:
    """Everything that the script draws; `layers` describes the stages of timelines that do not."""
    return {
        "ops": [str(op) for op in OPS],
        "names": [palette.NAMES[op] for op in OPS],
        "colours": [palette.COLOURS[op] for op in OPS],
        "reads": _writers(),
        "timelines": [_timeline(t, t.notes.get("layers", layers)) for t in timelines],
    }


def _writers() -> list[list[list[tuple[int, int]]]]:
    """Per operation, per value it reads: which operations write it, how many stages further on."""
    stage, stages = 1, 3  # a stage with neighbours on both sides
    result = []
    for reader in OPS:
        result.append(
            [
                [
                    (OPS.index(op), s - stage)
                    for op in OPS
                    for s in range(stages)
                    if any(
                        value in writes(Compute(op, s, 0), stages, recomputed)
                        for recomputed in (frozenset(), frozenset(range(stages)))
                    )
                ]
                for value in reads(Compute(reader, stage, 0), stages)
            ]
        )
    return result


def _timeline(timeline: Timeline, layers: object) -> dict[str, Any]:
    span = max(timeline.step, timeline.makespan)
    tick = 10.0 ** (math.floor(math.log10(span)) + 1 - DIGITS) if span > 0 else 1.0
    place = palette.positions(timeline.placement)
    known = sorted(set(place))
    return {
        "name": timeline.name,
        "source": timeline.source,
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


def _device(timeline: Timeline, device: int, tick: float) -> dict[str, list[int]]:
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
        "kinds": kinds.tolist(),
        "kind": kind.tolist(),
        "microbatch": microbatch.tolist(),
        "gap": (start - np.concatenate([[0], end[:-1]])).tolist() if len(start) else [],
        "length": length.tolist(),
    }


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
