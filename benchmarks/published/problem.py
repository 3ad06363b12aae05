"""One planning problem as the published generator sees it: stage costs from layer costs.

Seconds of a stage are sums over its layers, an output that crosses devices arrives after the
link's latency and occupies the link for its bytes. Shared parameters are left to the simulator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from adaptis.cluster import Cluster
    from adaptis.profile import Profile

SECONDS = ("forward", "backward", "backward_input", "backward_weight")
BYTES = ("state_bytes", "saved_bytes", "saved_weight_bytes")


class Problem(NamedTuple):
    """Prefix sums over layers; and what each device is like."""

    num_microbatches: int
    seconds: NDArray[np.float64]  # (4, L + 1) of `SECONDS`, at speed 1
    extra: NDArray[np.float64]  # (4,) that each instruction adds
    update: NDArray[np.float64]  # (L + 1,)
    bytes: NDArray[np.float64]  # (3, L + 1) of `BYTES`
    output: NDArray[np.float64]  # (L,) bytes handed on
    work: NDArray[np.float64]  # (L,) seconds of F, I and W
    slowness: NDArray[np.float64]  # (D,)
    memory: NDArray[np.float64]  # (D,)
    latency: NDArray[np.float64]  # (D, D)
    per_byte: NDArray[np.float64]  # (D, D)


class Priced(NamedTuple):
    """What each of S stages costs on its device, per micro-batch."""

    seconds: Any  # (S, 3) F, B or I, W
    wire: Any  # (2, S) seconds on the link: of the output, of the input gradient
    delay: Any  # (2, S) and how much later it arrives
    saved: Any  # (S,) bytes from F to B or I
    kept: Any  # (S,) bytes from I to W
    static: Any  # (D,) bytes held throughout
    update: Any  # (D,) seconds at the end of the step


def make_problem(profile: Profile, cluster: Cluster, num_microbatches: int) -> Problem:
    """The arrays of one planning problem."""

    def prefix(name: str) -> NDArray[np.float64]:
        values = [getattr(layer, name) for layer in profile.layers]
        return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])

    count = cluster.num_devices
    links = [[cluster.link(a, b) for b in range(count)] for a in range(count)]
    layers = profile.layers
    return Problem(
        num_microbatches=num_microbatches,
        seconds=np.stack([prefix(name) for name in SECONDS]),
        extra=np.array([getattr(profile.overheads, name) for name in SECONDS], dtype=np.float64),
        update=prefix("update"),
        bytes=np.stack([prefix(name) for name in BYTES]),
        output=np.array([layer.output_bytes for layer in layers], dtype=np.float64),
        work=np.array([x.forward + x.backward_input + x.backward_weight for x in layers]),
        slowness=np.array([1.0 / device.speed for device in cluster.devices]),
        memory=np.array([device.memory_bytes for device in cluster.devices]),
        latency=np.array([[link.latency for link in row] for row in links]),
        per_byte=np.array([[1.0 / link.bandwidth for link in row] for row in links]),
    )


def price(problem: Problem, stop: Any, device: Any, split: bool) -> Priced:
    """The costs of the stages that end before layer stop[s] and run on device[s]."""
    start = np.concatenate([[0], stop[:-1]])
    slow = problem.slowness[device]
    names = (0, 2, 3) if split else (0, 1)
    seconds = np.zeros((len(stop), 3))
    for k, row in enumerate(names):
        sums = problem.seconds[row, stop] - problem.seconds[row, start] + problem.extra[row]
        seconds[:, k] = sums * slow
    wire, delay = np.zeros((2, len(stop))), np.zeros((2, len(stop)))
    a, b = device[:-1], device[1:]
    onto = problem.output[stop[:-1] - 1]
    wire[0, :-1], delay[0, :-1] = onto * problem.per_byte[a, b], problem.latency[a, b]
    wire[1, 1:], delay[1, 1:] = onto * problem.per_byte[b, a], problem.latency[b, a]
    wire[0, :-1][a == b] = delay[0, :-1][a == b] = 0.0
    wire[1, 1:][a == b] = delay[1, 1:][a == b] = 0.0
    state, saved, kept = problem.bytes[:, stop] - problem.bytes[:, start]
    static, update = np.zeros(len(problem.memory)), np.zeros(len(problem.memory))
    np.add.at(static, device, state)
    np.add.at(update, device, (problem.update[stop] - problem.update[start]) * slow)
    return Priced(seconds, wire, delay, np.maximum(saved, kept), kept, static, update)
