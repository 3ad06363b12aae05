"""The schedules of `torch.distributed.pipelining`: CSV, one row a rank, one action a cell.

    0F0,0F1,,0B0,0B1         computations only; an empty cell is a bubble
    0F0,0SEND_F0,0RECV_B0... with communication; no empty cells

Two dialects: in today's, B is the whole backward and I its input half; in files from before it, B
is the input half and BW the whole. Torch reads `0F0garbage` as `0F0`, `0F-1` as a forward without
micro-batch and `0BW0` as such a backward, without a word; here each is refused with its row and
column, counted from 1.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptis.check import check
from adaptis.errors import InputError, PlanError
from adaptis.exchange.orders import Found, basic, plan_of
from adaptis.exchange.transfers import verify
from adaptis.lower import lower
from adaptis.profile import Profile
from adaptis.program import Compute, Op, Overlap, Shard, Sharding, Step, parts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adaptis.exchange.orders import Cut
    from adaptis.plan import Plan
    from adaptis.program import Instruction, Program

_NUMBER = r"(0|[1-9][0-9]{0,8})"
_COMPUTE = re.compile(rf"{_NUMBER}(BW|[FBIW]){_NUMBER}")
_FUSED = re.compile(r"\(([^();]*);([^();]*)\)OVERLAP_F_B")
_TRANSFER = re.compile(rf"{_NUMBER}(?:SEND|RECV)_[FB]{_NUMBER}")
_SHARD = re.compile(rf"{_NUMBER}(?:{'|'.join(Sharding)})")
_LEGACY = {"F": Op.FORWARD, "B": Op.BACKWARD_INPUT, "W": Op.BACKWARD_WEIGHT, "BW": Op.BACKWARD}

Letters = tuple[int, str, int]  # stage, letters and micro-batch of a computation


def write_orders(plan: Plan) -> str:
    """The computations alone; torch derives the communication itself.

    Raises:
        PlanError: torch has no word for a decision of the plan, or cannot run its order.
        ProgramError: the plan is no plan that can run.
    """
    _prove(plan)
    return "".join(f"{','.join(map(str, order))}\n" for order in plan.programs)


def write_program(plan: Plan) -> str:
    """The computations with our sends and receives, which torch runs as they stand.

    Torch scales the gradients in REDUCE_GRAD, so each stage gets one; STEP is left out.

    Raises:
        PlanError, ProgramError: as `write_orders`.
    """
    program = _prove(plan)
    return "".join(f"{','.join(_with_reductions(row))}\n" for row in program.devices)


def _prove(plan: Plan) -> Program:
    """The program of a plan that torch can run."""
    basic(plan, "torch", fused=True)
    program = lower(plan)
    check(program)
    idle = set(range(plan.num_devices)) - set(plan.placement)
    if idle:
        raise PlanError(f"device {min(idle)} holds no stage; torch needs one on each rank")
    last = len(plan.stages) - 1
    order = plan.programs[plan.placement[last]]
    computes = (c for work in order for c in parts(work))
    forwards = [c for c in computes if c.op is Op.FORWARD and c.stage == last]
    for expected, compute in enumerate(forwards):
        if compute.microbatch != expected:
            raise PlanError(
                f"torch takes the losses in the order of the micro-batches, but the last stage "
                f"computes {compute} where {last}F{expected} is needed; number them anew"
            )
    return program


def _with_reductions(row: Sequence[Instruction]) -> Iterator[str]:
    """A row's actions, the gradients of each stage reduced behind its last backward."""
    last = {
        c.stage: position
        for position, instruction in enumerate(row)
        for c in parts(instruction)
        if c.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)
    }
    for position, instruction in enumerate(row):
        reduces = isinstance(instruction, Shard) and instruction.what is Sharding.REDUCE
        if not (reduces or isinstance(instruction, Step)):
            yield str(instruction)
        for stage, end in last.items():
            if end == position:
                yield str(Shard(Sharding.REDUCE, stage))


