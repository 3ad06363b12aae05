"""What an instruction costs by docs/performance-model.md, one at a time, for the slow simulator."""

import math

from adaptis.program import BACKWARDS, Kind, Op, Overlap, Together, parts

SECONDS = {
    Op.FORWARD: "forward",
    Op.RECOMPUTE: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward_input",
    Op.BACKWARD_WEIGHT: "backward_weight",
}


class Costs:
    """Seconds and bytes of a plan."""

    def __init__(self, plan, profile, cluster, weights):
        self.plan, self.profile, self.cluster, self.weights = plan, profile, cluster, weights
        self.layout = plan.layout

    def total(self, stage, name):
        stage = self.plan.stages[stage]
        return sum(getattr(layer, name) for layer in self.profile.layers[stage.start : stage.stop])

    def seconds(self, device, compute):
        """Of one computation alone."""
        overheads, speed = self.profile.overheads, self.cluster.devices[device].speed
        weight = self.weights[compute.microbatch]
        if compute.op in (Op.SCORES, Op.SCORES_GRADIENT):
            head, scores = self.profile.layers[-1], compute.op is Op.SCORES
            work = head.forward if scores else head.backward_weight
            if scores == (self.plan.head_reductions == 1):
                work += head.backward_input
            overhead = overheads.forward if scores else overheads.backward_weight
            return (overhead + weight * work / self.plan.num_devices) / speed
        name = SECONDS[compute.op]
        work = self.total(compute.stage, name)
        return (getattr(overheads, name) + weight * work) / speed

    def pieces(self, device, instruction):
        """The computations of an instruction, each with its seconds as shown."""
        alone = [(c, self.seconds(device, c)) for c in parts(instruction)]
        if not isinstance(instruction, Overlap):
            return alone
        (first, a), (second, b) = alone
        speed = self.cluster.devices[device].speed
        hidden = min(
            0.0
            if c.op in (Op.SCORES, Op.SCORES_GRADIENT)
            else self.weights[c.microbatch] * self.total(c.stage, "overlapped") / speed
            for c in (first, second)
        )
        both = max(a + b - hidden, a, b)
        share = both / (a + b) if a + b else 1.0
        return [(first, a * share), (second, b * share)]

    def crossing_bytes(self, value):
        """Of an output: its own layer's; of an input gradient: what the stage before handed on."""
        stage = value.stage if value.kind is Kind.OUTPUT else value.stage - 1
        last = self.plan.stages[stage].stop - 1
        return self.profile.layers[last].output_bytes * self.weights[value.microbatch]

    def input_bytes(self, stage):
        start = self.plan.stages[stage].start
        return self.profile.layers[start - 1].output_bytes if start else 0

    def all_links(self, devices):
        devices = sorted(set(devices))
        return [self.cluster.link(a, b) for a in devices for b in devices if a != b]

    def slowest(self, devices, size):
        return max((link.seconds(size) for link in self.all_links(devices)), default=0.0)

    def ring(self, rounds, size):
        """Seconds between replicas."""
        link, n = self.cluster.between_replicas, self.plan.replicas
        return rounds * (n - 1) * (link.latency + size / n / link.bandwidth)

    def share_seconds(self, m):
        size, p = self.profile.layers[-2].output_bytes, len(self.devices)
        hops = math.ceil(math.log2(p))
        links = self.all_links(range(p))
        return self.weights[m] * max(
            (link.latency * hops + size / link.bandwidth for link in links), default=0.0
        )

    def sum_seconds(self, join):
        """A ring of two rounds over all devices."""
        p = len(self.devices)
        size = 0
        if join.what is Together.SUM_S:
            size += 8 * self.profile.tokens_per_microbatch
        if (join.what is Together.SUM_S) == (self.plan.head_reductions == 1):
            size += self.profile.layers[-2].output_bytes
        links = self.all_links(range(p))
        round_ = max((k.latency + size / p / k.bandwidth for k in links), default=0.0)
        return self.weights[join.microbatch] * 2 * (p - 1) * round_

    def update(self, device):
        seconds = 0.0
        for s, stage in enumerate(self.plan.stages):
            if stage.device == device:
                share = self.plan.replicas if stage.sharded else 1
                seconds += self.total(s, "update") / share
        if self.plan.head_reductions:
            seconds += self.profile.layers[-1].update / len(self.devices)
        return seconds

    def holders(self, layer):
        """The devices that hold any of the layer's parameters."""
        if self.plan.head_reductions and layer == self.plan.num_layers - 1:
            return set(range(len(self.devices)))
        return {s.device for s in self.plan.stages if s.start <= layer < s.stop}

    def static(self, device):
        """Held throughout."""
        layers = self.profile.layers
        held, workspace, p = 0.0, 0, len(self.devices)
        for s, stage in enumerate(self.plan.stages):
            if stage.device == device:
                share = self.plan.replicas if stage.sharded else 1
                held += self.total(s, "state_bytes") / share
                mine = layers[stage.start : stage.stop]
                workspace = max([workspace, *(layer.workspace_bytes for layer in mine)])
        if self.plan.head_reductions:
            held += layers[-1].state_bytes / p
            workspace = max(workspace, layers[-1].workspace_bytes / p)
        return held + workspace - self.held_once(device)

    def held_once(self, device):
        """What shared parameters would count too often; each copy of the model has its own."""
        again = 0.0
        for shared in self.profile.shared:
            for copy in range(self.layout.copies):
                held = []
                for s in range(copy * self.layout.length, (copy + 1) * self.layout.length):
                    stage = self.plan.stages[s]
                    for layer in shared.layers:
                        if stage.device == device and stage.start <= layer < stage.stop:
                            held.append(1 / self.plan.replicas if stage.sharded else 1.0)
                if held:
                    again += (sum(held) - max(held)) * self.profile.shared_state(shared)
        return again

    def taken(self, device, compute):
        """Bytes that are held from the start of `compute` on; the head's input may have been."""
        s, m, op = compute.stage, compute.microbatch, compute.op
        weight, size = self.weights[m], 0.0
        if op is Op.SCORES:
            own = self.plan.stages[-1].device == device
            size = self.profile.layers[-2].output_bytes if own else 0
            return weight * (self.profile.layers[-1].saved_bytes / len(self.devices) + size)
        if op is Op.SCORES_GRADIENT:
            return 0.0
        again = self.plan.stages[s].recompute
        if op is Op.FORWARD and again:
            size += self.input_bytes(s)
            size += self.total(s, "carried_bytes") if self.continued(m) else 0
        if op is Op.RECOMPUTE or (op is Op.FORWARD and not again):
            size += self.total(s, "saved_bytes")
        if op is Op.BACKWARD_INPUT:
            size += max(self.total(s, "saved_weight_bytes") - self.total(s, "saved_bytes"), 0)
        if op in BACKWARDS and self.plan.previous and self.plan.previous[m] >= 0:
            before = self.weights[self.plan.previous[m]]
            return weight * size + before * self.total(s, "carried_bytes")
        return weight * size

    def continued(self, m):
        return bool(self.plan.previous) and self.layout.following[m] >= 0

    def given(self, compute):
        """Bytes that are held no more from the end of `compute` on."""
        s, m, op = compute.stage, compute.microbatch, compute.op
        weight, size = self.weights[m], 0.0
        if op is Op.SCORES_GRADIENT:
            head, p = self.profile.layers[-1], len(self.devices)
            return weight * (head.saved_bytes / p + self.profile.layers[-2].output_bytes)
        if op in BACKWARDS:
            size += weight * self.given_by_backward(s, m, op is Op.BACKWARD_INPUT)
        if op is Op.BACKWARD_WEIGHT:
            size += weight * self.total(s, "saved_weight_bytes")
        return size

    def given_by_backward(self, s, m, half):
        saved, kept = self.total(s, "saved_bytes"), self.total(s, "saved_weight_bytes")
        size = saved - min(saved, kept) if half else saved
        if self.plan.stages[s].recompute:
            size += self.input_bytes(s)
            size += self.total(s, "carried_bytes") if self.continued(m) else 0
        if self.continued(m):
            size += self.total(s, "carried_bytes")
        return size
