"""How many bytes each device holds at most, from a plan's file and a profile's file alone.

Written from docs/performance-model.md, section Memory; dictionaries in, numbers out, no module of
AdaPtis. For plans whose memory follows from the orders alone: nothing is offloaded, no stage is
sharded, the model is there once, micro-batches are equal and whole.
"""

import re
from collections import defaultdict

AHEAD = 2  # a receive is posted this many computations before the one that reads the value
BACKWARDS = "BI"


def peak_bytes(plan, profile):
    """Per device: the most bytes that it holds at any moment."""
    assert not any(stage.get("offload") or stage.get("sharded") for stage in plan["stages"])
    assert sum(stage["layers"][0] == 0 for stage in plan["stages"]) == 1
    assert not plan.get("previous")
    return Memory(plan, profile).peaks()


class Memory:
    """One plan with what its stages weigh."""

    def __init__(self, plan, profile):
        self.stages, self.layers = plan["stages"], profile["layers"]
        self.shared = profile.get("shared", [])
        self.head = len(self.stages) if plan.get("head_reductions") else -1
        self.orders = [self.with_recomputation(map(words, row)) for row in plan["programs"]]
        self.position = {
            (op, s, m): (device, at)
            for device, order in enumerate(self.orders)
            for at, work in enumerate(order)
            for op, s, m in work
            if op not in "ST"
        }

    def peaks(self):
        posted = [defaultdict(float) for _ in self.orders]  # position -> bytes of buffers
        read = [defaultdict(float) for _ in self.orders]
        self.post(posted, read)
        result = []
        for device, order in enumerate(self.orders):
            held = most = self.always(device)
            for at, work in enumerate(order):
                held += posted[device][at] + sum(self.taken(device, *c) for c in work)
                most = max(most, held)
                held -= read[device][at] + sum(self.given(device, *c) for c in work)
            result.append(most)
        return result

    def with_recomputation(self, order):
        """The order with each missing R right before its backward."""
        order = list(order)
        there = {compute for work in order for compute in work}
        result = []
        for work in order:
            for op, s, m in work:
                again = op in BACKWARDS and self.stages[s].get("recompute")
                if again and ("R", s, m) not in there:
                    result.append([("R", s, m)])
            result.append(work)
        return result

    def total(self, s, name):
        return sum(layer.get(name, 0) for layer in self.layers[slice(*self.stages[s]["layers"])])

    def input_bytes(self, s):
        start = self.stages[s]["layers"][0]
        return self.layers[start - 1].get("output_bytes", 0) if start else 0

    # Throughout.

    def always(self, device):
        mine = [i for s in self.stages if s["device"] == device for i in range(*s["layers"])]
        held = sum(self.layers[i].get("state_bytes", 0) for i in mine)
        workspace = [self.layers[i].get("workspace_bytes", 0) for i in mine]
        if self.head >= 0:
            held += self.layers[-1].get("state_bytes", 0) / len(self.orders)
            workspace.append(self.layers[-1].get("workspace_bytes", 0) / len(self.orders))
        for shared in self.shared:
            users = sum(i in mine for i in shared["layers"])
            held -= max(users - 1, 0) * self.state_of(shared)
        return held + max(workspace, default=0)

    def state_of(self, shared):
        """Of a shared parameter with its gradient and optimizer state: its part of its layer's."""
        users = [self.layers[i] for i in shared["layers"]]
        own = users[0].get("parameter_bytes", 0)
        part = min(shared["bytes"] / own, 1.0) if own else 0.0
        states = [user.get("state_bytes", 0) for user in users]
        return min(states[0] * part, *states)

    # From a start, until an end.

    def taken(self, device, op, s, _m):
        if op in "ST":
            return self.of_head(device) if op == "S" else 0
        saved, kept = self.total(s, "saved_bytes"), self.total(s, "saved_weight_bytes")
        if op == "F" and self.stages[s].get("recompute"):
            return self.input_bytes(s)
        return {"F": saved, "R": saved, "I": max(kept - saved, 0)}.get(op, 0)

    def given(self, device, op, s, _m):
        if op in "ST":
            return self.of_head(device) if op == "T" else 0
        saved, kept = self.total(s, "saved_bytes"), self.total(s, "saved_weight_bytes")
        given = {"B": saved, "I": saved - min(kept, saved), "W": kept}.get(op, 0)
        if op in BACKWARDS and self.stages[s].get("recompute"):
            given += self.input_bytes(s)
        return given

    def of_head(self, device):
        """A part of what a sharded head saves; its input, unless it came as a copy."""
        own = self.stages[-1]["device"] == device
        saved = self.layers[-1].get("saved_bytes", 0) / len(self.orders)
        return saved + (self.layers[-2].get("output_bytes", 0) if own else 0)

    # What is received.

    def post(self, posted, read):
        """Receives on one link are posted in the order of the sends, none later than the next."""
        for target in range(len(self.orders)):
            for source in range(len(self.orders)):
                latest = len(self.orders[target])
                for size, reader, last in reversed(list(self.sent(source, target))):
                    latest = min(latest, max(reader - AHEAD, 0))
                    posted[target][latest] += size
                    read[target][last] += size

    def sent(self, source, target):
        """All that goes from one device to another: (bytes, who reads it first, and last)."""
        if source == target:
            return
        head = {(op, m): at for at, w in enumerate(self.orders[target]) for op, _, m in w}
        for op, s, m in (compute for work in self.orders[source] for compute in work):
            onwards = 1 if op == "F" else -1
            for letter in {"F": "F", "B": BACKWARDS, "I": BACKWARDS}.get(op, ""):
                device, at = self.position.get((letter, s + onwards, m), (-1, 0))
                if device == target:
                    yield self.input_bytes(s + 1 if op == "F" else s), at, at
            if op == "F" and s + 1 == self.head:
                yield self.layers[-2].get("output_bytes", 0), head["S", m], head["T", m]


def words(text):
    """`1F0`, or `(0F4;3B1)OVERLAP_F_B`, as its (operation, stage, micro-batch)."""
    return [(op, int(s), int(m)) for s, op, m in re.findall(r"(\d+)([FBIWRST])(\d+)", text)]
