"""The performance model against a second opinion: a slow simulator of objects and events."""

import heapq
import math
from collections import defaultdict, deque
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import (
    looped_plan,
    make_cluster,
    make_plan,
    make_profile,
    seeds,
    uniform_profile,
)

from adaptis.check import check
from adaptis.cluster import Cluster, Device, Link, uniform
from adaptis.costs import price
from adaptis.errors import Error, PlanError, ProgramError
from adaptis.lower import lower
from adaptis.plan import Plan, Stage
from adaptis.profile import LayerCost, Profile, Shared, load_profile
from adaptis.program import Compute, Kind, Op, Program, Send, Step, parse_order
from adaptis.schedules import SCHEDULES
from adaptis.search.instance import make_instance
from adaptis.search.instance import price as search_price
from adaptis.simulate import simulate, simulate_plan
from adaptis.workload import Workload

PROFILES = Path(__file__).parent / "data" / "profiles"
SECONDS = {
    Op.FORWARD: "forward",
    Op.RECOMPUTE: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward_input",
    Op.BACKWARD_WEIGHT: "backward_weight",
}


class SlowSimulator:
    """Devices walk through their instructions; a heap holds what happens next."""

    def __init__(self, plan, profile, cluster, weights):
        self.plan, self.profile, self.cluster, self.weights = plan, profile, cluster, weights
        self.program = lower(plan)
        self.events, self.serial = [], 0
        self.ran, self.ends, self.memory = {}, {}, {}
        self.there = defaultdict(dict)  # device -> value -> whether it came from elsewhere
        self.waits = {}  # device -> index of the instruction that waits
        self.queue, self.carrying = defaultdict(deque), set()
        self.bytes, self.peak = [], []
        for d in range(cluster.num_devices):
            static = sum(self.total(s, "state_bytes") for s in plan.stages if s.device == d)
            self.bytes.append(static)
            self.peak.append(static)
            self.ends[d] = 0.0
        self.static = list(self.bytes)

    def total(self, stage, name):
        return sum(getattr(layer, name) for layer in self.profile.layers[stage.start : stage.stop])

    def at(self, time, action, *arguments):
        self.serial += 1
        heapq.heappush(self.events, (time, self.serial, action, arguments))

    def run(self):
        for device in range(len(self.program.devices)):
            self.at(0.0, self.go_on, device, 0)
        while self.events:
            self.now, _, action, arguments = heapq.heappop(self.events)
            action(*arguments)
        return self

    def go_on(self, device, index):
        if index == len(self.program.devices[device]):
            return
        instruction = self.program.devices[device][index]
        match instruction:
            case Compute():
                read = list(self.program.reads(instruction))
                if any(value not in self.there[device] for value in read):
                    self.waits[device] = index
                    return
                cost = self.profile.overheads.receive
                moved = any(self.there[device][value] for value in read)
                self.at(self.now + (cost if moved else 0.0), self.begin, device, index)
            case Send(value, target):
                cost = self.profile.overheads.send
                self.at(self.now + cost, self.put, device, target, value, index)
            case Step():
                self.ends[device] = self.now
            case _:  # a receive costs nothing until its value is read
                self.go_on(device, index + 1)

    def begin(self, device, index):
        compute = self.program.devices[device][index]
        stage = self.plan.stages[compute.stage]
        seconds = self.total(stage, SECONDS[compute.op])
        seconds += getattr(self.profile.overheads, SECONDS[compute.op])
        seconds *= self.weights[compute.microbatch] / self.cluster.devices[device].speed
        self.hold(device, compute, "begin")
        self.at(self.now + seconds, self.finish, device, index, self.now)

    def finish(self, device, index, start):
        compute = self.program.devices[device][index]
        self.ran[compute] = (device, start, self.now)
        self.hold(device, compute, "end")
        for value in self.program.writes(compute):
            self.there[device][value] = False
        self.go_on(device, index + 1)

    def hold(self, device, compute, moment):
        """What is alive changes: new things appear at the beginning, old ones go at the end."""
        stage = self.plan.stages[compute.stage]
        weight = self.weights[compute.microbatch]
        before = self.profile.layers[stage.start - 1].output_bytes if stage.start else 0
        saved, kept = self.total(stage, "saved_bytes"), self.total(stage, "saved_weight_bytes")
        sizes = {Kind.SAVED: saved, Kind.SAVED_INPUT: before, Kind.SAVED_WEIGHT: kept}
        if moment == "begin":
            for value in self.program.writes(compute):
                # The operands of W are a part of what is saved already while I runs.
                if value.kind in sizes and value.kind is not Kind.SAVED_WEIGHT:
                    self.bytes[device] += sizes[value.kind] * weight
        else:
            written = {value.kind for value in self.program.writes(compute)}
            if Kind.SAVED_WEIGHT in written:
                self.bytes[device] += kept * weight
            for value in self.program.reads(compute):
                if value.kind in sizes and value.kind is not Kind.SAVED_INPUT:
                    self.bytes[device] -= sizes[value.kind] * weight
            backward = compute.op in (Op.BACKWARD, Op.BACKWARD_INPUT)
            if backward and stage.recompute:
                self.bytes[device] -= before * weight
        self.peak[device] = max(self.peak[device], self.bytes[device])

    def put(self, source, target, value, index):
        self.queue[source, target].append(value)
        self.carry(source, target)
        self.go_on(source, index + 1)

    def carry(self, source, target):
        if (source, target) in self.carrying or not self.queue[source, target]:
            return
        value = self.queue[source, target].popleft()
        self.carrying.add((source, target))
        link = self.cluster.link(source, target)
        last = self.plan.stages[value.stage].stop - 1
        if value.kind is Kind.INPUT_GRAD:
            last = self.plan.stages[value.stage - 1].stop - 1
        size = self.profile.layers[last].output_bytes
        busy = size / link.bandwidth * self.weights[value.microbatch]
        self.at(self.now + busy, self.let_go, source, target)
        self.at(self.now + busy + link.latency, self.arrive, target, value)

    def let_go(self, source, target):
        self.carrying.remove((source, target))
        self.carry(source, target)

    def arrive(self, device, value):
        self.there[device][value] = True
        if device in self.waits:
            self.go_on(device, self.waits.pop(device))

    def step(self):
        """Shared gradients are summed both ways over the slowest link, then the optimizers run."""
        ends = dict(self.ends)
        for shared in self.profile.shared:
            owners = sorted(
                {s.device for s in self.plan.stages for i in shared.layers if s.start <= i < s.stop}
            )
            if len(owners) > 1:
                links = [self.cluster.link(owners[0], other) for other in owners[1:]]
                both_ways = 2 * max(link.seconds(shared.bytes) for link in links)
                together = max(ends[d] for d in owners) + both_ways
                ends |= dict.fromkeys(owners, together)
        for d in ends:
            mine = [s for s in self.plan.stages if s.device == d]
            speed = self.cluster.devices[d].speed
            ends[d] += sum(self.total(s, "update") for s in mine) / speed
        return max(ends.values())


