"""Moves: from one candidate of the list scheduler to a neighbour; the arguments are never changed.

A move is chosen by what the simulated devices did: unequal work asks for other layers on them, idle
time before the first and after the last instruction for another placement, idle time in between for
another order. The other kinds stay possible all the time: following the diagnosis alone gets stuck
(a balanced V of 8 stages on 4 devices blames its order, but only moving a layer helps).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptis.kernels import compiled
from adaptis.lower import LOOKAHEAD
from adaptis.search.deal import deal, dealt, homes
from adaptis.search.greedy import (
    ALTERNATE,
    CLOCK,
    DEFER,
    FIRST,
    FIT,
    NUM_KNOBS,
    PATIENCE,
    PERIOD,
    RESERVE,
    WORKED,
    Candidate,
)
from adaptis.search.instance import (
    HEAD,
    PARTITION,
    PLACEMENT,
    RECOMPUTE,
    SCHEDULE,
    B,
    F,
    I,
    W,
    is_sharded,
)
from adaptis.search.room import is_limited

NO_LIMIT = 1 << 30
MOST_DOUBLINGS = 4  # at most 2 ** 3 proposals
MOST_RESERVED = LOOKAHEAD  # values that may have been received besides the one that is read
REDEALT = 0.03  # how often all layers are dealt out anew instead of one
TRIALS_A_LAYER = 200  # of such a deal
TRUST = 0.5  # how often the diagnosis decides


@compiled
def copy(candidate: Any) -> Any:
    """The same candidate in arrays of its own."""
    return Candidate(
        candidate.stop.copy(),
        candidate.device.copy(),
        candidate.split.copy(),
        candidate.again.copy(),
        candidate.nudge.copy(),
        candidate.limit.copy(),
        candidate.knobs.copy(),
    )


@compiled
def mutate(instance: Any, candidate: Any, state: Any, cost: float, most_stages: int) -> Any:
    """A random neighbour of `candidate`, whose devices fared as `state` says in `cost` seconds.

    Of several moves of layers the one that leaves the busiest device the least work is worth a
    simulation: looking at the sums costs a hundredth of it.
    """
    kind = _kind(instance.decide, state, cost)
    if not instance.decide[kind]:
        return candidate
    if kind == SCHEDULE:
        return _move_order(instance, candidate)
    if kind == RECOMPUTE:
        return _move_recompute(candidate)
    if kind == HEAD:
        return _move_head(instance, candidate)
    if kind == PARTITION and np.random.random() < REDEALT and instance.decide[:SCHEDULE].all():
        return _redeal(instance, candidate, most_stages)
    best, least = candidate, np.inf
    for _ in range(1 << np.random.randint(MOST_DOUBLINGS)):
        if kind == PARTITION:
            trial = _move_partition(candidate, state, most_stages)
        else:
            trial = _move_placement(candidate, state, most_stages)
        if not _settled(instance, candidate, trial):
            continue
        load = heaviest(instance, trial)
        if load < least:
            best, least = trial, load
    return best


@compiled
def _kind(decide: Any, state: Any, cost: float) -> int:
    """Which of DECISIONS to change; those that are seldom right now and then."""
    draw = np.random.random()
    if decide[RECOMPUTE] and draw < 0.1:
        return RECOMPUTE
    if decide[HEAD] and draw > 0.99:
        return HEAD
    kind = PARTITION
    for _ in range(10):
        kind = _diagnose(state, cost) if np.random.random() < TRUST else np.random.randint(3)
        if decide[kind]:
            break
    return kind


@compiled
def _settled(instance: Any, candidate: Any, trial: Any) -> bool:
    """Whether `trial` leaves alone what is not to be decided; equal cuts are made again."""
    n, last = len(trial.stop), trial.stop[-1]
    if not instance.decide[PLACEMENT] and n != len(candidate.stop):
        return False
    if not instance.decide[PARTITION]:
        if n > len(instance.even):
            return False
        trial.stop[:] = instance.even[n - 1, :n]
        trial.stop[-1] = last
        return n == 1 or trial.stop[n - 2] < last
    return True


@compiled
def heaviest(instance: Any, candidate: Any) -> float:
    """Seconds that the step takes at least on one of the devices."""
    return burdens(instance, candidate).max()


@compiled
def burdens(instance: Any, candidate: Any) -> Any:
    """(D,) seconds that each device keeps a step waiting: head, work and tail.

    It begins once the layers before its first stage have run forward, and after its last backward
    the gradient goes on through those layers, beside which only weight gradients can still run.
    """
    num_devices, m = len(instance.slowness), len(instance.weights)
    load, late = np.zeros(num_devices), np.zeros(num_devices)
    first, start = np.full(num_devices, -1), 0
    for s in range(len(candidate.stop)):
        d, stop = candidate.device[s], candidate.stop[s]
        if first[d] < 0:
            first[d] = start
        again = 2 if candidate.again[s] else 1
        total, calls = _one(instance, F, start, stop) * again, instance.extra[F] * again
        if candidate.split[s]:
            weight = _one(instance, W, start, stop)
            total += _one(instance, I, start, stop) + weight
            calls += instance.extra[I] + instance.extra[W]
            late[d] += (instance.total * weight + m * instance.extra[W]) * instance.slowness[d]
        else:
            total += _one(instance, B, start, stop)
            calls += instance.extra[B]
        load[d] += (instance.total * total + m * calls) * instance.slowness[d]
        start = stop
    one = instance.total / m * instance.slowness.min()
    sharded = is_sharded(instance, candidate.stop)
    for d in range(num_devices):
        if sharded:
            calls = (instance.extra[F] + instance.extra[W]) * instance.slowness[d]
            work = instance.head.scores[d] + instance.head.gradient[d] - calls
            load[d] += instance.total * work + m * calls
        if first[d] > 0:
            tail = instance.seconds[I, first[d]] * one - late[d]
            load[d] += instance.seconds[F, first[d]] * one + max(tail, 0.0)
    return load


@compiled
def _one(instance: Any, op: int, start: int, stop: int) -> float:
    """Seconds of one instruction of weight 1 at speed 1, without overhead."""
    return instance.seconds[op, stop] - instance.seconds[op, start]


@compiled
def _diagnose(state: Any, cost: float) -> int:
    """What costs most, drawn by its seconds: 0 unequal work, 1 idle ends, 2 idle time between."""
    uneven, ends, between = 0.0, 0.0, 0.0
    most = state[:, WORKED].max()
    for d in range(len(state)):
        uneven += most - state[d, WORKED]
        ends += state[d, FIRST] + cost - state[d, CLOCK]
        between += state[d, CLOCK] - state[d, FIRST] - state[d, WORKED]
    draw = np.random.random() * (uneven + ends + between)
    return 0 if draw < uneven else 1 if draw < uneven + ends else 2


@compiled
def _pick(state: Any, sign: int) -> int:
    """The busiest device (sign 1) or the least busy one (-1), or sometimes any."""
    if np.random.random() < 0.4:
        return np.random.randint(len(state))
    return int(np.argmax(sign * state[:, WORKED]))


@compiled
def _stage_on(candidate: Any, d: int) -> int:
    """A random stage on device d, -1 if it has none."""
    found, seen = -1, 0
    for s in range(len(candidate.device)):
        if candidate.device[s] == d:
            seen += 1
            if np.random.randint(seen) == 0:
                found = s
    return found


@compiled
def _move_partition(candidate: Any, state: Any, most_stages: int) -> Any:
    """Move layers: over a border, or out of a busy device into an idle one."""
    draw = np.random.random()
    if draw < 0.55:
        return _shift(candidate, np.random.randint(max(len(candidate.stop) - 1, 1)))
    if draw < 0.8:
        return _two_shifts(candidate)
    s = _stage_on(candidate, _pick(state, 1))
    return candidate if s < 0 else _carve(candidate, s, _pick(state, -1), most_stages)


@compiled
def _redeal(instance: Any, candidate: Any, most_stages: int) -> Any:
    """Several layers at once, so that work is even again; what a stage was its first layer keeps.

    Single layers seldom leave a deal whose busiest device nothing but an exchange relieves.
    """
    home, last = homes(candidate.stop, candidate.device), len(candidate.stop) - 1
    near, hot = 0.001 * 10 ** np.random.random(), 0.003 * 10 ** np.random.random()
    seed, trials = np.random.randint(1 << 30), TRIALS_A_LAYER * len(home)
    stop, device = dealt(deal(instance, home, seed, trials, most_stages, near, hot))
    first = np.append(np.zeros(1, np.int64), stop[:-1])
    trial = _selected(candidate, np.minimum(np.searchsorted(candidate.stop, first, "right"), last))
    trial.stop[:], trial.device[:] = stop, device
    return trial


@compiled
def _shift(candidate: Any, border: int) -> Any:
    """One layer, seldom two, over the border behind stage `border`; an emptied stage disappears."""
    trial = copy(candidate)
    if len(trial.stop) == 1:
        return trial
    step = 1 if np.random.random() < 0.8 else 2
    step = step if np.random.random() < 0.5 else -step
    low = trial.stop[border - 1] if border > 0 else 0
    high = trial.stop[border + 1]
    to = trial.stop[border] + step
    if low < to < high:
        trial.stop[border] = to
        return trial
    return _without(trial, border, border + 1 if to <= low else border)


@compiled
def _two_shifts(candidate: Any) -> Any:
    """Two borders at once: what one device gives it takes back elsewhere."""
    trial = candidate
    for _ in range(2):
        trial = _shift(trial, np.random.randint(max(len(trial.stop) - 1, 1)))
    return trial


@compiled
def _without(candidate: Any, border: int, keep: int) -> Any:
    """Stages `border` and `border` + 1 become one, which is otherwise as `keep` was."""
    n = len(candidate.stop)
    gone = border + 1 if keep == border else border
    index = np.empty(n - 1, np.int64)
    for s in range(n - 1):
        index[s] = s if s < gone else s + 1
    trial = _selected(candidate, index)
    trial.stop[border] = candidate.stop[border + 1]
    return trial


@compiled
def _selected(candidate: Any, index: Any) -> Any:
    """The stages `index` of `candidate`, in arrays of their own."""
    return Candidate(
        candidate.stop[index],
        candidate.device[index],
        candidate.split[index],
        candidate.again[index],
        candidate.nudge[index],
        candidate.limit[index],
        candidate.knobs.copy(),
    )


@compiled
def _cut(candidate: Any, s: int, at: int) -> Any:
    """Stage s becomes two, the second of which begins with layer `at`."""
    index = np.empty(len(candidate.stop) + 1, np.int64)
    for i in range(len(index)):
        index[i] = i if i <= s else i - 1
    trial = _selected(candidate, index)
    trial.stop[s] = at
    return trial


@compiled
def _carve(candidate: Any, s: int, device: int, most_stages: int) -> Any:
    """A random run of layers of stage s moves to `device`."""
    start, stop = candidate.stop[s - 1] if s > 0 else 0, candidate.stop[s]
    length = min(1 + np.random.randint(3), stop - start)
    first = start + np.random.randint(stop - start - length + 1)
    if len(candidate.stop) + 2 > most_stages and (first > start or first + length < stop):
        return candidate
    trial = candidate
    if first > start:
        trial = _cut(trial, s, first)
        s += 1
    if first + length < stop:
        trial = _cut(trial, s, first + length)
    trial = copy(trial)
    trial.device[s] = device
    return trial


@compiled
def _move_placement(candidate: Any, state: Any, most_stages: int) -> Any:
    """Stages change places, split, or join."""
    n = len(candidate.stop)
    s, draw = np.random.randint(n), np.random.random()
    if draw < 0.25:
        trial = copy(candidate)
        trial.device[s] = _pick(state, -1)
        return trial
    if draw < 0.55:
        other = np.random.randint(n)
        trial = copy(candidate)
        trial.device[s], trial.device[other] = candidate.device[other], candidate.device[s]
        return trial
    if draw < 0.8 or n == 1:
        return _divide(candidate, s, state, most_stages)
    border = np.random.randint(n - 1)
    return _without(candidate, border, border + np.random.randint(2))


@compiled
def _divide(candidate: Any, s: int, state: Any, most_stages: int) -> Any:
    """Stage s in two, one of which goes elsewhere."""
    start = candidate.stop[s - 1] if s > 0 else 0
    if candidate.stop[s] - start < 2 or len(candidate.stop) >= most_stages:
        return candidate
    trial = _cut(candidate, s, start + 1 + np.random.randint(candidate.stop[s] - start - 1))
    trial.device[s + np.random.randint(2)] = _pick(state, -1)
    return trial


@compiled
def _move_recompute(candidate: Any) -> Any:
    """One stage, or all stages of a device, recomputed from now on, or no longer."""
    trial = copy(candidate)
    s = np.random.randint(len(trial.stop))
    anew, all_of_it = not trial.again[s], np.random.random() < 0.3
    for other in range(len(trial.stop)):
        if other == s or (all_of_it and trial.device[other] == trial.device[s]):
            trial.again[other] = anew
            trial.split[other] = trial.split[other] and not anew
    return trial


@compiled
def _move_head(instance: Any, candidate: Any) -> Any:
    """The last layer goes to all devices, or back to the last stage."""
    last, n = len(instance.output) - 1, len(candidate.stop)
    start = candidate.stop[n - 2] if n > 1 else 0
    trial = copy(candidate)
    if trial.stop[n - 1] > last:
        if start < last:
            trial.stop[n - 1] = last
    else:
        trial.stop[n - 1] = last + 1
    return trial


@compiled
def _move_order(instance: Any, candidate: Any) -> Any:
    """Another rule, other priorities, another limit, or a backward in one piece or two."""
    trial = copy(candidate)
    s, draw = np.random.randint(len(trial.stop)), np.random.random()
    if draw < 0.55:
        trial.nudge[s, np.random.randint(3)] += np.random.normal() * 0.5
    elif draw < 0.65:
        trial.nudge[s, np.random.randint(3)] = 0.0
    elif draw < 0.85:
        # What is kept free matters only where there is a limit.
        _turn_knob(trial.knobs, np.random.randint(NUM_KNOBS - (not is_limited(instance))))
    elif draw < 0.95:
        if instance.decide[RECOMPUTE] or not trial.again[s]:
            trial.split[s] = not trial.split[s]
            trial.again[s] = False
    else:
        trial.limit[s] = (
            NO_LIMIT if np.random.random() < 0.5 else 1 + np.random.randint(2 * len(trial.stop))
        )
    return trial


@compiled
def _turn_knob(knobs: Any, knob: int) -> None:
    """Draw one number of the rule anew; 0 or 1 where those are the clear choices."""
    if knob == PERIOD:
        knobs[knob] = max(0.0, knobs[knob] + np.random.normal() * 0.3)
    elif knob == ALTERNATE:
        knobs[knob] = 0.0 if np.random.random() < 0.5 else np.random.normal()
    elif knob == FIT:
        knobs[knob] = np.random.random() if np.random.random() < 0.5 else np.random.randint(2)
    elif knob == PATIENCE:
        knobs[knob] = np.random.random() if np.random.random() < 0.5 else 0.0
    elif knob == DEFER:
        knobs[knob] = np.random.random() * 10 if np.random.random() < 0.5 else 100.0
    elif knob == RESERVE:
        knobs[knob] = np.random.randint(MOST_RESERVED + 1)
