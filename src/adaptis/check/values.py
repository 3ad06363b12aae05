"""Every value written once and before it is read."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from adaptis.check.deadlock import Events
from adaptis.check.places import there_are, where
from adaptis.check.rules import Rules
from adaptis.errors import ProgramError
from adaptis.program import (
    Compute,
    Copy,
    Join,
    Kind,
    Overlap,
    Receive,
    Send,
    Shard,
    Sharding,
    Step,
    Together,
    Value,
)

if TYPE_CHECKING:
    from adaptis.check.places import Position
    from adaptis.check.rules import Numbers
    from adaptis.program import Layout, Program


class Semantics(StrEnum):
    """When a transfer lets its two ends go on."""

    POSTED = "posted"
    BUFFERED = "buffered"
    RENDEZVOUS = "rendezvous"


# Of each link: its number, what was sent on it and what was received from it.
Links = dict[tuple[int, int], tuple[int, list[Value], list[Value]]]
_HERE = 0  # a value that this device made itself, or that it has waited for
_GROUP = {Together.SHARE: 0, Together.TAKE: 0, Together.SUM_S: 1, Together.SUM_T: 2}


class Walk:
    """Goes through each device's program once; collects what the devices have to agree on."""

    def __init__(self, program: Program, semantics: Semantics) -> None:
        devices = range(len(program.devices))
        self.program, self.layout, self.semantics = program, program.layout, semantics
        self.rules = Rules(program.layout)
        self.events = [Events() for _ in devices]
        self.links: Links = {}
        self.joins: list[list[list[int]]] = [[[] for _ in devices] for _ in range(3)]

    def through(self, device: int) -> None:
        """Prove that each value is there when it is read, and comes once."""
        there: dict[int, int] = {}  # each value, and the token of who has yet to bring it
        rule = self.rules.of
        for index, instruction in enumerate(self.program.devices[device]):
            if isinstance(instruction, (Compute, Overlap)):
                self._apply((device, index), rule(instruction), there, _HERE)
            elif isinstance(instruction, (Send, Receive)):
                self._transfer((device, index), instruction, there)
            elif not isinstance(instruction, Step):
                fault = _misplaced(self.layout, device, instruction)
                if fault:
                    raise ProgramError(f"{where(self.program, (device, index))}: {fault}")
                joins = isinstance(instruction, Join)
                token = self._join(device, index, instruction) if joins else _HERE
                self._apply((device, index), rule(instruction), there, token)
        for stage in self.layout.sharded:
            if self.rules.number(Value(Kind.PARAMETERS, stage, 0)) in there:
                raise ProgramError(
                    f"device {device}: the parameters of stage {stage} are still whole at the end; "
                    f"{stage}RESHARD is missing behind {stage}UNSHARD"
                )

    def _apply(
        self,
        at: Position,
        rule: tuple[Numbers, Numbers, Numbers, Numbers, int],
        there: dict[int, int],
        token: int,
    ) -> None:
        reads, writes, takes, whole, m = rule
        for base in reads:
            if there.get(base + m) != _HERE:
                self._wait(at, base + m, there)
        for number in whole:
            if number not in there:
                self._wait(at, number, there)
        for base in writes:
            if base + m in there:
                self._again(at, self.rules.value(base + m))
            there[base + m] = token
        for base in takes:
            del there[base + m]

    def _wait(self, at: Position, number: int, there: dict[int, int]) -> None:
        """Another device brings the value: its first reader waits for it."""
        token = there.get(number)
        if token is None:
            raise ProgramError(
                f"{where(self.program, at)}: reads {_describe(self.rules.value(number))}, which "
                f"nothing before it on this device computes or receives"
            )
        self.events[at[0]].wait(at[1], token)
        there[number] = _HERE

    def _again(self, at: Position, value: Value) -> None:
        raise ProgramError(
            f"{where(self.program, at)}: leaves {_describe(value)}, which is there already; each "
            f"value comes to a device once"
        )

    def _transfer(self, at: Position, end: Send | Receive, there: dict[int, int]) -> None:
        (device, index), value, sends = at, end.value, isinstance(end, Send)
        fault = _unsendable(self.layout, device, end)
        if fault:
            raise ProgramError(f"{where(self.program, at)}: {fault}")
        link = (device, end.target) if isinstance(end, Send) else (end.source, device)
        entry = self.links.get(link)
        if entry is None:
            entry = self.links[link] = (len(self.links) + 1, [], [])
        number, sent, received = entry
        queue = sent if sends else received
        token = (number << 32) + 2 * len(queue)  # of the sent value; the receive's is one more
        queue.append(value)
        number, events = self.rules.number(value), self.events[device]
        if sends and there.get(number) != _HERE:
            self._wait(at, number, there)
        if not sends:
            if number in there:
                self._again(at, value)
            there[number] = token if self.semantics is Semantics.POSTED else _HERE
        if self.semantics is Semantics.RENDEZVOUS:
            # Neither end passes before the other has arrived: all that stands before it has ended.
            events.post(max(index - 1, 0), token + (not sends))
            events.wait(index, token + sends)
        elif sends:
            events.post(index, token)
        elif self.semantics is Semantics.BUFFERED:
            events.wait(index, token)

    def _join(self, device: int, index: int, join: Join) -> int:
        group = _GROUP[join.what]
        self.joins[group][device].append(join.microbatch)
        if group == 0:  # handed out by one device, which waits for nobody
            token = 1 + join.microbatch
            if join.what is Together.SHARE:
                self.events[device].post(index, token)
            return token
        token = -1 - group * self.layout.num_microbatches - join.microbatch
        self.events[device].post(index, token)
        return token


