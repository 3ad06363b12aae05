"""Each computation exactly once, and on the device of its stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.check.places import there_are, where
from adaptis.errors import ProgramError
from adaptis.program import Compute, Op, Overlap, Step, parts

if TYPE_CHECKING:
    from adaptis.check.places import Position
    from adaptis.program import Layout, Program

_BIT = {op: 1 << number for number, op in enumerate(Op)}
_FULL = _BIT[Op.FORWARD] | _BIT[Op.BACKWARD]
_HALVES = _BIT[Op.FORWARD] | _BIT[Op.BACKWARD_INPUT] | _BIT[Op.BACKWARD_WEIGHT]
_HEAD = _BIT[Op.SCORES] | _BIT[Op.SCORES_GRADIENT]


class _Ledger:
    """What was computed: a bit for each operation of each stage and micro-batch."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.device = 0
        self.home = [*layout.placement, *[0] * bool(layout.reductions)]  # of each stage
        self.done = [bytearray(layout.num_microbatches) for _ in self.home]

    def enter(self, device: int) -> None:
        """The computations of `device` follow; all devices are at home in a sharded head."""
        self.device = device
        if self.layout.reductions:
            self.home[-1] = device
            self.done[-1] = bytearray(self.layout.num_microbatches)

    def mark(self, compute: Compute) -> str:
        """Note a computation; what is wrong with it, if anything is."""
        stage, m, bit = compute.stage, compute.microbatch, _BIT[compute.op]
        layout = self.layout
        if not (0 <= stage < len(self.home) and 0 <= m < layout.num_microbatches):
            return there_are(layout)
        if self.home[stage] != self.device:
            return f"stage {stage} is on device {self.home[stage]}"
        if (bit & _HEAD > 0) != (stage == layout.num_stages):
            return "S and T are of a sharded head, all other operations of the stages before it"
        if layout.copies > 1 and stage not in layout.stages_of(m):
            through = layout.stages_of(m)
            return f"micro-batch {m} goes through stages {through[0]} to {through[-1]} only"
        if self.done[stage][m] & bit:
            return "was computed before"
        self.done[stage][m] |= bit
        return ""

    def close(self) -> None:
        """The computations of a device have ended: nothing of a sharded head may be missing."""
        if not self.layout.reductions:
            return
        for m, bits in enumerate(self.done[-1]):
            if bits != _HEAD:
                missing = Op.SCORES_GRADIENT if bits else Op.SCORES
                raise ProgramError(
                    f"device {self.device}: {Compute(missing, self.layout.num_stages, m)} is "
                    f"missing; every device computes its columns of the head"
                )


def once(program: Program) -> None:
    """Prove that each computation is there once, and that a step ends each device's program."""
    ledger = _Ledger(program.layout)
    for device, row in enumerate(program.devices):
        ledger.enter(device)
        for index, instruction in enumerate(row):
            if isinstance(instruction, Compute):
                fault = ledger.mark(instruction)
            elif isinstance(instruction, Overlap):
                fault = ledger.mark(instruction.first) or ledger.mark(instruction.second)
            elif isinstance(instruction, Step) and index != len(row) - 1:
                fault = "only the last instruction can be STEP"
            else:
                continue
            if fault == "was computed before":
                first = where(program, _first(program, (device, index)))
                fault += f", at {first}; each computation runs once"
            if fault:
                raise ProgramError(f"{where(program, (device, index))}: {fault}")
        ledger.close()
    for stage in range(program.num_stages):
        _complete(program.layout, stage, ledger.done[stage])


def _first(program: Program, position: Position) -> Position:
    """Where a computation of the instruction at `position` stood before; there, if in itself."""
    again = set(parts(program.devices[position[0]][position[1]]))
    row = program.devices[position[0]][: position[1]]
    return next(
        ((position[0], index) for index, other in enumerate(row) if again & set(parts(other))),
        position,
    )


def _complete(layout: Layout, stage: int, done: bytearray) -> None:
    """Nothing is missing of `stage`: F, then B or both I and W, and R where it is recomputed."""
    again = _BIT[Op.RECOMPUTE] if stage in layout.recomputed else 0
    copy = stage // layout.length
    if set(done[copy :: layout.copies]) <= {_FULL | again, _HALVES | again}:
        return
    for m in range(copy, layout.num_microbatches, layout.copies):
        forward, fused, half, weight, recomputed = (
            bool(done[m] & _BIT[op])
            for op in (
                Op.FORWARD,
                Op.BACKWARD,
                Op.BACKWARD_INPUT,
                Op.BACKWARD_WEIGHT,
                Op.RECOMPUTE,
            )
        )
        what = f"stage {stage}, micro-batch {m}"
        if not forward:
            raise ProgramError(f"{what}: {stage}F{m} is missing")
        if fused and (half or weight):
            raise ProgramError(f"{what}: has B and also I or W; either B, or I and W")
        if not fused and not (half and weight):
            missing = "I" if weight else "W" if half else "B"
            raise ProgramError(f"{what}: {stage}{missing}{m} is missing")
        if recomputed != bool(again):
            extra = "has an R though the stage keeps its activations"
            raise ProgramError(f"{what}: {extra if recomputed else 'R is missing'}")