def both(seed, send_and_receive=True, weighted=True):
    """A random case, simulated slowly and fast."""
    plan = make_plan(seed)
    profile = make_profile(seed + 1, plan.num_layers, send_and_receive)
    cluster = make_cluster(seed + 2, plan.num_devices)
    weights = (1.0,) * plan.num_microbatches
    if weighted and seed % 2:
        weights = tuple(
            (0.5, 1.0, 1.25, 3.0)[(seed >> b) % 4] for b in range(plan.num_microbatches)
        )
    slow = SlowSimulator(plan, profile, cluster, weights).run()
    return slow, simulate_plan(plan, profile, cluster, Workload(weights))


def fast_rows(timeline):
    return {
        span.compute: (d, span.start, span.end)
        for d in range(timeline.num_devices)
        for span in timeline.spans(d)
    }


@settings(max_examples=300)
@given(seed=seeds)
def test_two_simulators_agree_on_every_instruction_and_on_memory(seed):
    slow, fast = both(seed)
    rows = fast_rows(fast)
    assert rows.keys() == slow.ran.keys()
    for compute, (device, start, end) in slow.ran.items():
        assert rows[compute][0] == device
        assert abs(rows[compute][1] - start) < 1e-12
        assert abs(rows[compute][2] - end) < 1e-12
    assert fast.peak_bytes == tuple(int(peak) for peak in slow.peak)
    assert slow.bytes == slow.static


@settings(max_examples=200)
@given(seed=seeds)
def test_two_simulators_agree_on_the_step(seed):
    slow, fast = both(seed)
    assert abs(fast.step - slow.step()) < 1e-12


