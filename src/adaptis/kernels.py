"""The hot loops, over plain arrays, compiled once and cached.

Called by `simulate` and by the search, which lower the typed objects to arrays. Nothing here is
checked: callers pass arrays that describe a program, and a program that cannot finish is reported
by the count of what ran.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = 20_000  # rows that plain Python replays sooner than compiled code is loaded


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as machine code; the cache beside the module makes the second start fast."""
    import numba

    return numba.njit(cache=True, nogil=True)(function)


def quickest(function: Callable[..., Any], num_rows: int) -> Callable[..., Any]:
    """`function` itself for a few rows in a process that has compiled nothing yet.

    Loading what runs compiled code takes a second, replaying a small plan in Python none.
    """
    plain = num_rows <= SMALL and "numba" not in sys.modules
    return function if plain else compiled(function)


TAKE, SECONDS, GIVE, DELAY = range(4)  # the columns of what a row costs
START, END, THERE = range(3)  # the columns of when it ran


def replay(
    offsets: Any,  # (L + 1,) rows of lane k: offsets[k] to offsets[k + 1]
    need_offsets: Any,  # (N + 1,) row i needs needs[need_offsets[i] : need_offsets[i + 1]]
    needs: Any,  # rows of other lanes
    # (N, 4) seconds that row i spends before it starts, to take what it needs; how long it lasts;
    # what its lane spends afterwards, to hand over what it wrote; how much later others see it
    costs: Any,
    times: Any,  # (N, 3) out: when row i starts, ends, and others see it
) -> int:
    """Run each lane's rows in order, as early as possible; returns how many rows could run.

    A lane goes on until it waits for a row of another lane, and is taken up again when that row
    is done: each row is looked at once or twice, so the cost is linear. Costs and times of a row
    lie side by side: hundreds of lanes advance in turn, and each touches few pages this way.
    """
    num_lanes, n = len(offsets) - 1, len(costs)
    times[:, THERE] = np.inf  # not yet
    clock = np.zeros(num_lanes)
    position = offsets[:-1].copy()
    waiter = np.full(n, -1, np.int32)  # the last lane that waits for row i
    neighbour = np.full(num_lanes, -1, np.int32)  # the lane that waits for the same row
    stack = np.arange(num_lanes)[::-1].copy()
    depth = num_lanes
    count = 0
    while depth > 0:
        depth -= 1
        lane = stack[depth]
        i, stop, now = position[lane], offsets[lane + 1], clock[lane]
        while i < stop:
            begin, missing = now, -1
            for k in range(need_offsets[i], need_offsets[i + 1]):
                there = times[needs[k], THERE]
                if there == np.inf:
                    missing = needs[k]
                    break
                begin = max(begin, there)
            if missing >= 0:
                neighbour[lane] = waiter[missing]
                waiter[missing] = lane
                break
            begin += costs[i, TAKE]
            end = begin + costs[i, SECONDS]
            now = end + costs[i, GIVE]
            times[i, START], times[i, END], times[i, THERE] = begin, end, now + costs[i, DELAY]
            other = waiter[i]
            while other >= 0:
                stack[depth] = other
                depth += 1
                other = neighbour[other]
            i += 1
            count += 1
        position[lane], clock[lane] = i, now
    return count


def peaks(
    offsets: Any,  # (D + 1,) rows of device d: offsets[d] to offsets[d + 1]
    taken: Any,  # (n,) bytes from the start of row i
    freed: Any,  # (n,) bytes given back at its end
    static: Any,  # (D,) bytes throughout
) -> Any:
    """(D,) the most bytes that each device holds at once."""
    result = static.copy()
    for d in range(len(offsets) - 1):
        held = static[d]
        for i in range(offsets[d], offsets[d + 1]):
            held += taken[i]
            result[d] = max(result[d], held)
            held -= freed[i]
    return result
