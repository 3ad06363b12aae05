"""What devices have to agree on: transfers, joins, the sums of gradients, the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.check.places import where
from adaptis.errors import ProgramError
from adaptis.program import Op, Receive, Send, Shard, Sharding, Step, parts

if TYPE_CHECKING:
    from adaptis.check.places import Position
    from adaptis.check.values import Links
    from adaptis.program import Program

_ADDS = (Op.BACKWARD, Op.BACKWARD_WEIGHT, Op.SCORES_GRADIENT)  # to the gradients of parameters


def matched(program: Program, links: Links) -> int:
    """How many transfers there are, each with its send and its receive."""
    for link, (_, sent, received) in sorted(links.items()):
        if sent == received:
            continue
        ends = _ends(program, link)
        for send, receive, there, here in zip(*ends, sent, received, strict=False):
            if there != here:
                raise ProgramError(
                    f"link {link[0]} to {link[1]}: {where(program, send)} meets "
                    f"{where(program, receive)}; sends and receives must stand in the same order"
                )
        more = len(sent) > len(received)
        extra = ends[0 if more else 1][min(len(sent), len(received))]
        raise ProgramError(
            f"link {link[0]} to {link[1]}: {where(program, extra)} has no "
            f"{'receive' if more else 'send'}"
        )
    return sum(len(sent) for _, sent, _ in links.values())


def _ends(program: Program, link: tuple[int, int]) -> tuple[list[Position], list[Position]]:
    """Where the sends and the receives of a link stand."""
    source, target = link
    rows = dict(enumerate(program.devices))
    sends = [
        (source, index)
        for index, instruction in enumerate(rows.get(source, ()))
        if isinstance(instruction, Send) and instruction.target == target
    ]
    receives = [
        (target, index)
        for index, instruction in enumerate(rows.get(target, ()))
        if isinstance(instruction, Receive) and instruction.source == source
    ]
    return sends, receives


def together(program: Program, joins: list[list[list[int]]]) -> None:
    """All devices join once for each micro-batch, in the same order; all step in the same way."""
    reductions, count = program.layout.reductions, program.layout.num_microbatches
    for group, orders in zip(("SHARE/TAKE", "SUM_S", "SUM_T"), joins, strict=True):
        expected = [*range(count)] if reductions >= (2 if group == "SUM_T" else 1) else []
        for device, order in enumerate(orders):
            if sorted(order) != expected:
                raise ProgramError(
                    f"device {device}: {group} must be there once for each micro-batch, found "
                    f"those of {order}"
                )
            if order != orders[0]:
                raise ProgramError(
                    f"device {device}: {group} comes in the order {order}, on device 0 in the "
                    f"order {orders[0]}; all devices must join in the same order"
                )
    clipped = [Step(clipped=True) in row[-1:] for row in program.devices]
    if any(clipped) and not all(clipped):
        raise ProgramError(
            f"device {clipped.index(False)}: does not end with CLIPPED_STEP, but device "
            f"{clipped.index(True)} does; all agree on the norm or none"
        )


def reduced_last(program: Program) -> None:
    """The gradients of each stage, and of each part of a head, are summed once, after the last."""
    summed: dict[tuple[int, int], Position] = {}  # by device and stage
    for device, row in enumerate(program.devices):
        for index, instruction in enumerate(row):
            if isinstance(instruction, Shard) and instruction.what is Sharding.REDUCE:
                if (device, instruction.stage) in summed:
                    first = where(program, summed[device, instruction.stage])
                    raise ProgramError(
                        f"{where(program, (device, index))}: was summed before, at {first}"
                    )
                summed[device, instruction.stage] = (device, index)
            for compute in parts(instruction):
                if compute.op in _ADDS and (device, compute.stage) in summed:
                    first = where(program, summed[device, compute.stage])
                    raise ProgramError(
                        f"{where(program, (device, index))}: adds to gradients that were summed "
                        f"before, at {first}"
                    )
    homes = [*enumerate(program.placement)]
    if program.layout.reductions:
        homes += [(program.num_stages, device) for device in range(len(program.devices))]
    for stage, device in homes:
        if (device, stage) not in summed:
            raise ProgramError(f"device {device}: {stage}REDUCE_GRAD is missing")
