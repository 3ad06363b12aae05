"""What devices hold: at least, whatever their order, and at most, in a given one.

Bytes depend on each device's order alone, not on time, so one walk over the rows counts what
`adaptis.simulate` would: activations, and every received value from the computation before which
its receive is posted (`adaptis.lower`) to the end of its reader.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptis.kernels import compiled
from adaptis.lower import LOOKAHEAD


@compiled
def is_limited(instance: Any) -> bool:
    """Whether any device's memory is."""
    return np.min(instance.memory) < np.inf


@compiled
def least_bytes(most: float, split: Any, again: Any, tables: Any) -> Any:
    """(D,) bytes to hold the layers and one micro-batch of weight `most` in every stage.

    Besides, while a computation runs there is the value that it has received.
    """
    held, peak = tables.static.copy(), tables.static.copy()
    for s in range(len(tables.device)):
        d, anew = tables.device[s], s < len(again) and again[s]
        if anew:
            held[d] += tables.input[s] * most
        else:
            kept = tables.kept[s] if s < len(split) and split[s] else 0.0
            held[d] += max(tables.saved[s], kept) * most
        back = tables.received[1, s] + (tables.saved[s] if anew else 0.0)
        front = tables.received[0, s] if s < len(split) else 0.0  # a head's part keeps its input
        peak[d] = max(peak[d], held[d] + max(front, back) * most)
    return peak


@compiled
def reserved(tables: Any, reserve: float, most: float) -> Any:
    """(D,) bytes of `reserve` values as large as any that the device receives."""
    result = np.zeros(len(tables.static))
    for s in range(len(tables.device)):
        value = max(tables.received[0, s], tables.received[1, s])
        result[tables.device[s]] = max(result[tables.device[s]], value * reserve * most)
    return result


@compiled
def missing(memory: Any, needed: Any) -> float:
    """What devices miss, as a share of their memory."""
    share = 0.0
    for d in range(len(memory)):
        if needed[d] > memory[d]:
            share += (needed[d] - memory[d]) / max(memory[d], 1.0)
    return share


@compiled
def peak_bytes(weights: Any, split: Any, again: Any, orders: Any, tables: Any) -> Any:
    """(D,) the most that each device holds; `orders` has offsets, kind and stage."""
    offsets, kind, stage = orders
    taken = _posted(weights, again, orders, tables)
    peak, counts, real = (
        tables.static.copy(),
        np.zeros((len(tables.device), 3), np.int64),
        len(split),
    )
    for d in range(len(peak)):
        held = tables.static[d]
        for i in range(offsets[d], offsets[d + 1]):
            k, s = kind[i], stage[i]
            w = weights[counts[s, k]]
            counts[s, k] += 1
            anew, halved = s < real and again[s], s < real and split[s]
            saved, kept = tables.saved[s], tables.kept[s] if halved else 0.0
            # What W needs is a part of what was saved, and I leaves it; what goes beyond is new.
            part = min(saved, kept)
            if k == 0:
                own = tables.received[0, s]
                take = tables.input[s] if anew else saved
                give = own
                if s >= real:  # its input is a part of what it saves
                    take, give = take - own, 0.0
            elif k == 1:
                take = (saved if anew else 0.0) + kept - part
                give = saved - part + tables.received[1, s] + (tables.input[s] if anew else 0.0)
            else:
                take, give = 0.0, kept
            held += taken[i] + take * w
            peak[d] = max(peak[d], held)
            held -= give * w
    return peak


@compiled
def _posted(weights: Any, again: Any, orders: Any, tables: Any) -> Any:
    """(n,) bytes of the values whose receives are posted before row i, as `adaptis.lower` does."""
    offsets, kind, stage = orders
    count, real, m = len(tables.device), len(again), len(weights)
    taken, left = np.zeros(offsets[-1]), np.full((count, 2), m)
    at, row_of, begins = _positions(m, again, orders, count)
    for d in range(len(offsets) - 1):
        # None is posted later than one that follows it on the link.
        latest = begins[1:] - begins[:-1] - 1
        for i in range(offsets[d + 1] - 1, offsets[d] - 1, -1):
            k, s = kind[i], stage[i]
            if k == 2:
                continue
            left[s, k] -= 1
            n = left[s, k]
            first, stop = s + 1 - 2 * k, s + 2 - 2 * k  # who reads it
            if k == 0 and s == real - 1:
                first, stop = real, count
            elif s >= real:
                stop = first
            for to in range(max(first, 0), stop):
                home, size = tables.device[to], tables.received[k, to]
                if home != d:
                    latest[home] = min(latest[home], max(at[to, k, n] - LOOKAHEAD, 0))
                    taken[row_of[begins[home] + latest[home]]] += size * weights[n]
    return taken


@compiled
def _positions(m: int, again: Any, orders: Any, count: int) -> Any:
    """Where the F and B of each stage and micro-batch stand among their device's computations.

    A recomputation is one of its own there, and the row of its backward here: so also the row of
    each position, and where each device's positions begin.
    """
    offsets, kind, stage = orders
    at, counts = np.zeros((count, 2, m), np.int32), np.zeros((count, 2), np.int64)
    row_of = np.empty(offsets[-1] + m * np.sum(again), np.int32)
    begins, position = np.zeros(len(offsets), np.int64), 0
    for d in range(len(offsets) - 1):
        begins[d] = position
        for i in range(offsets[d], offsets[d + 1]):
            k, s = kind[i], stage[i]
            row_of[position] = i
            if k == 1 and s < len(again) and again[s]:
                position += 1
                row_of[position] = i
            if k < 2:
                at[s, k, counts[s, k]] = position - begins[d]
                counts[s, k] += 1
            position += 1
    begins[-1] = position
    return at, row_of, begins
