"""The loss of a model that is cut, without gradients: the forward instructions of its program.

They keep the order that they have in the program. A program that is checked can run one instruction
after the other in some order; forwards need nothing but forwards, so what is left of that order
without the rest can run as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adaptis.execute.executor import Executor, describe
from adaptis.execute.offload import HostMemory
from adaptis.execute.transport import WireTransport
from adaptis.execute.wire import wire_of
from adaptis.program import Compute, Join, Kind, Op, Overlap, Program, Receive, Send, Step, Together
from adaptis.program import parts as parts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from adaptis.execute.head import ShardedHead
    from adaptis.execute.world import World
    from adaptis.measure.compute import StageCompute
    from adaptis.measure.stage import Microbatch
    from adaptis.program import Instruction

KEYS = 1 << 20  # between the number of a program and that of its forwards, for whoever watches
_JOINS = (Together.SHARE, Together.TAKE, Together.SUM_S)


class _Forwards:
    """A stage whose F keeps nothing; the last one's adds to `losses`."""

    def __init__(self, stage: StageCompute, last: bool, losses: dict[int, Tensor]) -> None:
        self._stage, self._last, self._losses = stage, last, losses

    def forward(self, m: int, inputs: Any, microbatch: Microbatch, weight: float, _: int) -> Any:
        result = self._stage.evaluate(inputs, microbatch, m)
        if not self._last:
            return result
        self._losses[m] = result * weight
        return None


class Evaluation:
    """One device's part in evaluating."""

    def __init__(
        self,
        world: World,
        program: Program,
        stages: dict[int, StageCompute],
        head: ShardedHead | None,
        key: int,
    ) -> None:
        """Take the forwards out of `program`; every rank calls this.

        Args:
            world: the ranks.
            program: that is checked.
            stages: of this rank.
            head: this rank's part of it, where it is sharded.
            key: of the program.
        """
        self._world, self._head, self._key = world, head, key + KEYS
        self._losses: dict[int, Tensor] = {}
        forwards, device = forwards_of(program), world.rank
        row = forwards.devices[device]
        world.tell("program", self._key, [describe(forwards, device, i) for i in range(len(row))])
        layout = program.layout
        own: dict[int, Any] = {
            s: _Forwards(stage, layout.is_last(s) and not layout.reductions, self._losses)
            for s, stage in stages.items()
        }
        self._transport = WireTransport(
            program.num_stages, program.num_microbatches, wire_of(world), world.device
        )
        self._executor = Executor(
            forwards, device, own, self._transport, world.progress, host=HostMemory(), head=head
        )

    def run(
        self, batch: Sequence[Microbatch], weight: float, step: int, signatures: Sequence[object]
    ) -> float:
        """The loss of `batch`, the same on every rank.

        Args:
            batch: as many micro-batches as the program has.
            weight: multiplies each summed loss: 1 / (tokens of the whole batch).
            step: after how many steps, for whoever watches.
            signatures: of the micro-batches; equal ones mean equal shapes on the way.
        """
        losses = self._losses
        if self._head is not None:
            self._head.training, losses = False, self._head.losses
        self._transport.begin(signatures)
        self._world.progress.begin(self._key, step)
        try:
            self._executor.run(batch, weight, step, lambda: None)
        finally:
            if self._head is not None:
                self._head.training = True
        self._world.progress.leave()
        total = sum(float(losses[m]) for m in sorted(losses))
        losses.clear()
        return self._world.sum(total)


def forwards_of(program: Program) -> Program:
    """What a program does up to the loss, and the wait for all messages at the end."""
    rows = tuple(
        tuple(kept for instruction in row for kept in _forward_part(instruction))
        for row in program.devices
    )
    return replace(program, devices=rows)


def _forward_part(instruction: Instruction) -> Sequence[Instruction]:
    match instruction:
        case Compute() | Overlap():
            pieces = parts_of(instruction)
            return [c for c in pieces if c.op in (Op.FORWARD, Op.SCORES)]
        case Send(value) | Receive(value):
            return [instruction] if value.kind is Kind.OUTPUT else []
        case Join():
            return [instruction] if instruction.what in _JOINS else []
        case Step():
            return [instruction]
    return []
