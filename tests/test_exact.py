"""The proven optimum: equal to brute force where that is possible, and within every limit."""

import itertools
import math
import random
import sys
from dataclasses import replace

import pytest
from random_plans import schedule_plan, uniform_profile

from adaptis.bounds import lower_bounds
from adaptis.cluster import Cluster, Device, Link, uniform
from adaptis.errors import InfeasibleError, InputError, PlanError, ProgramError
from adaptis.plan import Plan, Stage
from adaptis.profile import LayerCost, Overheads, Profile, Shared
from adaptis.program import Compute, Op, Overlap
from adaptis.search.exact import exact_order, exact_plan
from adaptis.search.exact_stages import deals_below, make_costs, preemptive
from adaptis.simulate import simulate_plan


def make_profile(seed, num_layers, shared=False, overhead=True):
    """Whole milliseconds up to 9."""
    rng = random.Random(seed)

    def some(most=9):
        return rng.randint(1, most) / 1000

    layers = []
    for i in range(num_layers):
        half, weight = some(), some()
        whole = half + weight - rng.choice((0, 0, 0.001)) / 2
        size = {"saved_bytes": rng.randint(1, 4), "output_bytes": rng.randint(0, 3)}
        size |= {"parameter_bytes": 2, "state_bytes": 8, "saved_weight_bytes": rng.randint(0, 4)}
        layers.append(
            LayerCost(str(i), "mlp", some(), half, weight, whole, update=some(3), **size),
        )
    ends = [rng.choice((0, 0.001)) for _ in range(6)] if overhead else []
    pair = (Shared((0, num_layers - 1), 1, 0.002),) if shared else ()
    return Profile("random", 1, tuple(layers), overheads=Overheads(*ends), shared=pair)


def make_cluster(seed, num_devices, memory=math.inf):
    rng = random.Random(seed)
    link = Link(rng.choice((0, 0.002)), rng.choice((math.inf, 1000.0, 500.0)))
    speeds = rng.choices((0.5, 1.0), k=num_devices)
    return Cluster(tuple(Device(speed, memory) for speed in speeds), link, link)


def every_order(stages, num_devices, microbatches, split):
    """All orders per device in which each stage takes its micro-batches in turn."""
    choices = []
    for device in range(num_devices):
        rows = []
        for s, stage in enumerate(stages):
            if stage.device == device:
                back = Op.BACKWARD_INPUT if split[s] else Op.BACKWARD
                ops = [Op.FORWARD, back] + [Op.BACKWARD_WEIGHT] * split[s]
                rows += [[Compute(op, s, i) for i in range(microbatches)] for op in ops]
        choices.append(list(merges(rows)))
    return itertools.product(*choices)


def merges(rows):
    """All ways to merge rows of which each keeps its order, and nothing comes before its cause."""
    rows = [row for row in rows if row]
    if not rows:
        yield ()
        return
    for k, row in enumerate(rows):
        first = row[0]
        if not any(waits(first, other) for rest in rows for other in rest):
            for rest in merges([*rows[:k], row[1:], *rows[k + 1 :]]):
                yield (first, *rest)


def waits(one, two):
    """Whether `one` cannot run before `two`, of the same micro-batch and device."""
    if one.microbatch != two.microbatch:
        return False
    if one.op is Op.FORWARD:
        return two.op is Op.FORWARD and two.stage < one.stage
    if two.op is Op.FORWARD:
        return True
    if one.op is Op.BACKWARD_WEIGHT:
        return two.op is not Op.BACKWARD_WEIGHT and two.stage >= one.stage
    return two.op is not Op.BACKWARD_WEIGHT and two.stage > one.stage


def best_order(stages, profile, cluster, microbatches, splits):
    """The least step of all orders, by simulating each; inf where none fits."""
    best = math.inf
    for split in splits:
        for orders in every_order(stages, cluster.num_devices, microbatches, split):
            plan = Plan(microbatches, tuple(stages), orders)
            try:
                timeline = simulate_plan(plan, profile, cluster)
            except ProgramError:
                continue
            limits = [device.memory_bytes for device in cluster.devices]
            if all(a <= b for a, b in zip(timeline.peak_bytes, limits, strict=True)):
                best = min(best, timeline.step)
    return best


def in_turn(stages, num_devices, microbatches, split):
    """An order that runs one micro-batch after the other."""
    orders = [[] for _ in range(num_devices)]
    for i in range(microbatches):
        for s, stage in enumerate(stages):
            orders[stage.device].append(Compute(Op.FORWARD, s, i))
        for s in reversed(range(len(stages))):
            back = Op.BACKWARD_INPUT if split[s] else Op.BACKWARD
            row = orders[stages[s].device]
            row += [Compute(back, s, i)] + [Compute(Op.BACKWARD_WEIGHT, s, i)] * split[s]
    return Plan(microbatches, tuple(stages), tuple(map(tuple, orders)))


