import json
import math
from dataclasses import replace

import pytest
from random_cases import make_case
from random_plans import schedule_plan, uniform_profile

from adaptis.bounds import Bound, Bounds, lower_bounds
from adaptis.cluster import uniform
from adaptis.notation import parse_order
from adaptis.plan import Plan, Stage
from adaptis.search.explain import ADVICE, explain, explanation
from adaptis.simulate import simulate_plan
from adaptis.workload import Workload

UNLIMITED = (math.inf,) * 2


def figures(plan, profile, memory=UNLIMITED):
    cluster = uniform(plan.num_devices)
    timeline = simulate_plan(plan, profile, cluster)
    bounds = lower_bounds(profile, cluster, plan.num_microbatches)
    return explanation(plan, timeline, bounds, memory), explain(plan, timeline, bounds, memory)


def test_a_textbook_schedule_is_explained_to_the_millisecond():
    profile = uniform_profile(2)  # F 1 s, B 2 s
    found, lines = figures(schedule_plan("1f1b", 2, 2), profile)
    assert found["step_parts_seconds"] == {"work": 6.0, "imbalance": 3.0}
    assert lines == [
        "2 stages on 2 devices; backward in one piece; nothing recomputed",
        "device 0: layers 0  work 6000.0 ms  idle 3000.0 ms (imbalance 3000.0)"
        "                  memory 0.00 GiB",
        "device 1: layers 1  work 6000.0 ms  idle 3000.0 ms (warm-up 1000.0, cool-down 2000.0)"
        "  memory 0.00 GiB",
        "step 9000.0 ms = work 6000.0 + imbalance 3000.0",
        "28.6 % above the lower bound of 7000.0 ms (layer: 1 alone is 1.00x the average device's "
        "work, indivisible); divide it or accept",
        "most is lost to imbalance: 3000.0 ms",
    ]


@pytest.mark.parametrize("seed", range(0, 300, 3))
def test_the_parts_of_a_step_add_up_to_it_and_the_figures_are_json(seed):
    plan, profile, cluster, weights = make_case(seed)
    timeline = simulate_plan(plan, profile, cluster, Workload(weights))
    bounds = lower_bounds(profile, cluster, plan.num_microbatches)
    limits = [device.memory_bytes for device in cluster.devices]
    found = explanation(plan, timeline, bounds, limits)
    assert sum(found["step_parts_seconds"].values()) == pytest.approx(timeline.step, abs=1e-9)
    for row in found["devices"]:
        total = row["work_seconds"] + sum(row["idle_seconds"].values())
        assert total == pytest.approx(timeline.makespan, abs=1e-9)
    assert json.loads(json.dumps(found)) == found
    assert len(explain(plan, timeline, bounds, limits)) == plan.num_devices + 4


def test_what_was_decided_beyond_the_order_is_said():
    stages = (Stage(0, 2, 0), Stage(2, 4, 1, recompute=True), Stage(4, 5, 0, recompute=True))
    orders = (
        parse_order(["0F0", "2F0", "2B0", "0I0", "0W0"], ""),
        parse_order(["1F0", "1B0"], ""),
    )
    found, lines = figures(Plan(1, stages, orders), uniform_profile(5))
    assert lines[0] == (
        "3 stages on 2 devices; backward in two halves in 1 of them; recomputed: layers 2-3 4"
    )
    assert found["step_parts_seconds"]["recomputation"] == pytest.approx(1.5)  # 3 F on 2 devices


def test_a_sharded_head_is_named():
    plan = next(p for p, *_ in map(make_case, range(100)) if p.head_reductions == 2)
    _, profile, cluster, _ = next(c for c in map(make_case, range(100)) if c[0] == plan)
    timeline = simulate_plan(plan, profile, cluster)
    bounds = lower_bounds(profile, cluster, plan.num_microbatches)
    line = explain(plan, timeline, bounds, [math.inf] * plan.num_devices)[0]
    assert line.endswith("head sharded, 2 reductions a micro-batch")


def test_memory_stands_beside_its_limit():
    profile = uniform_profile(2, state_bytes=2**30)
    _, lines = figures(schedule_plan("1f1b", 2, 2), profile, (2**31, math.inf))
    assert lines[1].endswith("  memory 1.00 of 2.00 GiB")
    assert lines[2].endswith("  memory 1.00 GiB")


def test_a_device_without_layers_is_listed():
    plan = schedule_plan("1f1b", 1, 2)
    _, lines = figures(replace(plan, programs=(*plan.programs, ())), uniform_profile(1))
    assert "layers none" in lines[2]


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ((("layer", 9.0, "9.head alone is 1.67x ..."),), "1.67x ...); deal it out to all devices"),
        ((("layer", 9.0, "mlp alone is 1.67x ..."),), "mlp alone is 1.67x ...); divide it"),
        (
            (("layer", 9.0, "head alone is 1.67x ..."), ("packing", 9.1, "dealt")),
            "(packing: head alone is 1.67x ...); deal it out to all devices (try --shard",
        ),
        ((("layer", 5.0, "head alone ..."), ("packing", 9.0, "dealt")), "(packing: dealt); layers"),
        ((("path", 9.0, "one"), ("layer", 5.0, "head alone")), "(path: one); more micro-batches"),
    ],
)
def test_the_binding_bound_comes_with_its_reason_and_what_helps(bounds, said):
    plan, profile = schedule_plan("1f1b", 2, 2), uniform_profile(2)
    timeline = simulate_plan(plan, profile, uniform(2))
    made = Bounds(tuple(Bound(*bound) for bound in bounds))
    assert said in explain(plan, timeline, made, UNLIMITED)[-2]


def test_every_bound_has_its_advice():
    profile = uniform_profile(2)
    assert {bound.name for bound in lower_bounds(profile, uniform(2), 2).all} <= set(ADVICE)


def test_at_the_bound_nothing_is_left_to_gain():
    found, lines = figures(schedule_plan("1f1b", 1, 2), uniform_profile(1), (math.inf,))
    assert found["gap"] == 0
    assert lines[-1] == "nothing left to gain: the plan is at the bound"
