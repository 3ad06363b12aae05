"""The performance model: a program, priced, becomes a timeline.

Semantics. An instruction starts when its device is free and what it reads is there. A value starts
to travel when it was written and its directed link is free, occupies the link for bytes /
bandwidth and arrives a latency later; computation goes on meanwhile, but for the seconds that
sending and receiving cost the two ends (where the cluster does not overlap, both ends are busy for
the whole transfer). Copies to the host, gathers and reductions have lanes of their own and begin
when the computation before them has ended. Memory: parameters, gradients and optimizer state
throughout; activations from F (or R) to B or I; what the weight gradient needs from I to W;
received values from the posting of their receive to the end of their reader. At the end
reductions and shared gradients are waited for and the optimizer runs.

Known limits: a value that waits to be sent holds no memory, and no link is shared by two pairs of
devices.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from adaptis.check import check
from adaptis.costs import price, price_rows
from adaptis.errors import PlanError, ProgramError
from adaptis.kernels import END, GIVE, START, TAKE, THERE, peaks, quickest, replay
from adaptis.lower import lower
from adaptis.program import Kind, Step
from adaptis.rows import GATHER, OF_ALL, OFFLOAD, RELOAD, TRANSFER, F, rows_of
from adaptis.timeline import Timeline, Transfer
from adaptis.workload import even

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from adaptis.cluster import Cluster
    from adaptis.costs import RowCosts, StageCosts
    from adaptis.plan import Plan
    from adaptis.profile import Profile
    from adaptis.program import Program
    from adaptis.rows import Rows
    from adaptis.workload import Workload

    Floats = NDArray[np.float64]
    Curve = tuple[Floats, Floats]  # times, and the bytes from then on


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
    return simulate(program, price(plan, profile, cluster), workload, name=plan.schedule)


def simulate(
    program: Program, costs: StageCosts, workload: Workload | None = None, name: str = "program"
) -> Timeline:
    """The timeline of `program` at `costs`.

    Raises:
        ProgramError: a device waits for ever (`check` says for what).
    """
    rows = rows_of(program)
    weights = np.array((workload or even(program.num_microbatches)).weights)
    prices = price_rows(rows, costs, weights)
    times = run(rows, prices)
    start, end = times[:, START], times[:, END]
    n = rows.num_computations
    memory = _memory(rows, costs, prices, times, weights)
    clipped = any(isinstance(row[-1], Step) and row[-1].clipped for row in program.devices if row)
    return Timeline(
        name=name,
        source="simulated",
        placement=program.placement,
        num_microbatches=program.num_microbatches,
        offsets=rows.columns.offsets,
        op=rows.op[:n],
        stage=rows.stage[:n],
        microbatch=rows.microbatch[:n],
        start=start[:n],
        end=end[:n],
        step=_step(rows, costs, end + prices.seconds[:, GIVE], clipped),
        peak_bytes=tuple(int(curve.max()) for _, curve in memory),
        memory=memory,
        transfers=_transfers(rows, times),
        copies=program.layout.copies,
        reductions=program.layout.reductions,
        partner=rows.columns.partner,
        held_back=_held_back(rows, costs, prices, times, memory),
    )


def run(rows: Rows, prices: RowCosts) -> Floats:
    """(N, 3) when each row starts, ends, and others see it.

    Raises:
        ProgramError: some wait for ever.
    """
    times = np.zeros((len(rows.op), 3))
    count = quickest(replay, len(rows.op))(
        rows.offsets, rows.need_offsets, rows.needs, prices.seconds, times
    )
    if count < len(rows.op):
        raise ProgramError(
            f"{len(rows.op) - count} instructions wait for ever; `adaptis check` names them"
        )
    return times


def peak_bytes(rows: Rows, costs: StageCosts, prices: RowCosts) -> Floats:
    """(D,) the most that each device holds, where all that changes it are computations."""
    return quickest(peaks, len(rows.op))(
        rows.columns.offsets, prices.taken, prices.freed, costs.static_bytes
    )


def _step(rows: Rows, costs: StageCosts, done: Floats, clipped: bool) -> float:
    """The end of the step: computations, sends, reductions, shared gradients, norm, optimizer."""
    last = np.zeros(costs.num_devices)
    for first, stop in pairwise(rows.offsets):
        code = rows.op[stop - 1]
        if stop > first and code not in (TRANSFER, OFFLOAD, RELOAD):
            devices = slice(None) if code in OF_ALL else rows.source[stop - 1]
            last[devices] = np.maximum(last[devices], done[stop - 1])
    for devices, seconds in costs.shared:
        last[list(devices)] = last[list(devices)].max() + seconds
    if clipped:
        last[:] = last.max() + costs.norm
    return float((last + costs.update).max())


def _memory(
    rows: Rows,
    costs: StageCosts,
    prices: RowCosts,
    span: Floats,
    weights: Floats,
) -> tuple[Curve, ...]:
    """Per device: when its memory changes, and the bytes from then on.

    Allocations count from an instruction's start, releases from its end.
    """
    changes = _changes_beside(rows, costs, span, weights)
    start, end = span[:, START], span[:, END]
    curves = []
    for d in range(costs.num_devices):
        part = slice(int(rows.columns.offsets[d]), int(rows.columns.offsets[d + 1]))
        change = np.empty(2 * (part.stop - part.start))
        change[0::2], change[1::2] = prices.taken[part], -prices.freed[part]
        times = np.empty_like(change)
        times[0::2], times[1::2] = start[part], end[part]
        if d in changes:
            times, change = _merged(times, change, *changes[d])
        curve = costs.static_bytes[d] + np.concatenate([[0.0], np.cumsum(change)])
        curves.append((np.concatenate([[0.0], times]), curve))
    return tuple(curves)


def _merged(times: Floats, change: Floats, more_times: Floats, more: Floats) -> Curve:
    """Both in the order of time; at the same moment what is given back comes first."""
    times, change = np.concatenate([times, more_times]), np.concatenate([change, more])
    rank = np.zeros(len(times))
    rank[-len(more) :] = np.where(more < 0, -1, 1)
    order = np.lexsort((rank, times))
    return times[order], change[order]


def _changes_beside(
    rows: Rows, costs: StageCosts, span: Floats, weights: Floats
) -> dict[int, Curve]:
    """Per device: what copies and gathered parameters take and give back, and when."""
    start, end = span[:, START], span[:, END]
    events: dict[int, list[tuple[float, float]]] = {}
    for i in np.flatnonzero((rows.op >= OFFLOAD) & (rows.op <= GATHER)):
        stage, device = rows.stage[i], int(rows.source[i])
        saved = costs.saved[stage] * weights[rows.microbatch[i]]
        match rows.op[i]:
            case code if code == OFFLOAD:
                event = (end[i], -saved)
            case code if code == RELOAD:
                event = (start[i], saved)
            case _:
                event = (start[i], costs.whole[stage])
        events.setdefault(device, []).append(event)
    for freed in rows.columns.freed:
        event = (end[freed.behind], -costs.whole[freed.stage])
        events.setdefault(freed.device, []).append(event)
    pairs = {device: np.array(found).T for device, found in events.items()}
    return {device: (pair[0], pair[1]) for device, pair in pairs.items()}


def _held_back(
    rows: Rows,
    costs: StageCosts,
    prices: RowCosts,
    span: Floats,
    memory: tuple[Curve, ...],
) -> Floats | None:
    """(n,) idle seconds before each computation in which a later forward was there for nothing.

    Its input had arrived, but its activations would not have fitted beside what was held.
    """
    if np.isinf(costs.limits).all():
        return None
    columns, n = rows.columns, rows.num_computations
    result = np.zeros(n)
    arrived = np.zeros(n)
    moved = rows.transfer >= 0
    arrived[moved] = span[rows.transfer[moved], THERE]
    start, taking = span[:, START], prices.seconds[:, TAKE]
    free = span[:, END] + prices.seconds[:, GIVE]
    index = np.arange(n)
    begins = np.where(columns.partner < 0, index, np.minimum(index, columns.partner))
    for d, limit in enumerate(costs.limits):
        forward = -1
        times, curve = memory[d]
        first, stop = int(columns.offsets[d]), int(columns.offsets[d + 1])
        for i in range(stop - 1, first, -1):
            if columns.op[i] == F:
                forward = i
            elif forward >= 0 and begins[forward] != i and start[i] > free[i - 1] + taking[i]:
                held = curve[np.searchsorted(times, free[i - 1], side="right") - 1]
                if held + prices.taken[begins[forward]] > limit:
                    result[i] = max(start[i] - max(free[i - 1], arrived[forward]), 0.0)
    return result


def _transfers(rows: Rows, span: Floats) -> tuple[Transfer, ...]:
    """The values that took time on a link."""
    n = rows.num_computations
    arrival = np.maximum(span[:, END], span[:, THERE])
    result = []
    for i in range(n, n + rows.num_transfers):
        if arrival[i] > span[i, START]:
            result.append(
                Transfer(
                    kind=Kind.OUTPUT if rows.onwards[i - n] else Kind.INPUT_GRAD,
                    stage=int(rows.stage[i]),
                    microbatch=int(rows.microbatch[i]),
                    source=int(rows.source[i]),
                    target=int(rows.target[i]),
                    start=float(span[i, START]),
                    end=float(arrival[i]),
                )
            )
    return tuple(result)
