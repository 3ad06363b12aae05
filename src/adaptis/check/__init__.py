"""`check(program)` proves a program, or says exactly what is wrong with it.

Always on before a simulation or a run. Proven: each computation exactly once and on the device of
its stage, every value written once and before it is read, sends and receives matched in order on
each link, what devices do together in the same order on all of them, gradients summed once and
after the last of them, and no deadlock. A program has no wildcards, so its moves commute and one
run of it decides for every interleaving. Three semantics of a transfer:

    posted      ours: neither end blocks; a reader waits for its value
    buffered    a receive blocks until its value was sent
    rendezvous  both ends block until the other is there, as in a plain blocking runtime

Under all three, who reads a sum waits until all devices have joined in it, who reads what is handed
out to all for its SHARE; joins,
copies and what happens to parameters never block by themselves. The steps wait for all else but
nothing waits for a step, so they need not be walked. The bytes are known to `simulate` only:
`check_memory` holds its peaks against what the devices have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptis.check.agreement import matched, reduced_last, together
from adaptis.check.deadlock import no_deadlock
from adaptis.check.once import once
from adaptis.check.values import Semantics, Walk
from adaptis.errors import InfeasibleError, ProgramError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.program import Program

__all__ = ["Proof", "Semantics", "check", "check_memory"]


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
    _layout_makes_sense(program)
    once(program)
    walk = Walk(program, semantics)
    for device in range(len(program.devices)):
        walk.through(device)
    num_transfers = matched(program, walk.links)
    together(program, walk.joins)
    if program.layout.reduced:
        reduced_last(program)
    no_deadlock(program, walk.events)
    return Proof(sum(map(len, program.devices)), num_transfers)


def check_memory(peak_bytes: Sequence[float], limit_bytes: Sequence[float]) -> None:
    """Prove that no device needs more memory than it has.

    Raises:
        InfeasibleError: with the device that misses most, and what it misses.
    """
    pairs = zip(peak_bytes, limit_bytes, strict=True)
    missing, device = max((peak - limit, d) for d, (peak, limit) in enumerate(pairs))
    if missing > 0:
        raise InfeasibleError(
            f"device {device} would need {peak_bytes[device] / 2**30:.3f} GiB at its peak, "
            f"{missing / 2**30:.3f} GiB ({missing:.0f} bytes) more than it has; plan with "
            f"--memory-gib",
            device,
            int(missing),
        )


def _layout_makes_sense(program: Program) -> None:
    """The numbers that all else relies on."""
    layout, stages = program.layout, range(program.num_stages)
    num_devices, count = len(program.devices), layout.num_microbatches
    before = [m for m in layout.previous if m != -1]
    for holds, sentence in (
        (count >= 1 and stages, "at least one stage and one micro-batch are needed"),
        (
            all(0 <= device < num_devices for device in layout.placement),
            f"a stage is on a device beyond the {num_devices} that there are",
        ),
        (
            layout.copies >= 1 and len(stages) % max(layout.copies, 1) == 0,
            f"{len(stages)} stages are not {layout.copies} copies of one model",
        ),
        (
            layout.recomputed <= {*stages} and layout.sharded <= {*stages},
            f"a recomputed or sharded stage is beyond the {len(stages)} that there are",
        ),
        (
            layout.reductions in (0, 1, 2) and (not layout.reductions or layout.copies == 1),
            "a sharded head has 1 or 2 reductions, and there is one copy of the model",
        ),
        (
            len(layout.previous) in (0, count)
            and all(-1 <= other < m for m, other in enumerate(layout.previous))
            and len(set(before)) == len(before),
            "each slice continues an earlier micro-batch that no other continues",
        ),
    ):
        if not holds:
            raise ProgramError(f"the program's layout: {sentence}")
