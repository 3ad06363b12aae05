"""The text form of instructions and programs, that of PyTorch's pipelining where it has one.

    2F0 0B3 1I0 1W0      computations: stage, operation, micro-batch
    2R0 4S0 4T0          recompute; the two passes of a sharded head (numbered after the stages)
    (0F4;3B1)OVERLAP_F_B two computations fused
    0SEND_F0 1RECV_F0    named by the stage that sends, by the stage that receives
    1SEND_B0 0RECV_B0
    4SHARE_F0 4TAKE_F0 4SUM_S0 4SUM_T0         of a sharded head, all devices together
    1OFFLOAD0 1RELOAD0   activations to the host and back
    1UNSHARD 1RESHARD 1REDUCE_GRAD             parameters and gradients of a stage
    STEP CLIPPED_STEP

A program is a line of facts, then one line a device; `parse_program` is the inverse of
`print_program`. Nothing around an instruction is tolerated: torch reads `0F0garbage` as `0F0`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adaptis.errors import ProgramError
from adaptis.program import (
    Compute,
    Copy,
    Join,
    Kind,
    Layout,
    Op,
    Overlap,
    Program,
    Receive,
    Send,
    Shard,
    Sharding,
    Step,
    Together,
    Value,
    Way,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adaptis.program import Instruction, Work

_NUMBER = r"(0|[1-9][0-9]{0,8})"
_COMPUTE = re.compile(rf"{_NUMBER}([FBIWRST]){_NUMBER}")
_OVERLAP = re.compile(r"\(([0-9A-Z]+);([0-9A-Z]+)\)OVERLAP_F_B")
_TRANSFER = re.compile(rf"{_NUMBER}(SEND|RECV)_([FB]){_NUMBER}")
_JOIN = re.compile(rf"{_NUMBER}({'|'.join(Together)}){_NUMBER}")
_COPY = re.compile(rf"{_NUMBER}({'|'.join(Way)}){_NUMBER}")
_SHARD = re.compile(rf"{_NUMBER}({'|'.join(Sharding)})")


def parse_compute(text: str) -> Compute:
    """`2F0` as a `Compute`; nothing around it is tolerated.

    Raises:
        ProgramError: if `text` is anything else.
    """
    match = _COMPUTE.fullmatch(text)
    if match is None:
        raise ProgramError(
            f"{text!r} is no instruction: stage, one of F B I W R S T, micro-batch are needed, as "
            f"in '2F0'"
        )
    return Compute(Op(match[2]), int(match[1]), int(match[3]))


def parse_work(text: str) -> Work:
    """A computation or a fused pair of two."""
    match = _OVERLAP.fullmatch(text)
    if match is None:
        return parse_compute(text)
    return Overlap(parse_compute(match[1]), parse_compute(match[2]))


def parse_order(words: Iterable[object], where: str) -> tuple[Work, ...]:
    """One device's computations from their text forms; `where` names the device in errors."""
    result = []
    for position, word in enumerate(words):
        if not isinstance(word, str):
            raise ProgramError(
                f"{where}, position {position}: {word!r} is no instruction but "
                f"{type(word).__name__}"
            )
        try:
            result.append(parse_work(word))
        except ProgramError as error:
            raise ProgramError(f"{where}, position {position}: {error}") from None
    return tuple(result)


def parse_instruction(text: str, layout: Layout) -> Instruction:
    """Any instruction; `layout` tells to which device a send goes.

    Raises:
        ProgramError: if `text` is none, or names a stage that does not exist.
    """
    if text in ("STEP", "CLIPPED_STEP"):
        return Step(text != "STEP")
    if match := _TRANSFER.fullmatch(text):
        return _transfer(match, layout)
    if match := _JOIN.fullmatch(text):
        return Join(Together(match[2]), int(match[1]), int(match[3]))
    if match := _COPY.fullmatch(text):
        return Copy(Way(match[2]), int(match[1]), int(match[3]))
    if match := _SHARD.fullmatch(text):
        return Shard(Sharding(match[2]), int(match[1]))
    return parse_work(text)


