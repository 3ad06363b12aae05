"""The list scheduler: stages with priorities become one order of computations per device.

Event by event, the device that can begin first begins; which of its ready computations it takes is
a matter of priority. Time passes as in `adaptis.kernels.replay`, so what comes out is already
simulated. Micro-batches go through each stage in the same order, so a computation is a kind (0 F,
1 B or I, 2 W), a stage and a counter. The parts of a sharded head are stages of their own, behind
the others: kind 0 is S, kind 1 is T.

Memory. F of stage s is admitted only if room is left for one micro-batch of every later stage on
its device, and for their recomputations on the way back. The micro-batch that got furthest can then
always go on; only a recomputation may have to wait, for micro-batches behind it that are further
down, and those come back. No deadlock.

Plain arrays with named columns instead of tuples of arrays: numba counts references on every field
it reads of a tuple, which made the loop five times slower. Known limits: bytes that W needs beyond
what F saved (never seen in a real profile) are reserved from F on; a recomputed stage is not split.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from adaptis.kernels import compiled
from adaptis.search.instance import B, F, I, W, finish, inlined, price
from adaptis.search.room import is_limited, least_bytes, missing, peak_bytes, reserved

# What `knobs` holds: see `_priorities` and `_choose`.
PERIOD, ALTERNATE, FIT, PATIENCE, DEFER, RESERVE = range(6)
NUM_KNOBS = 6
IMPOSSIBLE = 1e9  # seconds; what does not fit costs more
MISSING = 0.1  # the temperature at first where memory is missing, a share of it

# Columns of a stage's row in `spec`: the first seven take three, one a kind, the next three two.
# NEEDS is the most that a computation takes beside what is held, TAKES what it leaves. Its SECONDS
# grow with the micro-batch; ONCE, overhead and receiving, do not. BEFORE and ONCE_BEFORE are what
# it does before its value must be there: recomputing.
SECONDS, RANK, TAKES, NEEDS, ONCE, BEFORE, ONCE_BEFORE = range(0, 21, 3)
BUSY, LATENCY, ROOM, LIMIT, SPLIT, NUM_SPEC = 21, 23, 25, 27, 28, 29
# Columns of a device's row in `state`: when it is free, bytes held, seconds worked, when it
# began, when its choice begins.
CLOCK, HELD, WORKED, FIRST, WHEN = range(5)
# Columns of a device's row in `choice`: kind that ran last, the next kind, and its stage.
LAST, KIND, STAGE = range(3)


class Candidate(NamedTuple):
    """One point of the search; S stages, the arrays as long as that."""

    stop: Any  # (S,) the layer after the last of stage s
    device: Any  # (S,)
    split: Any  # (S,) whether its backward is I and W
    again: Any  # (S,) whether it is recomputed; then its backward is whole
    nudge: Any  # (S, 3) what is added to the priorities of F, B or I, and W
    limit: Any  # (S,) micro-batches in flight, >= 1
    knobs: Any  # (6,) the rule


class Orders(NamedTuple):
    """What each device does; rows offsets[d] to offsets[d + 1] belong to device d."""

    offsets: Any  # (D + 1,)
    kind: Any  # (n,)
    stage: Any  # (n,)
    state: Any  # (D, 5) how it went, columns CLOCK to WHEN


@compiled
def evaluate(instance: Any, candidate: Any) -> float:
    """Seconds of the step of `candidate`; above 1e9 where it cannot fit, by how much it misses."""
    return assess(instance, candidate, np.inf)[0]


@compiled
def assess(instance: Any, candidate: Any, limit: float) -> Any:
    """As `evaluate`, or inf above `limit`; and how each device fared, columns CLOCK to WHEN."""
    tables = price(instance, candidate.stop, candidate.device)
    limited = is_limited(instance)
    if limited:
        share = lacks(instance, candidate, tables)
        if share > 0:
            return IMPOSSIBLE * (1 + share), np.zeros((len(instance.slowness), 5))
    orders = list_schedule(instance, candidate, tables, limit)
    last = orders.state[:, CLOCK].copy()
    if limited and last[0] < np.inf:
        rows = orders.offsets, orders.kind, orders.stage
        needed = peak_bytes(instance.weights, candidate.split, candidate.again, rows, tables)
        share = missing(instance.memory, needed)
        if share > 0:
            return IMPOSSIBLE * (1 + share), orders.state
    return finish(instance, candidate.stop, candidate.device, tables.update, last), orders.state


@compiled
def lacks(instance: Any, candidate: Any, tables: Any) -> float:
    """What devices miss, whatever the order, as a share of their memory."""
    needed = least_bytes(instance.heaviest, candidate.split, candidate.again, tables)
    needed += reserved(tables, candidate.knobs[RESERVE], instance.heaviest)
    return missing(instance.memory, needed)


@compiled
def list_schedule(instance: Any, candidate: Any, tables: Any, limit: float) -> Any:
    """The orders that the priorities of `candidate` lead to; it must not lack memory.

    Given up, with clocks at inf, once some device cannot be done by `limit` seconds.
    """
    real, count, num_devices = len(candidate.stop), len(tables.device), len(instance.slowness)
    weights, m = instance.weights, len(instance.weights)
    ends = (instance.send, instance.overlap)
    spec, target = make_spec(instance, candidate.split, candidate.again, candidate.limit, tables)
    _add_bytes(instance, candidate.split, candidate.again, tables, spec)
    rule = _priorities(instance, candidate, tables, spec)
    hosted, homes, offsets = _layout(m, num_devices, tables.device, spec)
    kinds, stages = np.empty(offsets[-1], np.int8), np.empty(offsets[-1], np.int32)
    counts = np.zeros((count, 3), np.int64)
    arrived = np.full((count, 2, m), np.inf)
    arrived[0, 0, :] = 0.0
    due = arrived[:, :, 0].copy()
    state, choice = np.zeros((num_devices, 5)), np.full((num_devices, 3), -1)
    state[:, HELD] = tables.static + reserved(tables, candidate.knobs[RESERVE], instance.heaviest)
    link, joint = np.zeros((num_devices, num_devices)), make_joint(count - real, m)
    position = offsets[:-1].copy()
    left = seconds_of_work(instance.total, m, num_devices, tables.device, spec)
    stale, num_stale = np.arange(num_devices), num_devices  # devices that have to choose anew
    for _ in range(offsets[-1]):
        for each in range(num_stale):
            _choose(rule, weights, spec, counts, due, state, choice, hosted, homes, stale[each])
        d = _next_device(state)
        if state[d, WHEN] == np.inf or state[d, WHEN] + left[d] > limit * (1 + 1e-12):
            state[:, CLOCK] = np.inf
            break
        k, s = choice[d, KIND], choice[d, STAGE]
        left[d] -= (spec[s, BEFORE + k] + spec[s, SECONDS + k]) * weights[counts[s, k]]
        left[d] -= spec[s, ONCE_BEFORE + k] + spec[s, ONCE + k]
        kinds[position[d]], stages[position[d]] = k, s
        if position[d] == offsets[d]:
            state[d, FIRST] = state[d, WHEN]
        position[d] += 1
        other = _run(
            ends, weights, real, spec, target, counts, arrived, due, state, choice, link, d
        )
        if count > real and k == 0 and s >= real - 1:
            home, i = tables.device[real - 1], counts[s, 0] - 1
            if join(instance.head, weights[i], arrived, joint, i, state[d, CLOCK], real, home, s):
                for each in range(real - 1, count):
                    _refresh(weights, spec, counts, arrived, due, each, 0)
                    _refresh(weights, spec, counts, arrived, due, each, 1)
                for each in range(num_devices):
                    stale[each] = each
                num_stale = num_devices
                continue
        stale[0], num_stale = d, 1
        if other >= 0:
            stale[1], num_stale = other, 2
    return Orders(offsets, kinds, stages, state)


@compiled
def make_joint(parts: int, m: int) -> Any:
    """What a sharded head does together: row 0 when its two lanes are free, then (done, when)."""
    return np.zeros((m + 1 if parts else 1, 2))


@inlined
def join(
    head: Any,
    weight: float,
    arrived: Any,
    joint: Any,
    i: int,
    now: float,
    real: int,
    home: int,
    s: int,
) -> bool:
    """Fill in `arrived` after F of the last stage or S of a part, done `now`; whether it changed.

    The part on the last stage's own device, `home`, does not wait for the transfer.
    """
    parts, changed = arrived.shape[0] - real, True
    if s == real - 1:
        joint[0, 0] = max(joint[0, 0], now) + head.share * weight
        for part in range(parts):
            arrived[real + part, 0, i] = joint[0, 0]
        arrived[real + home, 0, i] = now
    else:
        joint[i + 1, 0] += 1
        joint[i + 1, 1] = max(joint[i + 1, 1], now)
        changed = joint[i + 1, 0] == parts
        if changed:
            joint[0, 1] = max(joint[0, 1], joint[i + 1, 1]) + head.sum * weight
            arrived[real - 1, 1, i] = joint[0, 1]
            for part in range(parts):
                arrived[real + part, 1, i] = joint[0, 1]
    return changed


@inlined
def _next_device(state: Any) -> int:
    """The device that can begin first."""
    found = 0
    for d in range(1, len(state)):
        if state[d, WHEN] < state[found, WHEN]:
            found = d
    return found


@compiled
def seconds_of_work(total: float, m: float, num_devices: int, device: Any, spec: Any) -> Any:
    """(D,) seconds that m micro-batches of weight `total` together keep each device busy."""
    work = np.zeros(num_devices)
    for s in range(len(device)):
        for k in range(3):
            work[device[s]] += total * (spec[s, BEFORE + k] + spec[s, SECONDS + k])
            work[device[s]] += m * (spec[s, ONCE_BEFORE + k] + spec[s, ONCE + k])
    return work


@compiled
def _layout(m: int, num_devices: int, device: Any, spec: Any) -> Any:
    """The stages of each device, where they begin, and where its rows begin."""
    stages, rows = np.zeros(num_devices + 1, np.int64), np.zeros(num_devices + 1, np.int64)
    for s in range(len(device)):
        stages[device[s] + 1] += 1
        rows[device[s] + 1] += m * (3 if spec[s, SPLIT] > 0 else 2)
    stages, rows = np.cumsum(stages), np.cumsum(rows)
    hosted, position = np.empty(len(device), np.int64), stages.copy()
    for s in range(len(device)):
        hosted[position[device[s]]] = s
        position[device[s]] += 1
    return hosted, stages, rows


@compiled
def make_spec(instance: Any, split: Any, again: Any, limit: Any, tables: Any) -> Any:
    """What the loop needs of each stage, and the devices that its results go to.

    An order that is fixed already has no limits: an empty `limit`.
    """
    count, real, device, remote = len(tables.device), len(split), tables.device, tables.remote
    spec, target = np.zeros((count, NUM_SPEC)), np.full((count, 2), -1)
    for s in range(count):
        halved, anew = s < real and split[s], s < real and again[s]
        for k, op in enumerate((F, I if halved else B, W)):
            if k < 2 or halved:
                spec[s, ONCE + k] = tables.once[op, s]
                spec[s, SECONDS + k] = tables.seconds[op, s] - tables.once[op, s]
        if anew:
            spec[s, ONCE_BEFORE + 1] = tables.once[F, s]
            spec[s, BEFORE + 1] = tables.seconds[F, s] - tables.once[F, s]
        spec[s, LIMIT] = limit[s] if s < len(limit) else np.inf
        spec[s, SPLIT] = 1.0 if halved else 0.0
        for k in range(2):
            spec[s, BUSY + k], spec[s, LATENCY + k] = tables.busy[k, s], tables.latency[k, s]
            source, to = (s - 1, s + 1) if k == 0 else (s + 1, s - 1)
            if 0 <= source < count and remote[k, source]:
                spec[s, ONCE + k] += instance.receive
                if not instance.overlap:  # the receiver is busy with the transfer as well
                    spec[s, ONCE + k] += tables.latency[k, source]
                    spec[s, SECONDS + k] += tables.busy[k, source]
            if remote[k, s]:
                target[s, k] = device[to]
    return spec, target


@compiled
def _add_bytes(instance: Any, split: Any, again: Any, tables: Any, spec: Any) -> None:
    """What each computation takes and leaves, and how much its device may hold before it.

    From the last stage to the first: `later` is what the stages behind need on the device.
    """
    later, heaviest = np.zeros(len(instance.slowness)), instance.heaviest
    for s in range(len(spec) - 1, -1, -1):
        d, inside = tables.device[s], s < len(split)
        kept = tables.kept[s] if inside and split[s] else 0.0
        most = max(tables.saved[s], kept)
        if inside and again[s]:
            most = tables.input[s]
            spec[s, NEEDS + 1] = tables.saved[s]
        spec[s, NEEDS] = most
        spec[s, TAKES], spec[s, TAKES + 1], spec[s, TAKES + 2] = most, kept - most, -kept
        # What is received stays while its reader runs.
        back = tables.received[1, s] * heaviest
        front = tables.received[0, s] * heaviest if inside else 0.0
        spec[s, ROOM + 1] = instance.memory[d] - back
        later[d] = max(later[d], spec[s, NEEDS + 1] * heaviest + back, front)
        spec[s, ROOM] = instance.memory[d] - later[d]
        later[d] += most * heaviest


@compiled
def _priorities(instance: Any, candidate: Any, tables: Any, spec: Any) -> Any:
    """Lower runs first: microbatch * period - (the seconds that must still follow) + nudges.

    This is the latest start that lets micro-batch i end i periods after the first one. A long
    period puts old micro-batches first (1F1B), a short one early stages (GPipe); W and T have
    nothing after them and fill gaps. Periods, nudges and the like are in units of the busiest
    device's work on one micro-batch. Returns what `_choose` goes by.
    """
    real = len(candidate.stop)
    scale = seconds_of_work(1, 1, len(tables.static), tables.device, spec).max()
    defer, follow = candidate.knobs[DEFER] * scale, 0.0
    for s in range(real):
        follow += spec[s, BEFORE + 1] + spec[s, ONCE_BEFORE + 1]
        follow += spec[s, SECONDS + 1] + spec[s, ONCE + 1]
        follow += spec[s, BUSY + 1] + spec[s, LATENCY + 1]
        spec[s, RANK + 1] = -follow
        spec[s, RANK + 2] = -spec[s, SECONDS + 2]
    parts = 0.0
    for s in range(real, len(spec)):
        parts = max(parts, spec[s, SECONDS] + instance.head.sum)
    follow += parts
    for s in range(real, len(spec)):
        spec[s, RANK] = -follow
        spec[s, RANK + 1] = defer - spec[s, SECONDS + 1]
    for s in range(real - 1, -1, -1):
        follow += spec[s, SECONDS] + spec[s, ONCE] + spec[s, BUSY] + spec[s, LATENCY]
        spec[s, RANK] = -follow
        spec[s, RANK + 2] += defer
        for k in range(3):
            spec[s, RANK + k] += candidate.nudge[s, k] * scale
    period, alternate = candidate.knobs[PERIOD] * scale, candidate.knobs[ALTERNATE] * scale
    return period, alternate, candidate.knobs[FIT], candidate.knobs[PATIENCE]


@inlined
def _choose(
    rule: Any,
    weights: Any,
    spec: Any,
    counts: Any,
    due: Any,
    state: Any,
    choice: Any,
    hosted: Any,
    homes: Any,
    d: int,
) -> None:
    """What device d begins next, and when, from what is known now.

    Its stages are hosted[homes[d] : homes[d + 1]].
    """
    period, alternate, fit, patience = rule
    now, held, last = state[d, CLOCK], state[d, HELD], choice[d, LAST]
    best, kind, stage = np.inf, 0, -1  # among what is there
    coming, soon, soon_kind, soon_stage = np.inf, np.inf, 0, -1  # the first thing to arrive
    for h in range(homes[d], homes[d + 1]):
        s = hosted[h]
        for k in range(2):
            at = due[s, k]
            i = counts[s, k]
            # Behind the last micro-batch `at` is inf, and its weight not looked at.
            if (
                at == np.inf
                or at > coming
                or held + spec[s, NEEDS + k] * weights[i] > spec[s, ROOM + k]
            ):
                continue
            rank = spec[s, RANK + k] + i * period + (alternate if k == last else 0.0)
            if at <= now:
                if rank < best:
                    best, kind, stage = rank, k, s
            elif at < coming or rank < soon:
                coming, soon, soon_kind, soon_stage = at, rank, k, s
    weight_rank, weight = _next_weight(spec, counts, hosted, homes[d], homes[d + 1], period)
    if weight_rank < best and (stage >= 0 or now + fit * spec[weight, SECONDS + 2] <= coming):
        best, kind, stage = weight_rank, 2, weight
    elif soon < best and stage >= 0 and coming < now + patience * spec[stage, SECONDS + kind]:
        # Something more urgent is about to arrive: wait rather than start something long.
        stage = -1
    if stage >= 0:
        state[d, WHEN], choice[d, KIND], choice[d, STAGE] = now, kind, stage
    else:
        state[d, WHEN], choice[d, KIND], choice[d, STAGE] = coming, soon_kind, soon_stage


@inlined
def _refresh(weights: Any, spec: Any, counts: Any, arrived: Any, due: Any, s: int, k: int) -> None:
    """When the next F (k = 0) or B or I (1) of stage s could begin: inf where that is not known."""
    i = counts[s, k]
    due[s, k] = np.inf
    if i < len(weights) and (k == 1 or i - counts[s, 1] < spec[s, LIMIT]):
        before = spec[s, BEFORE + k] * weights[i] + spec[s, ONCE_BEFORE + k]
        due[s, k] = arrived[s, k, i] - before


@inlined
def _next_weight(spec: Any, counts: Any, hosted: Any, first: int, stop: int, period: float) -> Any:
    """The most urgent W that can run; all that can are there already."""
    best, choice = np.inf, -1
    for h in range(first, stop):
        s = hosted[h]
        if spec[s, SPLIT] > 0 and counts[s, 2] < counts[s, 1]:
            rank = spec[s, RANK + 2] + counts[s, 2] * period
            if rank < best:
                best, choice = rank, s
    return best, choice


@inlined
def _run(
    ends: Any,
    weights: Any,
    real: int,
    spec: Any,
    target: Any,
    counts: Any,
    arrived: Any,
    due: Any,
    state: Any,
    choice: Any,
    link: Any,
    d: int,
) -> int:
    """Begin the choice of device d; returns the device that its result travels to, or -1."""
    kind, s = choice[d, KIND], choice[d, STAGE]
    i = counts[s, kind]
    counts[s, kind] = i + 1
    choice[d, LAST] = kind
    weight = weights[i]
    state[d, HELD] += spec[s, TAKES + kind] * weight
    seconds = (spec[s, BEFORE + kind] + spec[s, SECONDS + kind]) * weight
    seconds += spec[s, ONCE_BEFORE + kind] + spec[s, ONCE + kind]
    end = state[d, WHEN] + seconds
    state[d, WORKED] += seconds
    state[d, CLOCK] = end
    if kind == 2:
        return -1
    other, to, side = target[s, kind], s - 1, 1
    if kind == 0:
        to, side = (s + 1, 0) if s + 1 < len(spec) else (s, 1)
    if s >= real or (to >= real and kind == 0):  # what follows is joint: see `join`
        to = -1
    if other >= 0:
        hop, latency = spec[s, BUSY + kind] * weight, spec[s, LATENCY + kind]
        state[d, CLOCK], arrived[to, side, i] = pass_on(ends, link, d, other, end, hop, latency)
    elif to >= 0:
        arrived[to, side, i] = end
    _refresh(weights, spec, counts, arrived, due, s, 0)
    if kind == 1:
        _refresh(weights, spec, counts, arrived, due, s, 1)
    if to >= 0:
        _refresh(weights, spec, counts, arrived, due, to, side)
    return other


@inlined
def pass_on(
    ends: Any, link: Any, d: int, other: int, end: float, hop: float, latency: float
) -> Any:
    """Send from device d to `other` after `end`: when d goes on, and when the value is there.

    Without overlap both ends are busy with a transfer: the receiver from its beginning on, which
    is what counts as being there.
    """
    send, overlap = ends
    now = end + send
    begin = max(now, link[d, other])
    if overlap:
        link[d, other] = begin + hop
        there = begin + hop + latency
    else:
        link[d, other] = begin + hop + latency
        there = begin
        now += hop + latency
    return now, there
