"""Communication in a file must be just what follows from its computations.

Torch's transfers carry no tags: two ranks that disagree on the order of two of them swap the two
in silence. So each link is walked in order, as `adaptis.check` does for our own programs, but with
the places of the file in the message.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from adaptis.errors import PlanError, ProgramError
from adaptis.notation import parse_instruction
from adaptis.program import Op, Receive, Send, Shard, Sharding, parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.program import Instruction, Layout, Value, Work

    Row = list[tuple[str, Instruction]]  # with the place of each
    Moves = dict[Send | Receive, int]  # to a position of the row


def verify(named: Sequence[Sequence[tuple[str, Work | str]]], layout: Layout, where: str) -> bool:
    """Whether the rows hold communication; it must be complete and in an order that works.

    Raises:
        PlanError: naming the place of a transfer, or of a reduction, that is wrong.
    """
    rows = [[(at, _parsed(at, word, layout, where)) for at, word in row] for row in named]
    for device, row in enumerate(rows):
        _shards(device, row, layout, where)
    there = [_moves(row, where) for row in rows]
    if not any(there):
        return False
    wanted = _wanted(rows, layout)
    for device, (row, moves) in enumerate(zip(rows, there, strict=True)):
        _expected(device, row, moves, wanted[device], where)
        _beside_their_computations(row, moves, layout, where)
    _links(rows, there, where)
    return True


def _parsed(at: str, word: Work | str, layout: Layout, where: str) -> Instruction:
    if not isinstance(word, str):
        return word
    try:
        return parse_instruction(word, layout)
    except ProgramError as error:
        raise PlanError(f"{where}: {at}: {error}") from None


def _shards(device: int, row: Row, layout: Layout, where: str) -> None:
    """A stage's parameters are on its own row; its gradients are reduced once, at the end."""
    reduced: dict[int, str] = {}
    for at, instruction in row:
        if isinstance(instruction, Shard):
            stage = instruction.stage
            if stage >= layout.num_stages or layout.placement[stage] != device:
                raise PlanError(f"{where}: {at}: {instruction}: stage {stage} is not on this row")
            if instruction.what is Sharding.REDUCE:
                if stage in reduced:
                    raise PlanError(f"{where}: {at}: {instruction} is there twice; keep the last")
                reduced[stage] = at
        for c in parts(instruction):
            if c.stage in reduced and c.op is not Op.FORWARD:
                raise PlanError(
                    f"{where}: {at}: {c} comes after {c.stage}REDUCE_GRAD at {reduced[c.stage]}: "
                    f"its gradient would not be reduced"
                )


def _moves(row: Row, where: str) -> Moves:
    """The transfers of a row; none may be there twice."""
    result: Moves = {}
    for position, (at, instruction) in enumerate(row):
        if isinstance(instruction, Send | Receive):
            if instruction in result:
                first = row[result[instruction]][0]
                raise PlanError(f"{where}: {at}: {instruction} is there twice, first at {first}")
            result[instruction] = position
    return result


def _wanted(rows: Sequence[Row], layout: Layout) -> list[dict[Send | Receive, str]]:
    """The transfers that follow from the computations, for each row, with their origins."""
    result: list[dict[Send | Receive, str]] = [{} for _ in rows]
    for device, row in enumerate(rows):
        for at, instruction in row:
            for compute in parts(instruction):
                crossing = layout.crosses(compute)
                if crossing is not None:
                    value, target = crossing
                    result[device][Send(value, target)] = f"{compute} at {at}"
                    result[target][Receive(value, device)] = f"{compute} at {at}"
    return result


def _expected(
    device: int, row: Row, moves: Moves, wanted: dict[Send | Receive, str], where: str
) -> None:
    """The transfers of a row are those that follow from the computations of all rows."""
    for move, position in moves.items():
        if move not in wanted:
            raise PlanError(
                f"{where}: {row[position][0]}: {move} follows from no computation; remove it"
            )
    for move, origin in wanted.items():
        if move not in moves:
            raise PlanError(
                f"{where}: row {device + 1}: {move} is missing; it follows from {origin}"
            )


def _beside_their_computations(row: Row, moves: Moves, layout: Layout, where: str) -> None:
    """A send stands behind what writes its value, a receive before what reads it."""
    writer: dict[Value, int] = {}
    reader: dict[Value, int] = {}
    for position, (_, instruction) in enumerate(row):
        for compute in parts(instruction):
            writer |= dict.fromkeys(layout.writes(compute), position)
            reader |= dict.fromkeys(layout.reads(compute), position)
    for move, position in moves.items():
        sends = isinstance(move, Send)
        other = (writer if sends else reader)[move.value]
        if (position < other) is sends:
            at, compute = row[other]
            side = "before" if sends else "behind"
            raise PlanError(f"{where}: {row[position][0]}: {move} stands {side} {compute} at {at}")


def _links(rows: Sequence[Row], there: Sequence[Moves], where: str) -> None:
    """On each link, receives keep the order of the sends."""
    sends: dict[tuple[int, int], list[tuple[str, Send]]] = defaultdict(list)
    receives: dict[tuple[int, int], list[tuple[str, Receive]]] = defaultdict(list)
    for device, (row, moves) in enumerate(zip(rows, there, strict=True)):
        for move, position in moves.items():
            at = row[position][0]
            if isinstance(move, Send):
                sends[device, move.target].append((at, move))
            else:
                receives[move.source, device].append((at, move))
    for link, sent in sends.items():
        for (at, send), (other, receive) in zip(sent, receives[link], strict=True):
            if send.value != receive.value:
                raise PlanError(
                    f"{where}: {at}: {send} meets {receive} at {other}; torch has no tags and "
                    f"would swap the two values"
                )
