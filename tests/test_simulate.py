"""The performance model against a second opinion, and what must hold whatever the costs."""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from object_simulator import SlowSimulator
from random_cases import make_case
from random_plans import (
    make_cluster,
    make_plan,
    make_profile,
    schedule_plan,
    seeds,
    uniform_profile,
)

from adaptis.check import check
from adaptis.cluster import Cluster, Device, Link, uniform
from adaptis.costs import price
from adaptis.errors import Error, InputError, PlanError, ProgramError
from adaptis.lower import lower
from adaptis.notation import parse_order
from adaptis.plan import Plan, Stage
from adaptis.profile import LayerCost, Overheads, Profile, Shared, load_profile
from adaptis.program import Compute, Kind, Op, Program
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.search.instance import make_instance
from adaptis.search.instance import price as search_price
from adaptis.simulate import simulate, simulate_plan
from adaptis.timeline import timeline_from_json, timeline_to_json
from adaptis.workload import Workload

PROFILES = Path(__file__).parent / "data" / "profiles"


def both(seed):
    """A random case, simulated slowly and fast."""
    plan, profile, cluster, weights = make_case(seed)
    slow = SlowSimulator(plan, profile, cluster, weights).run()
    return slow, simulate_plan(plan, profile, cluster, Workload(weights))


def agree(seed):
    """Whether both say the same of a random case, to the last bit."""
    slow, fast = both(seed)
    assert fast.step == slow.step()
    for d, device in enumerate(slow.devices):
        spans = [(span.compute, span.start, span.end) for span in fast.spans(d)]
        assert spans == [span for ran in device.ran for span in ran.spans]
        assert fast.peak_bytes[d] == int(slow.peak(d))
        assert fast.bubbles()[d] == pytest.approx(slow.bubbles(d), abs=1e-12)


