"""The performance model: a program, priced, becomes a timeline.

Semantics. An instruction starts when its device is free and what it reads is there. A value starts
to travel when it was written and its directed link is free, occupies the link for bytes /
bandwidth and arrives a latency later; computation goes on meanwhile, but for the seconds that
sending and receiving cost the two ends. Memory: parameters, gradients and optimizer state
throughout; activations from F (or R) to B or I; what the weight gradient needs from I to W. At the
end gradients of shared parameters are summed and the optimizer runs.

Known limits: no receive buffers, no workspace, no link shared by two pairs of devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from adaptis.check import check
from adaptis.costs import price
from adaptis.errors import PlanError, ProgramError
from adaptis.kernels import replay
from adaptis.lower import lower
from adaptis.program import Compute, Kind, Op
from adaptis.timeline import OPS, Timeline, Transfer
from adaptis.workload import even

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from adaptis.cluster import Cluster
    from adaptis.costs import StageCosts
    from adaptis.plan import Plan
    from adaptis.profile import Profile
    from adaptis.program import Program
    from adaptis.workload import Workload

F, B, I, W, R = (OPS.index(op) for op in Op)  # noqa: E741 - the letters of the field


@dataclass(frozen=True, eq=False)
class Rows:
    """A program's computations as columns, and who waits for whom."""

    offsets: NDArray[np.int64]
    op: NDArray[np.int8]
    stage: NDArray[np.int32]
    microbatch: NDArray[np.int32]
    needs: NDArray[np.int64]  # the row that writes what row i reads from another stage, or -1
    reader: NDArray[np.int64]  # the row on another device that reads what row i writes, or -1


def rows_of(program: Program) -> Rows:
    """The columns of `program`."""
    orders = [[c for c in row if isinstance(c, Compute)] for row in program.devices]
    flat = [c for order in orders for c in order]
    codes = {op: code for code, op in enumerate(OPS)}
    return make_rows(
        np.cumsum([0, *map(len, orders)]).astype(np.int64),
        np.array([codes[c.op] for c in flat], dtype=np.int8),
        np.array([c.stage for c in flat], dtype=np.int32),
        np.array([c.microbatch for c in flat], dtype=np.int32),
        np.array(program.placement, dtype=np.int64),
        program.num_microbatches,
    )


def make_rows(
    offsets: NDArray[np.int64],
    op: NDArray[np.int8],
    stage: NDArray[np.int32],
    microbatch: NDArray[np.int32],
    placement: NDArray[np.int64],
    num_microbatches: int,
) -> Rows:
    """Columns with their dependencies: the array form of `program.reads` and `program.writes`."""
    num_stages = len(placement)
    forward = np.full(
        (num_stages + 2, num_microbatches), -1, dtype=np.int64
    )  # stage s in row s + 1
    backward = forward.copy()
    index = np.arange(len(op))
    is_forward, is_backward = op == F, (op == B) | (op == I)
    forward[stage[is_forward] + 1, microbatch[is_forward]] = index[is_forward]
    backward[stage[is_backward] + 1, microbatch[is_backward]] = index[is_backward]
    needs = np.full(len(op), -1, dtype=np.int64)
    needs[is_forward] = forward[stage[is_forward], microbatch[is_forward]]
    needs[is_backward] = backward[stage[is_backward] + 2, microbatch[is_backward]]
    reader = np.full(len(op), -1, dtype=np.int64)
    device = placement[stage]
    remote = (needs >= 0) & (device[needs] != device)
    reader[needs[remote]] = index[remote]
    return Rows(offsets, op, stage, microbatch, needs, reader)


def simulate_plan(
    plan: Plan, profile: Profile, cluster: Cluster, workload: Workload | None = None
) -> Timeline:
    """Check `plan` and simulate it.

    Raises:
        PlanError: the plan is for another model or number of devices.
        ProgramError: it breaks a rule.
    """
    plan.fits(profile)
    if plan.num_devices != cluster.num_devices:
        raise PlanError(
            f"the plan is for {plan.num_devices} devices, the cluster has {cluster.num_devices}; "
            f"make a plan for it with `adaptis plan`"
        )
    program = lower(plan)
    check(program)
    return simulate(program, price(plan.stages, profile, cluster), workload, name=plan.schedule)


