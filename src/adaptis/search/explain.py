"""What a found plan looks like and what keeps it from being faster, as figures and in sentences.

A step is exactly: the mean work of a device, what the busiest device works more than that, the idle
time of the busiest device by cause, and the end of the step (reductions and the optimizer).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adaptis.program import OPS, Op, parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.bounds import Bounds
    from adaptis.plan import Plan
    from adaptis.timeline import Timeline

GIB = 2**30
CLOSE = 0.005  # a gap below which a plan counts as at the bound
HEAVY = 0.97  # of the binding bound: what one layer takes where it is the reason of that bound
SHOWN = 5e-5  # seconds: less than that is 0.0 ms
ADVICE = {
    "work": "only more or faster devices, or cheaper layers, make it lower",
    "fill": "more micro-batches make it a smaller share",
    "layer": "divide it or accept",
    "packing": "layers are indivisible, another number of devices may divide them better",
    "path": "more micro-batches cost little, fewer save nothing",
    "memory": "more memory makes it lower",
}
SHARD = "deal it out to all devices (try --shard-head auto) or accept"


def explain(
    plan: Plan, timeline: Timeline, bounds: Bounds, memory_bytes: Sequence[float]
) -> list[str]:
    """What was chosen, a line per device, what the step consists of, and what limits it."""
    return explanation_lines(explanation(plan, timeline, bounds, memory_bytes))


def explanation(
    plan: Plan, timeline: Timeline, bounds: Bounds, memory_bytes: Sequence[float]
) -> dict[str, Any]:
    """The same as figures for JSON: seconds and bytes, None for unlimited memory."""
    pieces = _pieces(timeline)
    return {
        "chosen": _chosen(plan),
        "devices": _devices(plan, timeline, memory_bytes),
        "step_seconds": timeline.step,
        "step_parts_seconds": pieces,
        "lower_bound_seconds": bounds.value,
        "gap": bounds.gap(timeline.step),
        "bounds_seconds": {bound.name: bound.seconds for bound in bounds.all},
        "bound": _bound(bounds),
        "limit": _limit(pieces, bounds.gap(timeline.step)),
    }


def _chosen(plan: Plan) -> dict[str, Any]:
    """The decisions in numbers."""
    computes = [c for order in plan.programs for work in order for c in parts(work)]
    return {
        "stages": len(plan.stages),
        "devices": len({stage.device for stage in plan.stages}),
        "split_stages": sorted({c.stage for c in computes if c.op is Op.BACKWARD_WEIGHT}),
        "recomputed_layers": [[s.start, s.stop] for s in plan.stages if s.recompute],
        "head_reductions": plan.head_reductions,
    }


def _devices(plan: Plan, timeline: Timeline, memory_bytes: Sequence[float]) -> list[dict[str, Any]]:
    busy, bubbles = timeline.busy(), timeline.bubbles()
    return [
        {
            "device": d,
            "layers": plan.layers_of(d),
            "work_seconds": float(busy[d]),
            "idle_seconds": dict(bubbles[d]),
            "peak_bytes": timeline.peak_bytes[d] if timeline.peak_bytes else None,
            "memory_bytes": limit if math.isfinite(limit) else None,
        }
        for d, limit in enumerate(memory_bytes)
    ]


def _pieces(timeline: Timeline) -> dict[str, float]:
    """What the seconds of the step add up from; the work without recomputation comes first."""
    busy = timeline.busy()
    again = timeline.op == OPS.index(Op.RECOMPUTE)
    recomputed = float((timeline.end - timeline.start)[again].sum()) / len(busy)
    busiest = int(busy.argmax())
    result = {
        "work": float(busy.mean()) - recomputed,
        "recomputation": recomputed,
        "unequal work": float(busy.max() - busy.mean()),
        **timeline.bubbles()[busiest],
        "end of step": timeline.step - timeline.makespan,
    }
    return {name: seconds for name, seconds in result.items() if seconds > 0}


def _bound(bounds: Bounds) -> dict[str, Any]:
    """The bound that binds, why, and what could be done about it."""
    binding = bounds.binding
    layer = next((bound for bound in bounds.all if bound.name == "layer"), binding)
    reason, advice = binding.reason, ADVICE[binding.name]
    if binding.name in ("layer", "packing") and layer.seconds >= HEAVY * binding.seconds:
        reason = layer.reason
        advice = SHARD if "head" in reason.split(" alone")[0] else ADVICE["layer"]
    return {"name": binding.name, "reason": reason, "advice": advice}


def _limit(pieces: dict[str, float], gap: float) -> str:
    """The largest part of the step that another plan could save."""
    if gap < CLOSE:
        return "nothing left to gain: the plan is at the bound"
    left = {
        name: seconds for name, seconds in pieces.items() if name not in ("work", "end of step")
    }
    if not left:
        return "no device waits: what is left is in the overheads of the instructions"
    most = max(left, key=lambda name: left[name])
    return f"most is lost to {most}: {1e3 * left[most]:.1f} ms"


def explanation_lines(figures: dict[str, Any]) -> list[str]:
    """The lines of `explain` from the figures of `explanation`."""
    bound, step = figures["bound"], 1e3 * figures["step_seconds"]
    pieces = " + ".join(
        f"{name} {1e3 * seconds:.1f}"
        for name, seconds in figures["step_parts_seconds"].items()
        if seconds > SHOWN
    )
    return [
        _chosen_line(figures["chosen"]),
        *_device_lines(figures["devices"]),
        f"step {step:.1f} ms = {pieces}",
        f"{100 * figures['gap']:.1f} % above the lower bound of "
        f"{1e3 * figures['lower_bound_seconds']:.1f} ms ({bound['name']}: {bound['reason']}); "
        f"{bound['advice']}",
        figures["limit"],
    ]


def _chosen_line(chosen: dict[str, Any]) -> str:
    split, stages = len(chosen["split_stages"]), chosen["stages"]
    again = " ".join(
        f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in chosen["recomputed_layers"]
    )
    reductions = chosen["head_reductions"]
    return "; ".join(
        [
            f"{stages} stages on {chosen['devices']} devices",
            f"backward in two halves in {split} of them" if split else "backward in one piece",
            f"recomputed: layers {again}" if again else "nothing recomputed",
            *([f"head sharded, {reductions} reductions a micro-batch"] if reductions else []),
        ]
    )


def _device_lines(devices: list[dict[str, Any]]) -> list[str]:
    """A table; memory where there is any."""
    width = max(len(row["layers"] or "none") for row in devices)
    causes = [_causes(row["idle_seconds"]) for row in devices]
    longest = max(map(len, causes)) if any(row["peak_bytes"] for row in devices) else 0
    return [
        f"device {row['device']}: layers {row['layers'] or 'none':<{width}}  "
        f"work {1e3 * row['work_seconds']:.1f} ms  idle {cause:<{longest}}{_memory(row)}"
        for row, cause in zip(devices, causes, strict=True)
    ]


def _causes(idle: dict[str, float]) -> str:
    some = ", ".join(f"{cause} {1e3 * s:.1f}" for cause, s in idle.items() if s > SHOWN)
    return f"{1e3 * sum(idle.values()):.1f} ms" + (f" ({some})" if some else "")


def _memory(row: dict[str, Any]) -> str:
    if not row["peak_bytes"]:
        return ""
    limit = row["memory_bytes"]
    return f"  memory {row['peak_bytes'] / GIB:.2f}{f' of {limit / GIB:.2f}' if limit else ''} GiB"
