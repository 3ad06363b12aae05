"""The top test.

Whatever the plan, losses and gradients are those of plain training in one process.
"""

import functools

import numpy as np
import pytest
import tiny
import torch

from adaptis.execute.launch import launch
from adaptis.plan import Plan, Stage
from adaptis.program import Compute, Op
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape

CUTS = {  # schedule -> (stages as (start, stop, device)), for 2 devices and 6 layers
    "gpipe": ((0, 3, 0), (3, 6, 1)),
    "1f1b": ((0, 2, 0), (2, 6, 1)),
    "interleaved": ((0, 1, 0), (1, 3, 1), (3, 4, 0), (4, 6, 1)),
    "zb-h1": ((0, 4, 0), (4, 6, 1)),
    "zb-h2": ((0, 3, 0), (3, 6, 1)),
    "breadth-first": ((0, 1, 0), (1, 3, 1), (3, 4, 0), (4, 6, 1)),
    "gis": ((0, 2, 0), (2, 3, 1), (3, 4, 0), (4, 6, 1)),
    "zb-v": ((0, 1, 0), (1, 3, 1), (3, 5, 1), (5, 6, 0)),
    "v-half": ((0, 2, 0), (2, 3, 1), (3, 5, 1), (5, 6, 0)),
    "v-min": ((0, 1, 0), (1, 3, 1), (3, 4, 1), (4, 6, 0)),
    "hanayo": ((0, 1, 0), (1, 3, 1), (3, 5, 1), (5, 6, 0)),
}


def plan_of(name, cuts, m, *, recompute=()):
    stages = tuple(Stage(*cut, recompute=s in recompute) for s, cut in enumerate(cuts))
    ranks = 1 + max(stage.device for stage in stages)
    orders = SCHEDULES[name].orders(Shape(ranks, m, len(stages) // ranks))
    return Plan(m, stages, orders, schedule=name)


def irregular(m):
    """Stages 0 and 3 on device 0, 1 and 2 on device 1.

    Fused, split and deferred backwards mixed.
    """
    stages = tuple(Stage(*cut) for cut in ((0, 1, 0), (1, 3, 1), (3, 5, 1), (5, 6, 0)))
    first, second = [], []
    for i in range(m):
        first += [Compute(Op.FORWARD, 0, i)]
        second += [Compute(Op.FORWARD, 1, i), Compute(Op.FORWARD, 2, i)]
    for i in range(m):
        first += [Compute(Op.FORWARD, 3, i), Compute(Op.BACKWARD_INPUT, 3, i)]
        second += [Compute(Op.BACKWARD, 2, i), Compute(Op.BACKWARD_INPUT, 1, i)]
    for i in range(m):
        first += [Compute(Op.BACKWARD, 0, i), Compute(Op.BACKWARD_WEIGHT, 3, i)]
        second += [Compute(Op.BACKWARD_WEIGHT, 1, i)]
    return Plan(m, stages, (tuple(first), tuple(second)))


STEPS = 3
tied = functools.partial(tiny.chain, dtype=torch.float64, tied=True)


def cases():
    """Name -> (model, plan, uneven tokens)."""
    result = {name: (tiny.chain, plan_of(name, cut, 4), False) for name, cut in CUTS.items()}
    result["irregular"] = (tiny.chain, irregular(4), True)
    result["recomputed"] = (tiny.chain, plan_of("zb-h1", CUTS["zb-h1"], 4, recompute=(0, 1)), False)
    result["tied, apart"] = (tied, plan_of("1f1b", CUTS["1f1b"], 4), False)
    result["tied, together"] = (tied, irregular(4), False)
    return result


@pytest.fixture(scope="module")
def trained():
    """Every case's losses and parameters, all from one start of the processes."""
    named = cases()
    ranks = launch(tiny.train_rank, 2, list(named.values()), STEPS)
    result = {}
    for name, parts in zip(named, zip(*ranks, strict=True), strict=True):
        for losses, _ in parts[1:]:
            assert losses == parts[0][0], "the ranks disagree on the loss"
        merged = {}
        for _, parameters in parts:
            for key, value in parameters.items():
                assert key not in merged or np.array_equal(merged[key], value), f"{key} differs"
                merged[key] = value
        result[name] = (parts[0][0], merged)
    return result


@pytest.mark.parametrize("name", [*CUTS, "irregular", "recomputed"])
def test_every_schedule_trains_bitwise_as_one_process(name, trained):
    losses, parameters = trained[name]
    make, plan, uneven = cases()[name]
    expected, weights = tiny.train_plain(make, plan.num_microbatches, STEPS, uneven)
    assert losses == expected
    assert parameters.keys() == weights.keys()
    for key, value in weights.items():
        assert np.array_equal(parameters[key], value), key


@pytest.mark.parametrize("name", ["tied, apart", "tied, together"])
def test_tied_embedding_and_head_train_as_one_parameter(name, trained):
    """The embedding's and the head's gradients are summed apart, so not to the last bit.

    Float64.
    """
    losses, parameters = trained[name]
    expected, weights = tiny.train_plain(tied, 4, STEPS)
    np.testing.assert_allclose(losses, expected, rtol=1e-13)
    for key, value in weights.items():
        np.testing.assert_allclose(parameters[key], value, rtol=1e-11, atol=1e-13)
