"""What each stage costs on its device: a profile, a plan and a cluster, multiplied out once.

`StageCosts` holds arrays over stages; `price_rows` gives every row of a program its seconds and
bytes. A `Profile` is never looked at inside a loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adaptis.kernels import DELAY, GIVE, SECONDS, TAKE
from adaptis.program import OPS
from adaptis.rows import (
    GATHER,
    OFFLOAD,
    REDUCE,
    RELOAD,
    SHARE,
    SUM_S,
    SUM_T,
    B,
    F,
    I,
    R,
    S,
    T,
    W,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from adaptis.cluster import Cluster, Link
    from adaptis.plan import Plan, Stage
    from adaptis.profile import Profile
    from adaptis.rows import Rows

    Floats = NDArray[np.float64]

SUM_BYTES = 8  # what S leaves for each token: the largest logit and the sum of exponentials


@dataclass(frozen=True, eq=False)
class StageCosts:
    """Seconds and bytes per stage s and one micro-batch of weight 1; D devices, S stages.

    The overhead of an instruction is the part of its seconds that does not grow with the weight.
    """

    forward: Floats  # (S,)
    backward: Floats
    backward_input: Floats
    backward_weight: Floats
    overheads: Floats  # (operations, D) seconds of the above, and of S and T, at any weight
    recomputed: NDArray[np.bool_]  # whether the stage keeps only its input
    overlapped: Floats  # seconds hidden where F is fused with a B as long
    input: Floats  # bytes of the stage's input
    output: Floats  # bytes handed to the next stage
    saved: Floats  # bytes from F or R to B or I
    saved_weight: Floats  # bytes from I to W: part of the above, and what goes beyond it
    carried: Floats  # bytes from slice to slice
    forward_busy: Floats  # seconds that stage s's output occupies its link, 0 on one device
    forward_latency: Floats  # and the seconds on top until it arrives
    backward_busy: Floats  # likewise for the input gradient of stage s, towards stage s - 1
    backward_latency: Floats
    send: float  # seconds that a transfer costs the sender
    receive: float  # and the receiver
    overlap: bool  # whether devices compute while they transfer
    copy: Floats  # (S,) seconds from the device to the host, or back, without the latency
    copy_latency: float
    gather: Floats  # (S,) seconds to make a sharded stage's parameters whole
    reduce: Floats  # (S + 1,) seconds to sum its gradients over copies and replicas; last: head
    whole: Floats  # (S,) bytes that gathering takes
    head: Head  # where it is sharded
    static_bytes: Floats  # (D,) parameters, gradients, optimizer, workspace
    limits: Floats  # (D,) bytes that the devices have
    update: Floats  # (D,) seconds of the optimizer's step
    norm: float  # seconds to agree on the norm of all gradients
    shared: tuple[
        tuple[tuple[int, ...], float], ...
    ]  # devices that sum a shared gradient, and its seconds

    @property
    def num_devices(self) -> int:
        """How many devices there are."""
        return len(self.static_bytes)


class Head(NamedTuple):
    """A head sharded over all devices, per micro-batch of weight 1; all 0 where none is."""

    scores: Floats  # (D,) seconds of S
    gradient: Floats  # (D,) seconds of T
    share: float  # seconds to hand the last stage's output to all
    sum_s: float  # seconds of the sum after S
    sum_t: float  # and after T
    input: float  # bytes of that output
    saved: float  # bytes that a device keeps from S to T


def price(plan: Plan, profile: Profile, cluster: Cluster) -> StageCosts:
    """The costs of the stages of `plan` on `cluster`."""
    stages, extra = plan.stages, profile.overheads
    slowness = np.array([1.0 / cluster.devices[stage.device].speed for stage in stages])

    def total(name: str) -> Floats:
        prefix = np.concatenate(
            [[0.0], np.cumsum([getattr(layer, name) for layer in profile.layers])]
        )
        return np.array([prefix[stage.stop] - prefix[stage.start] for stage in stages])

    inputs = np.array(
        [profile.layers[s.start - 1].output_bytes if s.start else 0 for s in stages], dtype=float
    )
    outputs = np.array([profile.layers[s.stop - 1].output_bytes for s in stages], dtype=float)
    hops = [_hop(cluster, stages, outputs[s], s, s + 1) for s in range(len(stages))]
    back = [_hop(cluster, stages, inputs[s], s, s - 1) for s in range(len(stages))]
    parameters, saved = total("parameter_bytes"), total("saved_bytes")
    head = _head(plan, profile, cluster)
    return StageCosts(
        forward=(total("forward") + extra.forward) * slowness,
        backward=(total("backward") + extra.backward) * slowness,
        backward_input=(total("backward_input") + extra.backward_input) * slowness,
        backward_weight=(total("backward_weight") + extra.backward_weight) * slowness,
        overheads=_overheads(profile, cluster),
        recomputed=np.array([stage.recompute for stage in stages]),
        overlapped=total("overlapped") * slowness,
        input=inputs,
        output=outputs,
        saved=saved,
        saved_weight=total("saved_weight_bytes"),
        carried=total("carried_bytes"),
        forward_busy=np.array([busy for busy, _ in hops]),
        forward_latency=np.array([latency for _, latency in hops]),
        backward_busy=np.array([busy for busy, _ in back]),
        backward_latency=np.array([latency for _, latency in back]),
        send=extra.send,
        receive=extra.receive,
        overlap=cluster.overlap,
        copy=saved / cluster.host.bandwidth,
        copy_latency=cluster.host.latency,
        gather=np.array([_ring(cluster.between_replicas, b, plan.replicas, 1) for b in parameters]),
        reduce=_reductions(plan, profile, parameters, cluster),
        whole=parameters,
        head=head,
        static_bytes=_static(plan, profile, cluster, total("state_bytes")),
        limits=np.array([device.memory_bytes for device in cluster.devices]),
        update=_updates(plan, profile, cluster, total("update") * slowness),
        norm=2 * _slowest(cluster, range(cluster.num_devices), 0.0),
        shared=_shared(plan, profile, cluster),
    )


def _overheads(profile: Profile, cluster: Cluster) -> Floats:
    """(operations, D) seconds that an instruction takes whatever it computes."""
    extra, table = profile.overheads, np.zeros((len(OPS), cluster.num_devices))
    for codes, seconds in (
        ((F, R, S), extra.forward),
        ((B,), extra.backward),
        ((I,), extra.backward_input),
        ((W, T), extra.backward_weight),
    ):
        table[codes, :] = seconds
    return table / np.array([device.speed for device in cluster.devices])


def _static(plan: Plan, profile: Profile, cluster: Cluster, state: Floats) -> Floats:
    """(D,) bytes held throughout; a sharded stage holds its part of them."""
    part = np.array([plan.replicas if stage.sharded else 1 for stage in plan.stages])
    result = _per_device(cluster, plan.stages, state / part)
    result -= _held_twice(plan, profile, cluster)
    workspace = np.zeros(cluster.num_devices)
    for stage in plan.stages:
        most = max(layer.workspace_bytes for layer in profile.layers[stage.start : stage.stop])
        workspace[stage.device] = max(workspace[stage.device], most)
    if plan.head_reductions:
        last = profile.layers[-1]
        result += last.state_bytes / cluster.num_devices
        workspace = np.maximum(workspace, last.workspace_bytes / cluster.num_devices)
    return result + workspace


def _updates(plan: Plan, profile: Profile, cluster: Cluster, update: Floats) -> Floats:
    part = np.array([plan.replicas if stage.sharded else 1 for stage in plan.stages])
    result = _per_device(cluster, plan.stages, update / part)
    if plan.head_reductions:
        share = profile.layers[-1].update / cluster.num_devices
        result += np.array([share / device.speed for device in cluster.devices])
    return result


def _ring(link: Link, num_bytes: float, members: int, rounds: int) -> float:
    """A ring of `members`: one round gathers or scatters, two rounds sum and hand out."""
    if members < 2:
        return 0.0
    return rounds * (members - 1) * (link.latency + num_bytes / members / link.bandwidth)


def _reductions(plan: Plan, profile: Profile, parameters: Floats, cluster: Cluster) -> Floats:
    """(S + 1,) first the sum with the stage's other copies, then with the replicas.

    The last one is for a device's part of a sharded head.
    """
    length = len(plan.stages) // plan.copies
    result = np.zeros(len(plan.stages) + 1)
    for s, stage in enumerate(plan.stages):
        homes = {twin.device for twin in plan.stages[s % length :: length]}
        rounds = 1 if stage.sharded else 2
        result[s] = 2 * _slowest(cluster, sorted(homes), parameters[s])
        result[s] += _ring(cluster.between_replicas, parameters[s], plan.replicas, rounds)
    if plan.head_reductions:
        part = profile.layers[-1].parameter_bytes / cluster.num_devices
        result[-1] = _ring(cluster.between_replicas, part, plan.replicas, 2)
    return result


def _slowest(cluster: Cluster, devices: Sequence[int], num_bytes: float, hops: int = 1) -> float:
    """Seconds of `num_bytes` over the slowest link between `devices`, with so many latencies."""
    nodes = [cluster.devices[d].node for d in devices]
    kinds = len(set(nodes))
    used = [(cluster.between_nodes, kinds > 1), (cluster.within_node, kinds < len(nodes))]
    seconds = [
        hops * link.latency + num_bytes / link.bandwidth for link, is_used in used if is_used
    ]
    return max(seconds, default=0.0)


def _head(plan: Plan, profile: Profile, cluster: Cluster) -> Head:
    """S computes the logits and, with one reduction, the input gradient; T the rest.

    References: Yeung et al., "Balancing Pipeline Parallelism with Vocabulary Parallelism", MLSys
    2025, algorithms 1 (two reductions) and 2 (one).
    """
    p = cluster.num_devices
    if not plan.head_reductions:
        return Head(np.zeros(p), np.zeros(p), 0.0, 0.0, 0.0, 0.0, 0.0)
    last, extra, everyone = profile.layers[-1], profile.overheads, range(p)
    one = plan.head_reductions == 1
    scores = last.forward + (last.backward_input if one else 0.0)
    gradient = last.backward_weight + (0.0 if one else last.backward_input)
    slowness = np.array([1.0 / device.speed for device in cluster.devices])
    size = profile.layers[-2].output_bytes
    sums, rounds = SUM_BYTES * profile.tokens_per_microbatch, 2 * (p - 1)
    return Head(
        scores=(scores / p + extra.forward) * slowness,
        gradient=(gradient / p + extra.backward_weight) * slowness,
        share=_slowest(cluster, everyone, size, math.ceil(math.log2(p))),
        sum_s=rounds * _slowest(cluster, everyone, (sums + (size if one else 0)) / p),
        sum_t=0.0 if one else rounds * _slowest(cluster, everyone, size / p),
        input=size,
        saved=last.saved_bytes / p,
    )


def _hop(
    cluster: Cluster, stages: Sequence[Stage], size: float, s: int, other: int
) -> tuple[float, float]:
    """How long `size` bytes keep the link between two neighbours busy, and its latency."""
    if not 0 <= other < len(stages) or stages[s].device == stages[other].device:
        return 0.0, 0.0
    link = cluster.link(stages[s].device, stages[other].device)
    return size / link.bandwidth, link.latency


def _per_device(cluster: Cluster, stages: Sequence[Stage], values: Floats) -> Floats:
    result = np.zeros(cluster.num_devices)
    np.add.at(result, [stage.device for stage in stages], values)
    return result


def _held_twice(plan: Plan, profile: Profile, cluster: Cluster) -> Floats:
    """(D,) bytes of shared parameters that were counted for more than one layer of a device."""
    result, length = np.zeros(cluster.num_devices), len(plan.stages) // plan.copies
    for shared in profile.shared:
        for first in range(0, len(plan.stages), length):  # each copy of the model has its own
            most = np.zeros(cluster.num_devices)
            for stage in plan.stages[first : first + length]:
                part = profile.shared_state(shared) / (plan.replicas if stage.sharded else 1)
                held = part * sum(stage.start <= i < stage.stop for i in shared.layers)
                result[stage.device] += held
                most[stage.device] = max(most[stage.device], min(held, part))
            result -= most
    return result


def _shared(
    plan: Plan, profile: Profile, cluster: Cluster
) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Each parameter that layers on different devices share.

    Both ways over the slowest of their links, and the sum.
    """
    result = []
    for shared in profile.shared:
        owners = {
            stage.device
            for stage in plan.stages
            for layer in shared.layers
            if stage.start <= layer < stage.stop
        }
        if plan.head_reductions and profile.num_layers - 1 in shared.layers:
            owners = set(range(cluster.num_devices))
        if len(owners) > 1:
            seconds = 2 * _slowest(cluster, sorted(owners), shared.bytes) + shared.seconds
            result.append((tuple(sorted(owners)), seconds))
    return tuple(result)


