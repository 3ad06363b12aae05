"""A checkpoint is whole or refused, and goes on bitwise under any plan."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_transparency import CUTS, irregular, plan_of

from adaptis.errors import InputError
from adaptis.execute import checkpoint
from adaptis.execute.launch import launch


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, the losses of going on, and those after loading it under three plans."""
    plans = [plan_of("1f1b", CUTS["1f1b"], 4), irregular(4), plan_of("zb-h1", CUTS["zb-h1"], 4)]
    folder = tmp_path_factory.mktemp("run")
    return launch(tiny.resume_rank, 2, tiny.chain, plans, str(folder))[0]


def test_training_goes_on_bitwise_under_every_plan(saved):
    _, going_on, again = saved
    assert len(again) == 3
    assert all(losses == going_on for losses in again)


def test_a_checkpoint_holds_safetensors_and_json_only(saved):
    names = sorted(path.name for path in Path(saved[0]).iterdir())
    assert names == ["MANIFEST.json", "rank-0.safetensors", "rank-1.safetensors"]


def test_every_flipped_bit_is_detected(saved, tmp_path):
    rng = np.random.default_rng(0)
    for case in range(60):
        copy = tmp_path / f"step-{case:06d}"
        shutil.copytree(saved[0], copy)
        victim = sorted(copy.iterdir())[case % 3]
        data = bytearray(victim.read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        victim.write_bytes(data)
        with pytest.raises(InputError):
            checkpoint.newest(copy)
        shutil.rmtree(copy)


def test_the_newest_whole_checkpoint_is_found_behind_a_damaged_one(saved, tmp_path):
    good, bad = tmp_path / "step-000001", tmp_path / "step-000002"
    shutil.copytree(saved[0], good)
    shutil.copytree(saved[0], bad)
    (bad / "rank-1.safetensors").write_bytes(b"cut short")
    assert checkpoint.newest(tmp_path) == good


def test_a_folder_without_a_checkpoint_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint; train without --resume"):
        checkpoint.newest(tmp_path)
