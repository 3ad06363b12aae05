"""Simulated annealing over partition, placement and rule, one piece of a run at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptis.kernels import compiled
from adaptis.search.greedy import IMPOSSIBLE, MISSING, assess, evaluate
from adaptis.search.moves import mutate


@compiled
def anneal(
    instance: Any,
    current: Any,
    best: Any,
    seed: int,
    first: int,
    stop: int,
    total: int,
    hot: float,
    cold: float,
    most_stages: int,
) -> Any:
    """Trials `first` to `stop` of a run of `total`: where it stands, the best so far, and its cost.

    The temperature falls from `hot` to `cold`, shares of the cost, in geometric steps. Where
    nothing fits yet, it is a share of the devices' memory, and what misses less is taken.
    """
    np.random.seed(seed)
    cost, state = assess(instance, current, np.inf)
    least = evaluate(instance, best)
    for trial in range(first, stop):
        heat = (cold / hot) ** (trial / total)
        heat *= cost * hot if cost < IMPOSSIBLE else IMPOSSIBLE * MISSING
        candidate = mutate(instance, current, state, cost, most_stages)
        # Drawn first, so that what is refused need not be simulated to its end, often not at all.
        most = cost - heat * np.log(1 - np.random.random())
        step, fared = assess(instance, candidate, most)
        if step <= most:
            current, cost, state = candidate, step, fared
            if cost < least:
                best, least = current, cost
    return current, best, least