CASES = [  # devices of the stages, micro-batches, which are split
    ((0, 1), 2, (True, True)),
    ((0, 1), 3, (False, True)),
    ((0, 1, 0), 2, (False, False, False)),
    ((0, 1, 2), 2, (False, True, True)),
    ((0, 1, 1), 2, (False, False, False)),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("devices", "microbatches", "split"), CASES)
def test_the_best_order_is_that_of_all_orders(devices, microbatches, split, seed):
    stages = [Stage(s, s + 1, d) for s, d in enumerate(devices)]
    profile = make_profile(seed, len(stages), shared=seed == 1)
    cluster = make_cluster(seed, max(devices) + 1)
    start = in_turn(stages, cluster.num_devices, microbatches, split)
    found = exact_order(start, profile, cluster)
    assert found.optimal
    best = best_order(stages, profile, cluster, microbatches, [split])
    assert found.step_seconds == pytest.approx(best)
    assert found.bound_seconds == pytest.approx(best)
    assert found.step_seconds == simulate_plan(found.plan, profile, cluster).step


@pytest.mark.parametrize("spare", range(6))
def test_the_best_order_keeps_to_the_memory(spare):
    stages = [Stage(0, 1, 0), Stage(1, 2, 1)]
    profile = make_profile(3, 2)
    profile = replace(
        profile, layers=tuple(replace(layer, output_bytes=0) for layer in profile.layers)
    )
    start = in_turn(stages, 2, 3, (False, True))
    least = max(simulate_plan(start, profile, uniform(2)).peak_bytes)
    cluster = uniform(2, memory_bytes=least + 2 * spare)
    found = exact_order(start, profile, cluster)
    best = best_order(stages, profile, cluster, 3, [(False, True)])
    assert found.step_seconds == pytest.approx(best)
    assert found.optimal
    peaks = simulate_plan(found.plan, profile, cluster).peak_bytes
    assert max(peaks) <= least + 2 * spare


@pytest.mark.parametrize("spare", range(0, 10, 2))
@pytest.mark.parametrize("devices", [(0, 1), (0, 1, 0)])
def test_what_is_received_counts_from_the_posting_of_its_receive(devices, spare):
    stages = [Stage(s, s + 1, d) for s, d in enumerate(devices)]
    microbatches, split = (3, (False, True)) if len(devices) == 2 else (2, (False, False, False))
    profile = make_profile(4, len(devices))
    start = in_turn(stages, 2, microbatches, split)
    least = max(simulate_plan(start, profile, uniform(2)).peak_bytes)
    cluster = uniform(2, memory_bytes=least + spare)
    found = exact_order(start, profile, cluster)
    best = best_order(stages, profile, cluster, microbatches, [split])
    assert found.step_seconds == pytest.approx(best)
    assert found.optimal
    assert max(simulate_plan(found.plan, profile, cluster).peak_bytes) <= least + spare


def best_of_all(profile, cluster, microbatches, most_stages):
    """The least step of all partitions, placements, splits and orders."""
    length, best = profile.num_layers, math.inf
    for count in range(1, most_stages + 1):
        for cuts in itertools.combinations(range(1, length), count - 1):
            ends = [*itertools.pairwise((0, *cuts, length))]
            for devices in itertools.product(range(cluster.num_devices), repeat=count):
                stages = [Stage(a, b, d) for (a, b), d in zip(ends, devices, strict=True)]
                splits = [*itertools.product((False, True), repeat=count)]
                if len(set(devices)) > 1:
                    best = min(best, best_order(stages, profile, cluster, microbatches, splits))
                    continue
                for split in splits:  # one device is busy throughout, whatever the order
                    plan = in_turn(stages, cluster.num_devices, microbatches, split)
                    best = min(best, simulate_plan(plan, profile, cluster).step)
    return best


@pytest.mark.parametrize(("seed", "microbatches", "most"), [(0, 2, 2), (1, 1, 3), (5, 1, 3)])
def test_the_best_plan_is_that_of_all_plans(seed, microbatches, most):
    profile, cluster = make_profile(seed, 3, shared=seed == 5), make_cluster(seed, 2)
    found = exact_plan(profile, cluster, microbatches, seconds=5, most_stages=most)
    assert found.optimal
    assert found.step_seconds == pytest.approx(best_of_all(profile, cluster, microbatches, most))
    assert found.bound_seconds == pytest.approx(found.step_seconds)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 6), (4, 8)])
def test_known_schedules_are_proven(p, m):
    fused = exact_order(schedule_plan("gpipe", p, m), uniform_profile(p), uniform(p))
    assert (fused.step_seconds, fused.optimal) == (3 * (m + p - 1), True)
    split = exact_order(schedule_plan("zb-h1", p, m), uniform_profile(p), uniform(p))
    assert (split.step_seconds, split.optimal) == (3 * m + p - 1, True)


def test_1f1b_is_the_best_order_in_its_memory():
    profile, plan = uniform_profile(3), schedule_plan("1f1b", 3, 6)
    cluster = uniform(3, memory_bytes=3)
    found = exact_order(plan, profile, cluster)
    assert (found.step_seconds, found.optimal) == (24, True)
    devices = tuple(Device(memory_bytes=n) for n in (2, 3, 3))
    cluster = replace(cluster, devices=devices)
    assert exact_order(in_turn(plan.stages, 3, 6, (0, 0, 0)), profile, cluster).step_seconds > 24


