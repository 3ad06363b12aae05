"""Where a search begins: balanced cuts, looped, waved or dealt out freely, a rule for each."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.search.deal import deal, dealt, homes
from adaptis.search.greedy import Candidate, evaluate
from adaptis.search.instance import PARTITION, PLACEMENT, RECOMPUTE, SCHEDULE
from adaptis.search.moves import MOST_RESERVED, NO_LIMIT
from adaptis.search.partition import bottleneck_cut

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.search.instance import Instance

MOST_ROWS = 400_000  # computations of a candidate: a tenth of a second
# Shares of a device's work in its first, second, ... stage. A small first stage lets the other
# devices begin soon and finish soon after the last micro-batch; what they have to do until the
# larger ones come is the first stage of further micro-batches:
#
#     device 0 | 0 0 0 0 4 4 4 4 4 4 ...      stages 0 to 3 of one layer each,
#     device 1 |   1 1 1 1   5 5 5 5 ...      4 to 7 of the others
RAMPS = (
    (1,),
    (1, 1),
    (1, 2),
    (1, 3),
    (1, 1, 1),
    (1, 2, 1),
    (1, 2, 2),
    (1, 2, 4),
    (1, 3, 1),
    (1, 1, 1, 1),
    (1, 1, 2, 3),
    (1,) * 6,
    (1,) * 8,
)
BEST_SHAPES = 8  # are tried with every rule
TRIALS_A_LAYER, LAYERS_A_DEAL = 1_000, 1_000_000  # of one deal: some milliseconds
# Of deals: what a layer elsewhere costs, and the temperature, see `adaptis.search.deal`.
DEALS = ((0.002, 0.003), (0.004, 0.003), (0.008, 0.003), (0.001, 0.03), (0.004, 0.03), (0.01, 0.03))
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


def starts(
    instance: Instance, shard: bool = False, reserve: int = MOST_RESERVED
) -> list[tuple[float, Candidate]]:
    """Candidates with their seconds, the best shapes under their best rule; best first.

    With `shard`, the last layer belongs to all devices and to no stage. Memory is kept free for
    `reserve` received values.
    """
    rules = [np.array((*rule, reserve), dtype=np.float64) for rule in RULES]
    few = 3 * len(instance.slowness) * instance.num_microbatches > MOST_ROWS // 8
    shapes = _shapes(instance, len(instance.output) - shard)
    plain = [c for shape in shapes for c in _candidates(instance, *shape, rules[0])]
    if few:
        return _rated(instance, plain)
    rated = _rated(instance, plain + [c._replace(knobs=rules[1]) for c in plain])
    best = [candidate for _, candidate in rated[:BEST_SHAPES]]
    if instance.decide[SCHEDULE]:
        others = [c._replace(knobs=rule) for c in best for rule in rules]
        rated += _rated(instance, others)
        rated += _rated(instance, [c._replace(split=np.zeros_like(c.split)) for c in others])
    rated.sort(key=lambda pair: pair[0])
    if instance.decide[:SCHEDULE].all():
        # One deal is enough to begin with: runs that begin with plain shapes make their own.
        pairs = [(c, kind) for c in best for kind in DEALS]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            deals = list(threads.map(lambda pair: evened(instance, pair[0], 0, *pair[1]), pairs))
        deals += [c._replace(knobs=rules[1]) for c in deals]
        rated = sorted([*rated, *_rated(instance, deals)[:1]], key=lambda pair: pair[0])
    return rated


def evened(instance: Instance, start: Candidate, seed: int, near: float, hot: float) -> Candidate:
    """`start` with its layers dealt out more evenly, each layer elsewhere at the cost of `near`."""
    home = homes(start.stop, start.device)
    trials = min(LAYERS_A_DEAL // len(home), TRIALS_A_LAYER * len(home))
    home = deal(instance, home, seed, trials, most_stages(instance), near, hot)
    stop, device = dealt(home)
    again = bool(start.again.all())
    return _candidate(stop, device, start.knobs, bool(start.split.any()) and not again, again)


def _shapes(instance: Instance, num_layers: int) -> Iterator[tuple[Any, Any]]:
    """Where stages end, and their devices."""
    num_devices = len(instance.slowness)
    work, most = _work(instance)[: num_layers + 1], min(most_stages(instance), num_layers)
    for ramp in RAMPS if instance.decide[PLACEMENT] else RAMPS[:1]:
        count = num_devices * len(ramp)
        if count > most:
            continue
        share = np.repeat(np.array(ramp) / sum(ramp), num_devices)
        for device in (_loop(num_devices, count), _wave(num_devices, count))[: min(len(ramp), 2)]:
            yield _cut(instance, work, instance.slowness[device] / share), device
    if not instance.decide[PLACEMENT] and num_layers >= num_devices:
        return
    # Fewer layers than devices, or tight memory: each stage to the lightest device.
    weights = work / max(work[-1], 1e-30)
    if np.isfinite(instance.memory).any() and instance.sizes[0, num_layers] > 0:
        weights = weights + instance.sizes[0, : num_layers + 1] / instance.sizes[0, num_layers]
    for count in sorted({min(most, n * num_devices) for n in (1, 2, 3, 6)}):
        stop = _cut(instance, weights, np.ones(count))
        yield stop, _lightest(instance, stop, weights)


def _cut(instance: Instance, work: Any, slowness: Any) -> Any:
    """The lightest heaviest stage, or even stages where the cut is not to be decided."""
    count = len(slowness)
    if instance.decide[PARTITION] or count > len(instance.even):
        return bottleneck_cut(work, slowness)
    stop = instance.even[count - 1, :count].copy()
    stop[-1] = len(work) - 1
    return stop


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


def _candidates(instance: Instance, stop: Any, device: Any, rule: Any) -> list[Candidate]:
    """One shape under `rule`, in two halves where that is to be decided; recomputed as well."""
    return [
        _candidate(stop, device, rule, bool(instance.decide[SCHEDULE]) and not again, again)
        for again in ((False, True) if instance.decide[RECOMPUTE] else (False,))
    ]


def _candidate(stop: Any, device: Any, rule: Any, split: bool, again: bool) -> Candidate:
    n = len(stop)
    return Candidate(
        stop=np.asarray(stop, dtype=np.int64),
        device=np.asarray(device, dtype=np.int64),
        split=np.full(n, split),
        again=np.full(n, again),
        nudge=np.zeros((n, 3)),
        limit=np.full(n, NO_LIMIT, dtype=np.int64),
        knobs=rule,
    )


def _rated(instance: Instance, candidates: list[Candidate]) -> list[tuple[float, Candidate]]:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        costs = threads.map(lambda candidate: float(evaluate(instance, candidate)), candidates)
        return sorted(zip(costs, candidates, strict=True), key=lambda pair: pair[0])
