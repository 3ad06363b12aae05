"""What the search reads: a profile, a cluster and a number of micro-batches as arrays.

The kernels look at nothing else. `price` here is `adaptis.costs.price` in array land: prefix sums
over layers, so that a stage costs two look-ups whatever its length; a test holds the two equal.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np

from adaptis.costs import price as price_plan
from adaptis.kernels import compiled
from adaptis.model import HEAD as HEAD_LAYER
from adaptis.plan import Plan, Stage
from adaptis.rows import B, F, I, W

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from adaptis.cluster import Cluster
    from adaptis.profile import Profile

# What the planner may decide; columns of `Instance.decide`.
DECISIONS = ("partition", "placement", "schedule", "recompute", "head")
PARTITION, PLACEMENT, SCHEDULE, RECOMPUTE, HEAD = range(5)
PLANNED = DECISIONS[:HEAD]

# For what the inner loops call: handing over arrays costs more than such a helper does with them.
inlined = numba.njit(inline="always", nogil=True)


class Head(NamedTuple):
    """The last layer dealt out to all devices, with one sum a micro-batch."""

    scores: Any  # (D,) seconds of S
    gradient: Any  # (D,) seconds of T
    update: Any  # (D,) seconds of the optimizer
    share: float  # seconds to hand the last stage's output to all
    sum: float  # and to add up what S leaves
    input: float  # bytes of that output
    saved: float  # bytes from S to T, with the input
    state: float  # bytes of parameters, gradients, optimizer
    workspace: float


class Instance(NamedTuple):
    """One planning problem; L layers, D devices. Arrays are `Any`: numba knows their types."""

    weights: Any  # (m,) of the micro-batches, in the order in which they pass
    total: float  # of the weights
    heaviest: float
    seconds: Any  # (4, L + 1) prefix sums of F, B, I, W at speed 1
    extra: Any  # (4,) seconds that each instruction adds
    update: Any  # (L + 1,) prefix sums of the optimizer's seconds
    sizes: Any  # (3, L + 1) prefix sums of bytes: state, saved, saved for W
    output: Any  # (L,) bytes handed on
    workspace: Any  # (L,) bytes held only while a layer computes; empty where there are none
    slowness: Any  # (D,)
    memory: Any  # (D,) bytes, inf where unlimited
    node: Any  # (D,)
    link: Any  # (2, 2) latency and seconds per byte, [within, between] nodes
    send: float
    receive: float
    overlap: bool  # whether devices compute while they transfer
    shared_offsets: Any  # (K + 1,) the layers of shared parameter k
    shared_layers: Any
    shared_bytes: Any  # (K,)
    shared_seconds: Any  # (K,) of the sum itself
    shared_state: Any  # (K,) with gradient and optimizer
    head: Head  # the last layer, if it is sharded over all devices
    decide: Any  # (5,) which of DECISIONS are open
    even: Any  # (n, n) row k: where k + 1 even stages end; empty where the cut is open

    @property
    def num_microbatches(self) -> int:
        """How many micro-batches a step has."""
        return len(self.weights)


class Tables(NamedTuple):
    """What each of N stages costs on its device, per micro-batch.

    Where the head is sharded, the last D stages are its parts: F is S, B is T.
    """

    device: Any  # (N,)
    seconds: Any  # (4, N)
    once: Any  # (4, N) what of it does not grow with the weight
    busy: Any  # (2, N) seconds on the link: of the output, of the input gradient
    latency: Any  # (2, N)
    remote: Any  # (2, N) whether they cross devices
    input: Any  # (N,) bytes
    received: Any  # (2, N) bytes that F, and B or I, get from other devices
    saved: Any  # (N,) bytes from F to B or I
    kept: Any  # (N,) bytes from I to W
    static: Any  # (D,) bytes held throughout
    update: Any  # (D,) seconds at the end of the step


def make_instance(
    profile: Profile,
    cluster: Cluster,
    num_microbatches: int,
    spare: float = 0.0,
    decide: Collection[str] = DECISIONS,
    even: NDArray[np.int64] | None = None,
    weights: Sequence[float] = (),
) -> Instance:
    """The arrays of one planning problem; `spare` bytes of each device stay free.

    Micro-batches are equal where no `weights` are given.
    """

    def prefix(name: str) -> Any:
        values = [getattr(layer, name) for layer in profile.layers]
        return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])

    links = (cluster.within_node, cluster.between_nodes)
    workspace = np.array([layer.workspace_bytes for layer in profile.layers], dtype=np.float64)
    extra = profile.overheads
    weights = weights or (1.0,) * num_microbatches
    ops = ("forward", "backward", "backward_input", "backward_weight")
    return Instance(
        weights=np.array(weights, dtype=np.float64),
        total=float(sum(weights)),
        heaviest=float(max(weights)),
        seconds=np.stack([prefix(name) for name in ops]),
        extra=np.array([getattr(extra, name) for name in ops], dtype=np.float64),
        update=prefix("update"),
        sizes=np.stack(
            [prefix(n) for n in ("state_bytes", "saved_bytes", "saved_weight_bytes")],
        ),
        output=np.array([layer.output_bytes for layer in profile.layers], dtype=np.float64),
        workspace=workspace if workspace.any() else workspace[:0],
        slowness=np.array([1.0 / device.speed for device in cluster.devices]),
        memory=np.array([device.memory_bytes - spare for device in cluster.devices]),
        node=np.array([device.node for device in cluster.devices], dtype=np.int64),
        link=np.array([[x.latency for x in links], [1.0 / x.bandwidth for x in links]]),
        send=float(extra.send),
        receive=float(extra.receive),
        overlap=cluster.overlap,
        shared_offsets=np.cumsum([0, *(len(s.layers) for s in profile.shared)]).astype(np.int64),
        shared_layers=np.array([i for s in profile.shared for i in s.layers], dtype=np.int64),
        shared_bytes=np.array([s.bytes for s in profile.shared], dtype=np.float64),
        shared_seconds=np.array([s.seconds for s in profile.shared], dtype=np.float64),
        shared_state=np.array([profile.shared_state(s) for s in profile.shared], dtype=np.float64),
        head=_make_head(profile, cluster),
        decide=_open(profile, cluster, decide),
        even=np.zeros((0, 0), dtype=np.int64) if even is None else even,
    )


def _open(profile: Profile, cluster: Cluster, decide: Collection[str]) -> Any:
    """(5,) what is to be decided, as far as there is a choice."""
    result = np.array([name in decide for name in DECISIONS])
    limited = any(device.memory_bytes < math.inf for device in cluster.devices)
    result[RECOMPUTE] &= limited and any(layer.saved_bytes for layer in profile.layers)
    result[HEAD] &= can_shard(profile, cluster)
    return result


def can_shard(profile: Profile, cluster: Cluster) -> bool:
    """Whether the last layer is a vocabulary head, and there are devices to share it."""
    return (
        cluster.num_devices > 1 and profile.num_layers > 1 and profile.layers[-1].kind == HEAD_LAYER
    )


def _make_head(profile: Profile, cluster: Cluster) -> Head:
    """As `adaptis.costs` prices it, with one sum: the second one only makes the chain longer."""
    p, last, before = cluster.num_devices, profile.layers[-1], profile.num_layers - 1
    if not before:  # nothing would be left for the stages
        return Head(np.zeros(p), np.zeros(p), np.zeros(p), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    plan = Plan(1, (Stage(0, before, 0),), ((),) * p, head_reductions=1)
    head = price_plan(plan, profile, cluster).head
    return Head(
        scores=head.scores,
        gradient=head.gradient,
        update=np.array([last.update / p / device.speed for device in cluster.devices]),
        share=float(head.share),
        sum=float(head.sum_s),
        input=float(head.input),
        saved=float(head.saved + head.input),
        state=float(last.state_bytes / p),
        workspace=float(last.workspace_bytes / p),
    )


@compiled
def is_sharded(instance: Any, stop: Any) -> bool:
    """Whether the last layer is in no stage: dealt out to all devices."""
    return stop[-1] < len(instance.output)


@compiled
def _holders(instance: Any, k: int, stop: Any, device: Any) -> Any:
    """(D,) how many layers with shared parameter k each device holds in its stages."""
    held = np.zeros(len(instance.slowness), np.int64)
    for i in range(instance.shared_offsets[k], instance.shared_offsets[k + 1]):
        layer = instance.shared_layers[i]
        if layer < stop[-1]:
            held[device[np.searchsorted(stop, layer, side="right")]] += 1
    return held


@compiled
def price(instance: Any, stop: Any, device: Any) -> Any:
    """The tables of the stages that end before layer `stop[s]` and run on `device[s]`."""
    num_stages, num_devices = len(stop), len(instance.slowness)
    count = num_stages + (num_devices if is_sharded(instance, stop) else 0)
    seconds, once, received = np.empty((4, count)), np.empty((4, count)), np.zeros((2, count))
    busy, latency = np.zeros((2, count)), np.zeros((2, count))
    remote = np.zeros((2, count), np.bool_)
    inputs, saved, kept = np.zeros(count), np.empty(count), np.zeros(count)
    static, update = np.zeros(num_devices), np.zeros(num_devices)
    homes = np.empty(count, np.int64)
    homes[:num_stages] = device
    start = 0
    for s in range(num_stages):
        end, d = stop[s], device[s]
        for k in range(4):
            work = instance.seconds[k, end] - instance.seconds[k, start] + instance.extra[k]
            seconds[k, s] = work * instance.slowness[d]
            once[k, s] = instance.extra[k] * instance.slowness[d]
        static[d] += instance.sizes[0, end] - instance.sizes[0, start]
        inputs[s] = instance.output[start - 1] if start > 0 else 0.0
        saved[s] = instance.sizes[1, end] - instance.sizes[1, start]
        kept[s] = instance.sizes[2, end] - instance.sizes[2, start]
        update[d] += (instance.update[end] - instance.update[start]) * instance.slowness[d]
        if s + 1 < num_stages and device[s + 1] != d:
            between = 0 if instance.node[device[s + 1]] == instance.node[d] else 1
            # The gradient that comes back is as large as the output that went.
            onto = instance.output[end - 1] * instance.link[1, between]
            busy[0, s], busy[1, s + 1] = onto, onto
            latency[0, s], latency[1, s + 1] = instance.link[0, between], instance.link[0, between]
            remote[0, s], remote[1, s + 1] = True, True
            received[1, s] = received[0, s + 1] = instance.output[end - 1]
        start = end
    _add_workspace(instance, stop, device, static)
    for k in range(len(instance.shared_bytes)):
        held = _holders(instance, k, stop, device)
        for d in range(num_devices):
            static[d] -= max(held[d] - 1, 0) * instance.shared_state[k]
    tables = Tables(
        homes, seconds, once, busy, latency, remote, inputs, received, saved, kept, static, update
    )
    if count > num_stages:
        _price_head(instance, tables, num_stages)
    return tables


@compiled
def _price_head(instance: Any, tables: Any, first: int) -> None:
    """The parts of a sharded head, from stage `first` on."""
    head = instance.head
    for d in range(len(tables.static)):
        s = first + d
        tables.device[s] = d
        tables.seconds[F, s], tables.seconds[B, s] = head.scores[d], head.gradient[d]
        tables.seconds[I, s], tables.seconds[W, s] = head.gradient[d], 0.0
        tables.once[:, s] = instance.extra[W] * instance.slowness[d]
        tables.once[F, s] = instance.extra[F] * instance.slowness[d]
        tables.received[0, s] = head.input if d != tables.device[first - 1] else 0.0
        tables.saved[s] = head.saved
        tables.static[d] += head.state
        tables.update[d] += head.update[d]


@compiled
def _add_workspace(instance: Any, stop: Any, device: Any, static: Any) -> None:
    """Room for the largest workspace of each device's layers."""
    workspace, start = np.zeros(len(static)), 0
    if is_sharded(instance, stop):
        workspace += instance.head.workspace
    if len(instance.workspace):
        for s in range(len(stop)):
            most = np.max(instance.workspace[start : stop[s]])
            workspace[device[s]] = max(workspace[device[s]], most)
            start = stop[s]
    static += workspace


