"""Decisions become instructions: `lower(plan)` adds transfers, recomputations and the step.

Schedules and plans name computations only. A value is sent right after it is written; a receive is
posted `LOOKAHEAD` computations before the one that reads the value, so that the transfer runs
beside computation with a bounded number of buffers. On each directed link the receives keep the
order of the sends: NCCL matches in order and without tags, so an order mistake cannot swap two
values. ::

    device 0 | 0F0  0SEND_F0  0F1  0SEND_F1 ...
    device 1 | 1RECV_F0  1RECV_F1  1F0  1F1 ...
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from adaptis.errors import ProgramError
from adaptis.program import Compute, Kind, Op, Program, Receive, Send, Step, Value, reads, writes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptis.plan import Plan
    from adaptis.program import Instruction

LOOKAHEAD = 2  # computations between posting a receive and reading its value


def lower(plan: Plan) -> Program:
    """The program of `plan`: what both interpreters run.

    Raises:
        ProgramError: a computation names a stage that does not exist or that its device does not
        hold.
    """
    placement = plan.placement
    recomputed = frozenset(s for s, stage in enumerate(plan.stages) if stage.recompute)
    orders = [tuple(_with_recompute(order, recomputed)) for order in plan.programs]
    _on_their_devices(orders, placement)
    channels = _channels(orders, placement)
    devices = []
    for device, order in enumerate(orders):
        receives = _receives(device, order, channels, len(placement))
        row: list[Instruction] = []
        for position, compute in enumerate(order):
            row += receives.get(position, ())
            row.append(compute)
            crossing = crosses(compute, placement)
            if crossing is not None:
                row.append(Send(*crossing))
        row.append(Step())
        devices.append(tuple(row))
    return Program(tuple(devices), placement, plan.num_microbatches, recomputed)


def crosses(compute: Compute, placement: Sequence[int]) -> tuple[Value, int] | None:
    """The value that `compute` leaves for another device, and that device."""
    for value in writes(compute, len(placement)):
        if value.kind is Kind.OUTPUT:
            target = placement[value.stage + 1]
        elif value.kind is Kind.INPUT_GRAD:
            target = placement[value.stage - 1]
        else:
            continue
        if target != placement[compute.stage]:
            return value, target
    return None


def _with_recompute(order: Sequence[Compute], recomputed: frozenset[int]) -> Iterator[Compute]:
    """Each recomputed backward behind its R, unless the order places the R itself."""
    given = {(c.stage, c.microbatch) for c in order if c.op is Op.RECOMPUTE}
    for compute in order:
        key = (compute.stage, compute.microbatch)
        backward = compute.op in (Op.BACKWARD, Op.BACKWARD_INPUT)
        if backward and compute.stage in recomputed and key not in given:
            yield Compute(Op.RECOMPUTE, *key)
        yield compute


def _on_their_devices(orders: Sequence[Sequence[Compute]], placement: Sequence[int]) -> None:
    for device, order in enumerate(orders):
        for position, compute in enumerate(order):
            if compute.stage >= len(placement):
                raise ProgramError(
                    f"device {device}, position {position}: {compute} names stage {compute.stage}, "
                    f"but there are {len(placement)} stages; remove it or cut more stages"
                )
            if placement[compute.stage] != device:
                raise ProgramError(
                    f"device {device}, position {position}: {compute} belongs to device "
                    f"{placement[compute.stage]}, which holds stage {compute.stage}; move it there"
                )


def _channels(
    orders: Sequence[Sequence[Compute]], placement: Sequence[int]
) -> dict[tuple[int, int], list[Value]]:
    """The values on each directed link, in the order they are sent."""
    channels: dict[tuple[int, int], list[Value]] = defaultdict(list)
    for device, order in enumerate(orders):
        for compute in order:
            crossing = crosses(compute, placement)
            if crossing is not None:
                channels[device, crossing[1]].append(crossing[0])
    return channels


def _receives(
    device: int,
    order: Sequence[Compute],
    channels: dict[tuple[int, int], list[Value]],
    num_stages: int,
) -> dict[int, list[Receive]]:
    """Which receives stand before each position of `order`."""
    reader = {value: position for position, c in enumerate(order) for value in reads(c, num_stages)}
    placed: dict[int, list[Receive]] = defaultdict(list)
    for (source, target), values in channels.items():
        if target != device:
            continue
        # Walk back from the last value: none may be posted later than one that follows it on the
        # link.
        latest = len(order) - 1
        posts = []
        for value in reversed(values):
            latest = min(latest, max(0, reader.get(value, latest) - LOOKAHEAD))
            posts.append((latest, Receive(value, source)))
        for position, receive in reversed(posts):
            placed[position].append(receive)
    return placed
