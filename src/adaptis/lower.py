"""Decisions become instructions: `lower(plan)` adds all that is no computation of an order.

Schedules and plans name computations only. A value is sent right after it is written; a receive is
posted `LOOKAHEAD` computations before the one that reads the value, so that the transfer runs
beside computation with a bounded number of buffers. On each directed link the receives keep the
order of the sends: NCCL matches in order and without tags, so an order mistake cannot swap two
values. ::

    device 0 | 0F0  0SEND_F0  0F1  0SEND_F1 ...
    device 1 | 1RECV_F0  1RECV_F1  1F0  1F1 ...

The other decisions of a plan become instructions in the same way, before or after a position of a
device's order: recomputations, copies to the host and back, the gathering of sharded parameters
around each run of a stage's computations, the reduction of its gradients after the last of them,
and what a sharded head does together.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from adaptis.errors import ProgramError
from adaptis.program import (
    BACKWARDS,
    HEAD_OPS,
    Compute,
    Copy,
    Join,
    Kind,
    Op,
    Program,
    Receive,
    Send,
    Shard,
    Sharding,
    Step,
    Together,
    Value,
    Way,
    parts,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptis.plan import Plan
    from adaptis.program import Instruction, Layout, Work

    Order = Sequence[Work]
    Placed = dict[int, list[Instruction]]  # what stands before, or after, each position
    Computes = list[tuple[int, Compute]]  # of one device, with their positions in its order
    Arriving = dict[int, list[Receive | Join]]  # source -> what gets a value, in the order sent

_READS = {  # what may come from another device
    Op.FORWARD: Kind.OUTPUT,
    Op.SCORES: Kind.OUTPUT,
    Op.BACKWARD: Kind.INPUT_GRAD,
    Op.BACKWARD_INPUT: Kind.INPUT_GRAD,
}
LOOKAHEAD = 2  # computations between posting a receive and reading its value


def lower(plan: Plan) -> Program:
    """The program of `plan`: what both interpreters run.

    Raises:
        ProgramError: a computation names a stage that does not exist or that its device does not
        hold.
    """
    layout = plan.layout
    orders = [tuple(_with_recompute(order, layout.recomputed)) for order in plan.programs]
    computed = [_computes(order) for order in orders]
    _on_their_devices(computed, layout)
    after: list[Placed] = [defaultdict(list) for _ in orders]
    arriving = _place_sends(computed, layout, after)
    offloaded = {s for s, stage in enumerate(plan.stages) if stage.offload}
    devices = []
    for device, (order, computes) in enumerate(zip(orders, computed, strict=True)):
        before: Placed = defaultdict(list)
        _place_gathers(computes, layout.sharded, before, after[device])
        _place_reloads(computes, offloaded, before, after[device])
        _place_receives(computes, arriving[device], before)
        if layout.reductions:
            _place_joins(computes, layout, after[device])
        summed = _place_reductions(computes, after[device]) if layout.reduced else set()
        row: list[Instruction] = []
        for position, work in enumerate(order):
            if position in before:
                row += before[position]
            row.append(work)
            if position in after[device]:
                row += after[device][position]
        if layout.reduced:  # what no micro-batch goes through has zeros to add
            idle = (s for s, home in enumerate(layout.placement) if home == device)
            row += [Shard(Sharding.REDUCE, s) for s in idle if s not in summed]
        row.append(Step(plan.clipped))
        devices.append(tuple(row))
    return Program(tuple(devices), layout)


def _with_recompute(order: Order, recomputed: frozenset[int]) -> Iterator[Work]:
    """Each recomputed backward behind its R, unless the order places the R itself."""
    if not recomputed:
        yield from order
        return
    given = {(c.stage, c.microbatch) for work in order for c in parts(work) if c.op is Op.RECOMPUTE}
    for work in order:
        for c in parts(work):
            key = (c.stage, c.microbatch)
            if c.op in BACKWARDS and c.stage in recomputed and key not in given:
                yield Compute(Op.RECOMPUTE, *key)
        yield work


def _computes(order: Order) -> Computes:
    """The computations of an order with their positions; a fused pair has two at one."""
    return [(position, compute) for position, work in enumerate(order) for compute in parts(work)]


def _on_their_devices(computed: Sequence[Computes], layout: Layout) -> None:
    head = layout.num_stages if layout.reductions else -1
    stages = dict(enumerate(layout.placement))
    for device, computes in enumerate(computed):
        for position, compute in computes:
            of_head = compute.op in HEAD_OPS
            if (compute.stage == head) if of_head else (stages.get(compute.stage) == device):
                continue
            at = f"device {device}, position {position}: {compute}"
            if of_head:
                raise ProgramError(
                    f"{at} is a pass of a sharded head, which is stage {len(stages)} where "
                    f"'head_reductions' is 1 or 2"
                )
            if compute.stage not in stages:
                raise ProgramError(
                    f"{at} names stage {compute.stage}, but there are {len(stages)} stages; remove "
                    f"it or cut more stages"
                )
            raise ProgramError(
                f"{at} belongs to device {stages[compute.stage]}, which holds stage "
                f"{compute.stage}; move it there"
            )


def _place_sends(
    computed: Sequence[Computes], layout: Layout, after: Sequence[Placed]
) -> list[Arriving]:
    """Each send behind its computation; what arrives at each device on each of its links."""
    arriving: list[Arriving] = [defaultdict(list) for _ in computed]
    routes: dict[tuple[Op, int], tuple[Kind, int] | None] = {}  # the same for all micro-batches
    shared = (Op.FORWARD, layout.num_stages - 1 if layout.reductions else -1)
    for device, computes in enumerate(computed):
        for position, compute in computes:
            word = (compute.op, compute.stage)
            if word not in routes:
                crossing = layout.crosses(compute)
                routes[word] = (crossing[0].kind, crossing[1]) if crossing else None
            route, m = routes[word], compute.microbatch
            if route is not None:
                kind, target = route
                value = Value(kind, compute.stage, m)
                after[device][position].append(Send(value, target))
                arriving[target][device].append(Receive(value, device))
            if word == shared:
                take = Join(Together.TAKE, layout.num_stages, m)
                for target in range(len(computed)):
                    if target != device:
                        arriving[target][device].append(take)
    return arriving


def _place_receives(computes: Computes, arriving: Arriving, before: Placed) -> None:
    """Each receive `LOOKAHEAD` computations before its reader, those of a link in their order."""
    position, readers = 0, {}
    for position, c in computes:
        kind = _READS.get(c.op)
        if kind is not None:
            readers[kind, c.stage, c.microbatch] = position
    last = position
    for link in arriving.values():
        # Walk back from the last value: none may be posted later than one that follows it on the
        # link.
        latest = last
        posts = []
        for receive in reversed(link):
            latest = min(latest, max(0, readers.get(_reader(receive), latest) - LOOKAHEAD))
            posts.append((latest, receive))
        for position, receive in reversed(posts):
            before[position].append(receive)


def _reader(receive: Receive | Join) -> tuple[Kind, int, int]:
    """Who reads what arrives: the kind of value, and the reader's stage and micro-batch."""
    if isinstance(receive, Join):
        return Kind.OUTPUT, receive.stage, receive.microbatch
    value = receive.value
    return value.kind, value.stage + (1 if value.kind is Kind.OUTPUT else -1), value.microbatch


