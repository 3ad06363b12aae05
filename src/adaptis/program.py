"""The instructions: what each means, and what it reads and writes.

One program, two interpreters: the simulator and the executor run the same `Program`. What must
have happened before an instruction is said once, in `Layout.reads` and `Layout.writes`; lowering,
checking, simulating and executing derive everything from these two. ::

    Compute    F B I W R of a stage, S T of a sharded head    what occupies a device
    Overlap    two computations fused into one
    Send Receive                                              a value to one other device
    Join       SHARE TAKE SUM_S SUM_T                         all devices: the sharded head
    Copy       OFFLOAD RELOAD                                 activations to the host and back
    Shard      UNSHARD RESHARD REDUCE_GRAD                    parameters and gradients of a stage
    Step       the optimizer

A micro-batch that continues the sequence of another one is a slice of it (`Layout.previous`): its
forward needs the keys and values that the slice before left, its backward the gradients that the
slice after left. `adaptis.notation` has the text forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Op(StrEnum):
    """What a device computes for one stage and micro-batch; the value is the printed form."""

    FORWARD = "F"  # output[s, m] = stage(output[s - 1, m])
    BACKWARD = "B"  # I, then W, at one go
    BACKWARD_INPUT = "I"  # input_grad[s, m] = the gradient of the stage's input
    BACKWARD_WEIGHT = "W"  # parameter.grad += what I left to be multiplied
    RECOMPUTE = "R"  # saved[s, m] = what F would have kept, from the kept input
    SCORES = "S"  # this device's columns of the head: logits and their share of the sums
    SCORES_GRADIENT = "T"  # this device's columns of the head: gradients from the whole sums


OPS = tuple(Op)  # the codes of operations in columns
BACKWARDS = (Op.BACKWARD, Op.BACKWARD_INPUT)  # what yields a stage's input gradient
HEAD_OPS = (Op.SCORES, Op.SCORES_GRADIENT)


class Kind(StrEnum):
    """What passes from one instruction to another."""

    OUTPUT = "F"  # a stage's output; crosses devices
    INPUT_GRAD = "B"  # the gradient of a stage's input; crosses devices
    SAVED = "saved"  # activations, from F or R to B or I; of the head from S to T
    SAVED_INPUT = "input"  # a recomputed stage's input, from F to R
    SAVED_WEIGHT = "weight"  # operands of the weight gradient, from I to W
    HOST = "host"  # activations in the host's memory, from OFFLOAD to RELOAD
    STATE = "state"  # keys and values, or a recurrent state, for the next slice
    STATE_GRAD = "state gradient"  # and their gradients, for the slice before
    SHARE_S = "S"  # what S adds to the sums over the vocabulary
    SHARE_T = "T"  # what T adds to the head's input gradient
    SUMS = "sums"  # the sums over the whole vocabulary
    PARAMETERS = "parameters"  # of a sharded stage, whole; its micro-batch is 0


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
class Overlap:
    """Two computations fused into one: each hides what the other waits for."""

    first: Compute
    second: Compute

    def __str__(self) -> str:
        return f"({self.first};{self.second})OVERLAP_F_B"


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


class Together(StrEnum):
    """What all devices do together for a sharded head; never blocks."""

    SHARE = "SHARE_F"  # the last stage's device hands its output to all
    TAKE = "TAKE_F"  # all others get ready for it
    SUM_S = "SUM_S"  # add up what the S passes left: sums, and with one reduction the gradient
    SUM_T = "SUM_T"  # add up the input gradient that the T passes left


@dataclass(frozen=True, slots=True)
class Join:
    """This device's part in a collective of the head; `stage` is the head's number."""

    what: Together
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.what}{self.microbatch}"


class Way(StrEnum):
    """Where activations go."""

    OFFLOAD = "OFFLOAD"
    RELOAD = "RELOAD"


@dataclass(frozen=True, slots=True)
class Copy:
    """Activations to the host's memory or back, beside computation; never blocks."""

    way: Way
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.way}{self.microbatch}"


class Sharding(StrEnum):
    """What happens to a stage's parameters; torch's names."""

    GATHER = "UNSHARD"  # make the whole parameters of a sharded stage; who reads them waits
    FREE = "RESHARD"  # forget them
    REDUCE = "REDUCE_GRAD"  # sum the gradients, or the head's part, over copies and replicas


@dataclass(frozen=True, slots=True)
class Shard:
    """One of these for one stage; of a sharded head REDUCE alone, on each device."""

    what: Sharding
    stage: int

    def __str__(self) -> str:
        return f"{self.stage}{self.what}"


