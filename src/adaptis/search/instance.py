"""What the search reads: a profile, a cluster and a number of micro-batches as arrays.

The kernels look at nothing else. `price` here is `adaptis.costs.price` in array land: prefix sums
over layers, so that a stage costs two look-ups whatever its length; a test holds the two equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np

from adaptis.kernels import compiled
from adaptis.lower import LOOKAHEAD

if TYPE_CHECKING:
    from adaptis.cluster import Cluster
    from adaptis.profile import Profile

F, B, I, W = 0, 1, 2, 3  # noqa: E741 - the letters of the field; as in `adaptis.timeline.OPS`

# For what the inner loops call: handing over arrays costs more than such a helper does with them.
inlined = numba.njit(inline="always", nogil=True)


class Instance(NamedTuple):
    """One planning problem; L layers, D devices. Arrays are `Any`: numba knows their types."""

    num_microbatches: int
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
    shared_offsets: Any  # (K + 1,) the layers of shared parameter k
    shared_layers: Any
    shared_bytes: Any  # (K,)
    shared_state: Any  # (K,) with gradient and optimizer


class Tables(NamedTuple):
    """What each of S stages costs on its device, per micro-batch."""

    seconds: Any  # (4, S)
    busy: Any  # (2, S) seconds on the link: of the output, of the input gradient
    latency: Any  # (2, S)
    remote: Any  # (2, S) whether they cross devices
    saved: Any  # (S,) bytes from F to B or I
    kept: Any  # (S,) bytes from I to W
    static: Any  # (D,) bytes held throughout
    update: Any  # (D,) seconds at the end of the step


def make_instance(
    profile: Profile, cluster: Cluster, num_microbatches: int, spare: float = 0.0
) -> Instance:
    """The arrays of one planning problem; `spare` bytes of each device stay free."""

    def prefix(name: str) -> Any:
        values = [getattr(layer, name) for layer in profile.layers]
        return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])

    links = (cluster.within_node, cluster.between_nodes)
    workspace = np.array([layer.workspace_bytes for layer in profile.layers], dtype=np.float64)
    extra = profile.overheads
    ops = ("forward", "backward", "backward_input", "backward_weight")
    return Instance(
        num_microbatches=num_microbatches,
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
        shared_offsets=np.cumsum([0, *(len(s.layers) for s in profile.shared)]).astype(np.int64),
        shared_layers=np.array([i for s in profile.shared for i in s.layers], dtype=np.int64),
        shared_bytes=np.array([s.bytes for s in profile.shared], dtype=np.float64),
        shared_state=np.array([profile.shared_state(s) for s in profile.shared], dtype=np.float64),
    )


@compiled
def _holders(instance: Any, k: int, stop: Any, device: Any) -> Any:
    """(D,) how many layers with shared parameter k each device holds."""
    held = np.zeros(len(instance.slowness), np.int64)
    for i in range(instance.shared_offsets[k], instance.shared_offsets[k + 1]):
        held[device[np.searchsorted(stop, instance.shared_layers[i], side="right")]] += 1
    return held


@compiled
def price(instance: Any, stop: Any, device: Any) -> Any:
    """The tables of the stages that end before layer `stop[s]` and run on `device[s]`."""
    num_stages, num_devices = len(stop), len(instance.slowness)
    seconds = np.empty((4, num_stages))
    busy, latency = np.zeros((2, num_stages)), np.zeros((2, num_stages))
    remote = np.zeros((2, num_stages), np.bool_)
    saved, kept = np.empty(num_stages), np.empty(num_stages)
    static, update = np.zeros(num_devices), np.zeros(num_devices)
    start = 0
    for s in range(num_stages):
        end, d = stop[s], device[s]
        for k in range(4):
            work = instance.seconds[k, end] - instance.seconds[k, start] + instance.extra[k]
            seconds[k, s] = work * instance.slowness[d]
        static[d] += instance.sizes[0, end] - instance.sizes[0, start]
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
        start = end
    _reserve(instance, stop, device, static)
    for k in range(len(instance.shared_bytes)):
        held = _holders(instance, k, stop, device)
        for d in range(num_devices):
            static[d] -= max(held[d] - 1, 0) * instance.shared_state[k]
    return Tables(seconds, busy, latency, remote, saved, kept, static, update)


@compiled
def _reserve(instance: Any, stop: Any, device: Any, static: Any) -> None:
    """Room for the largest workspace, and for as many received values as are posted ahead."""
    num_devices, last = len(static), len(stop) - 1
    value, workspace = np.zeros(num_devices), np.zeros(num_devices)
    start = 0
    for s in range(len(stop)):
        d = device[s]
        if s > 0 and device[s - 1] != d:
            value[d] = max(value[d], instance.output[start - 1])
        if s < last and device[s + 1] != d:
            value[d] = max(value[d], instance.output[stop[s] - 1])
        if len(instance.workspace):
            workspace[d] = max(workspace[d], np.max(instance.workspace[start : stop[s]]))
        start = stop[s]
    static += (LOOKAHEAD + 1) * value + workspace


@compiled
def finish(instance: Any, stop: Any, device: Any, update: Any, last: Any) -> float:
    """The end of the step: `last` computations, shared gradients, then the optimizer."""
    for k in range(len(instance.shared_bytes)):
        _share(instance, instance.shared_bytes[k], _holders(instance, k, stop, device), last)
    return np.max(last + update)


@compiled
def _share(instance: Any, num_bytes: float, held: Any, last: Any) -> None:
    """All holders wait for the latest, then for both ways over the slowest link from the first."""
    owners = np.flatnonzero(held)
    if len(owners) < 2:
        return
    slowest, latest = 0.0, 0.0
    for d in owners:
        latest = max(latest, last[d])
        if d != owners[0]:
            between = 0 if instance.node[d] == instance.node[owners[0]] else 1
            seconds = instance.link[0, between] + num_bytes * instance.link[1, between]
            slowest = max(slowest, seconds)
    for d in owners:
        last[d] = latest + 2 * slowest
