"""The instructions: what each means, what it reads and writes, and how it is printed.

One program, two interpreters: the simulator and the executor run the same `Program`. What must
have happened before an instruction is said once, in `reads` and `writes`; lowering, checking,
simulating and executing derive everything from these two. The text form is that of PyTorch's
pipelining (`2F0`, `0I3`, `2SEND_F0`): a stage, an operation, a micro-batch; a `SEND_F` is named by
the stage that sends, a `RECV_F` by the stage that receives.

Not yet in it: offload and reload, vocabulary passes, fused pairs, gather and reduce, slices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from adaptis.errors import ProgramError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Op(StrEnum):
    """What a device computes for one stage and micro-batch; the value is the printed form."""

    FORWARD = "F"  # output[s, m] = stage(output[s - 1, m])
    BACKWARD = "B"  # I, then W, at one go
    BACKWARD_INPUT = "I"  # input_grad[s, m] = the gradient of the stage's input
    BACKWARD_WEIGHT = "W"  # parameter.grad += what I left to be multiplied
    RECOMPUTE = "R"  # saved[s, m] = what F would have kept, from the kept input


class Kind(StrEnum):
    """What passes from one instruction to another."""

    OUTPUT = "F"  # a stage's output; crosses devices
    INPUT_GRAD = "B"  # the gradient of a stage's input; crosses devices
    SAVED = "saved"  # activations, from F or R to B or I
    SAVED_INPUT = "input"  # a recomputed stage's input, from F to R
    SAVED_WEIGHT = "weight"  # operands of the weight gradient, from I to W


@dataclass(frozen=True, slots=True)
class Value:
    """What stage `stage` left for micro-batch `microbatch`."""

    kind: Kind
    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Compute:
    """One operation of one stage on one micro-batch."""

    op: Op
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Send:
    """Start handing `value` to the device `target`; never blocks."""

    value: Value
    target: int

    def __str__(self) -> str:
        return f"{self.value.stage}SEND_{self.value.kind}{self.value.microbatch}"


@dataclass(frozen=True, slots=True)
class Receive:
    """Get ready for `value` from the device `source`; who reads the value waits for it."""

    value: Value
    source: int

    def __str__(self) -> str:
        # Torch names a receive by the stage that will read the value.
        reader = self.value.stage + (1 if self.value.kind is Kind.OUTPUT else -1)
        return f"{reader}RECV_{self.value.kind}{self.value.microbatch}"


@dataclass(frozen=True, slots=True)
class Step:
    """The end of the device's step: sum the gradients of shared parameters, then the optimizer."""

    def __str__(self) -> str:
        return "STEP"


Instruction = Compute | Send | Receive | Step


@dataclass(frozen=True, slots=True)
class Program:
    """What each device does, in order.

    `recomputed` says which stages keep only their input from F on: it decides what their F leaves
    behind.
    """

    devices: tuple[tuple[Instruction, ...], ...]
    placement: tuple[int, ...]  # stage -> device
    num_microbatches: int
    recomputed: frozenset[int] = frozenset()

    @property
    def num_stages(self) -> int:
        """How many stages the chain is cut into."""
        return len(self.placement)

    def reads(self, instruction: Instruction) -> Iterator[Value]:
        """The values that `instruction` needs on its own device."""
        return reads(instruction, self.num_stages)

    def writes(self, instruction: Instruction) -> Iterator[Value]:
        """The values that `instruction` leaves on its own device."""
        return writes(instruction, self.num_stages, self.recomputed)

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, row)) for row in self.devices)


def reads(instruction: Instruction, num_stages: int) -> Iterator[Value]:
    """The values that `instruction` needs on its own device."""
    match instruction:
        case Compute(op, stage, microbatch):
            match op:
                case Op.FORWARD:
                    if stage > 0:
                        yield Value(Kind.OUTPUT, stage - 1, microbatch)
                case Op.RECOMPUTE:
                    yield Value(Kind.SAVED_INPUT, stage, microbatch)
                case Op.BACKWARD | Op.BACKWARD_INPUT:
                    yield Value(Kind.SAVED, stage, microbatch)
                    if stage < num_stages - 1:
                        yield Value(Kind.INPUT_GRAD, stage + 1, microbatch)
                case Op.BACKWARD_WEIGHT:
                    yield Value(Kind.SAVED_WEIGHT, stage, microbatch)
        case Send(value):
            yield value
        case Receive() | Step():
            pass


def writes(
    instruction: Instruction, num_stages: int, recomputed: frozenset[int] = frozenset()
) -> Iterator[Value]:
    """The values that `instruction` leaves on its own device."""
    match instruction:
        case Compute():
            yield from _written(instruction, num_stages, recomputed)
        case Receive(value):
            yield value
        case Send() | Step():
            pass


def _written(compute: Compute, num_stages: int, recomputed: frozenset[int]) -> Iterator[Value]:
    stage, microbatch = compute.stage, compute.microbatch
    match compute.op:
        case Op.FORWARD:
            kept = Kind.SAVED_INPUT if stage in recomputed else Kind.SAVED
            yield Value(kept, stage, microbatch)
            if stage < num_stages - 1:
                yield Value(Kind.OUTPUT, stage, microbatch)
        case Op.RECOMPUTE:
            yield Value(Kind.SAVED, stage, microbatch)
        case Op.BACKWARD | Op.BACKWARD_INPUT:
            if stage > 0:
                yield Value(Kind.INPUT_GRAD, stage, microbatch)
            if compute.op is Op.BACKWARD_INPUT:
                yield Value(Kind.SAVED_WEIGHT, stage, microbatch)
        case Op.BACKWARD_WEIGHT:
            pass


_COMPUTE = re.compile(r"(0|[1-9][0-9]{0,8})([FBIWR])(0|[1-9][0-9]{0,8})")


def parse_compute(text: str) -> Compute:
    """`2F0` as a `Compute`; nothing around it is tolerated.

    Raises:
        ProgramError: if `text` is anything else.
    """
    match = _COMPUTE.fullmatch(text)
    if match is None:
        raise ProgramError(
            f"{text!r} is no instruction: stage, one of F B I W R, micro-batch are needed, as in "
            f"'2F0'"
        )
    return Compute(Op(match[2]), int(match[1]), int(match[3]))


def parse_order(words: Iterable[object], where: str) -> tuple[Compute, ...]:
    """One device's computations from their text forms; `where` names the device in errors."""
    result = []
    for position, word in enumerate(words):
        if not isinstance(word, str):
            raise ProgramError(
                f"{where}, position {position}: {word!r} is no instruction but "
                f"{type(word).__name__}"
            )
        try:
            result.append(parse_compute(word))
        except ProgramError as error:
            raise ProgramError(f"{where}, position {position}: {error}") from None
    return tuple(result)