def _place_joins(computes: Computes, layout: Layout, after: Placed) -> None:
    """The head's collectives, each right after what it adds up or hands out."""
    head = layout.num_stages
    for position, c in computes:
        if c.op is Op.FORWARD and c.stage == head - 1:
            after[position].append(Join(Together.SHARE, head, c.microbatch))
        elif c.op is Op.SCORES:
            after[position].append(Join(Together.SUM_S, head, c.microbatch))
        elif c.op is Op.SCORES_GRADIENT and layout.reductions == 2:
            after[position].append(Join(Together.SUM_T, head, c.microbatch))


def _place_reloads(computes: Computes, offloaded: set[int], before: Placed, after: Placed) -> None:
    """Activations go to the host after F and come back `LOOKAHEAD` before the backward.

    Where the backward follows too soon for both, they stay.
    """
    if not offloaded:
        return
    forward: dict[tuple[int, int], int] = {}
    for position, c in computes:
        key = (c.stage, c.microbatch)
        if c.stage not in offloaded:
            continue
        if c.op is Op.FORWARD:
            forward[key] = position
        elif c.op in BACKWARDS and key in forward and position - forward[key] > LOOKAHEAD + 1:
            after[forward[key]].append(Copy(Way.OFFLOAD, *key))
            before[position - LOOKAHEAD].append(Copy(Way.RELOAD, *key))


def _place_gathers(
    computes: Computes, sharded: frozenset[int], before: Placed, after: Placed
) -> None:
    """The parameters of a sharded stage are whole around each run of its computations.

    The gathering begins `LOOKAHEAD` computations ahead.
    """
    touched: dict[int, list[int]] = defaultdict(list)
    for position, c in computes:
        if c.stage in sharded and (not touched[c.stage] or touched[c.stage][-1] != position):
            touched[c.stage].append(position)
    for stage, positions in touched.items():
        free = 0
        for index, position in enumerate(positions):
            if index == 0 or positions[index - 1] != position - 1:
                before[max(free, position - LOOKAHEAD)].append(Shard(Sharding.GATHER, stage))
            if index + 1 == len(positions) or positions[index + 1] != position + 1:
                after[position].append(Shard(Sharding.FREE, stage))
                free = position + 1


def _place_reductions(computes: Computes, after: Placed) -> set[int]:
    """The gradients of a stage, or of a part of the head, are summed after its last backward.

    Returns the stages.
    """
    last = {
        c.stage: position
        for position, c in computes
        if c.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT, Op.BACKWARD_INPUT, Op.SCORES_GRADIENT)
    }
    for stage, position in last.items():
        after[position].append(Shard(Sharding.REDUCE, stage))
    return set(last)
