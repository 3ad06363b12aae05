import math
from dataclasses import replace

import pytest
from random_plans import uniform_profile

from adaptis.cluster import uniform
from adaptis.errors import InfeasibleError
from adaptis.profile import Overheads
from adaptis.search import Stop, search, search_counts
from adaptis.simulate import simulate_plan
from adaptis.workload import Workload

QUICK = Stop(evaluations=2000)


def test_each_number_is_searched_and_the_plan_says_what_a_microbatch_weighs():
    profile, cluster = uniform_profile(8), uniform(4)
    answer, reached = search_counts(profile, cluster, [2, 4, 8], QUICK)
    assert list(reached) == [2, 4, 8]
    assert answer.timeline.step == min(reached.values()) == reached[8]  # nothing costs by number
    assert answer.plan.provenance["microbatch_weight"] == 1.0
    fewer, _ = search_counts(profile, cluster, [2, 4], QUICK)
    assert fewer.plan.num_microbatches == 4


def test_what_each_transfer_costs_makes_fewer_microbatches_the_better_ones():
    profile = replace(uniform_profile(8), overheads=Overheads(receive=50.0))
    answer, reached = search_counts(profile, uniform(2), [2, 8], QUICK)
    assert answer.plan.num_microbatches == 2
    assert answer.plan.provenance["microbatch_weight"] == 4.0
    again = simulate_plan(answer.plan, profile, uniform(2), Workload((4.0, 4.0)))
    assert again.step == answer.timeline.step == reached[2] < reached[8]


def test_larger_microbatches_take_more_memory_and_may_not_fit():
    profile = uniform_profile(4)  # each layer saves a byte
    cluster = uniform(2, memory_bytes=8)
    answer, reached = search_counts(profile, cluster, [1, 8], QUICK, decide=("partition",))
    assert reached[1] == math.inf
    assert answer.plan.num_microbatches == 8
    assert max(answer.timeline.peak_bytes) <= 8
    with pytest.raises(InfeasibleError):
        search_counts(profile, uniform(2, memory_bytes=1), [1, 8], QUICK, decide=("partition",))


def test_one_number_is_an_ordinary_search_and_progress_counts_on():
    profile, cluster = uniform_profile(4), uniform(2)
    told = []
    _, reached = search_counts(profile, cluster, [4], QUICK, 0, told.append)
    assert reached == {4: search(profile, cluster, 4, QUICK).timeline.step}
    told.clear()
    search_counts(profile, cluster, [1, 2], QUICK, 0, told.append)
    seconds = [state.seconds for state in told]
    assert len(seconds) >= 3  # each number, then the best again
    assert seconds == sorted(seconds)
