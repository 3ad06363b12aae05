"""How much of each cell of a time grid each operation fills: what is left to see of small spans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adaptis.program import OPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from adaptis.timeline import Timeline


def shares(timeline: Timeline, device: int, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row o, column i: the share of `OPS[o]` in the time from edges[i] to edges[i + 1], 0 to 1."""
    rows = timeline.rows(device)
    op, start, end = timeline.op[rows], timeline.start[rows], timeline.end[rows]
    result = np.zeros((len(OPS), len(edges) - 1))
    for code in np.unique(op):
        mine = op == code
        # The time spent on this operation until t is piecewise linear: it grows in its spans only.
        times = np.stack([start[mine], end[mine]], axis=1).ravel()
        length = end[mine] - start[mine]
        spent = np.stack([np.cumsum(length) - length, np.cumsum(length)], axis=1).ravel()
        result[code] = np.diff(np.interp(edges, times, spent)) / np.diff(edges)
    return np.clip(result, 0.0, 1.0)


def is_dense(timeline: Timeline, cells: float) -> bool:
    """Whether the devices run so many instructions that `cells` cannot show them one by one."""
    return len(timeline.op) > timeline.num_devices * cells
