"""Whether any plan fits, by trying all: for a few layers on two devices.

Every cut, every placement, each stage with its backward in one piece or two, and recomputed or not,
every order of each device. Feasible orders are looked for in one sequence over all devices, since a
device's memory depends on its own order alone.
"""

import itertools

from plain_memory import AHEAD, Memory, peak_bytes


def fitting_plan(profile, limits, microbatches, recompute=True):
    """The plan, as its file would hold it, of one that fits; None where there is none."""
    for stages in _all_stages(len(profile["layers"]), len(limits), recompute):
        for split in itertools.product((False, True), repeat=len(stages)):
            plan = {"stages": stages, "programs": [[] for _ in limits]}
            found = _Orders(plan, profile, limits, microbatches, split).first()
            if found is not None:
                return {**plan, "num_microbatches": microbatches, "programs": found}
    return None


def _all_stages(num_layers, num_devices, recompute):
    """Few recomputed stages first, and few cuts."""
    found = []
    for cuts in itertools.product((False, True), repeat=num_layers - 1):
        stops = [i + 1 for i, cut in enumerate(cuts) if cut] + [num_layers]
        starts = [0, *stops[:-1]]
        choices = (False, True) if recompute else (False,)
        for device in itertools.product(range(num_devices), repeat=len(stops)):
            for again in itertools.product(choices, repeat=len(stops)):
                rows = zip(starts, stops, device, again, strict=True)
                found.append(
                    [{"layers": [a, b], "device": d, "recompute": r} for a, b, d, r in rows]
                )
    return sorted(found, key=lambda stages: sum(s["recompute"] for s in stages) + len(stages))


class _Orders:
    """Depth first over what may run next; micro-batches go through each stage in order."""

    def __init__(self, plan, profile, limits, microbatches, split):
        self.plan, self.profile, self.limits = plan, profile, limits
        self.m, self.split = microbatches, split
        self.memory = Memory(plan, profile)
        self.device = [stage["device"] for stage in plan["stages"]]
        self.seen = set()

    def first(self):
        always = [self.memory.always(d) for d in range(len(self.limits))]
        if any(self.least(d, held) > self.limits[d] for d, held in enumerate(always)):
            return None
        counts = ((0, 0, 0, 0),) * len(self.device)  # F, R, B or I, W
        return self.extend(counts, tuple((held, ()) for held in always), [[] for _ in always])

    def least(self, device, held):
        """What one micro-batch alone takes: of each stage from its F on, all in its backward."""
        most = held
        for s in (s for s, home in enumerate(self.device) if home == device):
            kept = self.memory.taken(device, "F", s, 0)
            again = self.plan["stages"][s]["recompute"]
            whole = kept + (self.memory.taken(device, "R", s, 0) if again else 0)
            most = max(most, held + whole + self.received(s, "B"))
            held += kept
        return most

    def extend(self, counts, state, orders):
        """`state`: per device what it holds, and the most it held in the last computations."""
        if (counts, state) in self.seen:
            return None
        self.seen.add((counts, state))
        if all(c[3 if split else 2] == self.m for c, split in zip(counts, self.split, strict=True)):
            return self.whole(orders)
        for s, k in itertools.product(range(len(counts)), (2, 3, 1, 0)):
            if not self.ready(counts, s, k):
                continue
            d, op = self.device[s], self.letter(s, k)
            after = self.run(state[d], op, s, counts[s][k])
            if after is None:
                continue
            orders[d].append(f"{s}{op}{counts[s][k]}")
            row = (*counts[s][:k], counts[s][k] + 1, *counts[s][k + 1 :])
            rest = (*counts[:s], row, *counts[s + 1 :])
            found = self.extend(rest, (*state[:d], after, *state[d + 1 :]), orders)
            if found is not None:
                return found
            orders[d].pop()
        return None

    def letter(self, s, k):
        return ("F", "R", "I" if self.split[s] else "B", "W")[k]

    def ready(self, counts, s, k):
        i, again = counts[s][k], self.plan["stages"][s]["recompute"]
        if i == self.m:
            return False
        if k == 0:
            return s == 0 or counts[s - 1][0] > i
        if k == 1:
            return again and counts[s][0] > i
        if k == 3:
            return self.split[s] and counts[s][2] > i
        last = s == len(counts) - 1
        return counts[s][1 if again else 0] > i and (last or counts[s + 1][2] > i)

    def run(self, state, op, s, i):
        """What the device holds afterwards, or None where it does not fit.

        What it reads from another device it holds from `AHEAD` computations before on.
        """
        held, before = state
        device = self.device[s]
        size, limit = self.received(s, op), self.limits[device]
        now = held + self.memory.taken(device, op, s, i)
        tops = tuple(top + size for top in (*before, now)[-AHEAD - 1 :])
        if max(tops) > limit:
            return None
        return now - self.memory.given(device, op, s, i), tops

    def received(self, s, op):
        """Bytes that an operation of stage s reads from another device."""
        other = s - 1 if op == "F" else s + 1 if op in "BI" else s
        if not 0 <= other < len(self.device) or self.device[other] == self.device[s]:
            return 0
        return self.memory.input_bytes(max(s, other))

    def whole(self, orders):
        """Receives that overtake each other on a link hold more: look again at the whole plan."""
        plan = {**self.plan, "programs": [list(row) for row in orders]}
        peaks = peak_bytes(plan, self.profile)
        fits = all(a <= b for a, b in zip(peaks, self.limits, strict=True))
        return plan["programs"] if fits else None
