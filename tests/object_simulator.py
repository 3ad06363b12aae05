"""The performance model once more, slowly: objects and events, no arrays, nothing shared.

Written from docs/performance-model.md and the meaning of the instructions in `adaptis.program`.
Each device walks through its instructions; what goes on beside computation is a job that queues
on a lane. Equal results of two programs that were written apart are evidence for both.
"""

import heapq
import math
from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from object_costs import Costs

from adaptis.lower import lower
from adaptis.program import (
    Copy,
    Join,
    Kind,
    Op,
    Receive,
    Send,
    Shard,
    Sharding,
    Step,
    Together,
    Value,
    Way,
    parts,
)

GIVEN_BESIDE, COMPUTING, TAKEN_BESIDE = range(3)  # the order of what happens at one moment


@dataclass
class Job:
    """Something beside computation."""

    seconds: float
    ended: object = lambda: None  # what happens a latency after its end
    latency: float = 0.0
    missing: int = 0  # of what it waits for
    began: object = lambda: None
    left: object = lambda: None  # what happens right at its end


@dataclass
class Lane:
    """Jobs one after the other, in the order they came."""

    clock: object
    queue: deque = field(default_factory=deque)
    busy: bool = False

    def add(self, job):
        self.queue.append(job)
        self.go_on()

    def go_on(self):
        if self.busy or not self.queue or self.queue[0].missing:
            return
        job, self.busy = self.queue.popleft(), True
        job.began()
        self.clock.after(job.seconds, self.let_go, job)
        self.clock.after(job.seconds + job.latency, job.ended)

    def let_go(self, job):
        self.busy = False
        job.left()
        self.go_on()


class Clock:
    """A heap holds what happens next."""

    def __init__(self):
        self.now, self.events, self.serial = 0.0, [], 0

    def at(self, time, action, *arguments):
        self.serial += 1
        heapq.heappush(self.events, (time, self.serial, action, arguments))

    def after(self, seconds, action, *arguments):
        self.at(self.now + seconds, action, *arguments)

    def run(self):
        while self.events:
            self.now, _, action, arguments = heapq.heappop(self.events)
            action(*arguments)


@dataclass
class Ran:
    """An instruction that ran."""

    instruction: object
    spans: list  # (computation, start, end), two of a fused pair
    free: float  # from when on the device was there for it
    waited: bool  # whether it was not there at once
    taken: float  # bytes from its start

    @property
    def start(self):
        return self.spans[0][1]

    @property
    def end(self):
        return self.spans[-1][2]

    @property
    def forward(self):
        return any(compute.op is Op.FORWARD for compute, _, _ in self.spans)


class Walker:
    """One device: where it is in its program, and what is there."""

    def __init__(self, number, instructions, clock):
        self.number, self.instructions, self.clock = number, instructions, clock
        self.position, self.free, self.paid = 0, 0.0, 0.0  # paid: its sends are, free: and gone
        self.there = {}  # value -> seconds that taking it costs
        self.arrived = {}  # value -> when it came
        self.waits = False
        self.ran = []
        self.changes = []  # (time, which first, serial, bytes)
        self.posted = []  # received values of which the next computation takes the bytes
        self.received = set()  # values that hold a buffer
        self.held = {}  # value -> the job that waits for it, and its lane
        self.reduced = 0.0  # when the last reduction ended

    def change(self, time, order, size):
        self.changes.append((time, order, len(self.changes), size))