def _transfer(match: re.Match[str], layout: Layout) -> Send | Receive:
    """A send is named by the stage that wrote the value, a receive by the stage that reads it."""
    stage, kind, microbatch = int(match[1]), Kind(match[3]), int(match[4])
    onwards = 1 if kind is Kind.OUTPUT else -1
    sends = match[2] == "SEND"
    other = stage + onwards if sends else stage - onwards
    writer = stage if sends else other
    if not (0 <= other < layout.num_stages and 0 <= stage < layout.num_stages):
        raise ProgramError(f"{match[0]}: there is no such pair among {layout.num_stages} stages")
    value = Value(kind, writer, microbatch)
    return (Send if sends else Receive)(value, layout.placement[other])


def print_program(program: Program) -> str:
    """A program as text, one line a device behind a line of facts."""
    layout = program.layout
    facts = {
        "stages": " ".join(map(str, layout.placement)),
        "microbatches": layout.num_microbatches,
        "recomputed": " ".join(map(str, sorted(layout.recomputed))),
        "previous": " ".join(map(str, layout.previous)),
        "copies": layout.copies if layout.copies > 1 else "",
        "replicas": layout.replicas if layout.replicas > 1 else "",
        "sharded": " ".join(map(str, sorted(layout.sharded))),
        "reductions": layout.reductions or "",
    }
    head = "; ".join(f"{key} {value}" for key, value in facts.items() if value != "")
    rows = [f"device {d} | {' '.join(map(str, row))}" for d, row in enumerate(program.devices)]
    return "\n".join([head, *(row.rstrip() for row in rows)]) + "\n"


def parse_program(text: str) -> Program:
    """The inverse of `print_program`.

    Raises:
        ProgramError: with the line that is wrong.
    """
    head, *rows = text.splitlines() or [""]
    layout = _layout(head)
    devices = []
    for device, row in enumerate(rows):
        title, bar, words = row.partition(" |")
        if title != f"device {device}" or not bar:
            raise ProgramError(f"line {device + 2}: 'device {device} | ...' is needed")
        row_instructions = []
        for position, word in enumerate(words.split()):
            try:
                row_instructions.append(parse_instruction(word, layout))
            except ProgramError as error:
                raise ProgramError(f"device {device}, position {position}: {error}") from None
        devices.append(tuple(row_instructions))
    if not all(device < len(devices) for device in layout.placement):
        raise ProgramError(f"a stage is on a device beyond the {len(devices)} that have a line")
    return Program(tuple(devices), layout)


def _layout(head: str) -> Layout:
    """The line of facts."""
    facts: dict[str, tuple[int, ...]] = {}
    for part in head.split(";"):
        name, *numbers = part.split() or [""]
        if name not in _FACTS or name in facts:
            raise ProgramError(
                f"line 1: {part.strip()!r} is no fact of a program, or is there twice"
            )
        number = rf"-1|{_NUMBER}" if name == "previous" else _NUMBER
        if not all(re.fullmatch(number, text) for text in numbers):
            raise ProgramError(f"line 1: {part.strip()!r} must be a name and numbers")
        if name in ("microbatches", *_SINGLE) and len(numbers) != 1:
            raise ProgramError(f"line 1: {name!r} needs one number, found {len(numbers)}")
        facts[name] = tuple(map(int, numbers))
    for name in ("stages", "microbatches"):
        if not facts.get(name):
            raise ProgramError(f"line 1: {name!r} is missing")
    one = {name: facts.get(name, (default,))[0] for name, default in _SINGLE.items()}
    return Layout(
        placement=facts["stages"],
        recomputed=frozenset(facts.get("recomputed", ())),
        previous=facts.get("previous", ()),
        sharded=frozenset(facts.get("sharded", ())),
        num_microbatches=facts["microbatches"][0],
        **one,
    )


_SINGLE = {"copies": 1, "replicas": 1, "reductions": 0}
_FACTS = ("stages", "microbatches", "recomputed", "previous", "sharded", *_SINGLE)