def test_the_optimizer_runs_after_the_last_send_of_its_device():
    profile = replace(uniform_profile(2), overheads=replace(uniform_profile(2).overheads, send=0.5))
    layers = profile.layers[0], replace(profile.layers[1], update=100.0)
    timeline = simulate_plan(looped_plan("1f1b", 2, 1), replace(profile, layers=layers), uniform(2))
    assert timeline.step == 1 + 0.5 + 1 + 2 + 0.5 + 100  # 0F0, send, 1F0, 1B0, send, update


@pytest.mark.slow
@settings(max_examples=3000)
@given(seed=seeds)
def test_two_simulators_agree_on_thousands_of_cases(seed):
    slow, fast = both(seed)
    rows = fast_rows(fast)
    assert all(
        abs(rows[c][1] - s) < 1e-12 and abs(rows[c][2] - e) < 1e-12
        for c, (_, s, e) in slow.ran.items()
    )
    assert fast.peak_bytes == tuple(int(peak) for peak in slow.peak)


def nemotron_plan():
    cuts = [0, 15, 29, 43, 58]
    stages = tuple(Stage(a, b, d) for d, (a, b) in enumerate(pairwise(cuts)))
    return Plan(8, stages, SCHEDULES["1f1b"].orders(4, 8), schedule="1f1b")


def test_the_published_fixture_takes_its_published_time():
    profile = load_profile(PROFILES / "nemotron-nano-v2-9b.json")
    timeline = simulate_plan(nemotron_plan(), profile, uniform(4))
    assert abs(timeline.step - 1.33121) < 1e-12
    assert timeline.makespan == timeline.step


COSTS = ["forward", "backward", "backward_input", "backward_weight", "update", "output_bytes"]


@settings(max_examples=150)
@given(seed=seeds, name=st.sampled_from(COSTS), where=st.integers(0, 100), more=st.floats(1.0, 3.0))
def test_a_dearer_layer_never_makes_the_step_shorter(seed, name, where, more):
    plan = make_plan(seed)
    profile = make_profile(seed + 1, plan.num_layers)
    cluster = make_cluster(seed + 2, plan.num_devices)
    layers = list(profile.layers)
    i = where % len(layers)
    layers[i] = replace(layers[i], **{name: getattr(layers[i], name) * more})
    dearer = replace(profile, layers=tuple(layers))
    before, after = (simulate_plan(plan, x, cluster) for x in (profile, dearer))
    assert after.step >= before.step
    assert after.makespan >= before.makespan
    assert (after.start >= before.start).all()


@settings(max_examples=100)
@given(seed=seeds, field=st.sampled_from(["send", "receive", "forward", "backward_weight"]))
def test_a_dearer_overhead_never_makes_the_step_shorter(seed, field):
    plan = make_plan(seed)
    profile = make_profile(seed + 1, plan.num_layers)
    cluster = make_cluster(seed + 2, plan.num_devices)
    more = replace(profile.overheads, **{field: getattr(profile.overheads, field) + 0.01})
    before = simulate_plan(plan, profile, cluster)
    assert simulate_plan(plan, replace(profile, overheads=more), cluster).step >= before.step


@settings(max_examples=100)
@given(seed=seeds)
def test_a_slower_link_never_makes_the_step_shorter(seed):
    plan = make_plan(seed)
    profile = make_profile(seed + 1, plan.num_layers)
    cluster = make_cluster(seed + 2, plan.num_devices)
    slow = Link(cluster.within_node.latency + 0.01, cluster.within_node.bandwidth / 2)
    before, after = (
        simulate_plan(plan, profile, c) for c in (cluster, replace(cluster, within_node=slow))
    )
    assert after.step >= before.step


@settings(max_examples=200)
@given(seed=seeds)
def test_no_step_beats_the_work_of_a_device_or_the_path_of_a_microbatch(seed):
    slow, fast = both(seed)
    plan, costs = slow.plan, price(slow.plan.stages, slow.profile, slow.cluster)
    assert fast.makespan >= fast.busy().max() * (1 - 1e-12)
    split = {
        (c.stage, c.microbatch)
        for order in plan.programs
        for c in order
        if c.op is Op.BACKWARD_INPUT
    }
    hops = costs.forward_busy + costs.backward_busy
    waits = costs.forward_latency + costs.backward_latency
    for b in range(plan.num_microbatches):
        halves = np.array([(s, b) in split for s in range(len(plan.stages))])
        backward = np.where(halves, costs.backward_input, costs.backward)
        work = costs.forward + backward + hops
        path = work.sum() * slow.weights[b] + waits.sum()
        assert fast.makespan >= path * (1 - 1e-12)


