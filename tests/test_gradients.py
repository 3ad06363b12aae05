"""The sum of what several ranks hold, and what it is said to cost."""

import functools

import pytest
import tiny
import torch

from adaptis.execute.gradients import _sum, measure_sum
from adaptis.execute.launch import launch
from adaptis.execute.prepare import Measurement
from adaptis.execute.train import adamw
from adaptis.execute.world import seated


@pytest.mark.parametrize("count", [2, 3, 5])
def test_everybody_finds_the_same_sum_in_the_order_of_the_ranks(count):
    torch.manual_seed(count)
    parts = [torch.randn(1000) * 10.0**k for k in range(count)]
    expected = functools.reduce(torch.add, parts)
    for rank in range(count):
        terms = [part.clone() for part in parts]
        _sum(terms[rank], terms)
        assert torch.equal(terms[rank], expected)


def measured_rank(seat, connection):
    with seated(seat, connection) as world:
        costs = [measure_sum(world, size, rounds=5) for size in (4, 1 << 22)]
        chain = tiny.chain(tied=True)
        measurement = Measurement(
            world, chain, tiny.batches(1, 0)[0], optimizer=adamw(), num_microbatches=2
        )
        measurement.rounds(2)
        few = measurement.result([1]).profile
        return costs, measurement.result().profile, few


def test_a_profile_says_what_the_sum_of_a_tied_parameter_costs():
    found = launch(measured_rank, 3)
    (small, large), profile, few = found[0]
    assert 0 < small < large
    (shared,) = profile.shared
    assert 0 < shared.seconds < 1
    assert [profile, few] == [*found[1][1:]] == [*found[2][1:]]
    assert "2 rounds" in profile.source
    assert "1 rounds" in few.source
    assert few.layers != profile.layers
    assert few.shared == profile.shared