class RowCosts(NamedTuple):
    """What `kernels.replay` and `kernels.peaks` read; N rows, n of them computations."""

    seconds: Floats  # (N, 4) TAKE, SECONDS, GIVE, DELAY
    taken: Floats  # (n,) bytes from a computation's start
    freed: Floats  # (n,) bytes given back at its end


def price_rows(rows: Rows, costs: StageCosts, weights: Floats) -> RowCosts:
    """The seconds and bytes of every row; `weights` of the micro-batches."""
    n = rows.num_computations
    heavy = weights[rows.microbatch]
    table = np.zeros((len(rows.op), 4))
    computing, moving = table[:n], table[n : n + rows.num_transfers]
    seconds, once = _compute_seconds(rows, costs)
    computing[:, SECONDS] = seconds * heavy[:n] + once * (1 - heavy[:n])
    hop, latency = _hops(rows, costs, heavy)
    received, sent = rows.transfer >= 0, rows.sent >= 0
    computing[received, TAKE] = costs.receive
    computing[sent, GIVE] = costs.send
    if costs.overlap:
        moving[:, SECONDS], moving[:, DELAY] = hop, latency
    else:
        # Both ends are busy with a transfer: its writer afterwards, its reader before it begins.
        whole = hop + latency
        moving[:, SECONDS], moving[:, DELAY] = whole, -whole
        computing[received, TAKE] += whole[rows.transfer[received] - n]
        computing[sent, GIVE] += whole[rows.sent[sent] - n]
        computing[sent, DELAY] = -whole[rows.sent[sent] - n]
    _fuse(rows, costs, heavy, computing)
    _price_beside(rows, costs, heavy, table, n + rows.num_transfers)
    return RowCosts(table, *_bytes(rows, costs, heavy))


