"""`check(program)` proves a program, or says exactly what is wrong with it.

Always on before a simulation or a run. Proven: each computation exactly once and on the device of
its stage, every value written once and before it is read, sends and receives matched in order on
each link, and no deadlock. A program has no wildcards, so its moves commute and one walk over the
wait-for graph decides for every interleaving. Three semantics of a transfer:

    posted      ours: neither end blocks; a reader waits for its value, the step for all sends
    buffered    a receive blocks until its value was sent
    rendezvous  both ends block until the other is there, as in a plain blocking runtime

Memory is not checked here but priced by `simulate`, which knows the bytes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from adaptis.errors import DeadlockError, ProgramError
from adaptis.program import Compute, Op, Receive, Send, Step, Value

if TYPE_CHECKING:
    from adaptis.program import Program

Position = tuple[int, int]  # device, index in its program


class Semantics(StrEnum):
    """When a transfer lets its two ends go on."""

    POSTED = "posted"
    BUFFERED = "buffered"
    RENDEZVOUS = "rendezvous"


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proven, in numbers."""

    num_instructions: int
    num_transfers: int


def check(program: Program, semantics: Semantics = Semantics.POSTED) -> Proof:
    """Prove `program`.

    Raises:
        ProgramError: with the device, the position and the instruction that breaks a rule.
        DeadlockError: with the cycle of instructions that wait for each other.
    """
    _once(program)
    _written_before_read(program)
    pairs = _matched(program)
    _no_deadlock(program, pairs, semantics)
    return Proof(sum(map(len, program.devices)), len(pairs))


def where(program: Program, position: Position) -> str:
    """How a position is named in messages."""
    device, index = position
    return f"device {device}, position {index}: {program.devices[device][index]}"


def _once(program: Program) -> None:
    seen: dict[tuple[Op, int, int], Position] = {}
    for device, row in enumerate(program.devices):
        for index, instruction in enumerate(row):
            if isinstance(instruction, Step) and index != len(row) - 1:
                raise ProgramError(
                    f"{where(program, (device, index))}: only the last instruction can be STEP"
                )
            if not isinstance(instruction, Compute):
                continue
            at = where(program, (device, index))
            op, stage, microbatch = instruction.op, instruction.stage, instruction.microbatch
            if stage >= program.num_stages or microbatch >= program.num_microbatches:
                raise ProgramError(
                    f"{at}: there are {program.num_stages} stages and {program.num_microbatches} "
                    f"micro-batches"
                )
            if program.placement[stage] != device:
                raise ProgramError(f"{at}: stage {stage} is on device {program.placement[stage]}")
            if (op, stage, microbatch) in seen:
                first = where(program, seen[op, stage, microbatch])
                raise ProgramError(
                    f"{at}: was computed before, at {first}; each computation runs once"
                )
            seen[op, stage, microbatch] = (device, index)
    _complete(program, seen)


def _complete(program: Program, seen: dict[tuple[Op, int, int], Position]) -> None:
    for stage in range(program.num_stages):
        for microbatch in range(program.num_microbatches):
            forward, fused, half, weight, again = (
                (op, stage, microbatch) in seen
                for op in (
                    Op.FORWARD,
                    Op.BACKWARD,
                    Op.BACKWARD_INPUT,
                    Op.BACKWARD_WEIGHT,
                    Op.RECOMPUTE,
                )
            )
            what = f"stage {stage}, micro-batch {microbatch}"
            if not forward:
                raise ProgramError(f"{what}: {stage}F{microbatch} is missing")
            if fused and (half or weight):
                raise ProgramError(f"{what}: has B and also I or W; either B, or I and W")
            if not fused and not (half and weight):
                missing = "I" if weight else "W" if half else "B"
                raise ProgramError(f"{what}: {stage}{missing}{microbatch} is missing")
            if again != (stage in program.recomputed):
                missing = "R is missing"
                extra = "has an R though the stage keeps its activations"
                raise ProgramError(f"{what}: {extra if again else missing}")


def _written_before_read(program: Program) -> None:
    for device, row in enumerate(program.devices):
        there: set[Value] = set()
        for index, instruction in enumerate(row):
            for value in program.reads(instruction):
                if value not in there:
                    raise ProgramError(
                        f"{where(program, (device, index))}: reads {_describe(value)}, which "
                        f"nothing "
                        f"before it on this device computes or receives"
                    )
            for value in program.writes(instruction):
                if value in there:
                    raise ProgramError(
                        f"{where(program, (device, index))}: leaves {_describe(value)}, which is "
                        f"there already; each value comes to a device once"
                    )
                there.add(value)


