"""Islands: endless runs of annealing and polishing, in pieces, two of them side by side.

A run starts anew or from the best so far, and runs grow longer. Between pieces the islands meet:
the best is shared. An island is a generator of machine code with the lock released, so that both
cores work, and what it does depends on the seed and the number of evaluations alone, never on time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adaptis.search.anneal import anneal
from adaptis.search.greedy import IMPOSSIBLE, RESERVE, Candidate, evaluate, lacks
from adaptis.search.instance import SCHEDULE, price
from adaptis.search.placement import DEALS, evened, most_stages
from adaptis.search.polish import Fixed, fix, polish

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.search.instance import Instance

ISLANDS = 2
ROWS_A_PIECE = 1_500_000  # computations simulated between two looks at the clock: 0.2 s
FIRST_RUN, LONGEST_RUN = 6_000, 60_000  # trials
ROWS_A_RUN = 6_000_000  # computations simulated in a first run: two seconds
BIG = 1_000  # stage-micro-batches from which on a start must be good: the first run is a warm one
# Temperatures at the beginning and the end of a run, shares of the step: anew in turns, or from
# the best so far. Many runs of moderate length beat one long one.
HEATS, WARM = ((0.006, 0.0003), (0.003, 0.0001)), (0.003, 0.0003)
DEALT = 2  # deals of each kind before a run begins
SQUEEZED = 500  # trials of a run while nothing fits: many shapes, each order squeezed
POLISH = (0.001, 0.00002)


@dataclass
class Incumbent:
    """The best so far, and what is shared between islands."""

    fixed: Fixed | None
    cost: float
    candidate: Candidate  # the best of the list scheduler, where warm runs begin
    candidate_cost: float


@dataclass(frozen=True, slots=True)
class Found:
    """What one piece of an island's work brought."""

    evaluations: int
    candidate: Candidate | None = None
    candidate_cost: float = math.inf
    fixed: Fixed | None = None
    cost: float = math.inf


def merge(best: Incumbent, found: Found) -> None:
    """Keep what is better."""
    if found.candidate is not None and found.candidate_cost < best.candidate_cost:
        best.candidate, best.candidate_cost = found.candidate, found.candidate_cost
    if found.fixed is not None and found.cost < min(best.cost, IMPOSSIBLE):
        best.fixed, best.cost = found.fixed, found.cost


def island(
    instance: Instance,
    best: Incumbent,
    pool: list[tuple[float, Candidate]],
    base_seed: int,
    number: int,
    named: tuple[Fixed, float] | None,
) -> Iterator[Found]:
    """Runs for ever, a piece of work each `next`; `best` changes only between rounds."""
    random = np.random.default_rng([base_seed, number])
    first = best.fixed if number == 0 else named[0] if named is not None else None
    if first is not None:
        yield from _polish_run(instance, first, _length(instance, first, 0), random)
    for run in range(1 << 30):
        length = _length(instance, best.candidate, run)
        if best.fixed is None:
            length = min(length, SQUEEZED)
        if run % 3 == (0 if instance.num_microbatches * len(best.candidate.stop) > BIG else 2):
            start, heat = best.candidate, WARM
        else:
            start, heat = pool[(2 * run + number) % min(len(pool), 12)][1], HEATS[run % 2]
            if (run + number) % 2 and instance.decide[:SCHEDULE].all():
                start = _best_deal(instance, start, random)
        candidate, cost = start, math.inf
        for found in _anneal_run(instance, start, length, heat, random):
            yield found
            if found.candidate is not None:
                candidate, cost = found.candidate, found.candidate_cost
        if best.fixed is None:
            # Room for what has been received depends on the order: squeeze that.
            candidate = candidate._replace(knobs=np.append(candidate.knobs[:RESERVE], 0.0))
            tables = price(instance, candidate.stop, candidate.device)
            promising = lacks(instance, candidate, tables) == 0
        else:
            promising = cost < min(IMPOSSIBLE, best.cost * 1.02)
        if promising:
            trials = SQUEEZED if best.fixed is None else length // 3
            yield from _polish_run(instance, fix(instance, candidate), trials, random)


def _best_deal(instance: Instance, start: Candidate, random: np.random.Generator) -> Candidate:
    """The fastest of several deals near `start`."""
    deals = [
        evened(instance, start, int(random.integers(1 << 31)), near, hot)
        for near, hot in DEALS
        for _ in range(DEALT)
    ]
    return min(deals, key=lambda candidate: float(evaluate(instance, candidate)))


def _length(instance: Instance, example: Candidate | Fixed, run: int) -> int:
    """Trials of a run: fewer of larger plans, so that there are several runs in any case."""
    affordable = (ROWS_A_RUN << (run // 2)) // _rows(instance, len(example.stop))
    return min(FIRST_RUN << (run // 2), LONGEST_RUN, max(affordable, 200))


def _rows(instance: Instance, num_stages: int) -> int:
    return 3 * num_stages * instance.num_microbatches


def _piece(instance: Instance, num_stages: int) -> int:
    """How many trials fit between two looks at the clock."""
    return max(ROWS_A_PIECE // _rows(instance, num_stages), 16)


def _anneal_run(
    instance: Instance,
    start: Candidate,
    length: int,
    heat: tuple[float, float],
    random: np.random.Generator,
) -> Iterator[Found]:
    current, best = start, start
    most, first = most_stages(instance), 0
    while first < length:
        stop = min(first + _piece(instance, len(current.stop)), length)
        seed = int(random.integers(1 << 31))
        current, best, least = anneal(
            instance, current, best, seed, first, stop, length, *heat, most
        )
        fixed = fix(instance, best) if least < IMPOSSIBLE else None
        yield Found(stop - first, best, least, fixed, least if fixed is not None else math.inf)
        first = stop


def _polish_run(
    instance: Instance, start: Fixed, length: int, random: np.random.Generator
) -> Iterator[Found]:
    current, best, first = start, start, 0
    while first < length:
        stop = min(first + _piece(instance, len(start.stop)), length)
        seed = int(random.integers(1 << 31))
        current, best, least = polish(instance, current, best, seed, first, stop, length, *POLISH)
        yield Found(stop - first, fixed=best, cost=least)
        first = stop