def _compute_seconds(rows: Rows, costs: StageCosts) -> tuple[Floats, Floats]:
    """How long each computation takes for a micro-batch of weight 1, and the overhead in that."""
    table = np.zeros((len(OPS), len(costs.forward) + 1))  # the last stage is a sharded head
    for code, values in (
        (F, costs.forward),
        (B, costs.backward),
        (I, costs.backward_input),
        (W, costs.backward_weight),
        (R, costs.forward),
    ):
        table[code, :-1] = values
    columns = rows.columns
    result = table[columns.op, columns.stage]
    for code, values in ((S, costs.head.scores), (T, costs.head.gradient)):
        mine = np.flatnonzero(columns.op == code)
        result[mine] = values[rows.source[mine]]
    return result, costs.overheads[columns.op, rows.source[: rows.num_computations]]


def _hops(rows: Rows, costs: StageCosts, heavy: Floats) -> tuple[Floats, Floats]:
    """Seconds on the link and latency of each transfer."""
    n = rows.num_computations
    moving = slice(n, n + rows.num_transfers)
    stage, onwards = rows.stage[moving], rows.onwards
    busy = np.where(onwards, costs.forward_busy[stage], costs.backward_busy[stage])
    latency = np.where(onwards, costs.forward_latency[stage], costs.backward_latency[stage])
    return busy * heavy[moving], latency


