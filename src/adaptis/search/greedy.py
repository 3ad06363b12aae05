"""The list scheduler: stages with priorities become one order of computations per device.

Event by event, the device that can begin first begins; which of its ready computations it takes is
a matter of priority. Time passes as in `adaptis.kernels.replay`, so what comes out is already
simulated. Micro-batches are equal and go through each stage in order: swapping two of them never
helps, so a computation is a kind (0 F, 1 B or I, 2 W), a stage and a counter.

Memory. F of stage s is admitted only if room is left for one micro-batch of every later stage on
its device. The micro-batch that got furthest can then always go on, and nothing else ever waits for
memory: no deadlock.

Plain arrays with named columns instead of tuples of arrays: numba counts references on every field
it reads of a tuple, which made the loop five times slower. Known limit: bytes that W needs beyond
what F saved (never seen in a real profile) are reserved from F on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from adaptis.kernels import compiled
from adaptis.search.instance import B, F, I, W, finish, inlined, price

# What `knobs` holds: see `_priorities` and `_choose`.
PERIOD, ALTERNATE, FIT, PATIENCE, DEFER = range(5)
NUM_KNOBS = 5
IMPOSSIBLE = 1e9  # seconds; what does not fit costs more

# Columns of a stage's row in `spec`: the first four take three, one a kind, BUSY and LATENCY two.
SECONDS, RANK, TAKES, RECEIVE, BUSY, LATENCY, ROOM, LIMIT, SPLIT = 0, 3, 6, 9, 12, 14, 16, 17, 18
NUM_SPEC = 19
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
    nudge: Any  # (S, 3) what is added to the priorities of F, B or I, and W
    limit: Any  # (S,) micro-batches in flight, >= 1
    knobs: Any  # (5,) the rule


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
    missing = lacks(instance, candidate.device, tables)
    if missing > 0:
        return IMPOSSIBLE * (1 + missing), np.zeros((len(instance.slowness), 5))
    orders = list_schedule(instance, candidate, tables, limit)
    last = orders.state[:, CLOCK].copy()
    return finish(instance, candidate.stop, candidate.device, tables.update, last), orders.state


@compiled
def lacks(instance: Any, device: Any, tables: Any) -> float:
    """What devices miss to hold their layers and one micro-batch, as a share of their memory."""
    held = tables.static.copy()
    for s in range(len(device)):
        held[device[s]] += max(tables.saved[s], tables.kept[s])
    missing = 0.0
    for d in range(len(held)):
        if held[d] > instance.memory[d]:
            missing += (held[d] - instance.memory[d]) / max(instance.memory[d], 1.0)
    return missing


@compiled
def list_schedule(instance: Any, candidate: Any, tables: Any, limit: float) -> Any:
    """The orders that the priorities of `candidate` lead to; it must not lack memory.

    Given up, with clocks at inf, once some device cannot be done by `limit` seconds.
    """
    num_stages, num_devices = len(candidate.stop), len(instance.slowness)
    m, device, split = instance.num_microbatches, candidate.device, candidate.split
    spec, target = make_spec(instance, device, split, candidate.limit, tables)
    period, alternate = _priorities(candidate, tables, spec)
    hosted, homes, offsets = _layout(m, num_devices, device, split)
    kinds, stages = np.empty(offsets[-1], np.int8), np.empty(offsets[-1], np.int32)
    counts = np.zeros((num_stages, 3), np.int64)
    arrived = np.full((num_stages, 2, m), np.inf)
    arrived[0, 0, :] = 0.0
    due = arrived[:, :, 0].copy()
    state, choice = np.zeros((num_devices, 5)), np.full((num_devices, 3), -1)
    state[:, HELD] = tables.static
    link = np.zeros((num_devices, num_devices))
    fit, patience = candidate.knobs[FIT], candidate.knobs[PATIENCE]
    rule = (period, alternate, fit, patience)
    position, left = offsets[:-1].copy(), seconds_of_work(m, num_devices, device, spec)
    for d in range(num_devices):
        _choose(rule, spec, counts, due, state, choice, hosted, homes, d)
    for _ in range(offsets[-1]):
        d = _next_device(state)
        if state[d, WHEN] + left[d] > limit * (1 + 1e-12):
            state[:, CLOCK] = np.inf
            break
        left[d] -= spec[choice[d, STAGE], SECONDS + choice[d, KIND]]
        kinds[position[d]], stages[position[d]] = choice[d, KIND], choice[d, STAGE]
        if position[d] == offsets[d]:
            state[d, FIRST] = state[d, WHEN]
        position[d] += 1
        other = _run(instance.send, spec, target, counts, arrived, due, state, choice, link, d)
        _choose(rule, spec, counts, due, state, choice, hosted, homes, d)
        if other >= 0:
            _choose(rule, spec, counts, due, state, choice, hosted, homes, other)
    return Orders(offsets, kinds, stages, state)


@inlined
def _next_device(state: Any) -> int:
    """The device that can begin first."""
    found = 0
    for d in range(1, len(state)):
        if state[d, WHEN] < state[found, WHEN]:
            found = d
    return found


@compiled
def seconds_of_work(m: int, num_devices: int, device: Any, spec: Any) -> Any:
    """Seconds of work of each device."""
    work = np.zeros(num_devices)
    for s in range(len(device)):
        work[device[s]] += m * (spec[s, SECONDS] + spec[s, SECONDS + 1] + spec[s, SECONDS + 2])
    return work


@compiled
def _layout(m: int, num_devices: int, device: Any, split: Any) -> Any:
    """The stages of each device, where they begin, and where its rows begin."""
    stages, rows = np.zeros(num_devices + 1, np.int64), np.zeros(num_devices + 1, np.int64)
    for s in range(len(device)):
        stages[device[s] + 1] += 1
        rows[device[s] + 1] += m * (3 if split[s] else 2)
    stages, rows = np.cumsum(stages), np.cumsum(rows)
    hosted, position = np.empty(len(device), np.int64), stages.copy()
    for s in range(len(device)):
        hosted[position[device[s]]] = s
        position[device[s]] += 1
    return hosted, stages, rows


@compiled
def make_spec(instance: Any, device: Any, split: Any, limit: Any, tables: Any) -> Any:
    """What the loop needs of each stage, and the devices that its results go to.

    An order that is fixed already has no limits: an empty `limit`.
    """
    num_stages, remote = len(device), tables.remote
    spec, target = np.zeros((num_stages, NUM_SPEC)), np.full((num_stages, 2), -1)
    later = np.zeros(len(instance.slowness))
    for s in range(num_stages - 1, -1, -1):
        spec[s, SECONDS] = tables.seconds[F, s]
        spec[s, SECONDS + 1] = tables.seconds[I if split[s] else B, s]
        spec[s, SECONDS + 2] = tables.seconds[W, s] if split[s] else 0.0
        most, kept = max(tables.saved[s], tables.kept[s]), tables.kept[s] if split[s] else 0.0
        spec[s, TAKES], spec[s, TAKES + 1], spec[s, TAKES + 2] = most, kept - most, -kept
        spec[s, ROOM] = instance.memory[device[s]] - later[device[s]]
        later[device[s]] += most
        spec[s, LIMIT], spec[s, SPLIT] = limit[s] if len(limit) else np.inf, split[s]
        for k in range(2):
            spec[s, BUSY + k], spec[s, LATENCY + k] = tables.busy[k, s], tables.latency[k, s]
            source, to = (s - 1, s + 1) if k == 0 else (s + 1, s - 1)
            if 0 <= source < num_stages and remote[k, source]:
                spec[s, RECEIVE + k] = instance.receive
            if remote[k, s]:
                target[s, k] = device[to]
    return spec, target


@compiled
def _priorities(candidate: Any, tables: Any, spec: Any) -> Any:
    """Lower runs first: microbatch * period - (the seconds that must still follow) + nudges.

    This is the latest start that lets micro-batch i end i periods after the first one. A long
    period puts old micro-batches first (1F1B), a short one early stages (GPipe); W has nothing
    after it and fills gaps. Periods, nudges and the like are in units of the busiest device's work
    on one micro-batch.
    """
    num_stages = len(spec)
    load = np.zeros(len(tables.static))
    follow = 0.0
    for s in range(num_stages):
        follow += spec[s, SECONDS + 1] + spec[s, BUSY + 1] + spec[s, LATENCY + 1]
        spec[s, RANK + 1] = -follow
        spec[s, RANK + 2] = -spec[s, SECONDS + 2]
        load[candidate.device[s]] += spec[s, SECONDS] + spec[s, SECONDS + 1] + spec[s, SECONDS + 2]
    for s in range(num_stages - 1, -1, -1):
        follow += spec[s, SECONDS] + spec[s, BUSY] + spec[s, LATENCY]
        spec[s, RANK] = -follow
    scale = load.max()
    spec[:, RANK : RANK + 3] += candidate.nudge * scale
    spec[:, RANK + 2] += candidate.knobs[DEFER] * scale
    return candidate.knobs[PERIOD] * scale, candidate.knobs[ALTERNATE] * scale


@compiled
def _choose(
    rule: Any,
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
            full = k == 0 and held + spec[s, TAKES] > spec[s, ROOM]
            if full or at == np.inf or at > coming:
                continue
            rank = spec[s, RANK + k] + counts[s, k] * period + (alternate if k == last else 0.0)
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
def _refresh(spec: Any, counts: Any, arrived: Any, due: Any, s: int) -> None:
    """When the next F and the next B or I of stage s could begin: inf where that is not known."""
    for k in range(2):
        i = counts[s, k]
        full = k == 0 and i - counts[s, 1] >= spec[s, LIMIT]
        due[s, k] = np.inf if full or i == arrived.shape[2] else arrived[s, k, i]


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
    send: float,
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
    i, last = counts[s, kind], len(spec) - 1
    counts[s, kind] = i + 1
    choice[d, LAST] = kind
    state[d, HELD] += spec[s, TAKES + kind]
    begin = state[d, WHEN] + (spec[s, RECEIVE + kind] if kind < 2 else 0.0)
    end = begin + spec[s, SECONDS + kind]
    state[d, WORKED] += end - begin
    state[d, CLOCK] = end
    if kind == 2:
        return -1
    if kind == 1 and s == 0:
        _refresh(spec, counts, arrived, due, s)
        return -1
    to, side = (s + 1, 0) if kind == 0 else (s - 1, 1)
    if to > last:
        to, side = last, 1
    other = target[s, kind]
    if other < 0:
        arrived[to, side, i] = end
    else:
        state[d, CLOCK] = end + send
        link[d, other] = max(end + send, link[d, other]) + spec[s, BUSY + kind]
        arrived[to, side, i] = link[d, other] + spec[s, LATENCY + kind]
    _refresh(spec, counts, arrived, due, s)
    _refresh(spec, counts, arrived, due, to)
    return other
