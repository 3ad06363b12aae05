"""On GPUs a plan trains as one process does on one of them.

Two processes share a GPU, and where there are two, each has its own.
"""

import functools
import os

import gpu_ranks
import numpy as np
import pytest
import tiny
import torch

from adaptis.execute.launch import launch
from adaptis.execute.reference import Reference
from adaptis.execute.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
CASES = gpu_ranks.cases()


@pytest.fixture(scope="module", params=[1, 2], ids=["shared", "own"])
def visible(request):
    """The ranks see so many GPUs."""
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"there are fewer than {request.param} GPUs")
    numbers = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[: request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(numbers))
        yield request.param


@pytest.fixture(scope="module")
def trained(visible):
    return visible, launch(gpu_ranks.train_rank, 2, list(CASES), device="cuda")


@pytest.mark.parametrize("name", CASES)
def test_a_plan_trains_and_evaluates_as_one_process(name, trained):
    _, ranks = trained
    parts = [found[name, "own"] for _, _, found in ranks]
    gpu_ranks.assert_same(parts, *CASES[name], torch.device("cuda", 0), 1e-9)


def test_ranks_share_out_the_gpus_and_take_the_way_that_there_is(trained):
    count, ranks = trained
    wire = "StagedWire" if count == 1 else "NcclWire"
    assert [rank[:2] for rank in ranks] == [("cuda:0", wire), (f"cuda:{count - 1}", wire)]


def test_activations_go_to_the_host_and_come_back(trained):
    _, ranks = trained
    assert all(found["offloaded", "own"]["moved"] for _, _, found in ranks)


@pytest.mark.parametrize("name", CASES)
def test_the_rows_of_a_timeline_lie_in_its_step_in_the_program_s_order(name, trained):
    _, ranks = trained
    for _, _, found in ranks:
        gpu_ranks.assert_rows_lie_in_their_steps(found[name, "own"])


def test_training_goes_on_from_a_checkpoint_under_any_plan(visible, tmp_path):
    assert visible
    for going_on, again in launch(gpu_ranks.resume_rank, 2, str(tmp_path), device="cuda"):
        for losses in again:
            np.testing.assert_allclose(losses, going_on, rtol=1e-9)


def test_a_model_is_measured_planned_and_trained(visible):
    assert visible
    found = train(
        gpu_ranks.CHAIN,
        functools.partial(tiny.batches, 4),
        steps=2,
        device="cuda",
        optimizer=tiny.sgd,
        search_seconds=0.5,
    )
    assert found.profile is not None
    assert torch.cuda.get_device_name() in found.profile["machine"]
    plain = Reference(gpu_ranks.CHAIN(), optimizer=tiny.sgd, device=torch.device("cuda", 0))
    losses = [plain.step(tiny.batches(4, step)) for step in range(2)]
    np.testing.assert_allclose(found.losses, losses, rtol=1e-9)
