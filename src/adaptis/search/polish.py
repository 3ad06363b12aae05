"""The last per cents: explicit orders, changed where the critical path says, judged by replay.

The order of every device is a sequence of (kind, stage); which micro-batch is meant follows from
counting. Moving one computation to another position, or one layer over a border, leaves the rest as
it is, so that each trial is a replay: a few microseconds, and free of the list scheduler's rules.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from adaptis.kernels import compiled
from adaptis.search.greedy import (
    BEFORE,
    BUSY,
    IMPOSSIBLE,
    LATENCY,
    MISSING,
    ONCE,
    ONCE_BEFORE,
    SECONDS,
    SPLIT,
    join,
    list_schedule,
    make_joint,
    make_spec,
    pass_on,
    seconds_of_work,
)
from adaptis.search.instance import PARTITION, SCHEDULE, finish, price
from adaptis.search.room import is_limited, missing, peak_bytes

BORDER_SHARE = 0.15  # of the trials move a border, the others a computation


class Fixed(NamedTuple):
    """A candidate with an explicit order."""

    stop: Any  # (S,)
    device: Any  # (S,)
    split: Any  # (S,)
    again: Any  # (S,) recomputed
    offsets: Any  # (D + 1,)
    kind: Any  # (n,) 0 F, 1 B or I, 2 W
    stage: Any  # (n,) S + d: the part of a sharded head on device d


class Trace(NamedTuple):
    """What a replay leaves for the next move."""

    cause: Any  # (n,) the row whose end made row i begin when it did, -1: none
    path: Any  # (n,) the critical path, last row first
    length: Any  # (1,) of the path


@compiled
def fix(instance: Any, candidate: Any) -> Any:
    """The order that the list scheduler makes of `candidate`, written out."""
    tables = price(instance, candidate.stop, candidate.device)
    orders = list_schedule(instance, candidate, tables, np.inf)
    return Fixed(
        candidate.stop,
        candidate.device,
        candidate.split,
        candidate.again,
        orders.offsets,
        orders.kind,
        orders.stage,
    )


@compiled
def copy_fixed(fixed: Any) -> Any:
    """The same in arrays of its own."""
    return Fixed(
        fixed.stop.copy(),
        fixed.device.copy(),
        fixed.split.copy(),
        fixed.again.copy(),
        fixed.offsets.copy(),
        fixed.kind.copy(),
        fixed.stage.copy(),
    )


@compiled
def make_trace(n: int) -> Any:
    """Room for the traces of replays of n rows."""
    return Trace(np.full(n, -1), np.empty(n, np.int64), np.zeros(1, np.int64))


@compiled
def retime(instance: Any, fixed: Any, trace: Any, most: float = np.inf) -> float:
    """Seconds of the step; inf where it deadlocks or takes longer than `most`.

    Above 1e9 where it does not fit, by how much it misses.
    """
    tables = price(instance, fixed.stop, fixed.device)
    limit = np.empty(0)
    spec, target = make_spec(instance, fixed.split, fixed.again, limit, tables)
    num_devices = len(fixed.offsets) - 1
    clock = np.zeros(num_devices)
    left = seconds_of_work(instance.total, len(instance.weights), num_devices, tables.device, spec)
    for d in range(num_devices):
        left[d] -= most * (1 + 1e-12)
    route = _routes(len(fixed.stop), spec, target)
    if left.max() > 0:
        return np.inf
    if _replay(instance, fixed, spec, route, clock, trace.cause, left) < len(fixed.kind):
        return np.inf
    step = finish(instance, fixed.stop, fixed.device, tables.update, clock)
    d = np.argmax(clock + tables.update)
    i = fixed.offsets[d + 1] - 1 if fixed.offsets[d + 1] > fixed.offsets[d] else -1
    length = 0
    while i >= 0:
        trace.path[length] = i
        length += 1
        i = trace.cause[i]
    trace.length[0] = length
    if is_limited(instance):
        rows = fixed.offsets, fixed.kind, fixed.stage
        needed = peak_bytes(instance.weights, fixed.split, fixed.again, rows, tables)
        share = missing(instance.memory, needed)
        if share > 0:
            return IMPOSSIBLE * (1 + share)
    return step


# Columns of `route`; a slot is 3 times a stage, plus a kind.
# FOLLOWER is W after I, or beyond all slots.
READER, HOME, FOLLOWER = range(3)  # the slot that reads, its device if another
JOINT = -2  # in READER: see `adaptis.search.greedy.join`


@compiled
def _routes(real: int, spec: Any, target: Any) -> Any:
    """(3 N, 3) who reads what each slot leaves: -1 where nobody does."""
    count = len(spec)
    route = np.full((3 * count, 3), -1)
    route[:, FOLLOWER] = 3 * count
    for s in range(count):
        last = s == count - 1
        route[3 * s, READER] = 3 * s + 1 if last else 3 * s + 3
        route[3 * s + 1, READER] = 3 * s - 2 if s > 0 else -1
        if count > real and s >= real - 1:
            route[3 * s, READER] = JOINT
        if s >= real:
            route[3 * s + 1, READER] = -1
        if spec[s, SPLIT] > 0:
            route[3 * s + 1, FOLLOWER] = 3 * s + 2
        route[3 * s, HOME], route[3 * s + 1, HOME] = target[s, 0], target[s, 1]
    return route


@compiled
def _replay(
    instance: Any,
    fixed: Any,
    spec: Any,
    route: Any,
    clock: Any,  # (D,) out: when each device has finished
    cause: Any,
    left: Any,
) -> int:
    """Run every device's rows as early as possible; returns how many could run.

    `left` is each device's work less what time there is: positive once waits, and what it spends
    on sending, have used that up.
    A device that waits for a value names it in `wanted`, and is taken up when that arrives. What
    else a computation needs has come before: a gradient after its F, W after its I.
    """
    count, real, num_devices, m = len(spec), len(fixed.stop), len(clock), len(instance.weights)
    offsets, slots, weights = fixed.offsets, _slots(fixed), instance.weights
    ends, done = (instance.send, instance.overlap), 0
    price, counts = _slot_prices(spec), np.zeros(3 * count, np.int64)
    arrived = np.full((3 * count + 1, m), np.inf)
    arrived[0, :] = 0.0
    writer = np.full((3 * count, m), -1, np.int32)  # the row that writes what arrives
    link, joint = np.zeros((num_devices, num_devices)), make_joint(count - real, m)
    position, wanted = offsets[:-1].copy(), np.full(num_devices, -1)
    stack, depth = np.arange(num_devices), num_devices
    while depth > 0:
        depth -= 1
        d = stack[depth]
        now, late, i, first, stop = clock[d], left[d], position[d], offsets[d], offsets[d + 1]
        while i < stop:
            slot = slots[i]
            n = counts[slot]
            at = arrived[slot, n]
            if at == np.inf:
                wanted[d] = slot * m + n
                break
            w = weights[n]
            now += price[slot, 0] * w + price[slot, 1]
            cause[i] = writer[slot, n] if at > now else (i > first) * i - 1
            counts[slot] = n + 1
            if at > now:
                late += at - now
                now = at
                if late > 0:
                    return done
            now += price[slot, 2] * w + price[slot, 3]
            done, i = done + 1, i + 1
            arrived[route[slot, FOLLOWER], n] = now
            to, other = route[slot, READER], route[slot, HOME]
            if to >= 0:
                writer[to, n], arrived[to, n] = i - 1, now
                if other >= 0:
                    hop, latency, late = price[slot, 4] * w, price[slot, 5], late - now
                    now, arrived[to, n] = pass_on(ends, link, d, other, now, hop, latency)
                    late += now
                    if wanted[other] == to * m + n:
                        stack[depth], wanted[other], depth = other, -1, depth + 1
            elif to == JOINT:
                at = slot // 3, n, i - 1
                reached = arrived, writer, joint, wanted, stack
                depth = _meet(
                    instance.head, fixed.device[real - 1], w, real, at, now, reached, depth
                )
        position[d], clock[d], left[d] = i, now, late
    return done


@compiled
def _slots(fixed: Any) -> Any:
    slots = np.empty(len(fixed.kind), np.int64)
    for i in range(len(slots)):
        slots[i] = 3 * fixed.stage[i] + fixed.kind[i]
    return slots


@compiled
def _slot_prices(spec: Any) -> Any:
    """(3 N, 6) what `_replay` reads of a slot, side by side."""
    table = np.empty((3 * len(spec), 6))
    for s in range(len(spec)):
        for k in range(3):
            slot = 3 * s + k
            table[slot, 0], table[slot, 1] = spec[s, BEFORE + k], spec[s, ONCE_BEFORE + k]
            table[slot, 2], table[slot, 3] = spec[s, SECONDS + k], spec[s, ONCE + k]
            table[slot, 4] = spec[s, BUSY + k] if k < 2 else 0.0
            table[slot, 5] = spec[s, LATENCY + k] if k < 2 else 0.0
    return table


@compiled
def _meet(
    head: Any, home: int, weight: float, real: int, at: Any, now: float, reached: Any, depth: int
) -> int:
    """Of a sharded head: what row `at[2]`, of stage and micro-batch `at`, leaves for all devices.

    Who waits for it is taken up; the stack's new depth.
    """
    arrived, writer, joint, wanted, stack = reached
    s, n, row = at
    side, m = 0 if s == real - 1 else 1, writer.shape[1]
    where = arrived[:-1].reshape((len(writer) // 3, 3, m))
    if not join(head, weight, where, joint, n, now, real, home, s):
        return depth
    for to in range(real - side, len(where)):
        slot = 3 * to + side
        writer[slot, n] = row
        for d in range(len(wanted)):
            if wanted[d] == slot * m + n:
                stack[depth], wanted[d] = d, -1
                depth += 1
    return depth


@compiled
def polish(
    instance: Any,
    start: Any,
    best: Any,
    seed: int,
    first: int,
    stop: int,
    total: int,
    hot: float,
    cold: float,
) -> Any:
    """Trials `first` to `stop` of a run of `total`: where it stands, the best, and its cost."""
    np.random.seed(seed)
    current = copy_fixed(start)
    trace, other = make_trace(len(current.kind)), make_trace(len(current.kind))
    least, cost = retime(instance, best, trace), retime(instance, current, trace)
    for trial in range(first, stop):
        heat = (cold / hot) ** (trial / total)
        heat *= cost * hot if cost < IMPOSSIBLE else IMPOSSIBLE * MISSING
        moved, source, to = _change(current, trace, instance.decide)
        if moved < 0:
            continue
        # Drawn first, so that a replay can stop as soon as it is refused.
        most = cost - heat * np.log(1 - np.random.random())
        price = retime(instance, current, other, most)
        if price <= most:
            trace, other, cost = other, trace, price
            if cost < least:
                best, least = copy_fixed(current), cost
        else:
            _undo(current, moved, source, to)
    return current, best, least


@compiled
def _change(fixed: Any, trace: Any, decide: Any) -> Any:
    """Change `fixed` in place: (0, row, new place), (1, border, step) or (-1, 0, 0) for nothing."""
    share = BORDER_SHARE if decide[SCHEDULE] else 1.0
    if decide[PARTITION] and len(fixed.stop) > 1 and np.random.random() < share:
        border = np.random.randint(len(fixed.stop) - 1)
        step = 1 if np.random.random() < 0.5 else -1
        low = fixed.stop[border - 1] if border > 0 else 0
        if not low < fixed.stop[border] + step < fixed.stop[border + 1]:
            return -1, 0, 0
        fixed.stop[border] += step
        return 1, border, step
    if not decide[SCHEDULE]:
        return -1, 0, 0
    i = trace.path[np.random.randint(trace.length[0])]
    if np.random.random() < 0.2:
        i = np.random.randint(len(fixed.kind))
    d = np.searchsorted(fixed.offsets, i, side="right") - 1
    reach = 1 + int(np.random.exponential() * 3)
    to = i - reach if np.random.random() < 0.5 else i + reach
    to = min(max(to, fixed.offsets[d]), fixed.offsets[d + 1] - 1)
    # Between equal ones nothing changes.
    if to == i or (fixed.kind[to] == fixed.kind[i] and fixed.stage[to] == fixed.stage[i]):
        return -1, 0, 0
    _insert(fixed.kind, i, to)
    _insert(fixed.stage, i, to)
    return 0, i, to


@compiled
def _insert(row: Any, source: int, to: int) -> None:
    """Take out element `source` and put it in so that it stands at `to`."""
    value = row[source]
    step = 1 if to > source else -1
    for i in range(source, to, step):
        row[i] = row[i + step]
    row[to] = value


@compiled
def _undo(fixed: Any, moved: int, source: int, to: int) -> None:
    if moved == 1:
        fixed.stop[source] -= to
    else:
        _insert(fixed.kind, to, source)
        _insert(fixed.stage, to, source)