def test_seconds_that_are_no_whole_ticks_cost_less_than_a_thousandth():
    profile, cluster = make_profile(7, 4), make_cluster(7, 2)
    whole = exact_plan(profile, cluster, 3, seconds=5)
    layers = [
        replace(
            layer,
            forward=layer.forward * (1 + 1e-5 * math.sqrt(i)),
            update=layer.update * (1 + 1e-5 * math.sqrt(i + 3)),
        )
        for i, layer in enumerate(profile.layers)
    ]
    odd = exact_plan(replace(profile, layers=tuple(layers)), cluster, 3, seconds=5)
    assert whole.optimal
    assert odd.optimal
    assert odd.bound_seconds <= odd.step_seconds
    assert odd.step_seconds == pytest.approx(whole.step_seconds, rel=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_what_a_deal_takes_at_least_is_no_more_than_what_it_takes(seed):
    profile, cluster = make_profile(seed, 5, shared=True), make_cluster(seed, 3)
    costs = make_costs(profile, cluster, 3, 4)
    rng = random.Random(seed)
    cuts = [0, *sorted(rng.sample(range(1, 5), 3)), 5]
    stages = [Stage(a, b, rng.randrange(3)) for a, b in itertools.pairwise(cuts)]
    arrays = make_arrays(stages)
    for split in itertools.product((False, True), repeat=4):
        plan = exact_order(in_turn(stages, 3, 3, split), profile, cluster, seconds=10).plan
        step = simulate_plan(plan, profile, cluster).step
        assert preemptive(costs, *arrays) <= step * (1 + 1e-9)


def make_arrays(stages):
    import numpy as np

    stop = np.array([stage.stop for stage in stages])
    return stop, np.array([stage.device for stage in stages])


def test_no_deal_below_the_limit_is_forgotten():
    profile, cluster = make_profile(2, 4, overhead=False), uniform(2)
    costs = make_costs(profile, cluster, 2, 4)
    deals, reached = deals_below(costs, 1.0, 0.0)
    assert reached == 1.0
    # Eight ways to cut; with s stages 2^s placements, of which a half is a mirror image.
    assert len(deals) == sum(math.comb(3, s - 1) * 2 ** (s - 1) for s in range(1, 5))
    assert [deal.bound for deal in deals] == sorted(deal.bound for deal in deals)


def test_a_proof_that_is_cut_short_is_a_bound():
    profile, cluster = make_profile(11, 9), uniform(3)
    found = exact_plan(profile, cluster, 6, seconds=0.5)
    assert lower_bounds(profile, cluster, 6).value <= found.bound_seconds * (1 + 1e-9)
    assert found.bound_seconds <= found.step_seconds
    assert ("proven optimal" in found.verdict) == found.optimal


def test_nothing_that_fits_is_proven_too():
    with pytest.raises(InfeasibleError, match="proven that nothing fits"):
        exact_plan(make_profile(1, 3), uniform(2, memory_bytes=10), 2, seconds=1)


@pytest.mark.parametrize(
    ("sizes", "found"), [((17, 2, 2), "17 layers"), ((8, 7, 2), "7 devices"), ((4, 2, 17), "17 mi")]
)
def test_what_is_too_large_is_refused_with_the_limits(sizes, found):
    layers, devices, microbatches = sizes
    with pytest.raises(InputError, match=f"{found}.*at most 16 layers, 6 devices and 16 micro"):
        exact_plan(uniform_profile(layers), uniform(devices), microbatches)


def refuse(plan, profile, match):
    with pytest.raises(PlanError, match=match):
        exact_order(plan, profile, uniform(plan.num_devices))


def test_what_the_proof_cannot_express_is_refused_by_name():
    profile, plan = uniform_profile(2), schedule_plan("1f1b", 2, 4)
    one, two = plan.stages
    refuse(replace(plan, stages=(replace(one, recompute=True), two)), profile, "recomputation")
    refuse(replace(plan, stages=(replace(one, offload=True), two)), profile, "offloaded")
    refuse(replace(plan, replicas=2), profile, "replicas")
    refuse(replace(plan, clipped=True), profile, "clipped")
    refuse(replace(plan, previous=(-1, 0, -1, 2)), profile, "slices")
    pair = Overlap(plan.programs[0][0], plan.programs[0][1])
    refuse(replace(plan, programs=((pair,), ())), profile, "fused pairs")
    mixed = (*plan.programs[0], Compute(Op.BACKWARD_WEIGHT, 0, 0))
    refuse(replace(plan, programs=(mixed, plan.programs[1])), profile, "B as well as I and W")
    with pytest.raises(InputError, match="overlap"):
        exact_plan(profile, replace(uniform(2), overlap=False), 2)


def test_without_the_solver_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(InputError, match=r'pip install "adaptis\[exact\]"'):
        exact_plan(uniform_profile(3), uniform(2), 2)
