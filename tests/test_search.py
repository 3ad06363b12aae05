from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptis.check import check
from adaptis.cluster import Cluster, Device, Link, uniform
from adaptis.costs import price as price_stages
from adaptis.errors import InfeasibleError, PlanError
from adaptis.lower import lower
from adaptis.packing import fairest
from adaptis.plan import Plan, Stage, plan_from_json, plan_to_json
from adaptis.profile import LayerCost, Overheads, Profile, Shared, load_profile
from adaptis.program import HEAD_OPS, Op
from adaptis.rows import B, F, I, W
from adaptis.search import BASELINES, Progress, Stop, lower_bounds, search
from adaptis.search.convert import fixed_of, plan_of
from adaptis.search.greedy import Candidate, evaluate
from adaptis.search.instance import make_instance, price
from adaptis.search.polish import fix, make_trace, polish, retime
from adaptis.search.room import peak_bytes
from adaptis.simulate import simulate_plan
from adaptis.workload import Workload

PROFILES = Path(__file__).parent / "data" / "profiles"


@st.composite
def problems(draw, most_layers=8, memory=False):
    """A profile with everything in it, unequal devices, and a number of micro-batches."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, most_layers))
    seconds = random.uniform(0.1, 3.0, (n, 4)) * random.choice([0.0, 1.0], (n, 4), p=[0.05, 0.95])
    layers = tuple(
        LayerCost(
            f"l{i}",
            "mlp",
            *seconds[i, :3].tolist(),
            backward=float(
                random.choice([seconds[i, 1] + seconds[i, 2], seconds[i, 3] + seconds[i, 1]])
            ),
            update=float(random.uniform(0, 0.3)),
            state_bytes=int(random.integers(0, 50)),
            saved_bytes=int(random.integers(0, 20)),
            saved_weight_bytes=int(random.integers(0, 12)),
            output_bytes=int(random.integers(0, 5)),
        )
        for i in range(n)
    )
    overheads = (
        Overheads(*random.uniform(0, 0.3, 6).tolist()) if draw(st.booleans()) else Overheads()
    )
    shared = (
        (Shared((0, n - 1), 3, float(random.uniform(0, 0.3))),)
        if n > 1 and draw(st.booleans())
        else ()
    )
    profile = Profile("random", 1, layers, overheads, shared)
    p = draw(st.integers(1, 4))
    limits = random.uniform(150, 400, p).tolist() if memory else [float("inf")] * p
    devices = tuple(
        Device(float(random.choice([1.0, 0.5, 2.0])), limits[d], int(random.integers(2)))
        for d in range(p)
    )
    link = Link(float(random.uniform(0, 0.4)), float(random.uniform(1, 20)))
    cluster = Cluster(devices, Link(), link, overlap=draw(st.booleans()))
    return profile, cluster, draw(st.integers(1, 6)), random


def random_candidate(random, num_layers, num_devices):
    if num_layers > 1 and random.random() < 0.3:  # the last layer belongs to all devices
        num_layers -= 1
    n = int(random.integers(1, num_layers + 1))
    again = random.random(n) < random.choice([0.0, 0.4])
    stop = np.sort(random.choice(np.arange(1, num_layers), n - 1, replace=False)) if n > 1 else []
    return Candidate(
        np.array([*stop, num_layers], dtype=np.int64),
        random.integers(0, num_devices, n),
        (random.random(n) < 0.5) & ~again,
        again,
        random.normal(size=(n, 3)),
        random.integers(1, 5, n),
        np.array([*random.random(4) * [2, 1, 1, 1], random.choice([0.0, 100.0])]),
    )


def peaks(plan, profile, cluster):
    """Peak bytes of each device, from the order alone: what F takes, B or I and W give back."""
    costs = price_stages(plan, profile, cluster)
    result = []
    for d, order in enumerate(plan.programs):
        held = top = costs.static_bytes[d]
        for c in order:
            if c.op in HEAD_OPS:
                whole = costs.head.saved + costs.head.input
                held += whole if c.op is Op.SCORES else 0
                top = max(top, held)
                held -= whole if c.op is Op.SCORES_GRADIENT else 0
                continue
            saved, kept = costs.saved[c.stage], costs.saved_weight[c.stage]
            if plan.stages[c.stage].recompute:
                again = costs.input[c.stage]
                held += again if c.op is Op.FORWARD else 0
                top = max(top, held + (0 if c.op is Op.FORWARD else saved))
                held -= 0 if c.op is Op.FORWARD else again
                continue
            if c.op is Op.FORWARD:
                held += saved
            elif c.op is Op.BACKWARD_INPUT:
                top = max(top, held + max(kept - saved, 0))
                held += kept - saved
            top = max(top, held)
            held -= {Op.BACKWARD: saved, Op.BACKWARD_WEIGHT: kept}.get(c.op, 0)
        result.append(top)
    return result


@settings(max_examples=80, deadline=None)
@given(problems())
def test_array_prices_equal_the_typed_ones(problem):
    profile, cluster, m, random = problem
    c = random_candidate(random, profile.num_layers, cluster.num_devices)
    stages = tuple(
        Stage(int(a), int(b), int(d))
        for a, b, d in zip([0, *c.stop[:-1]], c.stop, c.device, strict=True)
    )
    sharded = int(c.stop[-1] < profile.num_layers)
    instance = make_instance(profile, cluster, m)
    tables = price(instance, c.stop, c.device)
    plan = Plan(m, stages, ((),) * cluster.num_devices, head_reductions=sharded)
    costs = price_stages(plan, profile, cluster)
    typed = [costs.forward, costs.backward, costs.backward_input, costs.backward_weight]
    n = len(stages)
    np.testing.assert_allclose(tables.seconds[:, :n], typed)
    np.testing.assert_allclose(tables.busy[:, :n], [costs.forward_busy, costs.backward_busy])
    np.testing.assert_allclose(
        tables.latency[:, :n], [costs.forward_latency, costs.backward_latency]
    )
    if sharded:
        np.testing.assert_allclose(tables.seconds[0, n:], costs.head.scores)
        np.testing.assert_allclose(tables.seconds[1, n:], costs.head.gradient)
    np.testing.assert_allclose(tables.once[:, :n], costs.overheads[:, c.device][[F, B, I, W]])
    np.testing.assert_allclose(tables.static, costs.static_bytes)
    np.testing.assert_allclose(tables.update, costs.update)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_list_schedules_are_proven_and_simulated_right_and_above_the_bounds(problem):
    profile, cluster, m, random = problem
    weights = random.uniform(0.2, 2.0, m) if random.random() < 0.5 else np.ones(m)
    workload = Workload(tuple(weights.tolist()))
    instance = make_instance(profile, cluster, m, weights=workload.weights)
    candidate = random_candidate(random, profile.num_layers, cluster.num_devices)
    cost, fixed = evaluate(instance, candidate), fix(instance, candidate)
    plan = plan_of(fixed, m, profile, "list")
    check(lower(plan))
    timeline = simulate_plan(plan, profile, cluster, workload)
    step = timeline.step
    assert cost == pytest.approx(step, rel=1e-9)
    assert retime(instance, fixed, make_trace(len(fixed.kind))) == pytest.approx(step, rel=1e-9)
    tables = price(instance, fixed.stop, fixed.device)
    rows = fixed.offsets, fixed.kind, fixed.stage
    peaks = peak_bytes(instance.weights, fixed.split, fixed.again, rows, tables)
    assert timeline.peak_bytes == pytest.approx(peaks.tolist(), abs=1)
    mode = "always" if plan.head_reductions else "never"
    for bound in lower_bounds(profile, cluster, workload, mode).all:
        assert bound.seconds <= step * (1 + 1e-9), bound


@settings(max_examples=60, deadline=None)
@given(problems(memory=True))
def test_the_list_scheduler_keeps_to_the_memory_or_says_that_nothing_fits(problem):
    profile, cluster, m, random = problem
    instance = make_instance(profile, cluster, m)
    candidate = random_candidate(random, profile.num_layers, cluster.num_devices)
    if evaluate(instance, candidate) >= 1e9:
        return
    plan = plan_of(fix(instance, candidate), m, profile, "list")
    check(lower(plan))
    limits = [device.memory_bytes for device in cluster.devices]
    assert all(
        p <= limit + 1e-6 for p, limit in zip(peaks(plan, profile, cluster), limits, strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(problems(memory=True))
def test_polishing_never_makes_it_worse_and_keeps_to_the_memory(problem):
    profile, cluster, m, random = problem
    instance = make_instance(profile, cluster, m)
    candidate = random_candidate(random, profile.num_layers, cluster.num_devices)
    cost = evaluate(instance, candidate)
    if cost >= 1e9:
        return
    start = fix(instance, candidate)
    _, best, least = polish(instance, start, start, 1, 0, 200, 200, 0.01, 0.001)
    plan = plan_of(best, m, profile, "polished")
    check(lower(plan))
    assert least <= cost * (1 + 1e-9)
    assert simulate_plan(plan, profile, cluster).step == pytest.approx(least, rel=1e-9)
    limits = [device.memory_bytes for device in cluster.devices]
    assert all(
        p <= limit + 1e-6 for p, limit in zip(peaks(plan, profile, cluster), limits, strict=True)
    )


@settings(max_examples=25, deadline=None)
@given(problems(memory=True))
def test_a_search_is_above_the_bound_not_worse_than_any_baseline_and_fits(problem):
    profile, cluster, m, _ = problem
    fitting = []
    limits = [device.memory_bytes for device in cluster.devices]
    for make in BASELINES.values():
        try:
            plan = make(profile, cluster, m)
        except PlanError:
            continue
        timeline = simulate_plan(plan, profile, cluster)
        if all(p <= limit for p, limit in zip(timeline.peak_bytes, limits, strict=True)):
            fitting.append(timeline.step)
    try:
        result = search(profile, cluster, m, Stop(evaluations=500))
    except InfeasibleError:
        assert not fitting
        return
    assert result.timeline.step <= min(fitting, default=np.inf) * (1 + 1e-9)
    assert result.timeline.step >= result.lower_bound.value * (1 - 1e-9)
    assert all(
        p <= x + 1e-6 for p, x in zip(peaks(result.plan, profile, cluster), limits, strict=True)
    )


def test_fairest_deal_equals_brute_force():
    random = np.random.default_rng(1)
    for _ in range(30):
        work, slowness = (
            random.integers(0, 4, 6).astype(float),
            random.integers(1, 3, 3).astype(float),
        )
        waits = random.integers(0, 3, 3).astype(float)
        best = np.inf
        for deal in itertools.product(range(3), repeat=6):
            load = np.zeros(3)
            np.add.at(load, list(deal), work)
            best = min(best, max(np.where(load > 0, waits + (load + 0.5) * slowness, 0.0)))
        assert fairest(work, slowness, waits, 0.5) == pytest.approx(best)


@pytest.fixture(scope="module")
def nano():
    return load_profile(PROFILES / "nemotron-nano-v2-9b.json")


def test_same_seed_and_evaluations_give_the_same_plan(nano):
    one, two = (search(nano, uniform(4), 8, Stop(evaluations=4000), seed=3) for _ in range(2))
    assert plan_to_json(one.plan) == plan_to_json(two.plan)
    assert one.evaluated == two.evaluated


def test_the_fixture_is_better_than_published_after_a_few_thousand_trials(nano):
    result = search(nano, uniform(4), 8, Stop(evaluations=40_000))
    assert result.timeline.step <= 0.8987
    assert result.gap == pytest.approx(result.timeline.step / result.lower_bound.value - 1)
    assert plan_from_json(plan_to_json(result.plan)) == result.plan
    assert result.plan.provenance["step_seconds"] == result.timeline.step


def test_a_search_stops_at_the_gap_asked_for(nano):
    result = search(nano, uniform(4), 8, Stop(gap=0.2))
    assert result.gap <= 0.2
    assert result.evaluated < 5000


def test_an_indivisible_layer_is_proven_to_be_the_limit():
    result = search(
        load_profile(PROFILES / "v1-gemma-small-2k.json"), uniform(4), 16, Stop(0.001, 30, 300_000)
    )
    assert result.gap <= 0.01
    assert result.lower_bound.binding.name == "packing"


def test_progress_improves_and_history_falls(nano):
    seen: list[Progress] = []
    result = search(nano, uniform(4), 8, Stop(evaluations=5000), progress=seen.append)
    assert [p.best for p in seen] == sorted((p.best for p in seen), reverse=True)
    assert [best for _, best in result.history] == sorted(
        (best for _, best in result.history), reverse=True
    )


def test_what_does_not_fit_names_the_device_and_the_bytes():
    layer = LayerCost("l", "mlp", 1.0, 1.0, 1.0, 2.0, state_bytes=100, saved_bytes=10)
    with pytest.raises(InfeasibleError, match="device") as caught:
        search(
            Profile("big", 1, (layer,) * 4), uniform(2, memory_bytes=200), 2, Stop(evaluations=2000)
        )
    assert caught.value.missing_bytes == 10  # one layer at a time recomputed


def test_few_devices_few_microbatches_and_real_overheads_come_close_to_the_bound():
    layers = [LayerCost("embedding", "embedding", 0.001, 0.0, 0.001, 0.001)]
    layers += [LayerCost(f"b{i}", "mlp", 0.006, 0.008, 0.006, 0.012) for i in range(8)]
    layers += [LayerCost("head", "head", 0.02, 0.02, 0.02, 0.035)]
    overheads = Overheads(0.001, 0.0015, 0.0015, 0.001, 0.0001, 0.0001)
    profile = Profile("demo", 1, tuple(layers), overheads)
    cluster = uniform(2, link=Link(0.0005))
    result = search(profile, cluster, 8, Stop(evaluations=30_000))
    assert result.gap <= 0.06


def test_tiny_instances_are_solved_as_well_as_by_exhaustion():
    random = np.random.default_rng(5)
    for _ in range(3):
        seconds = random.integers(1, 6, (3, 3)).astype(float)
        layers = tuple(
            LayerCost(f"l{i}", "mlp", *row, row[1] + row[2])
            for i, row in enumerate(seconds.tolist())
        )
        profile = Profile("tiny", 1, layers)
        result = search(profile, uniform(2), 2, Stop(evaluations=6000))
        assert result.timeline.step <= exhaustive(profile, 2) + 1e-9


def exhaustive(profile, m):
    """The best step over all cuts, placements on two devices, and orders; backward split."""
    n, best = profile.num_layers, np.inf
    for cuts in itertools.product((False, True), repeat=n - 1):
        stop = [i + 1 for i, cut in enumerate(cuts) if cut] + [n]
        for device in itertools.product(range(2), repeat=len(stop)):
            if device[0] == 0:
                best = min(best, best_order(profile, stop, device, m))
    return best


def inputs(n, k, s, i, ends):
    if k == 0:
        return ends.get((0, s - 1, i)) if s else 0.0
    if k == 1:
        return ends.get((1, s + 1, i)) if s < n - 1 else ends.get((0, s, i))
    return ends.get((1, s, i))


def best_order(profile, stop, device, m):
    """Branch and bound: each computation begins as early as its device and its inputs allow."""
    starts = [0, *stop[:-1]]
    seconds = [
        [
            sum(getattr(x, name) for x in profile.layers[a:b])
            for name in ("forward", "backward_input", "backward_weight")
        ]
        for a, b in zip(starts, stop, strict=True)
    ]
    n = len(stop)
    seen: dict[tuple, list] = defaultdict(list)
    best = [np.inf]

    def extend(counts, clock, ends):
        if all(c == m for row in counts for c in row):
            best[0] = min(best[0], max(clock))
            return
        for d in range(2):
            rest = sum(
                (m - counts[s][k]) * seconds[s][k]
                for s in range(n)
                if device[s] == d
                for k in range(3)
            )
            if clock[d] + rest >= best[0]:
                return
        state = tuple(map(tuple, counts))
        figures = (*clock, *(ends[key] for key in sorted(ends)))
        if any(all(a <= b for a, b in zip(old, figures, strict=True)) for old in seen[state]):
            return
        seen[state].append(figures)
        for s, k in itertools.product(range(n), range(3)):
            i = counts[s][k]
            at = inputs(n, k, s, i, ends) if i < m else None
            if at is None:
                continue
            end = max(clock[device[s]], at) + seconds[s][k]
            row = [list(x) for x in counts]
            row[s][k] += 1
            times = list(clock)
            times[device[s]] = end
            extend(row, times, {**ends, (k, s, i): end})

    extend([[0, 0, 0] for _ in range(n)], [0.0, 0.0], {})
    return best[0]


def test_fixed_orders_survive_the_way_to_a_plan_and_back(nano):
    plan = BASELINES["zb-h1"](nano, uniform(4), 8)
    again = plan_of(fixed_of(plan.stages, plan.programs), 8, nano, plan.schedule)
    assert again == plan
