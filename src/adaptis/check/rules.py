"""The rules of `Layout` in integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import Compute, Copy, Join, Kind, Overlap, Shard, Value

if TYPE_CHECKING:
    from adaptis.program import Instruction, Layout

Numbers = tuple[int, ...]


class Rules:
    """`Layout.reads`, `writes` and `takes` as integers, which cost a tenth of a `Value`.

    They are the same for all micro-batches that have the same slices next to them, but for the
    micro-batch itself. So they are asked for once, and shifted. Whole parameters are of no
    micro-batch and stand apart.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._count = layout.num_microbatches
        self._codes = {kind: code for code, kind in enumerate(Kind)}
        self._near = [
            (before - m if before >= 0 else 0, after - m if after >= 0 else 0)
            for m, (before, after) in enumerate(zip(layout.previous, layout.following, strict=True))
        ]
        self._known: dict[tuple[object, ...], tuple[Numbers, Numbers, Numbers, Numbers]] = {}

    def number(self, value: Value) -> int:
        """A value as an integer."""
        place = self._codes[value.kind] * (self._layout.num_stages + 1) + value.stage
        return place * self._count + value.microbatch

    def value(self, number: int) -> Value:
        """The inverse of `number`."""
        place, microbatch = divmod(number, self._count)
        code, stage = divmod(place, self._layout.num_stages + 1)
        return Value([*Kind][code], stage, microbatch)

    def of(
        self, instruction: Compute | Overlap | Join | Copy | Shard
    ) -> tuple[Numbers, Numbers, Numbers, Numbers, int]:
        """Reads, writes, takes, whole parameters, and what to add to the first three."""
        if isinstance(instruction, Overlap):
            return self._fused(instruction)
        m = 0 if isinstance(instruction, Shard) else instruction.microbatch
        if isinstance(instruction, Compute):
            word = instruction.op
        else:
            word = instruction.way if isinstance(instruction, Copy) else instruction.what
        key = (word, instruction.stage, self._near[m] if self._near else 0)
        rule = self._known.get(key)
        if rule is None:
            rule = self._known[key] = self._ask(instruction, m)
        return *rule, m

    def _fused(self, pair: Overlap) -> tuple[Numbers, Numbers, Numbers, Numbers, int]:
        columns: list[list[int]] = [[], [], [], []]
        for compute in (pair.first, pair.second):
            *shifted, whole, m = self.of(compute)
            for column, numbers in zip(columns, shifted, strict=False):
                column += [base + m for base in numbers]
            columns[3] += whole
        reads, writes, takes, whole = map(tuple, columns)
        return reads, writes, takes, whole, 0

    def _ask(
        self, instruction: Instruction, microbatch: int
    ) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        layout, whole = self._layout, ()
        reads = tuple(layout.reads(instruction))
        if isinstance(instruction, Compute):
            whole = tuple(self.number(v) for v in reads if v.kind is Kind.PARAMETERS)
            reads = tuple(value for value in reads if value.kind is not Kind.PARAMETERS)
        needs, leaves, takes = (
            tuple(self.number(value) - microbatch for value in values)
            for values in (reads, layout.writes(instruction), layout.takes(instruction))
        )
        return needs, leaves, takes, whole