def _fuse(rows: Rows, costs: StageCosts, heavy: Floats, table: Floats) -> None:
    """A fused pair takes less than its parts, which share the time in proportion.

    It takes all that it needs at its beginning and hands over all at its end.
    """
    partner = rows.columns.partner
    one = np.flatnonzero(partner > np.arange(len(partner)))
    if not len(one):
        return
    two = partner[one]
    both = table[one, SECONDS] + table[two, SECONDS]
    longer = np.maximum(table[one, SECONDS], table[two, SECONDS])
    stage = rows.columns.stage
    seconds = np.append(costs.overlapped, 0.0)  # a sharded head hides nothing
    hidden = np.minimum(seconds[stage[one]] * heavy[one], seconds[stage[two]] * heavy[two])
    fused = np.maximum(both - hidden, longer)
    share = np.divide(fused, both, out=np.ones_like(both), where=both > 0)
    table[one, SECONDS] *= share
    table[two, SECONDS] *= share
    table[one, TAKE] += table[two, TAKE]
    table[two, GIVE] += table[one, GIVE]
    table[two, DELAY] += table[one, DELAY]
    table[two, TAKE] = table[one, GIVE] = table[one, DELAY] = 0.0


def _price_beside(rows: Rows, costs: StageCosts, heavy: Floats, table: Floats, first: int) -> None:
    """Copies, networks and collectives."""
    head = costs.head
    for code, seconds in ((GATHER, costs.gather), (REDUCE, costs.reduce)):
        mine = first + np.flatnonzero(rows.op[first:] == code)
        table[mine, SECONDS] = seconds[rows.stage[mine]]
    for code in (OFFLOAD, RELOAD):
        mine = first + np.flatnonzero(rows.op[first:] == code)
        table[mine, SECONDS] = costs.copy[rows.stage[mine]] * heavy[mine]
        table[mine, DELAY] = costs.copy_latency
    for code, each in ((SHARE, head.share), (SUM_S, head.sum_s), (SUM_T, head.sum_t)):
        mine = first + np.flatnonzero(rows.op[first:] == code)
        table[mine, SECONDS] = each * heavy[mine]


