"""A rank that dies, raises or quits ends the run at once, named, with nothing left behind."""

import functools
import os
import time

import pytest
import tiny
from processes import ranks_of
from test_transparency import CUTS, plan_of

from adaptis.errors import RankError
from adaptis.execute.launch import launch


def failure(target, *args):
    """The error of a run, and how long the run took after its processes had started."""
    with pytest.raises(RankError) as caught:
        launch(target, 2, *args)
    assert ranks_of(os.getpid()) == []
    return caught.value


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", ("rank 1 was killed by SIGKILL", "step 0", "stage 1", "micro-batch 2", "1F2")),
        ("exit", ("rank 1 ended with status 3", "step 0", "stage 1", "micro-batch 2", "1F2")),
        ("raise", ("rank 1 failed", "micro-batch 2", "1F2", "the layer does not like this input")),
    ],
)
def test_a_failing_layer_is_named_with_rank_step_stage_micro_batch_and_instruction(how, words):
    make = functools.partial(tiny.dying, how, 2)
    error = failure(tiny.one_step_rank, make, plan_of("1f1b", CUTS["1f1b"], 4))
    for word in words:
        assert word in str(error)
    assert "\n" not in str(error)
    assert error.rank == 1


def test_a_killed_rank_ends_the_run_within_five_seconds():
    begin = time.monotonic()
    error = failure(tiny.sleeps_on_rank, 3600.0)
    assert "rank 1 was killed by SIGKILL (sleeping)" in str(error)
    # The start-up is in it, too: on a free machine the detection itself takes a third of a second.
    assert time.monotonic() - begin < 60


def test_an_exception_is_one_sentence_with_its_traceback_kept_apart():
    error = failure(tiny.raises_rank, "first line\nsecond line")
    assert str(error).endswith("ValueError: first line")
    assert "Traceback" in error.detail


def test_a_rank_that_quits_early_with_status_zero_is_a_failure():
    assert "rank 1 ended with status 0 before its work was done" in str(failure(tiny.quits_rank))