@compiled
def finish(instance: Any, stop: Any, device: Any, update: Any, last: Any) -> float:
    """The end of the step: `last` computations, shared gradients, then the optimizer."""
    head = len(instance.output) - 1 if is_sharded(instance, stop) else -1
    for k in range(len(instance.shared_bytes)):
        held = _holders(instance, k, stop, device)
        for i in range(instance.shared_offsets[k], instance.shared_offsets[k + 1]):
            if instance.shared_layers[i] == head:
                held[:] = 1
        _share(instance, k, held, last)
    return np.max(last + update)


@compiled
def _share(instance: Any, k: int, held: Any, last: Any) -> None:
    """All holders wait for the latest, for both ways over the slowest link from the first, and sum.

    `held` says how often each device holds shared parameter `k`.
    """
    owners = np.flatnonzero(held)
    if len(owners) < 2:
        return
    slowest, latest = 0.0, 0.0
    for d in owners:
        latest = max(latest, last[d])
        if d != owners[0]:
            between = 0 if instance.node[d] == instance.node[owners[0]] else 1
            seconds = (
                instance.link[0, between] + instance.shared_bytes[k] * instance.link[1, between]
            )
            slowest = max(slowest, seconds)
    for d in owners:
        last[d] = latest + 2 * slowest + instance.shared_seconds[k]
