"""Where a search begins: balanced cuts, looped, waved or dealt out freely, a rule for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.search.greedy import Candidate, evaluate
from adaptis.search.moves import NO_LIMIT
from adaptis.search.partition import bottleneck_cut

if TYPE_CHECKING:
    from adaptis.search.instance import Instance

MOST_ROWS = 400_000  # computations of a candidate: a tenth of a second
CHUNKS = (1, 2, 3, 4, 6, 8)  # stages per device
# period, alternate, fit, patience, defer: see `adaptis.search.greedy`
RULES = (
    (0.5, 1.0, 0.5, 0.0, 100.0),
    (0.5, 0.0, 0.0, 0.0, 100.0),
    (2.0, 0.0, 0.5, 0.0, 100.0),
    (2.0, 0.0, 0.0, 0.0, 1.0),
    (1.0, 0.5, 1.0, 0.5, 100.0),
)


def most_stages(instance: Instance) -> int:
    """More stages than this are not tried: they only make each trial dearer."""
    num_devices = len(instance.slowness)
    affordable = max(MOST_ROWS // (3 * instance.num_microbatches), num_devices)
    return min(len(instance.output), max(8 * num_devices, 16), affordable)


def starts(instance: Instance) -> list[tuple[float, Candidate]]:
    """Candidates with their seconds, each cut and placement under its best rule; best first."""
    num_devices, num_layers = len(instance.slowness), len(instance.output)
    found = []
    for chunks in CHUNKS:
        count = num_devices * chunks
        if count > most_stages(instance):
            break
        for device in (_loop(num_devices, count), _wave(num_devices, count)):
            stop = bottleneck_cut(_work(instance), instance.slowness[device])
            found.append(_best_rule(instance, stop, device))
    # Fewer layers than devices, or tight memory: each stage to the lightest device.
    for count in sorted(
        {min(most_stages(instance), n) for n in (num_devices, 3 * num_devices, 6 * num_devices)}
    ):
        weights = _work(instance) / max(_work(instance)[-1], 1e-30)
        if np.isfinite(instance.memory).any() and instance.sizes[0, -1] > 0:
            weights = weights + instance.sizes[0] / instance.sizes[0, -1]
        stop = bottleneck_cut(weights, np.ones(min(count, num_layers)))
        found.append(_best_rule(instance, stop, _lightest(instance, stop, weights)))
    return sorted(found, key=lambda pair: pair[0])


def _work(instance: Instance) -> Any:
    return instance.seconds[0] + np.minimum(
        instance.seconds[1], instance.seconds[2] + instance.seconds[3]
    )


def _loop(num_devices: int, num_stages: int) -> Any:
    return np.arange(num_stages) % num_devices


def _wave(num_devices: int, num_stages: int) -> Any:
    lap, rank = np.divmod(np.arange(num_stages), num_devices)
    return np.where(lap % 2 == 0, rank, num_devices - 1 - rank)


def _lightest(instance: Instance, stop: Any, weights: Any) -> Any:
    """Heaviest stage first, each to the device that would be done first."""
    work = np.diff(weights[np.concatenate([[0], stop])])
    load, device = np.zeros(len(instance.slowness)), np.zeros(len(stop), dtype=np.int64)
    for s in np.argsort(-work, kind="stable"):
        d = int(np.argmin(load + work[s] * instance.slowness))
        device[s] = d
        load[d] += work[s] * instance.slowness[d]
    return device


def _best_rule(instance: Instance, stop: Any, device: Any) -> tuple[float, Candidate]:
    """The best of the rules, and of whole and split backwards."""
    n = len(stop)
    found = []
    few = 3 * n * instance.num_microbatches > MOST_ROWS // 4
    for rule in RULES[: 2 if few else len(RULES)]:
        for split in (True,) if few else (False, True):
            candidate = Candidate(
                np.asarray(stop, dtype=np.int64),
                np.asarray(device, dtype=np.int64),
                np.full(n, split),
                np.zeros((n, 3)),
                np.full(n, NO_LIMIT, dtype=np.int64),
                np.array(rule, dtype=np.float64),
            )
            found.append((float(evaluate(instance, candidate)), candidate))
    return min(found, key=lambda pair: pair[0])
