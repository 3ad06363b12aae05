"""The published generator, written anew for the study of plan quality, does what is described."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptis.cluster import Cluster, Device, Link, uniform
from adaptis.profile import LayerCost, Profile, load_profile
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.simulate import simulate_plan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from published import publish  # noqa: E402 - of benchmarks/
from published.generator import Generator, order_of, plan_of  # noqa: E402
from published.moves import MOVES  # noqa: E402
from published.problem import make_problem  # noqa: E402
from published.starts import cuts, lightest_first  # noqa: E402
from quality import cases, figure, keep, tables  # noqa: E402
from quality.models import deepseek_v1  # noqa: E402

PROFILES = ROOT / "tests" / "data" / "profiles"


def equal_layers(count, memory=0):
    layer = LayerCost("x", "x", 1.0, 1.0, 1.0, 2.0, saved_bytes=memory)
    return Profile("equal", 1, (layer,) * count)


@pytest.fixture(scope="module")
def example():
    """The published example of a start where the rule's choice does not help."""
    generator = Generator(make_problem(equal_layers(64), uniform(4), 8), 60.0, 0)
    trial = generator.trial(np.arange(8, 65, 8), np.arange(8) % 4, split=False, defer=False)
    order = order_of(SCHEDULES["interleaved"].orders(Shape(4, 8, 2)))
    return generator, generator.evaluate(trial._replace(order=order))


def least(generator, point, phase, keep):
    trials = MOVES[phase](generator.problem, point, np.random.default_rng(0))
    found = [generator.evaluate(trial) for trial in trials if keep(trial)]
    return min(one.step for one in found if one is not None)


def test_the_published_example_starts_at_456_and_a_layer_moved_makes_it_447(example):
    generator, point = example
    assert point.step == 456
    first, last = point.edges()
    ends = first + 456 - last
    assert ends.sum() == (456 - ends - point.busy()).sum() == 144
    assert np.ptp(456 - point.busy()) == 0
    assert generator.phase(point, 1.0) == "schedule"
    assert least(generator, point, "partition", lambda trial: not trial.split) == 447


def test_without_splitting_backwards_the_chosen_phase_has_no_improving_move_there(example):
    generator, point = example
    assert least(generator, point, "schedule", lambda trial: not trial.split) == 456


def test_the_list_scheduler_finds_the_orders_of_1f1b_and_fills_gaps_with_w(example):
    generator, point = example
    fused = generator.evaluate(point.trial._replace(order=None))
    split = generator.evaluate(point.trial._replace(split=True, order=None))
    assert fused.step == 456
    assert split.step == 408


def test_a_device_whose_load_differs_by_a_layer_asks_for_another_partition(example):
    generator, point = example
    stop = point.trial.stop.copy()
    stop[0] += 1
    moved = generator.evaluate(point.trial._replace(stop=stop))
    assert generator.phase(moved, 1.0) == "partition"


def test_it_is_as_good_as_its_authors_on_their_own_fixture():
    problem = make_problem(load_profile(PROFILES / "nemotron-nano-v2-9b.json"), uniform(4), 8)
    generator = Generator(problem, 100.0, 0, evaluations=12_000)
    assert 0.85194 <= generator.run()[0].step <= 0.8987
    assert generator.phases["partition"] > 0 < generator.phases["placement"]


costs = st.integers(0, 5).map(float)
layer_costs = st.builds(
    lambda f, i, w, saved: LayerCost(
        "x", "x", f + 1, i, w, i + w, saved_bytes=saved, saved_weight_bytes=saved // 2,
        output_bytes=1,
    ),
    costs, costs, costs, st.integers(0, 9),
)  # fmt: skip


@settings(max_examples=40)
@given(
    layers=st.lists(layer_costs, min_size=4, max_size=9),
    m=st.integers(1, 6),
    speeds=st.lists(st.sampled_from((0.5, 1.0)), min_size=2, max_size=3),
    link=st.sampled_from((Link(), Link(0.5, 2.0))),
    room=st.sampled_from((np.inf, 40.0)),
    seed=st.integers(0, 99),
)
def test_its_own_times_are_those_of_the_simulator(layers, m, speeds, link, room, seed):
    profile = Profile("random", 1, tuple(layers))
    cluster = Cluster(tuple(Device(speed, room) for speed in speeds), link, link)
    generator = Generator(make_problem(profile, cluster, m), 60.0, seed)
    random = np.random.default_rng(seed)
    stages = int(random.integers(len(speeds), len(layers) + 1))
    stop = np.sort(random.permutation(np.arange(1, len(layers)))[: stages - 1])
    stop = np.append(stop, len(layers))
    device = np.append(np.arange(len(speeds)), random.integers(len(speeds), size=stages))[:stages]
    for split in (False, True):
        point = generator.evaluate(generator.trial(stop, device, split=split, defer=bool(seed % 2)))
        if point is None:
            assert room < np.inf
            continue
        timeline = simulate_plan(plan_of(point, m, profile), profile, cluster)
        assert timeline.step == pytest.approx(point.step)


