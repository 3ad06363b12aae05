"""One loop runs any checked program: wait for what is read, compute, hand over what is written.

The meaning of each instruction is in `measure.compute`, the network in `transport`; here is only
the loop, and the clock. Recording is always on: two clock readings an instruction.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from adaptis.errors import PlanError
from adaptis.program import Compute, Instruction, Kind, Op, Program, Receive, Send, Step, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from adaptis.execute.transport import Transport
    from adaptis.measure.compute import StageCompute
    from adaptis.measure.stage import Microbatch

Row = tuple[
    Compute, float, float
]  # what ran, from when to when (seconds of the machine's monotonic clock)


class Progress(Protocol):
    """Where the loop stands, for whoever watches from outside the process."""

    def at(self, position: int) -> None:
        """The instruction at `position` begins."""
        ...

    def waits(self) -> None:
        """It waits for a value of another device."""
        ...


class Executor:
    """One device's part of a program."""

    def __init__(
        self,
        program: Program,
        device: int,
        stages: dict[int, StageCompute],
        transport: Transport,
        progress: Progress,
    ) -> None:
        self.device = device
        self.stages = stages
        self.transport = transport
        self._program = program
        self._instructions = program.devices[device]
        self._progress = progress
        self._values: dict[Value, Tensor] = {}

    def run(
        self,
        microbatches: Sequence[Microbatch],
        weight: float,
        step: Callable[[], None],
        watch: Callable[[], None] | None = None,
    ) -> list[Row]:
        """Run the device's instructions once.

        Args:
            microbatches: of the whole step.
            weight: multiplies each summed loss: 1 / (tokens of the whole step).
            step: what STEP does after every send was taken.
            watch: called after each computation, outside of its time.
        """
        rows: list[Row] = []
        clock = time.perf_counter
        for position, instruction in enumerate(self._instructions):
            self._progress.at(position)
            match instruction:
                case Compute():
                    given = self._fetch(instruction)
                    begin = clock()
                    result = self._compute(instruction, given, microbatches, weight)
                    rows.append((instruction, begin, clock()))
                    if result is not None:
                        self._values[_written(instruction)] = result
                    if watch is not None:
                        watch()
                case Send(value, target):
                    self.transport.send(value, target, self._values.pop(value))
                case Receive(value, source):
                    self.transport.post(value, source)
                case Step():
                    self.transport.finish()
                    step()
        return rows

    def _fetch(self, compute: Compute) -> Tensor | None:
        """The value of another stage that `compute` reads."""
        for value in self._program.layout.reads(compute):
            if value.kind in (Kind.OUTPUT, Kind.INPUT_GRAD):
                if self._program.placement[value.stage] == self.device:
                    return self._values.pop(value)
                self._progress.waits()
                return self.transport.wait(value)
        return None

    def _compute(
        self,
        compute: Compute,
        given: Tensor | None,
        microbatches: Sequence[Microbatch],
        weight: float,
    ) -> Tensor | None:
        """Do it; returns what goes to another stage."""
        stage, m = self.stages[compute.stage], compute.microbatch
        match compute.op:
            case Op.FORWARD:
                return stage.forward(m, given, microbatches[m], weight)
            case Op.BACKWARD:
                return stage.backward(m, given)
            case Op.BACKWARD_INPUT:
                return stage.backward_input(m, given)
            case Op.BACKWARD_WEIGHT:
                stage.backward_weight(m)
            case Op.RECOMPUTE:
                stage.recompute(m)
        return None


def refuse_unknown(program: Program) -> None:
    """Name what the loop above cannot run yet.

    Raises:
        PlanError: the program has slices, copies of the model, or an instruction of another kind.
    """
    layout = program.layout
    for found, what in (
        (layout.previous, "sequences in slices"),
        (layout.copies > 1, "several copies of the model"),
        (layout.replicas > 1, "data-parallel replicas"),
        (layout.sharded, "sharded stages"),
        (layout.reductions, "a sharded head"),
    ):
        if found:
            raise PlanError(f"the plan has {what}, which can be simulated but not executed yet")
    for device, row in enumerate(program.devices):
        for instruction in row:
            known = isinstance(instruction, Compute | Send | Receive | Step)
            if not known or instruction == Step(clipped=True):
                raise PlanError(
                    f"device {device}: {instruction} can be simulated but not executed yet; use a "
                    f"plan without it"
                )


def _written(compute: Compute) -> Value:
    kind = Kind.OUTPUT if compute.op is Op.FORWARD else Kind.INPUT_GRAD
    return Value(kind, compute.stage, compute.microbatch)


def describe(program: Program, device: int, position: int) -> str:
    """An instruction with its place, as failures name it."""
    instruction: Instruction = program.devices[device][position]
    match instruction:
        case Compute(_, stage, microbatch):
            place = f"stage {stage}, micro-batch {microbatch}, "
        case Send(value) | Receive(value):
            place = f"stage {value.stage}, micro-batch {value.microbatch}, "
        case _:
            place = ""
    return f"{place}instruction {position + 1} of {len(program.devices[device])}: {instruction}"
