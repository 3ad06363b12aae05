"""The top test: whatever the plan, losses and gradients are those of plain training in one process."""

import functools

import numpy as np
import pytest
import tiny
import torch

from adaptis.execute.launch import launch
from adaptis.plan import Plan, Stage
from adaptis.program import Compute, Op
from adaptis.schedules import SCHEDULES

CUTS = {  # schedule -> (stages as (start, stop, device)), for 2 devices and 6 layers
    "gpipe": ((0, 3, 0), (3, 6, 1)),
    "1f1b": ((0, 2, 0), (2, 6, 1)),
    "interleaved": ((0, 1, 0), (1, 3, 1), (3, 4, 0), (4, 6, 1)),
    "zb-h1": ((0, 4, 0), (4, 6, 1)),
}


def plan_of(name, cuts, m, *, recompute=()):
    stages = tuple(Stage(*cut, recompute=s in recompute) for s, cut in enumerate(cuts))
    ranks = 1 + max(stage.device for stage in stages)
    orders = SCHEDULES[name].orders(ranks, m, len(stages) // ranks)
    return Plan(m, stages, orders, schedule=name)


def irregular(m):
    """Stages 0 and 3 on device 0, 1 and 2 on device 1; fused, split and deferred backwards mixed."""
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


def run(plan, make, steps=3, uneven=False):
    """Losses under the plan, and the parameters of all ranks."""
    parts = launch(tiny.train_rank, plan.num_devices, make, plan, steps, uneven)
    for other in parts[1:]:
        assert other[0] == parts[0][0], "the ranks disagree on the loss"
    merged = {}
    for _, parameters in parts:
        for name, value in parameters.items():
            if name in merged:
                assert np.array_equal(merged[name], value), f"{name} differs between its holders"
            merged[name] = value
    return parts[0][0], merged


@pytest.mark.parametrize("name", sorted(CUTS))
def test_every_schedule_trains_bitwise_as_one_process(name):
    plan = plan_of(name, CUTS[name], 4)
    losses, parameters = run(plan, tiny.chain)
    expected, weights = tiny.train_plain(tiny.chain, 4, 3)
    assert losses == expected
    assert parameters.keys() == weights.keys()
    for key, value in weights.items():
        assert np.array_equal(parameters[key], value), key


def test_an_irregular_plan_with_uneven_tokens_trains_bitwise_as_one_process():
    losses, parameters = run(irregular(4), tiny.chain, uneven=True)
    expected, weights = tiny.train_plain(tiny.chain, 4, 3, uneven=True)
    assert losses == expected
    assert all(np.array_equal(parameters[key], value) for key, value in weights.items())


def test_recomputed_stages_train_bitwise_as_one_process():
    plan = plan_of("zb-h1", CUTS["zb-h1"], 4, recompute=(0, 1))
    losses, parameters = run(plan, tiny.chain)
    expected, weights = tiny.train_plain(tiny.chain, 4, 3)
    assert losses == expected
    assert all(np.array_equal(parameters[key], value) for key, value in weights.items())


@pytest.mark.parametrize("shape", ["apart", "together"])
def test_tied_embedding_and_head_train_as_one_parameter(shape):
    """The sums have another order (embedding's and head's gradients apart), so not to the last bit: float64."""
    make = functools.partial(tiny.chain, dtype=torch.float64, tied=True)
    plan = plan_of("1f1b", CUTS["1f1b"], 4) if shape == "apart" else irregular(4)
    losses, parameters = run(plan, make)
    expected, weights = tiny.train_plain(make, 4, 3)
    np.testing.assert_allclose(losses, expected, rtol=1e-13)
    for key, value in weights.items():
        np.testing.assert_allclose(parameters[key], value, rtol=1e-11, atol=1e-13)
