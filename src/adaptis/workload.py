"""On which data: how many micro-batches a step has, and how they differ.

The profile prices one ordinary micro-batch; a micro-batch of weight 2 takes twice as long and
holds twice as much.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaptis.errors import InputError

MAX_MICROBATCHES = 1 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    """The micro-batches of one step, in order."""

    weights: tuple[float, ...]  # cost relative to the profile's micro-batch

    @property
    def num_microbatches(self) -> int:
        """How many micro-batches a step has."""
        return len(self.weights)


def even(num_microbatches: int) -> Workload:
    """Equal micro-batches.

    Raises:
        InputError: if there is not at least one.
    """
    if not 1 <= num_microbatches <= MAX_MICROBATCHES:
        raise InputError(
            f"{num_microbatches} micro-batches: a number from 1 to {MAX_MICROBATCHES} is needed"
        )
    return Workload((1.0,) * num_microbatches)
