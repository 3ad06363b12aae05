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
    LATENCY,
    NEEDS,
    RECEIVE,
    SECONDS,
    TAKES,
    join,
    list_schedule,
    make_joint,
    make_spec,
    pass_on,
    seconds_of_work,
)
from adaptis.search.instance import PARTITION, SCHEDULE, finish, inlined, price

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
    """Seconds of the step; inf where it deadlocks, does not fit or takes longer than `most`."""
    tables = price(instance, fixed.stop, fixed.device)
    limit = np.empty(0)
    spec, target = make_spec(instance, fixed.split, fixed.again, limit, tables)
    num_devices = len(fixed.offsets) - 1
    clock = np.zeros(num_devices)
    left = seconds_of_work(instance.total, num_devices, tables.device, spec)
    left -= most * (1 + 1e-12)
    done = _replay(instance, fixed, spec, target, tables.static.copy(), clock, trace.cause, left)
    if done < len(fixed.kind):
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
    return step


@compiled
def _replay(
    instance: Any,
    fixed: Any,
    spec: Any,
    target: Any,
    held: Any,  # (D,) bytes that each device holds
    clock: Any,  # (D,) out: when each device has finished
    cause: Any,
    left: Any,
) -> int:
    """Run every device's rows as early as possible; returns how many could run and fitted.

    `left` is each device's work less what time there is: positive once idle time has used that up.
    A device that waits for a value names it in `wanted`, and is taken up when that arrives.
    """
    offsets, kinds, stages = fixed.offsets, fixed.kind, fixed.stage
    count, real, num_devices, m = len(spec), len(fixed.stop), len(held), len(instance.weights)
    weights, memory, done = instance.weights, instance.memory, 0
    counts = np.zeros((count, 3), np.int64)
    arrived = np.full((count, 2, m), np.inf)
    arrived[0, 0, :] = 0.0
    writer = np.full((count, 2, m), -1, np.int32)  # the row that writes what arrives
    link, joint = np.zeros((num_devices, num_devices)), make_joint(count - real, m)
    position, wanted = offsets[:-1].copy(), np.full(num_devices, -1)
    stack, depth = np.arange(num_devices), num_devices
    while depth > 0:
        depth -= 1
        d = stack[depth]
        now, bytes_held, rest, first = clock[d], held[d], left[d], offsets[d]
        i, stop = position[d], offsets[d + 1]
        while i < stop:
            k, s = kinds[i], stages[i]
            n = counts[s, k]
            at = arrived[s, k, n] if k < 2 else 0.0
            if at == np.inf or (k > 0 and n >= counts[s, k - 1]):
                wanted[d] = (s * 2 + k) * m + n
                break
            w = weights[n]
            before, seconds = spec[s, BEFORE + k] * w, spec[s, SECONDS + k] * w
            now += before
            rest -= before + seconds
            cause[i] = writer[s, k, n] if at > now else i - 1 if i > first else -1
            counts[s, k] = n + 1
            now = max(at, now) + spec[s, RECEIVE + k] + seconds
            if bytes_held + spec[s, NEEDS + k] * w > memory[d] or now + rest > 0:
                return done
            bytes_held += spec[s, TAKES + k] * w
            done, i = done + 1, i + 1
            if k == 2 or (k == 1 and (s == 0 or s >= real)):
                continue
            if count > real and k == 0 and s >= real - 1:
                if join(instance.head, w, arrived, joint, n, now, real, fixed.device[real - 1], s):
                    depth = _wake(s, real, n, i - 1, writer, wanted, stack, depth)
                continue
            to, side = _reader(k, s, count)
            writer[to, side, n], arrived[to, side, n] = i - 1, now
            other = target[s, k]
            if other >= 0:
                hop, latency = spec[s, BUSY + k] * w, spec[s, LATENCY + k]
                now, arrived[to, side, n] = pass_on(instance, link, d, other, now, hop, latency)
                if wanted[other] == (to * 2 + side) * m + n:
                    stack[depth], wanted[other] = other, -1
                    depth += 1
        position[d], clock[d], held[d], left[d] = i, now, bytes_held, rest
    return done


@inlined
def _wake(
    s: int,
    real: int,
    n: int,
    row: int,
    writer: Any,
    wanted: Any,
    stack: Any,
    depth: int,
) -> int:
    """Take up who waits for what row `row` wrote for a sharded head; the stack's new depth."""
    side, m = 0 if s == real - 1 else 1, writer.shape[2]
    for to in range(real - side, len(writer)):
        writer[to, side, n] = row
        for d in range(len(wanted)):
            if wanted[d] == (to * 2 + side) * m + n:
                stack[depth], wanted[d] = d, -1
                depth += 1
    return depth


@inlined
def _reader(k: int, s: int, count: int) -> Any:
    """Which stage reads what kind k of stage s leaves, and as which kind."""
    if k == 1:
        return s - 1, 1
    return (s + 1, 0) if s + 1 < count else (s, 1)


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
        heat = cost * hot * (cold / hot) ** (trial / total)
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
