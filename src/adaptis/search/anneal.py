"""Simulated annealing over partition, placement and rule, one piece of a run at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptis.kernels import compiled
from adaptis.search.greedy import IMPOSSIBLE, MISSING, WORKED, assess, evaluate
from adaptis.search.instance import price
from adaptis.search.moves import burdens, move_layers, mutate
from adaptis.search.room import is_limited, least_bytes, missing

STAGE_COST = 0.001  # what one more stage per device must gain, a share of the busiest device's work


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


@compiled
def even_out(instance: Any, start: Any, seed: int, trials: int, most_stages: int) -> Any:
    """`start` with its layers dealt out more evenly; annealed on sums, without simulating."""
    np.random.seed(seed)
    current, best = start, start
    state = np.zeros((len(instance.slowness), 5))
    cost = least = _unfairness(instance, start, state)
    for trial in range(trials):
        heat = cost * 0.05 * 0.01 ** (trial / trials)
        candidate = move_layers(current, state, most_stages)
        other = np.zeros_like(state)
        step = _unfairness(instance, candidate, other)
        if step <= cost - heat * np.log(1 - np.random.random()):
            current, cost, state = candidate, step, other
            if cost < least:
                best, least = current, cost
    return best


@compiled
def _unfairness(instance: Any, candidate: Any, state: Any) -> float:
    """The seconds of the busiest device, dearer with every stage; fills column WORKED."""
    state[:, WORKED] = burdens(instance, candidate)
    load = state[:, WORKED].max() * (1 + STAGE_COST * len(candidate.stop) / len(state))
    if not is_limited(instance):
        return load
    tables = price(instance, candidate.stop, candidate.device)
    needed = least_bytes(instance.heaviest, candidate.split, candidate.again, tables)
    return load * (1 + 10 * missing(instance.memory, needed))