def _unsendable(layout: Layout, device: int, end: Send | Receive) -> str:
    value = end.value
    if not (
        0 <= value.stage < layout.num_stages and 0 <= value.microbatch < layout.num_microbatches
    ):
        return there_are(layout)
    if value.kind is not Kind.OUTPUT and value.kind is not Kind.INPUT_GRAD:
        return "only outputs and input gradients go from device to device"
    if device == (end.target if isinstance(end, Send) else end.source):
        return "the other end is the same device"
    return ""


def _misplaced(layout: Layout, device: int, instruction: Join | Copy | Shard) -> str:
    """What is wrong with an instruction that names a stage, if anything is."""
    stage, num_stages = instruction.stage, layout.num_stages
    m = 0 if isinstance(instruction, Shard) else instruction.microbatch
    if not (0 <= stage < num_stages + (layout.reductions > 0) and 0 <= m < layout.num_microbatches):
        return there_are(layout)
    match instruction:
        case Join(what):
            return _misjoined(layout, device, what, stage)
        case Shard() if stage < num_stages and layout.placement[stage] != device:
            return f"stage {stage} is not on device {device}"
        case Shard(Sharding.REDUCE) if not layout.reduced:
            return "there is one copy and one replica: nothing is to be summed"
        case Shard(Sharding.GATHER | Sharding.FREE) if stage not in layout.sharded:
            return f"stage {stage} is not sharded"
        case _:
            return ""


def _misjoined(layout: Layout, device: int, what: Together, stage: int) -> str:
    if stage != layout.num_stages:
        return f"only the sharded head, stage {layout.num_stages}, is joined in"
    if what is Together.SUM_T and layout.reductions == 1:
        return "with one reduction SUM_S adds up the input gradient"
    if (what is Together.SHARE) != (device == layout.placement[-1]) and _GROUP[what] == 0:
        return f"device {layout.placement[-1]} holds the last stage: SHARE there, TAKE elsewhere"
    return ""


def _describe(value: Value) -> str:
    if value.kind is Kind.PARAMETERS:
        return f"the whole parameters of stage {value.stage}"
    names = {"F": "the output", "B": "the input gradient", "saved": "the activations"}
    name = names.get(value.kind, f"the kept {value.kind}")
    return f"{name} of stage {value.stage}, micro-batch {value.microbatch}"