@settings(max_examples=200)
@given(seed=seeds)
def test_memory_stays_above_what_is_static_and_returns_to_it(seed):
    slow, fast = both(seed)
    for (times, curve), static, peak in zip(fast.memory, slow.static, fast.peak_bytes, strict=True):
        assert (np.diff(times) >= 0).all()
        assert curve[0] == curve[-1] == static
        assert curve.min() >= static
        assert int(curve.max()) == peak


@settings(max_examples=200)
@given(seed=seeds)
def test_each_device_does_one_thing_at_a_time_in_its_order(seed):
    plan = make_plan(seed, recompute=False)
    profile = make_profile(seed + 1, plan.num_layers)
    timeline = simulate_plan(plan, profile, make_cluster(seed + 2, plan.num_devices))
    for d, order in enumerate(plan.programs):
        spans = list(timeline.spans(d))
        assert tuple(span.compute for span in spans) == order
        assert all(a.end <= b.start for a, b in pairwise(spans))


@settings(max_examples=200)
@given(seed=seeds)
def test_transfers_of_one_link_follow_each_other(seed):
    _, timeline = both(seed, weighted=False)
    links = defaultdict(list)
    for t in timeline.transfers:
        assert timeline.placement[t.stage] == t.source != t.target
        links[t.source, t.target].append(t)
    for transfers in links.values():
        ends = sorted(t.end for t in transfers)
        assert all(t.start < t.end for t in transfers)
        assert len(ends) == len(transfers)


@settings(max_examples=200)
@given(seed=seeds)
def test_idle_time_and_work_add_up_to_the_makespan(seed):
    _, timeline = both(seed)
    for busy, bubbles in zip(timeline.busy(), timeline.bubbles(), strict=True):
        assert all(seconds >= 0 for seconds in bubbles.values())
        assert busy + sum(bubbles.values()) == pytest.approx(timeline.makespan, abs=1e-12)


@settings(max_examples=60)
@given(seed=seeds, weight=st.sampled_from([0.5, 2.0, 3.0]))
def test_a_microbatch_of_twice_the_weight_takes_twice_as_long(seed, weight):
    plan = make_plan(seed)
    profile = make_profile(seed + 1, plan.num_layers, send_and_receive=False)
    devices = make_cluster(seed + 2, plan.num_devices).devices
    cluster = Cluster(devices, Link(0.0, 1e5), Link(0.0, 1e4))
    even = simulate_plan(plan, profile, cluster)
    heavy = simulate_plan(plan, profile, cluster, Workload((weight,) * plan.num_microbatches))
    assert heavy.end == pytest.approx(even.end * weight, rel=1e-12)
    for (_, a), (_, b) in zip(even.memory, heavy.memory, strict=True):
        assert b - b[0] == pytest.approx((a - a[0]) * weight)


def test_one_heavy_microbatch_delays_what_follows():
    plan, profile = looped_plan("gpipe", 1, 2), uniform_profile(1)
    timeline = simulate_plan(plan, profile, uniform(1), Workload((3.0, 1.0)))
    assert timeline.start.tolist() == [0, 3, 4, 10]
    assert timeline.peak_bytes == (4,)


def test_recompute_pays_a_forward_and_keeps_the_input_alone():
    profile = uniform_profile(4, output_bytes=3)
    profile = replace(
        profile,
        layers=tuple(replace(x, saved_bytes=100, saved_weight_bytes=0) for x in profile.layers),
    )
    orders = SCHEDULES["gpipe"].orders(2, 2)
    runs = [
        simulate_plan(Plan(2, (Stage(0, 2, 0), Stage(2, 4, 1, again)), orders), profile, uniform(2))
        for again in (False, True)
    ]
    assert [int(r.busy()[1]) for r in runs] == [12, 16]
    assert [r.peak_bytes for r in runs] == [(400, 400), (400, 3 + 3 + 200)]


def test_a_recomputed_stage_that_takes_no_time_gives_its_input_back():
    profile = uniform_profile(2, forward=0.0, output_bytes=8)
    plan = Plan(
        1, (Stage(0, 1, 0), Stage(1, 2, 1, recompute=True)), SCHEDULES["gpipe"].orders(2, 1)
    )
    timeline = simulate_plan(plan, profile, uniform(2))
    assert all(curve[-1] == curve[0] for _, curve in timeline.memory)


