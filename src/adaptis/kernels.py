"""The hot loops, over plain arrays, compiled once and cached.

Called by `simulate` and by the search, which lower the typed objects to arrays. Nothing here is
checked: callers pass arrays that describe a program, and a program that cannot finish is reported
by the count of what ran.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as machine code; the cache beside the module makes the second start fast."""
    return numba.njit(cache=True, nogil=True)(function)


@compiled
def replay(
    offsets: Any,  # (D + 1,) rows of device d: offsets[d] to offsets[d + 1]
    needs: Any,  # (n,) the row that writes what row i reads from another stage, or -1
    reader: Any,  # (n,) the row on another device that reads what row i writes, or -1
    seconds: Any,  # (n,) how long row i computes
    busy: Any,  # (n,) how long the link carries what row i writes
    latency: Any,  # (n,) and how much later it arrives
    send: float,
    receive: float,
    start: Any,  # (n,) out
    end: Any,  # (n,) out
    arrival: Any,  # (n,) out: when the value of row i has arrived, 0 where it does not travel
) -> int:
    """Run each device's rows in order, as early as possible; returns how many rows could run.

    A device goes on until it waits for a row of another device, and is taken up again when that
    row is done: each row is looked at twice at most, so the cost is linear.
    """
    num_devices = len(offsets) - 1
    n = len(needs)
    device = np.empty(n, np.int32)
    for d in range(num_devices):
        device[offsets[d] : offsets[d + 1]] = d
    done = np.zeros(n, np.bool_)
    clock = np.zeros(num_devices)
    link = np.zeros((num_devices, num_devices))
    position = offsets[:-1].copy()
    stack = np.arange(num_devices)[::-1].copy()
    depth = num_devices
    waiting = np.zeros(num_devices, np.bool_)
    count = 0
    while depth > 0:
        depth -= 1
        d = stack[depth]
        waiting[d] = False
        while position[d] < offsets[d + 1]:
            i = position[d]
            begin = clock[d]
            j = needs[i]
            if j >= 0:
                if not done[j]:
                    waiting[d] = True
                    break
                if device[j] != d:
                    begin = max(begin, arrival[j]) + receive
            start[i] = begin
            finish = begin + seconds[i]
            end[i] = finish
            done[i] = True
            count += 1
            position[d] = i + 1
            clock[d] = finish
            k = reader[i]
            if k >= 0:
                e = device[k]
                clock[d] = finish + send
                # One transfer at a time on a directed link.
                onto = max(clock[d], link[d, e])
                link[d, e] = onto + busy[i]
                arrival[i] = link[d, e] + latency[i]
                if waiting[e] and position[e] == k:
                    waiting[e] = False
                    stack[depth] = e
                    depth += 1
    return count