@dataclass(frozen=True, slots=True)
class Step:
    """The end of the device's step: all sums and sends done, then the optimizer.

    With `clipped`, all devices first agree on the norm of all gradients.
    """

    clipped: bool = False

    def __str__(self) -> str:
        return "CLIPPED_STEP" if self.clipped else "STEP"


Work = Compute | Overlap  # what occupies a device
Instruction = Work | Send | Receive | Join | Copy | Shard | Step


def parts(instruction: Instruction) -> tuple[Compute, ...]:
    """The computations in `instruction`: one, two where they are fused, none in the others."""
    match instruction:
        case Compute():
            return (instruction,)
        case Overlap(first, second):
            return (first, second)
        case _:
            return ()


_KEPT = {  # what the other operations read; an output is that of the stage before
    Op.RECOMPUTE: (Kind.SAVED_INPUT,),
    Op.BACKWARD_WEIGHT: (Kind.SAVED_WEIGHT,),
    Op.SCORES: (Kind.OUTPUT,),
    Op.SCORES_GRADIENT: (Kind.SAVED, Kind.SUMS),
}
_USED_UP = (Kind.SAVED, Kind.SAVED_INPUT, Kind.SAVED_WEIGHT)  # freed by the one that reads it


@dataclass(frozen=True)
class Layout:
    """What the numbers in instructions stand for, and so what each reads and writes.

    A model may be there `copies` times (Chimera, DualPipe): stages 0 to S / copies - 1 are the
    first copy, and micro-batch m goes through copy m mod copies.
    """

    placement: tuple[int, ...]  # stage -> device
    num_microbatches: int
    recomputed: frozenset[int] = frozenset()  # stages that keep only their input from F on
    previous: tuple[int, ...] = ()  # the slice before each micro-batch, -1: none; (): no slices
    copies: int = 1
    replicas: int = 1  # of the whole pipeline (data parallel)
    sharded: frozenset[int] = frozenset()  # stages whose parameters lie in parts on the replicas
    reductions: int = 0  # of a head that is sharded over all devices: 1 or 2; 0: none is

    @property
    def num_stages(self) -> int:
        """How many stages there are, all copies counted; also the number of a sharded head."""
        return len(self.placement)

    @property
    def length(self) -> int:
        """How many stages a micro-batch goes through."""
        return len(self.placement) // self.copies

    @property
    def reduced(self) -> bool:
        """Whether each stage's gradients must be summed with those of copies or replicas."""
        return self.copies * self.replicas > 1

    @cached_property
    def following(self) -> tuple[int, ...]:
        """The slice after each micro-batch, -1: none; (): no slices."""
        result = [-1] * len(self.previous)
        for m, before in enumerate(self.previous):
            if before >= 0:
                result[before] = m
        return tuple(result)

    def stages_of(self, microbatch: int) -> range:
        """The stages that `microbatch` goes through."""
        first = microbatch % self.copies * self.length
        return range(first, first + self.length)

    def is_first(self, stage: int) -> bool:
        """Whether `stage` takes the data."""
        return stage % self.length == 0

    def is_last(self, stage: int) -> bool:
        """Whether `stage` is the end of the chain of stages; the loss is there or at the head."""
        return (stage + 1) % self.length == 0

    def reads(self, instruction: Instruction) -> Iterator[Value]:
        """The values that `instruction` needs on its own device."""
        match instruction:
            case Compute():
                yield from self._read(instruction)
            case Overlap(first, second):
                yield from self._read(first)
                yield from self._read(second)
            case Send(value):
                yield value
            case Join():
                yield from self._joined(instruction)
            case Copy(way, stage, microbatch):
                yield Value(Kind.SAVED if way is Way.OFFLOAD else Kind.HOST, stage, microbatch)
            case Shard(what, stage):
                if what is Sharding.FREE:
                    yield Value(Kind.PARAMETERS, stage, 0)
            case Receive() | Step():
                pass

    def writes(self, instruction: Instruction) -> Iterator[Value]:
        """The values that `instruction` leaves on its own device."""
        match instruction:
            case Compute():
                yield from self._written(instruction)
            case Overlap(first, second):
                yield from self._written(first)
                yield from self._written(second)
            case Receive(value):
                yield value
            case Join():
                yield from self._got(instruction)
            case Copy(way, stage, microbatch):
                yield Value(Kind.HOST if way is Way.OFFLOAD else Kind.SAVED, stage, microbatch)
            case Shard(what, stage):
                if what is Sharding.GATHER:
                    yield Value(Kind.PARAMETERS, stage, 0)
            case Send() | Step():
                pass

    def takes(self, instruction: Instruction) -> Iterator[Value]:
        """The values that are gone after `instruction`, and may be written again."""
        match instruction:
            case Compute():
                yield from (v for v in self._read(instruction) if v.kind in _USED_UP)
            case Overlap(first, second):
                yield from self.takes(first)
                yield from self.takes(second)
            case Copy() | Shard(Sharding.FREE):
                yield from self.reads(instruction)
            case _:
                pass

    def _read(self, compute: Compute) -> Iterator[Value]:
        stage, m = compute.stage, compute.microbatch
        if self.sharded and stage in self.sharded:
            yield Value(Kind.PARAMETERS, stage, 0)
        match compute.op:
            case Op.FORWARD:
                if not self.is_first(stage):
                    yield Value(Kind.OUTPUT, stage - 1, m)
                if self.previous and self.previous[m] >= 0:
                    yield Value(Kind.STATE, stage, self.previous[m])
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                yield from self._read_backwards(stage, m)
            case _:
                for kind in _KEPT[compute.op]:
                    yield Value(kind, stage - (kind is Kind.OUTPUT), m)

    def _read_backwards(self, stage: int, m: int) -> Iterator[Value]:
        yield Value(Kind.SAVED, stage, m)
        if self.reductions or not self.is_last(stage):
            yield Value(Kind.INPUT_GRAD, stage + 1, m)
        if self.previous and self.following[m] >= 0:
            yield Value(Kind.STATE_GRAD, stage, self.following[m])

    def _written(self, compute: Compute) -> Iterator[Value]:
        stage, m = compute.stage, compute.microbatch
        match compute.op:
            case Op.FORWARD:
                yield Value(Kind.SAVED_INPUT if stage in self.recomputed else Kind.SAVED, stage, m)
                if self.reductions or not self.is_last(stage):
                    yield Value(Kind.OUTPUT, stage, m)
                if self.previous and self.following[m] >= 0:
                    yield Value(Kind.STATE, stage, m)
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                yield from self._written_backwards(compute)
            case Op.RECOMPUTE | Op.SCORES:
                yield Value(Kind.SAVED, stage, m)
                if compute.op is Op.SCORES:
                    yield Value(Kind.SHARE_S, stage, m)
            case Op.SCORES_GRADIENT:
                if self.reductions == 2:
                    yield Value(Kind.SHARE_T, stage, m)
            case Op.BACKWARD_WEIGHT:
                pass

    def _written_backwards(self, compute: Compute) -> Iterator[Value]:
        stage, m = compute.stage, compute.microbatch
        if not self.is_first(stage):
            yield Value(Kind.INPUT_GRAD, stage, m)
        if self.previous and self.previous[m] >= 0:
            yield Value(Kind.STATE_GRAD, stage, m)
        if compute.op is Op.BACKWARD_INPUT:
            yield Value(Kind.SAVED_WEIGHT, stage, m)

    def _joined(self, join: Join) -> Iterator[Value]:
        match join.what:
            case Together.SHARE:
                yield Value(Kind.OUTPUT, join.stage - 1, join.microbatch)
            case Together.SUM_S:
                yield Value(Kind.SHARE_S, join.stage, join.microbatch)
            case Together.SUM_T:
                yield Value(Kind.SHARE_T, join.stage, join.microbatch)
            case Together.TAKE:
                pass

    def _got(self, join: Join) -> Iterator[Value]:
        if join.what is Together.TAKE:
            yield Value(Kind.OUTPUT, join.stage - 1, join.microbatch)
        if join.what is Together.SUM_S:
            yield Value(Kind.SUMS, join.stage, join.microbatch)
        if join.what is (Together.SUM_S if self.reductions == 1 else Together.SUM_T):
            yield Value(Kind.INPUT_GRAD, join.stage, join.microbatch)

    def crosses(self, compute: Compute) -> tuple[Value, int] | None:
        """The value that `compute` leaves for one other device, and that device."""
        stage = compute.stage
        if compute.op is Op.FORWARD and not self.is_last(stage):
            kind, reader = Kind.OUTPUT, stage + 1
        elif compute.op in BACKWARDS and not self.is_first(stage):
            kind, reader = Kind.INPUT_GRAD, stage - 1
        else:
            return None
        target = self.placement[reader]
        if target == self.placement[stage]:
            return None
        return Value(kind, stage, compute.microbatch), target


@dataclass(frozen=True)
class Program:
    """What each device does, in order."""

    devices: tuple[tuple[Instruction, ...], ...]
    layout: Layout

    @property
    def placement(self) -> tuple[int, ...]:
        """Stage to device."""
        return self.layout.placement

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return self.layout.num_stages

    @property
    def num_microbatches(self) -> int:
        """How many micro-batches a step has."""
        return self.layout.num_microbatches

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, row)) for row in self.devices)