def test_a_shared_parameter_is_summed_both_ways_before_the_optimizers():
    profile = replace(uniform_profile(2, update=0.25), shared=(Shared((0, 1), 100),))
    cluster = uniform(2, link=Link(0.5, 100.0))
    timeline = simulate_plan(looped_plan("1f1b", 2, 1), profile, cluster)
    assert timeline.step == timeline.makespan + 2 * 1.5 + 0.25
    together = Plan(1, (Stage(0, 2, 0),), SCHEDULES["1f1b"].orders(1, 1))
    alone = simulate_plan(together, profile, uniform(1, link=Link(0.5, 100.0)))
    assert alone.step == alone.makespan + 0.5


def test_two_transfers_on_one_link_queue():
    profile = uniform_profile(2, output_bytes=400)
    plan = looped_plan("gpipe", 2, 3)
    timeline = simulate_plan(plan, profile, uniform(2, link=Link(0.5, 100.0)))
    forwards = [t for t in timeline.transfers if t.kind is Kind.OUTPUT]
    assert [t.end for t in forwards] == [1 + 4.5, 1 + 8.5, 1 + 12.5]
    assert timeline.start[timeline.rows(1)][:3].tolist() == [5.5, 9.5, 13.5]


def test_a_faster_device_takes_less_time():
    cluster = Cluster((Device(speed=2.0), Device(speed=0.5)))
    timeline = simulate_plan(looped_plan("1f1b", 2, 1), uniform_profile(2), cluster)
    assert (timeline.end - timeline.start).tolist() == [0.5, 1.0, 2.0, 4.0]


def test_an_order_that_waits_for_ever_is_refused_by_both_check_and_simulate():
    orders = parse_order(["0B0", "0F0"], ""), parse_order(["1F0", "1B0"], "")
    plan = Plan(1, (Stage(0, 1, 0), Stage(1, 2, 1)), orders)
    with pytest.raises(ProgramError):
        simulate_plan(plan, uniform_profile(2), uniform(2))
    with pytest.raises(ProgramError, match="wait for ever"):
        simulate(lower(plan), price(plan.stages, uniform_profile(2), uniform(2)))


def test_a_plan_for_another_model_is_not_simulated():
    with pytest.raises(PlanError, match="covers 2 layers"):
        simulate_plan(looped_plan("1f1b", 2, 2), uniform_profile(3), uniform(2))


@pytest.mark.parametrize("num_devices", [1, 3])
def test_a_plan_for_another_number_of_devices_is_refused(num_devices):
    with pytest.raises(Error):
        simulate_plan(looped_plan("1f1b", 2, 2), uniform_profile(2), uniform(num_devices))


def test_the_step_of_the_same_case_is_always_the_same():
    first, second = both(12345)[1], both(12345)[1]
    assert first.step == second.step
    assert (first.start == second.start).all()
    assert math.isfinite(first.step)


def test_computations_alone_are_enough_to_simulate():
    plan = looped_plan("1f1b", 2, 3)
    bare = Program(plan.programs, plan.placement, 3)
    costs = price(plan.stages, uniform_profile(2), uniform(2))
    assert check(lower(plan)).num_transfers == 6
    assert simulate(bare, costs).step == simulate(lower(plan), costs).step


def test_a_device_holds_a_shared_parameter_once():
    layer = LayerCost("a", "mlp", 1.0, 1.0, 1.0, 2.0, parameter_bytes=100, state_bytes=400)
    layers = tuple(replace(layer, name=name) for name in "abc")
    profile = Profile("tied", 1, layers, shared=(Shared((0, 2), 80),))
    together = Plan(1, (Stage(0, 3, 0),), SCHEDULES["1f1b"].orders(1, 1))
    assert simulate_plan(together, profile, uniform(1)).peak_bytes == (1200 - 320,)
    apart = Plan(1, (Stage(0, 2, 0), Stage(2, 3, 1)), SCHEDULES["1f1b"].orders(2, 1))
    assert simulate_plan(apart, profile, uniform(2)).peak_bytes == (800, 400)
    instance = make_instance(profile, uniform(2), 1)
    for stop, device in (([2, 3], [0, 1]), ([1, 2, 3], [0, 1, 0])):
        stages = tuple(
            Stage(a, b, d) for a, b, d in zip([0, *stop[:-1]], stop, device, strict=True)
        )
        tables = search_price(instance, np.array(stop), np.array(device))
        assert tables.static.tolist() == price(stages, profile, uniform(2)).static_bytes.tolist()