@dataclass(frozen=True, slots=True)
class Cell:
    """One action: the computations in it, or none in one of another kind."""

    row: int
    column: int
    text: str
    letters: tuple[Letters, ...]

    @property
    def at(self) -> str:
        """The place, counted from 1."""
        return f"row {self.row}, column {self.column}"


def read_schedule(text: str, cut: Cut, where: str = "schedule") -> Plan:
    """The plan of a schedule in either form and dialect, over the layers of `cut`.

    Communication must be just what follows from the computations; it is derived anew.

    Raises:
        InputError: a cell is no action of torch's.
        PlanError: an action is there twice, missing, or at a place where it cannot run.
        ProgramError: the ranks wait for each other in a circle.
    """
    rows, blank = _cells(text, where)
    translate = _dialect(rows, where)
    works = [[translate(cell) for cell in row] for row in rows]
    orders = [
        [Found(cell.at, work) for cell, work in zip(row, found, strict=True) if work is not None]
        for row, found in zip(rows, works, strict=True)
    ]
    profile = cut if isinstance(cut, Profile) else None
    plan = plan_of(orders, cut, where, profile, provenance={"imported": "torch"})
    named = [
        [(cell.at, work or cell.text) for cell, work in zip(row, found, strict=True)]
        for row, found in zip(rows, works, strict=True)
    ]
    if verify(named, plan.layout, where) and blank:
        raise InputError(f"{where}: {blank}: is empty; with communication no cell may be")
    return plan


def _cells(text: str, where: str) -> tuple[list[list[Cell]], str]:
    """The cells that hold something, and the place of the first that does not."""
    rows: list[list[Cell]] = []
    blank = ""
    try:
        for row, words in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True), 1):
            cells = []
            for column, word in enumerate(words, 1):
                if word.strip(" \t"):
                    cells.append(_cell(row, column, word.strip(" \t"), where))
                else:
                    blank = blank or f"row {row}, column {column}"
            rows.append(cells)
    except csv.Error as error:
        raise InputError(f"{where}: row {len(rows) + 1}: no CSV ({error})") from None
    return rows, blank


def _cell(row: int, column: int, text: str, where: str) -> Cell:
    fused = _FUSED.fullmatch(text)
    words = [word.strip(" ") for word in fused.groups()] if fused else [text]
    matches = [_COMPUTE.fullmatch(word) for word in words]
    if all(matches):
        letters = tuple((int(m[1]), m[2], int(m[3])) for m in matches if m)
        return Cell(row, column, text, letters)
    if _TRANSFER.fullmatch(text) or _SHARD.fullmatch(text):
        return Cell(row, column, text, ())
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    raise InputError(
        f"{where}: row {row}, column {column}: {shown!r} is no action; '0F0', '0SEND_F0', "
        f"'0UNSHARD' or '(0F1;1B0)OVERLAP_F_B' are"
    )


class _Dialect:
    """What the letters of a file stand for."""

    def __init__(self, words: dict[str, Op], where: str, why: str) -> None:
        self.words, self.where, self.why = words, where, why

    def __call__(self, cell: Cell) -> Compute | Overlap | None:
        """The computation in `cell`; None: it holds another action."""
        found = []
        for stage, letters, microbatch in cell.letters:
            if letters not in self.words:
                raise InputError(
                    f"{self.where}: {cell.at}: {letters} is a word of today's dialect, but the "
                    f"file is in the old one, where B is the input half: {self.why}"
                )
            found.append(Compute(self.words[letters], stage, microbatch))
        if len(found) == 2:
            return Overlap(*found)
        return found[0] if found else None


def _dialect(rows: Sequence[Sequence[Cell]], where: str) -> _Dialect:
    """The dialect of a file: the old one has BW, or W and B but no I of one micro-batch."""
    places: dict[Letters, str] = {}
    for row in rows:
        for cell in row:
            for letters in cell.letters:
                places.setdefault(letters, f"{cell.at} has {cell.text}")
    for (stage, letters, m), at in places.items():
        split = letters == "W" and (stage, "B", m) in places and (stage, "I", m) not in places
        if letters == "BW" or split:
            return _Dialect(_LEGACY, where, at)
    return _Dialect({op.value: op for op in (*_LEGACY.values(),)}, where, "")
