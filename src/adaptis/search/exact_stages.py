"""Every way to cut a model and to deal its stages out that may still beat a given step time.

A depth-first walk adds stage by stage and turns back where some device, or all together, cannot be
done in time; what is left is looked at once more, device by device, as a single machine that may
interrupt its work: Jackson's preemptive schedule of heads and tails, a lower bound in itself.
Devices alike in speed, memory and node are taken up in order.

References: Carlier, "The one-machine sequencing problem", EJOR 11 (1982).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from adaptis.cluster import uniform
from adaptis.kernels import compiled
from adaptis.plan import Stage
from adaptis.profile import LayerCost, Profile

if TYPE_CHECKING:
    from adaptis.cluster import Cluster

F, G, W = 0, 1, 2  # G: the shorter of B and I; W: what the cheaper backward takes besides
MOST_DEALS = 1 << 16
MOST_LOOKED_AT = 1 << 26  # nodes of the walk: seconds


class Costs(NamedTuple):
    """What the walk reads; L layers, D devices."""

    num_microbatches: int
    most_stages: int
    seconds: Any  # (4, L + 1) prefix sums of F, B, I, W at speed 1
    extra: Any  # (4,) seconds that each instruction adds
    update: Any  # (L + 1,) prefix sums of the optimizer's seconds
    state: Any  # (L + 1,) prefix sums of bytes held throughout
    saved: Any  # (L + 1,) and of those held from F to B
    twice: float  # bytes of shared parameters that may be counted more than once
    slowness: Any  # (D,)
    memory: Any  # (D,)
    alike: Any  # (D,) devices of a number are interchangeable
    hop: Any  # (L, D, D) seconds until the output of a layer is there
    send: float
    receive: float


class Deal(NamedTuple):
    """Stages on devices, and what any order of them takes at least."""

    bound: float
    stages: tuple[Stage, ...]


def make_costs(
    profile: Profile, cluster: Cluster, num_microbatches: int, most_stages: int
) -> Costs:
    """The arrays of one planning problem."""

    def prefix(name: str) -> Any:
        values = [getattr(layer, name) for layer in profile.layers]
        return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])

    extra, everyone = profile.overheads, range(cluster.num_devices)
    ops = ("forward", "backward", "backward_input", "backward_weight")
    hop = np.array(
        [
            [
                [
                    cluster.link(a, b).seconds(layer.output_bytes) if a != b else 0.0
                    for b in everyone
                ]
                for a in everyone
            ]
            for layer in profile.layers
        ]
    )
    return Costs(
        num_microbatches=num_microbatches,
        most_stages=most_stages,
        seconds=np.stack([prefix(name) for name in ops]),
        extra=np.array([getattr(extra, name) for name in ops], dtype=np.float64),
        update=prefix("update"),
        state=prefix("state_bytes"),
        saved=prefix("saved_bytes"),
        twice=float(sum(len(s.layers) * profile.shared_state(s) for s in profile.shared)),
        slowness=np.array([1.0 / device.speed for device in cluster.devices]),
        memory=np.array([device.memory_bytes for device in cluster.devices]),
        alike=np.array([cluster.devices.index(device) for device in cluster.devices]),
        hop=hop,
        send=float(extra.send),
        receive=float(extra.receive),
    )


def deals_below(costs: Costs, limit: float, lower: float) -> tuple[list[Deal], float]:
    """All deals whose bound is `limit` seconds or less, the most promising first.

    Where they are too many, only those up to another limit nearer to `lower`, which is returned
    with them: what is missing takes longer than that.
    """
    count, stops, devices, sizes = walk(costs, limit)
    while count < 0:
        limit = lower + 0.7 * (limit - lower) - 1e-9 * lower
        count, stops, devices, sizes = walk(costs, limit)
    deals = []
    for row in range(count):
        stop, device = stops[row, : sizes[row]], devices[row, : sizes[row]]
        bound = float(preemptive(costs, stop, device))
        if bound <= limit:
            starts = [0, *stop[:-1].tolist()]
            cut = zip(starts, stop.tolist(), device.tolist(), strict=True)
            deals.append(Deal(bound, tuple(Stage(*stage) for stage in cut)))
    return sorted(deals, key=lambda deal: (deal.bound, len(deal.stages))), limit


def warm_up() -> None:
    """Have everything compiled or read from the cache."""
    profile = Profile("", 1, (LayerCost("", "", 1.0, 1.0, 1.0, 2.0),) * 2)
    deals_below(make_costs(profile, uniform(2), 1, 2), math.inf, 0.0)


@compiled
def walk(costs: Any, limit: float) -> Any:
    """Number, stops, devices and sizes of the deals up to `limit`; number -1: too many."""
    num_layers, num_devices = costs.seconds.shape[1] - 1, len(costs.slowness)
    depth = min(costs.most_stages, num_layers)
    stops = np.zeros((MOST_DEALS, depth), np.int64)
    devices = np.zeros((MOST_DEALS, depth), np.int64)
    sizes = np.zeros(MOST_DEALS, np.int64)
    count, looked = 0, 0
    # What is known before stage s: work and begin of each device, bytes, and the way so far.
    load, begin = np.zeros((depth + 1, num_devices)), np.full((depth + 1, num_devices), np.inf)
    held = np.zeros((depth + 1, num_devices))
    reach = np.zeros(depth + 1)
    stop, device = np.zeros(depth, np.int64), np.full(depth, -1)
    s = 0
    stop[0] = 1
    while s >= 0:
        start = stop[s - 1] if s > 0 else 0
        device[s] += 1
        if device[s] == num_devices:
            device[s] = 0
            stop[s] += 1
        if stop[s] > num_layers:
            s -= 1
            continue
        looked += 1
        if looked > MOST_LOOKED_AT:
            return -1, stops, devices, sizes
        if not _add(costs, limit, s, start, stop, device, load, begin, held, reach):
            continue
        if stop[s] < num_layers:
            if s + 1 < depth:
                s += 1
                stop[s], device[s] = stop[s - 1] + 1, -1
            continue
        if count == MOST_DEALS:
            return -1, stops, devices, sizes
        stops[count], devices[count], sizes[count] = stop, device, s + 1
        count += 1
    return count, stops, devices, sizes


@compiled
def _add(
    costs: Any,
    limit: float,
    s: int,
    start: int,
    stop: Any,
    device: Any,
    load: Any,
    begin: Any,
    held: Any,
    reach: Any,
) -> bool:
    """Put stage s on its device; whether the step may still end by `limit`."""
    d, end, m = device[s], stop[s], costs.num_microbatches
    if begin[s, d] == np.inf:
        for other in range(d):
            if costs.alike[other] == costs.alike[d] and begin[s, other] == np.inf:
                return False
    load[s + 1], begin[s + 1], held[s + 1] = load[s], begin[s], held[s]
    slow, before = costs.slowness[d], reach[s]
    if s > 0 and device[s - 1] != d:
        load[s + 1, d] += m * (costs.send + costs.receive)
        load[s + 1, device[s - 1]] += m * (costs.send + costs.receive)
        before += costs.send + costs.hop[start - 1, device[s - 1], d] + costs.receive
    work = costs.seconds[:, end] - costs.seconds[:, start] + costs.extra
    load[s + 1, d] += slow * (
        m * (work[0] + min(work[1], work[2] + work[3])) + costs.update[end] - costs.update[start]
    )
    begin[s + 1, d] = min(begin[s, d], before - (costs.receive if s > 0 else 0.0))
    reach[s + 1] = before + slow * work[0]
    held[s + 1, d] += costs.state[end] - costs.state[start]
    held[s + 1, d] += costs.saved[end] - costs.saved[start]
    return held[s + 1, d] - costs.twice <= costs.memory[d] and _in_time(
        costs, limit, end, load[s + 1], begin[s + 1], reach[s + 1]
    )


@compiled
def _in_time(costs: Any, limit: float, end: int, load: Any, begin: Any, reach: float) -> bool:
    """Whether each device can do what it has, and all of them what is left."""
    last, m = costs.seconds.shape[1] - 1, costs.num_microbatches
    work = costs.seconds[:, last] - costs.seconds[:, end]
    left = m * (work[0] + min(work[1], work[2] + work[3])) + costs.update[last] - costs.update[end]
    room = 0.0
    for d in range(len(load)):
        free = limit - load[d] - min(begin[d], reach)
        if free < 0 and load[d] > 0:
            return False
        room += max(free, 0.0) / costs.slowness[d]
    return left <= room * (1 + 1e-12)


@compiled
def preemptive(costs: Any, stop: Any, device: Any) -> float:
    """What the step takes at least if every device could interrupt its work at no cost."""
    num_stages, m, num_devices = len(stop), costs.num_microbatches, len(costs.slowness)
    seconds, hop, finish = _stage_seconds(costs, stop, device)
    head = _heads(seconds, hop, m)
    tail = _tails(seconds, hop, finish, device, m)
    bound = 0.0
    for d in range(num_devices):
        count = 3 * m * np.sum(device == d)
        jobs = np.empty((count, 3))
        row = 0
        for s in range(num_stages):
            if device[s] == d:
                for k in range(3):
                    for i in range(m):
                        jobs[row, 0], jobs[row, 1] = head[k, s, i], seconds[k, s]
                        jobs[row, 2] = tail[k, s, i]
                        row += 1
        bound = max(bound, _one_machine(jobs))
    return bound


@compiled
def _stage_seconds(costs: Any, stop: Any, device: Any) -> Any:
    """(3, S) seconds of F, G, W with both ends; (S,) from stage s - 1; (D,) at the end."""
    num_stages = len(stop)
    seconds, hop = np.zeros((3, num_stages)), np.zeros(num_stages)
    finish = np.zeros(len(costs.slowness))
    start = 0
    for s in range(num_stages):
        d, end = device[s], stop[s]
        slow = costs.slowness[d]
        work = (costs.seconds[:, end] - costs.seconds[:, start] + costs.extra) * slow
        seconds[F, s] += work[0]
        seconds[G, s] += min(work[1], work[2])
        seconds[W, s] = min(work[1], work[2] + work[3]) - min(work[1], work[2])
        finish[d] += (costs.update[end] - costs.update[start]) * slow
        if s > 0 and device[s - 1] != d:
            hop[s] = costs.hop[start - 1, device[s - 1], d]
            seconds[F, s] += costs.receive
            seconds[F, s - 1] += costs.send
            seconds[G, s] += costs.send
            seconds[G, s - 1] += costs.receive
        start = end
    return seconds, hop, finish


@compiled
def _heads(seconds: Any, hop: Any, m: int) -> Any:
    """(3, S, m) before which nothing can begin: the longest way to it."""
    num_stages = seconds.shape[1]
    head = np.zeros((3, num_stages, m))
    for i in range(m):
        for s in range(num_stages):
            if i > 0:
                head[F, s, i] = head[F, s, i - 1] + seconds[F, s]
            if s > 0:
                there = head[F, s - 1, i] + seconds[F, s - 1] + hop[s]
                head[F, s, i] = max(head[F, s, i], there)
        for s in range(num_stages - 1, -1, -1):
            head[G, s, i] = head[F, s, i] + seconds[F, s]
            if i > 0:
                head[G, s, i] = max(head[G, s, i], head[G, s, i - 1] + seconds[G, s])
                head[W, s, i] = head[W, s, i - 1] + seconds[W, s]
            if s + 1 < num_stages:
                there = head[G, s + 1, i] + seconds[G, s + 1] + hop[s + 1]
                head[G, s, i] = max(head[G, s, i], there)
            head[W, s, i] = max(head[W, s, i], head[G, s, i] + seconds[G, s])
    return head


@compiled
def _tails(seconds: Any, hop: Any, finish: Any, device: Any, m: int) -> Any:
    """(3, S, m) what must follow after it: the longest way to the end of the step."""
    num_stages = seconds.shape[1]
    tail = np.zeros((3, num_stages, m))
    for i in range(m - 1, -1, -1):
        for s in range(num_stages):
            tail[W, s, i] = finish[device[s]]
            if i + 1 < m:
                tail[W, s, i] = tail[W, s, i + 1] + seconds[W, s]
                tail[G, s, i] = tail[G, s, i + 1] + seconds[G, s]
            tail[G, s, i] = max(tail[G, s, i], tail[W, s, i] + seconds[W, s])
            if s > 0:
                follows = hop[s] + seconds[G, s - 1] + tail[G, s - 1, i]
                tail[G, s, i] = max(tail[G, s, i], follows)
        for s in range(num_stages - 1, -1, -1):
            tail[F, s, i] = seconds[G, s] + tail[G, s, i]
            if i + 1 < m:
                tail[F, s, i] = max(tail[F, s, i], tail[F, s, i + 1] + seconds[F, s])
            if s + 1 < num_stages:
                follows = hop[s + 1] + seconds[F, s + 1] + tail[F, s + 1, i]
                tail[F, s, i] = max(tail[F, s, i], follows)
    return tail


@compiled
def _one_machine(jobs: Any) -> float:
    """The largest end plus tail where the longest tail always runs first.

    `jobs` has rows of head, seconds, tail.
    """
    order = np.argsort(jobs[:, 0])
    left = jobs[order, 1]
    now, bound, known, done = 0.0, 0.0, 0, 0
    ready = np.zeros(len(jobs), np.bool_)
    while done < len(jobs):
        while known < len(jobs) and jobs[order[known], 0] <= now:
            ready[known] = True
            known += 1
        best = -1
        for j in range(known):
            if ready[j] and (best < 0 or jobs[order[j], 2] > jobs[order[best], 2]):
                best = j
        if best < 0:
            now = jobs[order[known], 0]
            continue
        end = now + left[best]
        if known < len(jobs) and end > jobs[order[known], 0]:
            left[best] = end - jobs[order[known], 0]
            now = jobs[order[known], 0]
            continue
        now = end
        ready[best] = False
        done += 1
        bound = max(bound, now + jobs[order[best], 2])
    return bound
