"""One loop runs any checked program: wait for what is read, compute, hand over what is written.

The meaning of each computation is in `measure.compute` and `head`, the network in `transport`, the
host's memory in `offload`; here is only the loop. Recording is always on: two readings of the
clock in `device` a computation. Each instruction becomes a function once, so that a step only calls
them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from adaptis.errors import PlanError
from adaptis.execute.device import HostClock
from adaptis.program import (
    HEAD_OPS,
    Compute,
    Copy,
    Instruction,
    Join,
    Kind,
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
    parts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adaptis.execute.device import Clock
    from adaptis.execute.head import ShardedHead
    from adaptis.execute.offload import HostMemory
    from adaptis.execute.transport import Transport
    from adaptis.measure.compute import StageCompute
    from adaptis.measure.stage import Microbatch
    from adaptis.measure.values import Value as Content

Row = tuple[
    Compute, float, float
]  # what ran, from when to when (seconds of the machine's monotonic clock)
_SHARD = {Sharding.GATHER: "gather", Sharding.FREE: "free", Sharding.REDUCE: "reduce"}
_HANDED = (Kind.OUTPUT, Kind.INPUT_GRAD, Kind.SUMS)  # what passes through the loop


class Progress(Protocol):
    """Where the loop stands, for whoever watches from outside the process."""

    def at(self, position: int) -> None:
        """The instruction at `position` begins."""
        ...

    def waits(self) -> None:
        """It waits for a value of another device."""
        ...

    def resumes(self) -> None:
        """What it waited for is there."""
        ...


class Shared(Protocol):
    """What replicas of the pipeline have in common, by stage."""

    def gather(self, stage: int) -> None:
        """Start making its parameters whole."""
        ...

    def wait(self, stage: int) -> None:
        """Until they are."""
        ...

    def free(self, stage: int) -> None:
        """Let them go."""
        ...

    def reduce(self, stage: int) -> None:
        """Start summing its gradients."""
        ...


class _Run(NamedTuple):
    """What a step is given."""

    microbatches: Sequence[Microbatch]
    weight: float
    number: int
    step: Callable[[], None]
    watch: Callable[[], None] | None
    rows: list[Row]


class Executor:
    """One device's part of a program."""

    def __init__(
        self,
        program: Program,
        device: int,
        stages: dict[int, StageCompute],
        transport: Transport,
        progress: Progress,
        *,
        host: HostMemory,
        head: ShardedHead | None = None,
        shared: Shared | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Turn the device's instructions into functions; `head` where it is sharded."""
        self.device = device
        self._clock = clock or HostClock()
        self._shared = shared
        self._stages, self._transport, self._progress = stages, transport, progress
        self._host, self._head = host, head
        self._layout = program.layout
        self._others = [d for d in range(len(program.devices)) if d != device]
        self._values: dict[Value, Any] = {}  # written here
        self._coming: dict[Value, Callable[[], Any]] = {}  # asked for; the call waits for it
        self._step: _Run
        row = program.devices[device]
        self._last_reads = _last_reads(program, device)
        self._tasks = [
            self._task(position, instruction) for position, instruction in enumerate(row)
        ]

    def run(
        self,
        microbatches: Sequence[Microbatch],
        weight: float,
        number: int,
        step: Callable[[], None],
        watch: Callable[[], None] | None = None,
    ) -> list[Row]:
        """Run the device's instructions once.

        Args:
            microbatches: of the whole step.
            weight: multiplies each summed loss: 1 / (tokens of the whole step).
            number: of the step, for layers that draw random numbers.
            step: what STEP does after every send was taken.
            watch: called after each computation, outside of its time.
        """
        rows: list[Row] = []
        self._step = _Run(microbatches, weight, number, step, watch, rows)
        at = self._progress.at
        self._clock.begin()
        for position, task in enumerate(self._tasks):
            at(position)
            task()
        return self._clock.seconds(rows)

    def _task(self, position: int, instruction: Instruction) -> Callable[[], None]:
        """What `instruction` does."""
        match instruction:
            case Compute() | Overlap():
                pieces = [
                    (c, self._reads(c, position), self._written(c)) for c in parts(instruction)
                ]
                work = partial(self._work, pieces)
                return partial(self._whole, pieces, work) if self._shared else work
            case Send(value, target):
                return partial(self._send, value, (target,), self._is_last(value, position))
            case Receive(value, source):
                return partial(self._receive, value, source)
            case Join():
                return self._join(position, instruction)
            case _:
                return self._beside(position, instruction)

    def _beside(self, position: int, instruction: Copy | Shard | Step) -> Callable[[], None]:
        match instruction:
            case Copy(way, stage, microbatch):
                move = self._host.offload if way is Way.OFFLOAD else self._host.reload
                return partial(move, self._stages[stage], microbatch)
            case Shard(what, stage):
                if self._shared is None:  # copies are summed at the step, like all that is tied
                    return _nothing
                return partial(getattr(self._shared, _SHARD[what]), stage)
            case Step():
                return partial(self._finish, position)

    def _reads(self, compute: Compute, position: int) -> tuple[Value, bool] | None:
        """What comes from another computation, and whether nobody reads it later."""
        for value in self._layout.reads(compute):
            if value.kind in _HANDED:
                return value, self._is_last(value, position)
        return None

    def _is_last(self, value: Value, position: int) -> bool:
        return self._last_reads[value] == position

    def _written(self, compute: Compute) -> Value | None:
        """What another computation, or another device, reads."""
        written = [v for v in self._layout.writes(compute) if v.kind in _HANDED]
        return written[0] if written else None

    def _get(self, value: Value, last: bool) -> Any:
        """A value that this device wrote, or was to get."""
        if value in self._coming:
            self._progress.waits()
            self._values[value] = self._coming.pop(value)()
            self._progress.resumes()
        return self._values.pop(value) if last else self._values[value]

    def _work(
        self, pieces: Sequence[tuple[Compute, tuple[Value, bool] | None, Value | None]]
    ) -> None:
        """A computation, or two that are fused: both have all they need before they begin."""
        given = [None if read is None else self._get(*read) for _, read, _ in pieces]
        step, clock = self._step, self._clock.read
        for (compute, _, written), content in zip(pieces, given, strict=True):
            begin = clock()
            result = self._compute(compute, content)
            step.rows.append((compute, begin, clock()))
            if written is not None:
                self._values[written] = result
        if step.watch is not None:
            step.watch()

    def _whole(self, pieces: Sequence[tuple[Compute, Any, Any]], work: Callable[[], None]) -> None:
        """A computation whose stage's parameters may still be on their way."""
        for compute, _, _ in pieces:
            cast("Shared", self._shared).wait(compute.stage)
        work()

    def _compute(self, compute: Compute, given: Any) -> Content | None:
        """Do it; returns what goes to another stage."""
        m, step = compute.microbatch, self._step
        if compute.op in HEAD_OPS:
            return self._compute_head(compute, given)
        stage = self._stages[compute.stage]
        match compute.op:
            case Op.FORWARD:
                return stage.forward(m, given, step.microbatches[m], step.weight, step.number)
            case Op.BACKWARD:
                return stage.backward(m, given)
            case Op.BACKWARD_INPUT:
                return stage.backward_input(m, given)
            case Op.BACKWARD_WEIGHT:
                stage.backward_weight(m)
            case Op.RECOMPUTE:
                stage.recompute(m)
        return None

    def _compute_head(self, compute: Compute, given: Any) -> None:
        head, m, step = _present(self._head), compute.microbatch, self._step
        if compute.op is Op.SCORES:
            head.scores(m, given, step.microbatches[m], step.weight)
        else:
            head.gradient(m, given)

    def _send(self, value: Value, targets: Sequence[int], last: bool) -> None:
        content = self._get(value, last)
        for target in targets:
            self._transport.send(value, target, content)

    def _receive(self, value: Value, source: int) -> None:
        self._transport.post(value, source)
        self._coming[value] = partial(self._transport.wait, value)

    def _join(self, position: int, join: Join) -> Callable[[], None]:
        hidden = Value(Kind.OUTPUT, join.stage - 1, join.microbatch)
        match join.what:
            case Together.SHARE:
                last = self._is_last(hidden, position)
                return partial(self._send, hidden, self._others, last)
            case Together.TAKE:
                return partial(self._receive, hidden, self._layout.placement[-1])
            case Together.SUM_S | Together.SUM_T:
                read = [v for v in self._layout.writes(join) if v in self._last_reads]
                return partial(self._sum, join, read)

    def _sum(self, join: Join, read: Sequence[Value]) -> None:
        """Begin a sum; only those parts of the result are kept that this device reads."""
        head = _present(self._head)
        begin = head.sum_scores if join.what is Together.SUM_S else head.sum_gradients
        waits = begin(join.microbatch)
        for value in read:
            self._coming[value] = waits[value.kind]

    def _finish(self, position: int) -> None:
        self._progress.waits()
        self._transport.finish()
        if self._head is not None:
            self._head.finish()
        self._clock.drain()  # here a GPU stands still for the others, not in the update
        self._progress.at(position)
        self._step.step()


def _nothing() -> None:
    pass


def _present(head: ShardedHead | None) -> ShardedHead:
    """The head of a program that has one."""
    if head is None:
        raise PlanError("the program has a sharded head, but none was built for it")
    return head


def _last_reads(program: Program, device: int) -> dict[Value, int]:
    """The position at which each value that passes through the loop is read for the last time."""
    layout = program.layout
    return {
        value: position
        for position, instruction in enumerate(program.devices[device])
        for value in layout.reads(instruction)
        if value.kind in _HANDED
    }


def links_of(program: Program) -> set[tuple[int, int]]:
    """From which device to which values pass."""
    found = set()
    for device, row in enumerate(program.devices):
        for instruction in row:
            match instruction:
                case Receive(_, source):
                    found.add((source, device))
                case Join(Together.TAKE):
                    found.add((program.layout.placement[-1], device))
    return found


def describe(program: Program, device: int, position: int) -> str:
    """An instruction with its place, as failures name it."""
    instruction: Instruction = program.devices[device][position]
    match instruction:
        case Compute(_, stage, m) | Overlap(Compute(_, stage, m)) | Join(_, stage, m):
            place = f"stage {stage}, micro-batch {m}, "
        case Copy(_, stage, m) | Send(Value(_, stage, m)) | Receive(Value(_, stage, m)):
            place = f"stage {stage}, micro-batch {m}, "
        case _:
            place = ""
    return f"{place}instruction {position + 1} of {len(program.devices[device])}: {instruction}"