def _describe(value: Value) -> str:
    names = {"F": "the output", "B": "the input gradient", "saved": "the activations"}
    name = names.get(value.kind, f"the kept {value.kind}")
    return f"{name} of stage {value.stage}, micro-batch {value.microbatch}"


def _matched(program: Program) -> list[tuple[Position, Position]]:
    """The send and the receive of each transfer."""
    sends: dict[tuple[int, int], list[tuple[Position, Value]]] = defaultdict(list)
    receives: dict[tuple[int, int], list[tuple[Position, Value]]] = defaultdict(list)
    for device, row in enumerate(program.devices):
        for index, instruction in enumerate(row):
            if isinstance(instruction, Send):
                sends[device, instruction.target].append(((device, index), instruction.value))
            elif isinstance(instruction, Receive):
                receives[instruction.source, device].append(((device, index), instruction.value))
    pairs = []
    for link in sorted(sends.keys() | receives.keys()):
        there, here = sends[link], receives[link]
        for (send, sent), (receive, expected) in zip(there, here, strict=False):
            if sent != expected:
                raise ProgramError(
                    f"link {link[0]} to {link[1]}: {where(program, send)} meets "
                    f"{where(program, receive)}; "
                    f"sends and receives must stand in the same order"
                )
            pairs.append((send, receive))
        if len(there) != len(here):
            left, other = (there, "receive") if len(there) > len(here) else (here, "send")
            extra = where(program, left[min(len(there), len(here))][0])
            raise ProgramError(f"link {link[0]} to {link[1]}: {extra} has no {other}")
    return pairs


def _no_deadlock(
    program: Program, pairs: list[tuple[Position, Position]], semantics: Semantics
) -> None:
    """Kahn's walk over the wait-for graph; what is left over holds a cycle."""
    before = _wait_for(program, pairs, semantics)
    after: dict[Position, list[Position]] = defaultdict(list)
    missing = {}
    ready = []
    for node, needs in before.items():
        missing[node] = len(needs)
        for need in needs:
            after[need].append(node)
        if not needs:
            ready.append(node)
    done = 0
    while ready:
        node = ready.pop()
        done += 1
        for follower in after[node]:
            missing[follower] -= 1
            if missing[follower] == 0:
                ready.append(follower)
    if done == len(before):
        return
    cycle = _cycle(before, {node for node, count in missing.items() if count > 0})
    lines = tuple(where(program, node) for node in cycle)
    raise DeadlockError(
        f"{len(lines)} instructions wait for each other in a circle: "
        + " <- ".join((*lines, lines[0])),
        lines,
    )


def _wait_for(
    program: Program, pairs: list[tuple[Position, Position]], semantics: Semantics
) -> dict[Position, list[Position]]:
    """Each instruction with those that must come before it."""
    before: dict[Position, list[Position]] = {}
    for device, row in enumerate(program.devices):
        for index in range(len(row)):
            before[device, index] = [(device, index - 1)] if index else []
    if semantics is Semantics.POSTED:
        reader = _readers(program)
        for send, receive in pairs:
            before[reader[receive]].append(send)
            last = (send[0], len(program.devices[send[0]]) - 1)
            if isinstance(program.devices[last[0]][last[1]], Step):
                before[last].append(receive)
        return before
    for send, receive in pairs:
        before[receive].append(send)
        if semantics is Semantics.RENDEZVOUS:
            # Neither end passes before the other has arrived: what follows the one waits for the
            # other.
            before[send] += [(receive[0], receive[1] - 1)] if receive[1] else []
    return before


def _readers(program: Program) -> dict[Position, Position]:
    """Where each received value is first read; the receive itself if nobody reads it."""
    result: dict[Position, Position] = {}
    for device, row in enumerate(program.devices):
        waiting: dict[Value, Position] = {}
        for index, instruction in enumerate(row):
            for value in program.reads(instruction):
                if value in waiting:
                    result[waiting.pop(value)] = (device, index)
            if isinstance(instruction, Receive):
                waiting[instruction.value] = (device, index)
        result.update({position: position for position in waiting.values()})
    return result


def _cycle(before: dict[Position, list[Position]], stuck: set[Position]) -> list[Position]:
    """One cycle among the stuck instructions, in the order of waiting."""
    path: list[Position] = []
    place: dict[Position, int] = {}
    node = min(stuck)
    while node not in place:
        place[node] = len(path)
        path.append(node)
        node = next(need for need in before[node] if need in stuck)
    return path[place[node] :]
