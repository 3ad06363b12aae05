"""What a found plan looks like and what keeps it from being faster, in plain sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.bounds import Bounds
    from adaptis.plan import Plan
    from adaptis.timeline import Timeline


def explain(
    plan: Plan, timeline: Timeline, bounds: Bounds, memory_bytes: Sequence[float]
) -> list[str]:
    """A line per device (layers, work, idle by cause, memory), the bound, and what limits it."""
    busy = timeline.busy()
    lines = []
    for d, bubbles in enumerate(timeline.bubbles()):
        idle = ", ".join(f"{cause} {1e3 * s:.1f}" for cause, s in bubbles.items() if s > 5e-5)
        lines.append(
            f"device {d}: layers {plan.layers_of(d) or 'none'}; busy {1e3 * busy[d]:.1f} ms; "
            f"idle ms: {idle or 'none'}{_memory(timeline, memory_bytes, d)}"
        )
    binding = bounds.binding
    gap = bounds.gap(timeline.step)
    lines.append(
        f"step {1e3 * timeline.step:.1f} ms, {100 * gap:.1f} % above the lower bound of "
        f"{1e3 * binding.seconds:.1f} ms ({binding.name}: {binding.reason})"
    )
    lines.append(_limit(timeline, bounds, memory_bytes))
    return lines


def _memory(timeline: Timeline, memory_bytes: Sequence[float], d: int) -> str:
    peak = timeline.peak_bytes[d] if timeline.peak_bytes else 0
    if not peak:
        return ""
    of = f" of {memory_bytes[d] / 2**30:.2f}" if math.isfinite(memory_bytes[d]) else ""
    return f"; memory {peak / 2**30:.2f}{of} GiB"


def _limit(timeline: Timeline, bounds: Bounds, memory_bytes: Sequence[float]) -> str:
    """The largest part of what the step takes beyond the bound."""
    busy = timeline.busy()
    most, mean = float(busy.max()), float(busy.mean())
    if bounds.binding.name == "layer" and bounds.gap(timeline.step) < 0.03:
        return "limited by one layer: only dividing it (a sharded head) can make the step shorter"
    tight = [
        d
        for d, limit in enumerate(memory_bytes)
        if math.isfinite(limit) and timeline.peak_bytes and timeline.peak_bytes[d] > 0.97 * limit
    ]
    if tight:
        devices = ", ".join(map(str, tight))
        return f"limited by memory on device {devices}: fewer micro-batches fit than would help"
    idle: dict[str, float] = {"unequal work": most - mean}
    for bubbles in timeline.bubbles():
        for cause, seconds in bubbles.items():
            if cause != "imbalance":
                idle[cause] = idle.get(cause, 0.0) + seconds / len(busy)
    cause = max(idle, key=lambda name: idle[name])
    return f"of what is left, {cause} costs most: {1e3 * idle[cause]:.1f} ms per device"
