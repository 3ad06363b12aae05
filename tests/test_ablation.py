import json
import math
from dataclasses import replace

import pytest
from random_plans import uniform_profile

from adaptis.cluster import uniform
from adaptis.errors import InfeasibleError
from adaptis.profile import Profile
from adaptis.search import BASELINES, Stop
from adaptis.search.ablation import FACTORS, Ablation, ablation, combinations_for
from adaptis.simulate import simulate_plan

QUICK = Stop(evaluations=3000)


def uneven():
    """Blocks of two kinds, and a head that is worth five of them."""
    layers = list(uniform_profile(13).layers)
    layers[3:9] = [replace(x, forward=2.0, backward=3.0, backward_weight=2.0) for x in layers[3:9]]
    layers[-1] = replace(layers[-1], kind="head", forward=5.0, backward=10.0, backward_input=5.0)
    layers[-1] = replace(layers[-1], backward_weight=5.0, output_bytes=0)
    return Profile("uneven", 1, tuple(layers))


@pytest.fixture(scope="module")
def found():
    return ablation(uneven(), uniform(4), 8, QUICK)


def test_the_base_is_1f1b_with_an_even_cut(found):
    plan = BASELINES["1f1b"](uneven(), uniform(4), 8)
    assert found.steps[()] == pytest.approx(simulate_plan(plan, uneven(), uniform(4)).step)


def test_every_combination_is_there_and_more_decisions_never_cost(found):
    assert len(found.steps) == 2 ** len(FACTORS) + 1  # the head on top; memory is unlimited
    for one, step in found.steps.items():
        for other, longer in found.steps.items():
            assert step <= longer or not set(other) < set(one)
    assert found.gained > 0


def test_the_shares_add_up_to_the_gain(found):
    shares = found.shares()
    assert set(shares) == {*FACTORS, "head"}
    assert sum(shares.values()) == pytest.approx(found.gained)
    assert shares["partition"] > 0


def test_a_share_is_what_a_decision_adds_averaged_over_all_orders():
    names = [(), *((f,) for f in FACTORS), FACTORS[:2], FACTORS[::2], FACTORS[1:], FACTORS]
    made = Ablation(dict(zip(names, (10.0, 9.0, 8.0, 7.0, 6.0, 6.0, 4.0, 3.0), strict=True)))
    # Placement adds 1 as the first, 2 or 1 as the second, 1 as the last: (1+1+2+1+1+1) / 6.
    assert made.shares() == pytest.approx(
        {"placement": 7 / 6, "schedule": 16 / 6, "partition": 19 / 6}
    )
    assert made.lines() == [
        "decided                            step ms  throughput",
        "nothing: uniform 1F1B              10000.0       0.300",
        "placement                           9000.0       0.333",
        "schedule                            8000.0       0.375",
        "partition                           7000.0       0.429",
        "placement, schedule                 6000.0       0.500",
        "placement, partition                6000.0       0.500",
        "schedule, partition                 4000.0       0.750",
        "placement, schedule, partition      3000.0       1.000",
        "7000.0 ms gained: placement 1166.7, schedule 2666.7, partition 3166.7",
    ]


def test_what_fits_with_some_decisions_only_is_said_and_not_divided():
    names = combinations_for(uniform_profile(2), uniform(2))
    made = Ablation({name: 2.0 if name else math.inf for name in names})
    assert made.shares() == {}
    assert made.lines()[1].endswith("does not fit")
    assert made.lines()[-1].startswith("the gain cannot be divided")
    assert made.to_json()["ablation"][0] == {"decided": [], "step_seconds": None}
    assert made.to_json()["gained_seconds"] is None


def test_what_fits_by_no_decision_is_refused():
    profile = uniform_profile(2, state_bytes=100)
    with pytest.raises(InfeasibleError, match="nothing fits"):
        ablation(profile, uniform(2, memory_bytes=99), 2, Stop(evaluations=100))


def test_the_figures_are_json_and_progress_is_told():
    told = []
    made = ablation(
        uniform_profile(4),
        uniform(2, memory_bytes=100),
        2,
        Stop(evaluations=200),
        say=lambda *x: told.append(x),
    )
    assert told == [(i, 9) for i in range(9)]
    assert list(made.steps)[-1] == (*FACTORS, "recompute")
    assert json.loads(json.dumps(made.to_json())) == made.to_json()