class SlowSimulator(Costs):
    """All devices and lanes."""

    def __init__(self, plan, profile, cluster, weights):
        super().__init__(plan, profile, cluster, weights)
        self.program = lower(plan)
        self.clock = Clock()
        rows = self.program.devices
        self.devices = [Walker(d, row, self.clock) for d, row in enumerate(rows)]
        self.lanes = defaultdict(partial(Lane, self.clock))
        self.sums = {}  # a collective -> its job
        self.reducing = defaultdict(list)  # stage of one copy -> the jobs of all copies so far
        self.reduced_copies = defaultdict(int)
        self.written = {}  # value -> the device that wrote it, and when

    # Time.

    def run(self):
        for device in self.devices:
            self.clock.at(0.0, self.walk, device)
        self.clock.run()
        stuck = [d.number for d in self.devices if d.position < len(d.instructions)]
        assert not stuck, stuck
        return self

    def walk(self, device):
        """Do what comes until something must be waited for."""
        while device.position < len(device.instructions):
            instruction = device.instructions[device.position]
            if parts(instruction):
                self.try_to_begin(device, instruction)
                return
            self.beside(device, instruction)
            device.position += 1

    def try_to_begin(self, device, instruction):
        reads = set(self.layout.reads(instruction))
        device.waits = not reads <= device.there.keys()
        if not device.waits:
            ready = max(self.clock.now, device.free)
            waited = ready > device.free
            start = ready + sum(device.there[v] for v in reads)
            self.clock.at(start, self.begin, device, instruction, waited)

    def begin(self, device, instruction, waited):
        spans, time = [], self.clock.now
        for compute, seconds in self.pieces(device.number, instruction):
            spans.append((compute, time, time + seconds))
            time += seconds
        received = sum(self.crossing_bytes(value) for value in device.posted)
        taken = received + sum(self.taken(device.number, c) for c in parts(instruction))
        device.change(self.clock.now, COMPUTING, taken)
        # What a head takes is given back by T.
        device.received.update(v for v in device.posted if not self.is_head_input(v))
        device.posted = []
        device.ran.append(Ran(instruction, spans, device.free, waited, taken))
        self.clock.at(time, self.finish, device, instruction)

    def is_head_input(self, value):
        of_last = value.stage == self.layout.num_stages - 1
        return self.layout.reductions and of_last and value.kind is Kind.OUTPUT

    def finish(self, device, instruction):
        for value in self.layout.takes(instruction):
            device.there.pop(value)
        for compute in parts(instruction):
            device.change(self.clock.now, COMPUTING, -self.given(compute))
        for value in device.received.intersection(self.layout.reads(instruction)):
            device.received.remove(value)
            device.change(self.clock.now, COMPUTING, -self.crossing_bytes(value))
        for value in self.layout.writes(instruction):
            self.put(device, value)
        device.free, device.position = self.clock.now, device.position + 1
        self.send_all(device)
        self.walk(device)

    def send_all(self, device):
        """The sends right behind a computation; the values leave when all are paid for."""
        sends = []
        while isinstance(device.instructions[device.position], Send):
            sends.append(device.instructions[device.position])
            device.position += 1
        device.free = device.paid = device.free + len(sends) * self.profile.overheads.send
        for send in sends:
            self.send(device, send.value, send.target)

    def put(self, device, value, cost=0.0):
        """A value is there: who waits may go on."""
        self.written.setdefault(value, (device.number, self.clock.now))
        device.there[value] = cost
        device.arrived[value] = self.clock.now
        if value in device.held:
            job, lane = device.held.pop(value)
            self.release([(job, lane)])
        if device.waits:
            self.walk(device)

    def beside(self, device, instruction):
        """What never blocks."""
        match instruction:
            case Receive(value):
                device.posted.append(value)
            case Join():
                self.join(device, instruction)
            case Copy():
                self.copy(device, instruction)
            case Shard():
                self.shard(device, instruction)
            case Step():
                pass

    def send(self, device, value, target):
        link, size = self.cluster.link(device.number, target), self.crossing_bytes(value)
        busy, receive = size / link.bandwidth, self.profile.overheads.receive
        if self.cluster.overlap:
            arrive = partial(self.put, self.devices[target], value, receive)
            job = Job(busy, arrive, link.latency)
        else:
            whole = busy + link.latency
            job = Job(whole, began=partial(self.put, self.devices[target], value, whole + receive))
            device.free += whole
        self.clock.at(device.paid, self.lanes["link", device.number, target].add, job)

    def copy(self, device, copy):
        size = self.total(copy.stage, "saved_bytes") * self.weights[copy.microbatch]
        host, lane = self.cluster.host, self.lanes[copy.way, device.number]
        (read,), (value,) = self.layout.reads(copy), self.layout.writes(copy)
        job = Job(size / host.bandwidth, partial(self.put, device, value), host.latency)
        if copy.way is Way.OFFLOAD:
            del device.there[read]
            job.left = partial(self.change_now, device, GIVEN_BESIDE, -size)
        else:
            job.began = partial(self.change_now, device, TAKEN_BESIDE, size)
            if read not in device.there:
                job.missing = 1
                device.held[read] = job, lane
        self.clock.at(device.paid, lane.add, job)

    def change_now(self, device, order, size):
        device.change(self.clock.now, order, size)

    def shard(self, device, shard):
        if shard.stage == self.layout.num_stages:
            seconds = self.ring(2, self.profile.layers[-1].parameter_bytes / len(self.devices))
            job = Job(seconds, partial(self.reduced, device))
            self.clock.at(device.paid, self.lanes["network", device.number].add, job)
            return
        size = self.total(shard.stage, "parameter_bytes")
        own = shard.what is Sharding.REDUCE and self.layout.copies > 1
        network = self.lanes["reductions" if own else "network", device.number]
        value = Value(Kind.PARAMETERS, shard.stage, 0)
        if shard.what is Sharding.FREE:
            del device.there[value]
            device.change(self.clock.now, GIVEN_BESIDE, -size)
        elif shard.what is Sharding.GATHER:
            job = Job(self.ring(1, size), partial(self.put, device, value))
            job.began = partial(self.change_now, device, TAKEN_BESIDE, size)
            self.clock.at(device.paid, network.add, job)
        else:
            self.reduce(device, shard.stage, size, network)

    def reduce(self, device, stage, size, network):
        """The gradients of a stage, when those of all copies are there."""
        group = stage % self.layout.length
        twins = self.layout.placement[group :: self.layout.length]
        seconds = 2 * self.slowest(twins, size)
        seconds += self.ring(1 if self.plan.stages[stage].sharded else 2, size)
        job = Job(seconds, partial(self.reduced, device), missing=len(twins))
        self.clock.at(device.paid, network.add, job)
        self.reducing[group].append((job, network))
        self.clock.at(device.paid, self.gradient_there, group)

    def gradient_there(self, group):
        """Of one more copy."""
        self.reduced_copies[group] += 1
        if self.reduced_copies[group] == self.layout.copies:
            self.release(self.reducing[group])

    def release(self, jobs):
        for job, _ in jobs:
            job.missing = 0
        for _, lane in jobs:
            lane.go_on()

    def reduced(self, device):
        device.reduced = self.clock.now

    def join(self, device, join):
        """A sum begins when the last device has joined with its part, handing out at once."""
        if join.what is Together.TAKE:
            device.posted.extend(self.layout.writes(join))
            return
        self.clock.at(device.paid, self.joined, join, self.lanes[join.what])

    def joined(self, join, lane):
        """One more device has."""
        key = join.what, join.microbatch
        if key not in self.sums:
            if join.what is Together.SHARE:
                seconds, values = self.share_seconds(join.microbatch), list(self.layout.reads(join))
                receivers = [d for d in self.devices if d.number != self.layout.placement[-1]]
            else:
                seconds, values = self.sum_seconds(join), list(self.layout.writes(join))
                receivers = self.devices
            hand_out = partial(self.hand_out, receivers, values)
            missing = 1 if join.what is Together.SHARE else len(self.devices)
            self.sums[key] = Job(seconds, hand_out, missing=missing)
            lane.add(self.sums[key])
        self.sums[key].missing -= 1
        lane.go_on()

    def hand_out(self, devices, values):
        for device in devices:
            for value in values:
                self.put(device, value)
        for device in self.devices:
            device.reduced = self.clock.now

    # The end of the step.

    def step(self):
        """When the optimizers have run everywhere."""
        ends = [max(device.free, device.reduced) for device in self.devices]
        for shared in self.profile.shared:
            holders = {d for layer in shared.layers for d in self.holders(layer)}
            if len(holders) > 1:
                together = max(ends[d] for d in holders) + 2 * self.slowest(holders, shared.bytes)
                together += shared.seconds
                for d in holders:
                    ends[d] = together
        if self.plan.clipped:
            ends = [max(ends) + 2 * self.slowest(range(len(ends)), 0)] * len(ends)
        for d, device in enumerate(self.cluster.devices):
            ends[d] += self.update(d) / device.speed
        return max(ends)

    def memory(self, device):
        """(time, bytes from then on), after everything that happens at that time in turn."""
        held = self.static(device)
        curve = [(0.0, held)]
        for time, _, _, size in sorted(self.devices[device].changes):
            held += size
            curve.append((time, held))
        return curve

    def peak(self, device):
        return max(held for _, held in self.memory(device))

    # Idle time.

    def bubbles(self, device):
        """Seconds by cause: before the first instruction, between two, after the last."""
        ran = self.devices[device].ran
        last = max((r.end for d in self.devices for r in d.ran), default=0.0)
        causes = dict.fromkeys(("warm-up", "transfer", "memory", "imbalance", "cool-down"), 0.0)
        if not ran:
            return causes | {"cool-down": last}
        causes["warm-up"], causes["cool-down"] = ran[0].start, last - ran[-1].end
        for index in range(1, len(ran)):
            for cause, seconds in self.causes(device, index):
                causes[cause] += seconds
        return causes

    def causes(self, device, index):
        """Each moment between two instructions has one cause."""
        ran = self.devices[device].ran
        begin, end = ran[index - 1].end, ran[index].start
        moving, held = self.moving_from(device, index), self.held_from(device, index)
        cuts = sorted({begin, end, *(t for t in (moving, held) if begin < t < end)})
        for a, b in pairwise(cuts):
            yield "memory" if a >= held else "transfer" if a >= moving else "imbalance", b - a

    def moving_from(self, device, index):
        """From when on what the instruction waits for was on its way from another device."""
        head = self.layout.num_stages
        values = set(self.layout.reads(self.devices[device].ran[index].instruction))
        values = {v for v in values if v.kind in (Kind.OUTPUT, Kind.INPUT_GRAD) and v.stage != head}
        written = [self.written[value] for value in values]
        return max((time for writer, time in written if writer != device), default=math.inf)

    def held_from(self, device, index):
        """From when on the next forward was there, but had no room."""
        walker, limit = self.devices[device], self.cluster.devices[device].memory_bytes
        after = [r for r in walker.ran[index + 1 :] if r.forward]
        now = walker.ran[index]
        if not now.waited or now.forward or not after:
            return math.inf
        held = [size for time, size in self.memory(device) if time <= now.free][-1]
        if held + after[0].taken <= limit:
            return math.inf
        (forward,) = (c for c, _, _ in after[0].spans if c.op is Op.FORWARD)
        inputs = [v for v in self.layout.reads(forward) if v.kind is Kind.OUTPUT]
        return max([now.free, *(walker.arrived[v] for v in inputs)])
