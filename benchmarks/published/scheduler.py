"""The published list scheduler and a replay of explicit orders, compiled.

An idle device takes a ready computation: the types alternate (after F comes B if it can, after B
comes F), W fills gaps. Ties: F by micro-batch, then stage; B by the latest stage, then micro-batch;
W by micro-batch, then stage. Overlap-aware: what has come straight from another device, so that
nothing hid its transfer, runs only if nothing else can; not before the first B. F waits where its
activations would not leave room for one micro-batch of each stage of the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from adaptis.kernels import compiled

FULL = 0.8  # of its memory: a device that holds more runs W first


class Order(NamedTuple):
    """Rows offsets[d] to offsets[d + 1] are what device d does, in order."""

    offsets: Any  # (D + 1,)
    kind: Any  # (n,) 0 F, 1 B or I, 2 W
    stage: Any  # (n,)


class Times(NamedTuple):
    """When each row of an order runs, and the end of the step; inf: it cannot be."""

    start: Any  # (n,)
    end: Any  # (n,)
    step: float


@compiled
def list_schedule(
    m: int, device: Any, memory: Any, split: bool, defer: bool, exempt: Any, priced: Any
) -> Any:
    """The order of the rules above as columns (device, kind, stage); fewer rows: it got stuck.

    Micro-batches of `exempt[kind]` are never deferred.
    """
    seconds, wire, delay, saved, kept, static, _ = priced
    num_stages, num_devices = len(device), len(memory)
    arrived = np.full((num_stages, 2, m), np.inf)
    arrived[0, 0, :] = 0.0
    counts = np.zeros((num_stages, 3), np.int64)
    room = memory - static
    held, free = np.zeros(num_devices), np.zeros(num_devices)
    reserve = _reserve(device, num_devices, saved)
    link = np.zeros((num_devices, num_devices))
    # Each device's last two computations: kind, stage, micro-batch, start, end.
    recent = np.full((num_devices, 2, 5), -1.0)
    after = np.ones(num_devices, np.int64)  # the kind that is preferred: B at first
    begins = np.full(num_devices, np.inf)
    n = num_stages * m * (3 if split else 2)
    rows = np.empty((n, 3), np.int64)
    spent = (counts, arrived, held, room, reserve, saved)
    for d in range(num_devices):
        begins[d] = _first_ready(d, device, split, free[d], spent)
    first_backward = np.inf
    for row in range(n):
        d = int(np.argmin(begins))
        now = begins[d]
        if now == np.inf:
            return rows[:row]
        deferring = defer and now > first_backward
        tight = held[d] > FULL * room[d] and room[d] < np.inf
        k, s = _pick(d, device, split, now, spent, after[d], deferring, exempt, recent, tight)
        i = counts[s, k]
        counts[s, k] += 1
        end = now + seconds[s, k]
        rows[row, 0], rows[row, 1], rows[row, 2] = d, k, s
        recent[d, 0] = recent[d, 1]
        recent[d, 1, 0], recent[d, 1, 1], recent[d, 1, 2] = k, s, i
        recent[d, 1, 3], recent[d, 1, 4] = now, end
        free[d] = end
        held[d] += _bytes(k, s, split, saved, kept)
        if k < 2:
            after[d] = 1 - k
            first_backward = min(first_backward, now) if k == 1 else first_backward
            other = _hand_over(k, s, i, end, device, wire, delay, link, arrived)
            if other >= 0:
                begins[other] = _first_ready(other, device, split, free[other], spent)
        begins[d] = _first_ready(d, device, split, end, spent)
    return rows


@compiled
def _reserve(device: Any, num_devices: int, saved: Any) -> Any:
    """(S,) bytes that F of a stage must leave: a micro-batch of each later stage of its device."""
    later, reserve = np.zeros(num_devices), np.zeros(len(device))
    for s in range(len(device) - 1, -1, -1):
        reserve[s] = later[device[s]]
        later[device[s]] += saved[s]
    return reserve


@compiled
def _bytes(k: int, s: int, split: bool, saved: Any, kept: Any) -> float:
    """What a device holds more after computation k of stage s."""
    if k == 0:
        return saved[s]
    if k == 1:
        return (kept[s] if split else 0.0) - saved[s]
    return -kept[s]


@compiled
def _hand_over(
    k: int,
    s: int,
    i: int,
    end: float,
    device: Any,
    wire: Any,
    delay: Any,
    link: Any,
    arrived: Any,
) -> int:
    """Note when the result of F or B arrives; the device it travels to, -1: none."""
    to, side = (s + 1, 0) if k == 0 else (s - 1, 1)
    if k == 0 and to == len(device):
        to, side = s, 1
    if k == 2 or to < 0:
        return -1
    d, other = device[s], device[to]
    if other == d:
        arrived[to, side, i] = end
        return -1
    link[d, other] = max(end, link[d, other]) + wire[k, s]
    arrived[to, side, i] = link[d, other] + delay[k, s]
    return other


@compiled
def _first_ready(d: int, device: Any, split: bool, free: float, spent: Any) -> float:
    """When device d can begin something."""
    counts, arrived, held, room, reserve, saved = spent
    first = np.inf
    for s in range(len(device)):
        if device[s] != d:
            continue
        if split and counts[s, 2] < counts[s, 1]:
            return free
        for k in range(2):
            i = counts[s, k]
            if i == arrived.shape[2]:
                continue
            if k == 0 and held[d] + saved[s] + reserve[s] > room[d]:
                continue
            if k == 1 and i >= counts[s, 0]:
                continue
            first = min(first, max(free, arrived[s, k, i]))
    return first


@compiled
def _pick(
    d: int,
    device: Any,
    split: bool,
    now: float,
    spent: Any,
    preferred: int,
    deferring: bool,
    exempt: Any,
    recent: Any,
    tight: bool,
) -> Any:
    """The ready computation of device d that comes first."""
    counts, arrived, held, room, reserve, saved = spent
    num_stages, m = len(device), arrived.shape[2]
    least, kind, stage = 1 << 60, -1, -1
    for s in range(num_stages):
        if device[s] != d:
            continue
        for k in range(3 if split else 2):
            i = counts[s, k]
            if k == 2:
                if i >= counts[s, 1]:
                    continue
                rank = -1 if tight else 2
            else:
                if i == m or arrived[s, k, i] > now or (k == 1 and i >= counts[s, 0]):
                    continue
                if k == 0 and held[d] + saved[s] + reserve[s] > room[d]:
                    continue
                rank = 0 if k == preferred else 1
                if deferring and not exempt[k, i] and _fresh(d, device, s, k, i, now, recent):
                    rank += 4
            tie = (num_stages - 1 - s) * m + i if k == 1 else i * num_stages + s
            if rank * num_stages * m + tie < least:
                least, kind, stage = rank * num_stages * m + tie, k, s
    return kind, stage


@compiled
def _fresh(d: int, device: Any, s: int, k: int, i: int, now: float, recent: Any) -> bool:
    """Whether its input was the last that another device finished, too late to hide its way."""
    source = s - 1 if k == 0 else s + 1
    if source < 0 or source >= len(device) or device[source] == d:
        return False
    other = device[source]
    which = 1 if recent[other, 1, 4] <= now else 0
    last = recent[other, which]
    if last[0] != k or last[1] != source or last[2] != i:
        return False
    return last[4] > recent[d, 1, 3]


@compiled
def replay(m: int, device: Any, memory: Any, split: bool, order: Any, priced: Any) -> Any:
    """When each row runs, as early as the order of its device allows."""
    seconds, wire, delay, saved, kept, static, update = priced
    offsets, kinds, stages = order
    num_stages, num_devices, n = len(device), len(memory), len(kinds)
    arrived = np.full((num_stages, 2, m), np.inf)
    arrived[0, 0, :] = 0.0
    counts = np.zeros((num_stages, 3), np.int64)
    start, end = np.full(n, np.inf), np.full(n, np.inf)
    clock, held = np.zeros(num_devices), static.copy()
    link = np.zeros((num_devices, num_devices))
    position = offsets[:-1].copy()
    done, before = 0, -1
    while done > before:
        before = done
        for d in range(num_devices):
            while position[d] < offsets[d + 1]:
                row = position[d]
                k, s = kinds[row], stages[row]
                i = counts[s, k]
                at = arrived[s, k, i] if k < 2 else 0.0
                if at == np.inf or (k > 0 and i >= counts[s, k - 1]):
                    break
                start[row] = max(clock[d], at)
                clock[d] = end[row] = start[row] + seconds[s, k]
                counts[s, k] += 1
                done += 1
                position[d] += 1
                held[d] += _bytes(k, s, split, saved, kept)
                if held[d] > memory[d]:
                    return start, end, np.inf
                _hand_over(k, s, i, end[row], device, wire, delay, link, arrived)
    return start, end, np.max(clock + update) if done == n else np.inf


def listed(rows: Any, num_devices: int) -> Order:
    """The rows of `list_schedule`, device by device."""
    by_device = np.argsort(rows[:, 0], kind="stable")
    counts = np.bincount(rows[:, 0], minlength=num_devices)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Order(offsets, rows[by_device, 1], rows[by_device, 2])