def test_cuts_are_the_most_even_ones():
    work = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    found = {(n, tuple(stop.tolist())) for n, _, stop in cuts(work, range(2, 4), 1)}
    assert found == {(2, (5, 7)), (3, (3, 5, 7))}


def test_the_heaviest_stage_goes_to_the_least_burdened_device():
    cluster = Cluster((Device(1.0), Device(0.5)))
    problem = make_problem(equal_layers(2), cluster, 1)
    assert lightest_first(problem, np.array([3.0, 2.0, 1.0])).tolist() == [0, 1, 0]


def test_there_is_no_plan_where_nothing_fits():
    profile = equal_layers(8, memory=10)
    assert publish(profile, uniform(2, memory_bytes=30.0), 4, seconds=0.2) is None


def test_plans_respect_memory():
    profile = equal_layers(8, memory=10)
    answer = publish(profile, uniform(2, memory_bytes=80.0), 4, seconds=0.5)
    assert max(simulate_plan(answer.plan, profile, uniform(2)).peak_bytes) <= 80


def test_the_cells_are_those_of_the_paper():
    found = cases.cells()
    assert len(found) == 18
    assert sum(case.measured for case in found) / 18 == pytest.approx(1.42, abs=0.005)
    deepseek = deepseek_v1("large", "2k")
    assert [deepseek.num_layers, deepseek.devices, deepseek.microbatches] == [65, 8, 32]
    assert [layer.kind for layer in deepseek.layers].count("dense") == 7
    assert deepseek.layers[0].backward == pytest.approx(2.28e-3)


def test_every_model_of_the_design_meets_each_number_of_devices_it_has_layers_for(monkeypatch):
    monkeypatch.setattr(cases, "model", lambda name: equal_layers(34))
    names = [case.name for case in cases.design()]
    assert len(names) == len(set(names))
    assert {"llama3-8b-32x128", "deepseek-v3-8x32-priced-tight-unequal"} < set(names)
    assert "llama3-8b-64x256" not in names
    assert {case.name for case in cases.quick()} <= set(names)


def test_tight_memory_still_holds_the_best_contiguous_plan(monkeypatch):
    monkeypatch.setattr(cases, "model", lambda name: equal_layers(8, memory=7))
    case = cases.Case("conditions", "any", 4, 16, tight=True)
    assert {device.memory_bytes for device in case.cluster.devices} == {1.15 * 4 * 2 * 7}
    case = cases.Case("conditions", "any", 4, 16, unequal=True)
    assert [device.speed for device in case.cluster.devices] == [1.0, 1.0, 0.7, 0.7]


def test_a_case_is_claimed_once_and_a_dead_claim_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setattr(keep, "KEPT", tmp_path)
    with keep.claimed("case") as mine, keep.claimed("case") as again:
        assert mine
        assert not again
    (tmp_path / "case.claim").write_text("999999999")
    with keep.claimed("case") as mine:
        assert mine


def test_a_result_is_made_once(monkeypatch, tmp_path):
    monkeypatch.setattr(keep, "KEPT", tmp_path)
    for value in (1, 2):
        assert keep.kept("a/b", lambda value=value: {"value": value}) == {"value": 1}


def test_the_tables_and_the_figure_show_every_case():
    answer = {"step": 1.1, "seconds": 2.0, "seconds_to_1_percent": 1.0}
    lost = {"step": None, "error": "InfeasibleError: too little"}
    row = {
        "case": "one-4x16", "group": "cells", "devices": 4, "microbatches": 16, "priced": False,
        "tight": False, "unequal": False, "bound": 1.0, "binding": "work", "measured": 1.4,
        "interleaved": 1.65, "best_baseline": "zb-v", "best_baseline_step": 1.21,
        "published": {"step": None}, "whole": answer, "sharded": answer | {"step": 1.0},
    }  # fmt: skip
    text = tables.summary([row, row | {"case": "two-4x16", "whole": lost}])
    assert "| one-4x16 | 1.364 | nan | 1.500 | 1.650 | 1.650 | 1.400 | zb-v | 10.0% |" in text
    assert "- two-4x16, whole: InfeasibleError: too little" in text
    assert figure.draw([row]).count("one-4x16") == 3  # the baseline, ours, and the time
