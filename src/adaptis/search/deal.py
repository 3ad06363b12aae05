"""Layers dealt out to devices so that none keeps the step waiting: annealed on sums alone.

Whole layers do not divide evenly, and the best deal is rarely a cut into equal chunks. A deal says
for each layer which device has it; runs of one device become stages. A trial moves a layer or swaps
two, and costs one pass over the layers instead of a simulation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptis.kernels import compiled
from adaptis.search.instance import B, F, I, W

STAGE_COST = 0.005  # what one more stage per device must gain, a share of the busiest device's work
COLD = 0.0003  # the temperature at the end, a share of the cost
SPREAD = 0.1  # of the deviation between devices


@compiled
def deal(
    instance: Any, start: Any, seed: int, trials: int, most_stages: int, near: float, hot: float
) -> Any:
    """(L,) a device for each layer: evener than `start`, where each layer elsewhere costs `near`.

    Good orders need more than even work: a deal near a good shape keeps what made that good. `near`
    and the temperature at the beginning, `hot`, are shares of the cost.
    """
    np.random.seed(seed)
    num_layers, num_devices = len(start), len(instance.slowness)
    layers, device = _layers(instance, num_layers), np.zeros((num_devices, 4))
    constant = _constant(instance, num_layers)
    current, best, moved = start.copy(), start.copy(), 0
    cost = least = _burden(instance, layers, constant, current, most_stages, device)
    for trial in range(trials):
        heat = cost * hot * (COLD / hot) ** (trial / trials)
        i, j, draw = (
            np.random.randint(num_layers),
            np.random.randint(num_layers),
            np.random.random(),
        )
        if draw > 0.6:  # to the device of a neighbour
            j = min(max(i + (1 if draw < 0.8 else -1), 0), num_layers - 1)
        one, other = current[i], current[j]
        to = np.random.randint(num_devices) if 0.4 < draw < 0.6 else other
        back = one if draw < 0.4 else other  # two layers swap
        if to == one:
            continue
        current[i], current[j] = to, back
        change = (to != start[i]) - (one != start[i]) + (back != start[j]) - (other != start[j])
        step = _burden(instance, layers, constant, current, most_stages, device)
        step *= 1 + near * (moved + change)
        if step <= cost - heat * np.log(1 - np.random.random()):
            cost, moved = step, moved + change
            if cost < least:
                best[:], least = current, cost
        else:
            current[i], current[j] = one, other
    return best


FORWARD, BACK, WORK, LATE, BYTES = range(5)  # columns of a layer's row


@compiled
def _layers(instance: Any, num_layers: int) -> Any:
    """(L, 5) seconds of one F and I before each layer, work and W of a step, and bytes."""
    result, total = np.empty((num_layers, 5)), instance.total
    one = total / len(instance.weights) * instance.slowness.min()
    for i in range(num_layers):
        seconds = instance.seconds[:, i + 1] - instance.seconds[:, i]
        result[i, FORWARD] = instance.seconds[F, i] * one
        result[i, BACK] = instance.seconds[I, i] * one
        result[i, WORK] = total * (seconds[F] + min(seconds[B], seconds[I] + seconds[W]))
        result[i, LATE] = total * seconds[W]
        sizes = instance.sizes[:2, i + 1] - instance.sizes[:2, i]
        result[i, BYTES] = sizes[0] + instance.heaviest * sizes[1]
    return result


@compiled
def _constant(instance: Any, num_layers: int) -> Any:
    """(D,) seconds of each device's part of a head that is in no stage."""
    if num_layers == len(instance.output):
        return np.zeros(len(instance.slowness))
    return instance.total * (instance.head.scores + instance.head.gradient)


@compiled
def _burden(
    instance: Any, layers: Any, constant: Any, home: Any, most_stages: int, device: Any
) -> float:
    """Seconds that the busiest device keeps the step waiting, dearer with every stage.

    A device begins once the layers before its first have run forward, and after its last backward
    the gradient goes on through those, beside which only weight gradients can still run. `device`
    is scratch: work, W, bytes and the first layer, counted from 1.
    """
    num_devices, before, stages = len(device), -1, 0
    ends = 2 * (instance.send + instance.receive)
    call = instance.extra[F] + instance.extra[I] + instance.extra[W] + ends
    call *= len(instance.weights)
    device[:] = 0.0
    for i in range(len(home)):
        d = home[i]
        if device[d, 3] == 0.0:
            device[d, 3] = i + 1
        device[d, 0] += layers[i, WORK]
        device[d, 1] += layers[i, LATE]
        device[d, 2] += layers[i, BYTES]
        if d != before:
            device[d, 0] += call
            stages += 1
        before = d
    most, lacking, squares, mean = 0.0, 0.0, 0.0, 0.0
    for d in range(num_devices):
        load = device[d, 0] * instance.slowness[d] + constant[d]
        if device[d, 3] > 0:
            first = int(device[d, 3]) - 1
            tail = layers[first, BACK] - device[d, 1] * instance.slowness[d]
            load += layers[first, FORWARD] + max(tail, 0.0)
        most = max(most, load)
        mean += load / num_devices
        squares += load * load / num_devices
        if device[d, 2] > instance.memory[d]:
            lacking += (device[d, 2] - instance.memory[d]) / max(instance.memory[d], 1.0)
    # Of two deals as bad at worst, the evener.
    most += SPREAD * np.sqrt(max(squares - mean * mean, 0.0))
    beyond = max(stages - most_stages, 0)
    return most * (1 + STAGE_COST * stages / num_devices + 10 * lacking + beyond)


@compiled
def homes(stop: Any, device: Any) -> Any:
    """(L,) the device of each layer that is in a stage."""
    home, start = np.empty(stop[-1], np.int64), 0
    for s in range(len(stop)):
        home[start : stop[s]] = device[s]
        start = stop[s]
    return home


@compiled
def dealt(home: Any) -> Any:
    """Where the stages of a deal end, and their devices."""
    count = 1 + np.sum(home[1:] != home[:-1])
    stop, device, s = np.empty(count, np.int64), np.empty(count, np.int64), 0
    for i in range(len(home)):
        if i + 1 == len(home) or home[i + 1] != home[i]:
            stop[s], device[s] = i + 1, home[i]
            s += 1
    return stop, device