def simulate(
    program: Program, costs: StageCosts, workload: Workload | None = None, name: str = "program"
) -> Timeline:
    """The timeline of `program` at `costs`.

    Raises:
        ProgramError: a device waits for ever (`check` says for what).
    """
    rows = rows_of(program)
    weights = np.array((workload or even(program.num_microbatches)).weights)[rows.microbatch]
    start, end, arrival = (np.zeros(len(rows.op)) for _ in range(3))
    travels = rows.reader >= 0
    busy, latency = hops(rows, costs, weights)
    count = replay(
        rows.offsets,
        rows.needs,
        rows.reader,
        seconds_of(rows, costs) * weights,
        busy,
        latency,
        costs.send,
        costs.receive,
        start,
        end,
        arrival,
    )
    if count < len(rows.op):
        raise ProgramError(
            f"{len(rows.op) - count} instructions wait for ever; `adaptis check` names them"
        )
    memory = _memory(rows, costs, weights, start, end)
    return Timeline(
        name=name,
        source="simulated",
        placement=program.placement,
        num_microbatches=program.num_microbatches,
        offsets=rows.offsets,
        op=rows.op,
        stage=rows.stage,
        microbatch=rows.microbatch,
        start=start,
        end=end,
        step=step_seconds(rows, end, costs),
        peak_bytes=tuple(int(curve.max()) if len(curve) else 0 for _, curve in memory),
        memory=memory,
        transfers=_transfers(rows, costs, program.placement, travels, busy + latency, arrival),
    )


def seconds_of(rows: Rows, costs: StageCosts) -> NDArray[np.float64]:
    """How long each row computes, for a micro-batch of weight 1."""
    table = np.stack(
        [
            costs.forward,
            costs.backward,
            costs.backward_input,
            costs.backward_weight,
            costs.recompute,
        ]
    )
    return table[rows.op, rows.stage]


def hops(
    rows: Rows, costs: StageCosts, weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Link seconds and latency of what each row writes; 0 where it stays on its device."""
    forward = rows.op == F
    travels = rows.reader >= 0
    busy = np.where(forward, costs.forward_busy[rows.stage], costs.backward_busy[rows.stage])
    latency = np.where(
        forward, costs.forward_latency[rows.stage], costs.backward_latency[rows.stage]
    )
    return np.where(travels, busy * weights, 0.0), np.where(travels, latency, 0.0)


def step_seconds(rows: Rows, end: NDArray[np.float64], costs: StageCosts) -> float:
    """The end of the step: computations, the last sends, shared gradients, optimizer."""
    last = np.zeros(costs.num_devices)
    for device, (first, stop) in enumerate(pairwise(rows.offsets)):
        if stop > first:
            sends = costs.send if rows.reader[stop - 1] >= 0 else 0.0
            last[device] = end[stop - 1] + sends
    for devices, seconds in costs.shared:
        last[list(devices)] = last[list(devices)].max() + seconds
    return float((last + costs.update).max())


def _memory(
    rows: Rows,
    costs: StageCosts,
    weights: NDArray[np.float64],
    start: NDArray[np.float64],
    end: NDArray[np.float64],
) -> tuple[tuple[NDArray[np.float64], NDArray[np.float64]], ...]:
    """Per device: when its memory changes, and the bytes from then on.

    Allocations count from an instruction's start, releases from its end.
    """
    zero = np.zeros_like(costs.saved)
    taken = np.stack([costs.kept, zero, costs.saved_weight, zero, costs.saved])
    freed = np.stack(
        [zero, costs.saved, costs.saved, costs.saved_weight, zero],
    )
    # A recomputed stage still holds its input when B or I ends.
    again = costs.recomputed
    freed[B] += np.where(again, costs.kept, 0.0)
    freed[I] += np.where(again, costs.kept, 0.0)
    # What W needs is a part of what was saved: I keeps it, it does not take it anew.
    freed[I] -= np.minimum(costs.saved_weight, costs.saved)
    taken[I] -= np.minimum(costs.saved_weight, costs.saved)
    curves = []
    for d in range(costs.num_devices):
        part = slice(int(rows.offsets[d]), int(rows.offsets[d + 1]))
        plus = taken[rows.op[part], rows.stage[part]] * weights[part]
        minus = freed[rows.op[part], rows.stage[part]] * weights[part]
        change = np.empty(2 * len(plus))
        change[0::2], change[1::2] = plus, -minus
        times = np.empty_like(change)
        times[0::2], times[1::2] = start[part], end[part]
        curve = costs.static_bytes[d] + np.concatenate([[0.0], np.cumsum(change)])
        curves.append((np.concatenate([[0.0], times]), curve))
    return tuple(curves)


def _transfers(
    rows: Rows,
    costs: StageCosts,
    placement: tuple[int, ...],
    travels: NDArray[np.bool_],
    seconds: NDArray[np.float64],
    arrival: NDArray[np.float64],
) -> tuple[Transfer, ...]:
    """The values that took time on a link."""
    result = []
    for i in np.flatnonzero(travels & (seconds > 0)):
        stage = int(rows.stage[i])
        result.append(
            Transfer(
                kind=Kind.OUTPUT if rows.op[i] == F else Kind.INPUT_GRAD,
                stage=stage,
                microbatch=int(rows.microbatch[i]),
                source=placement[stage],
                target=placement[int(rows.stage[rows.reader[i]])],
                start=float(arrival[i] - seconds[i]),
                end=float(arrival[i]),
            )
        )
    return tuple(result)