def _bytes(rows: Rows, costs: StageCosts, heavy: Floats) -> tuple[Floats, Floats]:
    """What each computation takes at its start and gives back at its end.

    A received value is held from the moment its receive is posted to the end of its reader, the
    input of a sharded head to the end of T.
    """
    columns, n = rows.columns, rows.num_computations
    op, stage = columns.op, columns.stage
    taken_by, freed_by = _byte_tables(costs)
    taken, freed = taken_by[op, stage] * heavy[:n], freed_by[op, stage] * heavy[:n]
    if rows.layout.previous:
        _slices(rows, costs, heavy, taken, freed)
    received = np.flatnonzero((rows.transfer >= 0) & (columns.posted >= 0))
    size = np.where(op[received] == F, costs.input[stage[received]], costs.output[stage[received]])
    size = size * heavy[received]
    np.add.at(taken, columns.posted[received], size)
    freed[received] += size
    taking = np.flatnonzero((op == S) & (columns.posted >= 0))
    size = costs.head.input * heavy[taking]
    np.add.at(taken, columns.posted[taking], size)
    taken[taking] -= size  # T gives it back, and S has no more to take
    one = np.flatnonzero(columns.partner > np.arange(n))
    two = columns.partner[one]
    taken[one] += taken[two]  # a fused pair is one instruction: both parts are there throughout
    freed[two] += freed[one]
    taken[two] = freed[one] = 0.0
    return taken, freed


def _byte_tables(costs: StageCosts) -> tuple[Floats, Floats]:
    """By operation and stage, the sharded head last: bytes taken and given back."""
    taken = np.zeros((len(OPS), len(costs.saved) + 1))
    freed = np.zeros_like(taken)
    again = costs.recomputed
    taken[F, :-1] = np.where(again, costs.input, costs.saved)
    taken[R, :-1] = costs.saved
    # A recomputed stage still holds its input when B or I ends.
    freed[B, :-1] = freed[I, :-1] = costs.saved + np.where(again, costs.input, 0.0)
    # What W needs is a part of what was saved, and I leaves it; what goes beyond I takes anew.
    part = np.minimum(costs.saved_weight, costs.saved)
    freed[I, :-1] -= part
    taken[I, :-1] = costs.saved_weight - part
    freed[W, :-1] = costs.saved_weight
    taken[S, -1] = freed[T, -1] = costs.head.saved + costs.head.input
    return taken, freed


def _slices(rows: Rows, costs: StageCosts, heavy: Floats, taken: Floats, freed: Floats) -> None:
    """Keys and values live on where recomputation drops the rest; their gradients go back.

    A slice's backward leaves them for the slice before, whose backward uses them up.
    """
    columns, n = rows.columns, rows.num_computations
    op, stage = columns.op, columns.stage
    before = np.array(rows.layout.previous)[columns.microbatch]
    after = np.array(rows.layout.following)[columns.microbatch]
    weights = np.zeros(rows.layout.num_microbatches + 1)  # the last one: of no slice
    weights[columns.microbatch] = heavy[:n]
    backward = (op == B) | (op == I)
    carried = np.append(costs.carried, 0.0)[stage]
    own = np.where(after >= 0, carried * heavy[:n], 0.0)  # what this slice leaves for the next
    kept = np.where(np.append(costs.recomputed, False)[stage], own, 0.0)
    taken += np.where(op == F, kept, 0.0) + np.where(backward, carried * weights[before], 0.0)
    freed += np.where(backward, kept + own, 0.0)