@settings(max_examples=300)
@given(seed=seeds)
def test_two_simulators_agree_on_every_instruction_memory_idle_time_and_the_step(seed):
    agree(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_two_simulators_agree_on_ten_thousand_programs(block):
    for seed in range(1000 * block, 1000 * (block + 1)):
        agree(seed)


def test_the_optimizer_runs_after_the_last_send_of_its_device():
    profile = replace(uniform_profile(2), overheads=replace(uniform_profile(2).overheads, send=0.5))
    layers = profile.layers[0], replace(profile.layers[1], update=100.0)
    timeline = simulate_plan(
        schedule_plan("1f1b", 2, 1), replace(profile, layers=layers), uniform(2)
    )
    assert timeline.step == 1 + 0.5 + 1 + 2 + 0.5 + 100  # 0F0, send, 1F0, 1B0, send, update


def nemotron_plan():
    cuts = [0, 15, 29, 43, 58]
    stages = tuple(Stage(a, b, d) for d, (a, b) in enumerate(pairwise(cuts)))
    return Plan(8, stages, SCHEDULES["1f1b"].orders(Shape(4, 8)), schedule="1f1b")


def test_the_published_fixture_takes_its_published_time():
    profile = load_profile(PROFILES / "nemotron-nano-v2-9b.json")
    timeline = simulate_plan(nemotron_plan(), profile, uniform(4))
    assert abs(timeline.step - 1.33121) < 1e-12
    assert timeline.makespan == timeline.step


COSTS = ["forward", "backward", "backward_input", "backward_weight", "update"]
COSTS += ["output_bytes", "saved_bytes", "parameter_bytes"]
LINKS = ["within_node", "between_nodes", "host", "between_replicas"]


def never_shorter(before, after):
    """Nothing begins earlier; the parts of a fused pair only share its time in another way."""
    whole = (before.partner < 0) | (before.partner > np.arange(len(before.partner)))
    assert after.step >= before.step - 1e-12
    assert after.makespan >= before.makespan - 1e-12
    assert (after.start >= before.start - 1e-12)[whole].all()


@settings(max_examples=200)
@given(seed=seeds, name=st.sampled_from(COSTS), where=st.integers(0, 100), more=st.floats(1.0, 3.0))
def test_a_dearer_layer_never_makes_the_step_shorter(seed, name, where, more):
    plan, profile, cluster, _ = make_case(seed)
    layers = list(profile.layers)
    i = where % len(layers)
    layers[i] = replace(layers[i], **{name: getattr(layers[i], name) * more})
    dearer = replace(profile, layers=tuple(layers))
    never_shorter(*(simulate_plan(plan, x, cluster) for x in (profile, dearer)))


@settings(max_examples=100)
@given(seed=seeds, field=st.sampled_from(["send", "receive", "forward", "backward_weight"]))
def test_a_dearer_overhead_never_makes_the_step_shorter(seed, field):
    plan, profile, cluster, _ = make_case(seed)
    more = replace(profile.overheads, **{field: getattr(profile.overheads, field) + 0.01})
    dearer = replace(profile, overheads=more)
    never_shorter(*(simulate_plan(plan, x, cluster) for x in (profile, dearer)))


@settings(max_examples=200)
@given(seed=seeds, name=st.sampled_from(LINKS))
def test_a_slower_link_never_makes_the_step_shorter(seed, name):
    plan, profile, cluster, _ = make_case(seed)
    link = getattr(cluster, name)
    slow = replace(cluster, **{name: Link(link.latency + 0.01, min(link.bandwidth, 2e4) / 2)})
    never_shorter(*(simulate_plan(plan, profile, x) for x in (cluster, slow)))


@settings(max_examples=200)
@given(seed=seeds)
def test_devices_that_cannot_overlap_are_never_faster(seed):
    plan, profile, cluster, _ = make_case(seed)
    pair = (replace(cluster, overlap=overlap) for overlap in (True, False))
    never_shorter(*(simulate_plan(plan, profile, x) for x in pair))


@settings(max_examples=200)
@given(seed=seeds)
def test_no_step_beats_the_work_of_a_device_or_the_path_of_a_microbatch(seed):
    plan = make_plan(seed)
    profile = make_profile(seed + 1, plan.num_layers)
    cluster = make_cluster(seed + 2, plan.num_devices)
    fast, costs = simulate_plan(plan, profile, cluster), price(plan, profile, cluster)
    assert fast.makespan >= fast.busy().max() * (1 - 1e-12)
    works = {c for order in plan.programs for c in order}
    hops = costs.forward_busy + costs.backward_busy + costs.forward_latency + costs.backward_latency
    for m in range(plan.num_microbatches):
        stages = range(len(plan.stages))
        halves = np.array([Compute(Op.BACKWARD_INPUT, s, m) in works for s in stages])
        backward = np.where(halves, costs.backward_input, costs.backward)
        path = (costs.forward + backward + hops).sum()
        assert fast.makespan >= path * (1 - 1e-12)


@settings(max_examples=200)
@given(seed=seeds)
def test_memory_stays_above_what_is_static_and_returns_to_it(seed):
    slow, fast = both(seed)
    for d, (times, curve) in enumerate(fast.memory):
        assert (np.diff(times) >= 0).all()
        assert curve[0] == curve[-1] == slow.static(d)
        assert curve.min() >= curve[0]
        assert int(curve.max()) == fast.peak_bytes[d]


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
    slow, timeline = both(seed)
    links = defaultdict(list)
    for t in timeline.transfers:
        assert timeline.placement[t.stage] == t.source != t.target
        links[t.source, t.target].append(t)
    for (source, target), transfers in links.items():
        latency = slow.cluster.link(source, target).latency
        for a, b in pairwise(sorted(transfers, key=lambda t: t.start)):
            assert a.start <= a.end - latency <= b.start + 1e-12


@settings(max_examples=200)
@given(seed=seeds)
def test_idle_time_and_work_add_up_to_the_makespan(seed):
    _, timeline = both(seed)
    for busy, bubbles in zip(timeline.busy(), timeline.bubbles(), strict=True):
        assert all(seconds >= 0 for seconds in bubbles.values())
        assert busy + sum(bubbles.values()) == pytest.approx(timeline.makespan, abs=1e-12)


@settings(max_examples=60)
@given(seed=seeds, weight=st.sampled_from([0.5, 2.0, 3.0]))
def test_a_microbatch_of_twice_the_weight_takes_twice_as_long_but_for_overheads(seed, weight):
    plan = make_plan(seed)
    profile = make_profile(seed + 1, plan.num_layers, overheads=False)
    devices = make_cluster(seed + 2, plan.num_devices).devices
    cluster = Cluster(devices, Link(0.0, 1e5), Link(0.0, 1e4))
    even = simulate_plan(plan, profile, cluster)
    heavy = simulate_plan(plan, profile, cluster, Workload((weight,) * plan.num_microbatches))
    assert heavy.end == pytest.approx(even.end * weight, rel=1e-12)
    for (_, a), (_, b) in zip(even.memory, heavy.memory, strict=True):
        assert b - b[0] == pytest.approx((a - a[0]) * weight)


def test_an_overhead_is_the_same_whatever_the_microbatch_weighs():
    plan = schedule_plan("gpipe", 1, 2)
    profile = replace(uniform_profile(1), overheads=Overheads(forward=0.5, backward=0.25))
    timeline = simulate_plan(plan, profile, uniform(1), Workload((3.0, 1.0)))
    assert timeline.start.tolist() == [0, 3.5, 5, 11.25]


def test_one_heavy_microbatch_delays_what_follows():
    plan, profile = schedule_plan("gpipe", 1, 2), uniform_profile(1)
    timeline = simulate_plan(plan, profile, uniform(1), Workload((3.0, 1.0)))
    assert timeline.start.tolist() == [0, 3, 4, 10]
    assert timeline.peak_bytes == (4,)


def test_recompute_pays_a_forward_and_keeps_the_input_alone():
    profile = uniform_profile(4, output_bytes=3)
    profile = replace(
        profile,
        layers=tuple(replace(x, saved_bytes=100, saved_weight_bytes=0) for x in profile.layers),
    )
    orders = SCHEDULES["gpipe"].orders(Shape(2, 2))
    runs = [
        simulate_plan(Plan(2, (Stage(0, 2, 0), Stage(2, 4, 1, again)), orders), profile, uniform(2))
        for again in (False, True)
    ]
    assert [int(r.busy()[1]) for r in runs] == [12, 16]
    # Each device waits for values of 3 bytes; device 1 has read the first before it holds most.
    assert [r.peak_bytes for r in runs] == [(400 + 6, 400 + 3), (400 + 6, 3 + 3 + 200)]


def test_a_recomputed_stage_that_takes_no_time_gives_its_input_back():
    profile = uniform_profile(2, forward=0.0, output_bytes=8)
    plan = Plan(
        1, (Stage(0, 1, 0), Stage(1, 2, 1, recompute=True)), SCHEDULES["gpipe"].orders(Shape(2, 1))
    )
    timeline = simulate_plan(plan, profile, uniform(2))
    assert all(curve[-1] == curve[0] for _, curve in timeline.memory)


def test_a_shared_parameter_is_summed_both_ways_before_the_optimizers():
    profile = replace(uniform_profile(2, update=0.25), shared=(Shared((0, 1), 100, 0.125),))
    cluster = uniform(2, link=Link(0.5, 100.0))
    timeline = simulate_plan(schedule_plan("1f1b", 2, 1), profile, cluster)
    assert timeline.step == timeline.makespan + 2 * 1.5 + 0.125 + 0.25
    together = Plan(1, (Stage(0, 2, 0),), SCHEDULES["1f1b"].orders(Shape(1, 1)))
    alone = simulate_plan(together, profile, uniform(1, link=Link(0.5, 100.0)))
    assert alone.step == alone.makespan + 0.5


def test_two_transfers_on_one_link_queue():
    profile = uniform_profile(2, output_bytes=400)
    plan = schedule_plan("gpipe", 2, 3)
    timeline = simulate_plan(plan, profile, uniform(2, link=Link(0.5, 100.0)))
    forwards = [t for t in timeline.transfers if t.kind is Kind.OUTPUT]
    assert [t.end for t in forwards] == [1 + 4.5, 1 + 8.5, 1 + 12.5]
    assert timeline.start[timeline.rows(1)][:3].tolist() == [5.5, 9.5, 13.5]


def test_a_faster_device_takes_less_time():
    cluster = Cluster((Device(speed=2.0), Device(speed=0.5)))
    timeline = simulate_plan(schedule_plan("1f1b", 2, 1), uniform_profile(2), cluster)
    assert (timeline.end - timeline.start).tolist() == [0.5, 1.0, 2.0, 4.0]


def test_an_order_that_waits_for_ever_is_refused_by_both_check_and_simulate():
    orders = parse_order(["0B0", "0F0"], ""), parse_order(["1F0", "1B0"], "")
    plan = Plan(1, (Stage(0, 1, 0), Stage(1, 2, 1)), orders)
    with pytest.raises(ProgramError):
        simulate_plan(plan, uniform_profile(2), uniform(2))
    with pytest.raises(ProgramError, match="wait for ever"):
        simulate(lower(plan), price(plan, uniform_profile(2), uniform(2)))


def test_a_plan_for_another_model_is_not_simulated():
    with pytest.raises(PlanError, match="covers 2 layers"):
        simulate_plan(schedule_plan("1f1b", 2, 2), uniform_profile(3), uniform(2))


@pytest.mark.parametrize("num_devices", [1, 3])
def test_a_plan_for_another_number_of_devices_is_refused(num_devices):
    with pytest.raises(Error):
        simulate_plan(schedule_plan("1f1b", 2, 2), uniform_profile(2), uniform(num_devices))


def test_the_step_of_the_same_case_is_always_the_same():
    first, second = both(12345)[1], both(12345)[1]
    assert first.step == second.step
    assert (first.start == second.start).all()
    assert math.isfinite(first.step)


def test_computations_alone_are_enough_to_simulate():
    plan = schedule_plan("1f1b", 2, 3)
    bare = Program(plan.programs, plan.layout)
    costs = price(plan, uniform_profile(2), uniform(2))
    assert check(lower(plan)).num_transfers == 6
    assert simulate(bare, costs).step == simulate(lower(plan), costs).step


def test_a_device_holds_a_shared_parameter_once():
    layer = LayerCost("a", "mlp", 1.0, 1.0, 1.0, 2.0, parameter_bytes=100, state_bytes=400)
    layers = tuple(replace(layer, name=name) for name in "abc")
    profile = Profile("tied", 1, layers, shared=(Shared((0, 2), 80),))
    together = Plan(1, (Stage(0, 3, 0),), SCHEDULES["1f1b"].orders(Shape(1, 1)))
    assert simulate_plan(together, profile, uniform(1)).peak_bytes == (1200 - 320,)
    apart = Plan(1, (Stage(0, 2, 0), Stage(2, 3, 1)), SCHEDULES["1f1b"].orders(Shape(2, 1)))
    assert simulate_plan(apart, profile, uniform(2)).peak_bytes == (800, 400)
    instance = make_instance(profile, uniform(2), 1)
    for stop, device in (([2, 3], [0, 1]), ([1, 2, 3], [0, 1, 0])):
        stages = tuple(
            Stage(a, b, d) for a, b, d in zip([0, *stop[:-1]], stop, device, strict=True)
        )
        tables = search_price(instance, np.array(stop), np.array(device))
        assert (
            tables.static.tolist()
            == price(Plan(1, stages, ((), ())), profile, uniform(2)).static_bytes.tolist()
        )


def fused_timeline():
    order = parse_order(["0F0", "(0F1;0B0)OVERLAP_F_B", "0B1"], "")
    plan = Plan(2, (Stage(0, 1, 0),), (order,))
    return simulate_plan(plan, uniform_profile(1, overlapped=0.5), uniform(1))


def test_a_timeline_keeps_its_fused_pairs_in_its_file():
    value = json.loads(json.dumps(timeline_to_json(fused_timeline())))
    assert value["fused"] == [[1, 2]]
    assert timeline_from_json(value).partner.tolist() == [-1, 2, 1, -1]
    del value["fused"]  # as older files are
    assert timeline_from_json(value).partner is None


@settings(max_examples=100)
@given(seed=seeds)
def test_a_timeline_from_its_file_has_the_same_idle_time_by_cause(seed):
    _, timeline = both(seed)
    assert timeline_from_json(timeline_to_json(timeline)).bubbles() == timeline.bubbles()


@pytest.mark.parametrize(
    "fused", [[[1]], [[2, 1]], [[1, 4]], [[-1, 0]], [[1, True]], [1], [[1, 2], [2, 3]], [[1, 1.5]]]
)
def test_a_fused_pair_that_is_none_is_refused(fused):
    with pytest.raises(InputError, match=r"^here: fused\[\d\]: .* is no pair of two rows"):
        timeline_from_json(timeline_to_json(fused_timeline()) | {"fused": fused}, "here")


def test_a_small_plan_is_simulated_without_compiled_code():
    code = (
        "import sys; from adaptis.cluster import uniform;"
        "from adaptis.comparison import simulation;"
        "from random_plans import schedule_plan, uniform_profile;"
        "print(simulation(schedule_plan('1f1b', 4, 8), uniform_profile(4), uniform(4))[0].step,"
        "'numba' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.split() == ["33.0", "False"]
