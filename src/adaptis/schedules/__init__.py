"""Schedules: generators of computations, one small function each, with its drawing and its paper.

A schedule knows nothing of transfers, torch or time: it yields what one rank computes, in order.
`SCHEDULES` is the table that the command line, the planner, the tests and the docs loop over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adaptis.errors import PlanError
from adaptis.program import Compute
from adaptis.schedules.gpipe import gpipe
from adaptis.schedules.interleaved import interleaved
from adaptis.schedules.one_f_one_b import one_f_one_b
from adaptis.schedules.zero_bubble import zb_h1

Generator = Callable[[int, int, int, int], Iterator[Compute]]  # rank, ranks, micro-batches, chunks


@dataclass(frozen=True, slots=True)
class Schedule:
    """One named order, and when it applies."""

    name: str
    generate: Generator
    paper: str
    chunked: bool = False  # several stages per rank, looped: stage s on rank s mod p
    whole_groups: bool = False  # micro-batches must be a multiple of the ranks

    def orders(
        self, num_ranks: int, num_microbatches: int, num_chunks: int = 1
    ) -> tuple[tuple[Compute, ...], ...]:
        """The computations of each rank.

        Raises:
            PlanError: the schedule does not exist for these numbers.
        """
        if num_chunks != 1 and not self.chunked:
            raise PlanError(f"{self.name} holds one stage per device, {num_chunks} were asked for")
        if self.whole_groups and num_chunks > 1 and num_microbatches % num_ranks:
            raise PlanError(
                f"{self.name} needs a multiple of {num_ranks} micro-batches on {num_ranks} "
                f"devices, "
                f"found {num_microbatches}"
            )
        return tuple(
            tuple(self.generate(rank, num_ranks, num_microbatches, num_chunks))
            for rank in range(num_ranks)
        )


SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule("gpipe", gpipe, "Huang et al., GPipe, NeurIPS 2019"),
        Schedule("1f1b", one_f_one_b, "Narayanan et al., PipeDream, SOSP 2019"),
        Schedule(
            "interleaved",
            interleaved,
            "Narayanan et al., Megatron-LM, SC 2021",
            chunked=True,
            whole_groups=True,
        ),
        Schedule("zb-h1", zb_h1, "Qi et al., Zero Bubble, ICLR 2024"),
    )
}
