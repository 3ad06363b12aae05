from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adaptis.check import check
from adaptis.cluster import uniform
from adaptis.errors import PlanError
from adaptis.lower import lower
from adaptis.profile import LayerCost, Overheads, Profile, load_profile
from adaptis.search import BASELINES, fitted, lower_bounds
from adaptis.search.partition import bottleneck_cut, even_cut
from adaptis.simulate import simulate_plan

PROFILES = Path(__file__).parent / "data" / "profiles"


def chain(*forward, overheads=Overheads()):  # noqa: B008 - frozen
    layers = tuple(LayerCost(f"l{i}", "mlp", f, f, f, 2 * f) for i, f in enumerate(forward))
    return Profile("chain", 1, layers, overheads)


@pytest.fixture(scope="module")
def nano():
    return load_profile(PROFILES / "nemotron-nano-v2-9b.json")


def step(name, profile, devices, microbatches):
    cluster = uniform(devices)
    plan = BASELINES[name](profile, cluster, microbatches)
    check(lower(plan))
    return simulate_plan(plan, profile, cluster).step


def test_uniform_1f1b_is_exactly_the_published_fixture(nano):
    assert step("1f1b", nano, 4, 8) == pytest.approx(1.33121, abs=1e-9)


def test_best_contiguous_1f1b_is_the_published_one(nano):
    plan = BASELINES["1f1b-uneven"](nano, uniform(4), 8)
    assert [s.stop - s.start for s in plan.stages] == [14, 16, 15, 13] or (
        simulate_plan(plan, nano, uniform(4)).step <= 1.18326
    )


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_a_proven_plan_above_the_bound(name):
    profile = load_profile(PROFILES / "v1-gemma-small-2k.json")
    assert step(name, profile, 4, 16) >= lower_bounds(profile, uniform(4), 16).value


def test_interleaved_holds_one_block_per_stage_where_they_divide(nano):
    assert len(BASELINES["interleaved"](nano, uniform(4), 8).stages) == 56


def test_interleaved_merges_blocks_where_they_do_not_divide():
    plan = BASELINES["interleaved"](chain(*[1.0] * 7), uniform(2), 4)
    assert [s.stop - s.start for s in plan.stages] == [2, 1, 1, 1, 1, 1]


def test_interleaved_tuned_is_not_worse_than_either_extreme(nano):
    tuned = step("interleaved-tuned", nano, 4, 8)
    assert tuned <= min(step("interleaved", nano, 4, 8), step("1f1b", nano, 4, 8))


def test_interleaved_refuses_broken_groups_of_microbatches(nano):
    with pytest.raises(PlanError, match="multiple of 4 micro-batches"):
        BASELINES["interleaved"](nano, uniform(4), 6)


def test_tuned_interleaving_falls_back_to_1f1b(nano):
    assert step("interleaved-tuned", nano, 4, 6) == pytest.approx(step("1f1b", nano, 4, 6))


def saving(count):
    """Layers that save 10 bytes, of which the input is 1, and hold 1."""
    layers = (replace(x, saved_bytes=10, output_bytes=1, state_bytes=1) for x in chain(1).layers)
    return Profile("saving", 1, tuple(layers) * count)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_can_be_recomputed_to_fit(name):
    profile = saving(8)
    free = fitted(BASELINES[name], profile, uniform(4), 8)
    least = max(free.timeline.peak_bytes)
    assert free.fits
    assert not any(stage.recompute for stage in free.plan.stages)
    tight = fitted(BASELINES[name], profile, uniform(4, memory_bytes=least - 1), 8)
    assert tight.fits
    assert max(tight.timeline.peak_bytes) < least
    assert tight.plan.schedule == free.plan.schedule
    if name == "v-search":  # it looks at the room there is, and refuses
        return
    lost = fitted(BASELINES[name], profile, uniform(4, memory_bytes=1), 8)
    assert not lost.fits
    assert not any(stage.recompute for stage in lost.plan.stages)


def test_what_fits_by_recomputation_alone_is_recomputed_whole():
    profile = saving(8)
    peak = max(fitted(BASELINES["gpipe"], profile, uniform(4), 8).timeline.peak_bytes)
    tight = fitted(BASELINES["gpipe"], profile, uniform(4, memory_bytes=peak - 1), 8)
    assert all(stage.recompute for stage in tight.plan.stages)


def test_a_number_of_stages_that_fits_goes_before_a_faster_one_that_does_not():
    profile = saving(16)
    free = fitted(BASELINES["interleaved-tuned"], profile, uniform(4), 8)
    one = fitted(BASELINES["1f1b"], profile, uniform(4), 8)
    assert len(free.plan.stages) > len(one.plan.stages)
    limit = max(one.timeline.peak_bytes)
    assert limit < max(free.timeline.peak_bytes)
    tight = fitted(BASELINES["interleaved-tuned"], profile, uniform(4, memory_bytes=limit), 8)
    assert tight.fits
    assert tight.timeline.step == pytest.approx(one.timeline.step)


@pytest.mark.parametrize("name", BASELINES)
def test_too_few_layers_are_refused(name):
    with pytest.raises(PlanError, match="too few"):
        BASELINES[name](chain(1.0, 1.0), uniform(3), 3)


def test_even_cut_gives_the_first_stages_what_is_left_over():
    assert even_cut(chain(*[1.0] * 10), 4) == [3, 6, 8, 10]


def test_bottleneck_cut_equals_brute_force():
    random = np.random.default_rng(0)
    for _ in range(50):
        work = np.concatenate([[0.0], np.cumsum(random.integers(1, 9, 7))])
        slowness = random.integers(1, 4, 3).astype(float)
        best = min(
            max(
                work[a] * slowness[0],
                (work[b] - work[a]) * slowness[1],
                (work[7] - work[b]) * slowness[2],
            )
            for a in range(1, 6)
            for b in range(a + 1, 7)
        )
        stop = bottleneck_cut(work, slowness)
        assert (np.diff(np.concatenate([[0], stop])) > 0).all()
        assert max(np.diff(work[np.concatenate([[0], stop])]) * slowness) == best
