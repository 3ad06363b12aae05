"""A checkpoint is whole or refused, goes on bitwise under any plan, and is written beside training.

The functions named `..._rank` run in the processes of `launch`.
"""

import functools
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_transparency import CUTS, irregular, plan_of

from adaptis.errors import InputError, RankError
from adaptis.execute import checkpoint, storage, train
from adaptis.execute.launch import launch
from adaptis.execute.reference import Reference
from adaptis.execute.session import Session
from adaptis.execute.world import seated

tied = functools.partial(tiny.chain, tied=True)


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


def test_other_programs_can_read_the_files(saved):
    found = storage.Checkpoint(Path(saved[0]))
    seen = {}
    for file in Path(saved[0]).glob("*.safetensors"):
        seen |= load_file(file)
    assert seen.keys() == found.tensors.keys()
    for name, tensor in seen.items():
        assert torch.equal(tensor, found.tensors[name].read()), name


def damaged(folder, rng):
    """One bit of one file of the checkpoint in `folder` is flipped, files drawn evenly."""
    files = sorted(folder.iterdir())
    victim = files[int(rng.integers(len(files)))]
    data = bytearray(victim.read_bytes())
    position = int(rng.integers(len(data)))
    data[position] ^= 1 << int(rng.integers(8))
    victim.write_bytes(data)
    return victim, position


def undetected(saved, tmp_path, count, seed):
    """Of `count` random bit flips, those with which the checkpoint still verifies."""
    rng = np.random.default_rng(seed)
    missed = []
    copy = tmp_path / "step-000002"
    shutil.copytree(saved, copy)
    for _ in range(count):
        victim, position = damaged(copy, rng)
        try:
            checkpoint.newest(copy)
            missed.append((victim.name, position))
        except InputError:
            pass
        shutil.copyfile(Path(saved, victim.name), victim)
    assert checkpoint.newest(copy) == copy
    return missed


def test_every_flipped_bit_is_detected(saved, tmp_path):
    assert undetected(saved[0], tmp_path, 60, seed=0) == []


@pytest.mark.slow
def test_two_thousand_flipped_bits_are_all_detected(saved, tmp_path):
    assert undetected(saved[0], tmp_path, 2000, seed=1) == []


def test_every_flipped_bit_of_the_manifests_first_lines_is_detected(saved, tmp_path):
    copy = tmp_path / "step-000002"
    shutil.copytree(saved[0], copy)
    whole = (copy / "MANIFEST.json").read_bytes()
    for bit in range(8 * 200):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (copy / "MANIFEST.json").write_bytes(data)
        with pytest.raises(InputError):
            storage.Checkpoint(copy)


def test_truncations_holes_and_files_of_another_step_are_detected(saved, tmp_path):
    copy = tmp_path / "step-000002"
    shutil.copytree(saved[0], copy)
    file = copy / "rank-0.safetensors"
    whole = file.read_bytes()
    half = len(whole) // 2
    for wrong in (b"", whole[:half], whole[:-1], whole + b"\0", whole[:half] + bytes(half)):
        file.write_bytes(wrong)
        with pytest.raises(InputError, match=r"rank-0\.safetensors"):
            checkpoint.newest(copy)
    shutil.copyfile(copy / "rank-1.safetensors", file)
    with pytest.raises(InputError, match=r"rank-0\.safetensors"):
        checkpoint.newest(copy)


def test_a_sealed_manifest_with_wrong_sizes_is_refused(saved, tmp_path):
    copy = tmp_path / "step-000002"
    shutil.copytree(saved[0], copy)
    for key, value in (
        ("data_offsets", [0, 1 << 40]),
        ("data_offsets", [0]),
        ("data_offsets", [-8, 0]),
        ("shape", [1 << 40]),
        ("shape", ["a"]),
        ("dtype", "F7"),
    ):
        body = json.loads(Path(saved[0], "MANIFEST.json").read_text())["manifest"]
        tensor = next(iter(body["files"][0]["tensors"].values()))
        tensor[key] = value
        (copy / "MANIFEST.json").write_bytes(storage._sealed(body))
        with pytest.raises(InputError, match=r"use another checkpoint|update adaptis"):
            storage.Checkpoint(copy)


def test_the_newest_whole_checkpoint_is_found_behind_a_damaged_one(saved, tmp_path):
    good, bad = tmp_path / "step-000001", tmp_path / "step-000002"
    shutil.copytree(saved[0], good)
    shutil.copytree(saved[0], bad)
    (bad / "rank-1.safetensors").write_bytes(b"cut short")
    assert checkpoint.newest(tmp_path) == good


def test_a_folder_without_a_checkpoint_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint; train without --resume"):
        checkpoint.newest(tmp_path)


class OneRank:
    """The only rank of a run, in this process."""

    rank, size = 0, 1

    def gather(self, text):
        return [text]

    def broadcast(self, text, source=0):
        return text or ""

    def sum(self, number):
        return number


def alone(model, optimizer=None, *, cut=None, steps=0):
    """What a checkpoint needs of a session, without a run."""
    stage = model.build(*(cut or (0, len(model.layers))), seed=1)
    parameters = stage.global_parameters()
    made = optimizer and optimizer([p for p in parameters.values() if p.requires_grad])
    return SimpleNamespace(
        world=OneRank(),
        model=model,
        steps=steps,
        parameters=parameters,
        buffers=stage.global_buffers(),
        optimizer=made,
        schedule=None,
        mesh=SimpleNamespace(is_first_row=True),
    )


STEPS = 2  # of each part of a journey
JOURNEY = (  # (ranks, schedule, cuts): where the same training goes on
    (2, "1f1b", CUTS["1f1b"]),
    (1, "gpipe", ((0, 6, 0),)),
    (3, "zb-h1", ((0, 1, 0), (1, 4, 1), (4, 6, 2))),
)


def journey_rank(seat, connection, make, plan, begin, folder, optimizer):
    """Resume where there is something, train, save, and tell the losses."""
    with seated(seat, connection) as world:
        session = Session(world, make(), plan, optimizer=optimizer, seed=99 if begin else 3)
        if begin:
            found, problems = checkpoint.resume(session, Path(folder))
            assert (found.step, found.seed, problems) == (begin, 3, [])
        steps = range(begin, begin + STEPS)
        losses = [session.step(tiny.batches(4, step)).loss for step in steps]
        checkpoint.save(session, Path(folder), seed=3)
        return losses


def journey(make, folder, stops, optimizer):
    losses = []
    for index, (ranks, schedule, cuts) in enumerate(stops):
        plan = plan_of(schedule, cuts, 4)
        begin = index * STEPS
        told = launch(journey_rank, ranks, make, plan, begin, str(folder), optimizer)
        losses += told[0]
    return losses


def test_training_goes_on_bitwise_with_other_cuts_schedules_and_numbers_of_ranks(tmp_path):
    expected, _ = tiny.train_plain(tiny.chain, 4, STEPS * len(JOURNEY))
    assert len(set(expected)) == STEPS * len(JOURNEY)
    assert journey(tiny.chain, tmp_path, JOURNEY, tiny.sgd) == expected
    assert len(list(tmp_path.iterdir())) == storage.KEEP


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "RMSprop", "Adam", "Rprop"])
def test_the_state_of_any_optimizer_goes_on(optimizer, tmp_path):
    made = functools.partial(getattr(torch.optim, optimizer), lr=0.01)
    plain = Reference(tiny.chain(), optimizer=made, seed=3)
    expected = [plain.step(tiny.batches(4, step)) for step in range(2 * STEPS)]
    assert journey(tiny.chain, tmp_path, JOURNEY[:2], made) == expected


def test_values_of_an_optimizer_that_are_no_tensors_are_kept_as_they_are(tmp_path):
    before = alone(tiny.chain(), tiny.sgd)
    kept = {"count": 3, "factor": 0.1, "nothing": None, "mean": torch.ones(2, 2)}
    for parameter in before.parameters.values():
        before.optimizer.state[parameter] = dict(kept)
    after = alone(tiny.chain(), tiny.sgd)
    checkpoint.load(after, checkpoint.save(before, tmp_path, seed=0))
    for parameter in after.parameters.values():
        state = after.optimizer.state[parameter]
        assert torch.equal(state.pop("mean"), kept["mean"])
        assert state == {"count": 3, "factor": 0.1, "nothing": None}


@pytest.mark.parametrize(
    ("make", "optimizer", "words"),
    [
        (functools.partial(tiny.chain, 5), train.adamw(), "lacks the parameter layers.5"),
        (functools.partial(tiny.chain, 3), train.adamw(), "lacks the parameter layers.4"),
        (tied, train.adamw(), "tiny lacks the parameter layers.5.weight"),
        (
            functools.partial(tiny.chain, dtype=torch.float64),
            train.adamw(),
            "the model needs torch.float64",
        ),
        (tiny.chain, tiny.sgd, "was saved with the optimizer AdamW, SGD is used"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(saved, make, optimizer, words):
    with pytest.raises(InputError, match="; resume with") as caught:
        checkpoint.resume(alone(make(), optimizer), Path(saved[0]))
    assert words in str(caught.value)


def test_resuming_falls_back_to_an_older_checkpoint_and_says_why(tmp_path):
    for step in (1, 2):
        checkpoint.save(alone(tiny.chain(), tiny.sgd, steps=step), tmp_path, seed=0)
    damaged(tmp_path / "step-000002", np.random.default_rng(0))
    session = alone(tiny.chain(), tiny.sgd)
    found, problems = checkpoint.resume(session, tmp_path)
    assert (found.step, session.steps) == (1, 1)
    assert len(problems) == 1
    assert "step-000002" in problems[0]
    assert "use another checkpoint" in problems[0]


def test_random_numbers_go_on_where_they_were(tmp_path):
    session = alone(tiny.chain(), tiny.sgd)
    path = checkpoint.save(session, tmp_path, seed=0)
    expected = torch.rand(5)
    checkpoint.load(session, path)
    assert torch.equal(torch.rand(5), expected)


class Gate:
    """Holds the writing of files back until it is opened, and then may fail."""

    def __init__(self, monkeypatched, error=None):
        self.opened, self.error, self.calls = threading.Event(), error, 0
        self._real = monkeypatched.write_tensors
        monkeypatched.write_tensors = self

    def __call__(self, path, tensors):
        self.calls += 1
        self.opened.wait()
        if self.error is not None:
            raise self.error
        return self._real(path, tensors)


def background_rank(seat, connection, plan, folder):
    """Losses of steps 0..5; what is there while a save of step 2 is on its way, and afterwards."""
    with seated(seat, connection) as world:
        session = Session(world, tiny.chain(), plan, optimizer=train.adamw(), seed=3)
        gate, seen = Gate(checkpoint), []
        saver = checkpoint.Saver(session, Path(folder), seed=3)
        for step in range(6):
            session.step(tiny.batches(4, step))
            saver.poll()
            if step == 1:
                saver.start()
                kept = {n: p.detach().clone() for n, p in session.parameters.items()}
            seen.append(sorted(path.name for path in Path(folder).glob("*")))
            world.barrier()
            if step == 3 and world.rank == 1:
                gate.opened.set()
        gate.opened.set()
        saver.finish()
        found = storage.Checkpoint(Path(saver.saved))
        there = {n: part.read() for n, part in found.named("param")}
        assert all(torch.equal(there[n], value) for n, value in kept.items())
        assert any(not torch.equal(there[n], p) for n, p in session.parameters.items())
        return seen, saver.saved, found.step, gate.calls


def test_training_goes_on_while_a_checkpoint_is_written_from_the_state_at_its_step(tmp_path):
    plan = plan_of("1f1b", CUTS["1f1b"], 4)
    for seen, saved, step, calls in launch(background_rank, 2, plan, str(tmp_path)):
        assert seen[0] == []
        assert all(names == [".step-000002.tmp"] for names in seen[1:])  # one rank is not done
        assert saved == str(tmp_path / "step-000002")
        assert (step, calls) == (2, 1)


def test_at_most_one_save_is_on_its_way_and_the_end_waits_for_the_last(tmp_path):
    session, found = alone(tiny.chain(), tiny.sgd), []
    saver = checkpoint.Saver(session, tmp_path, seed=3)
    for _ in range(5):
        session.steps += 1
        saver.start()
        found.append(saver.saved[-1:])
    saver.finish()
    assert found == ["", "1", "2", "3", "4"]
    assert saver.saved == str(tmp_path / "step-000005")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-000004", "step-000005"]


def failing_rank(seat, connection, plan, folder):
    """The second save fails on rank 1 in the background; training goes on until it is told."""
    with seated(seat, connection) as world:
        session = Session(world, tiny.chain(), plan, optimizer=train.adamw(), seed=3)
        session.step(tiny.batches(4, 0))
        checkpoint.save(session, Path(folder), seed=3)
        wrong = OSError(28, "No space left on device") if world.rank == 1 else None
        gate = Gate(checkpoint, wrong)
        gate.opened.set()
        saver = checkpoint.Saver(session, Path(folder), seed=3)
        session.step(tiny.batches(4, 1))
        saver.start()
        for step in range(2, 2000):
            session.step(tiny.batches(4, step))
            saver.poll()


def test_a_failed_save_ends_the_run_at_a_step_with_one_sentence_and_leaves_the_old_one(tmp_path):
    with pytest.raises(RankError) as caught:
        launch(failing_rank, 2, plan_of("1f1b", CUTS["1f1b"], 4), str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: the checkpoint of step 2 could not be saved (No space left on device)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000001"


def test_a_new_run_in_an_old_folder_is_the_newest_and_old_ones_are_never_overwritten(tmp_path):
    body = {"model": "m", "seed": 0, "optimizer": "", "values": {}, "files": []}
    names = []
    for step in (7, 9, 3, 9, 9, 4):
        storage.prepare(tmp_path, tmp_path / ".step-x.tmp")
        path = storage.publish(tmp_path / ".step-x.tmp", tmp_path, {**body, "step": step})
        assert checkpoint.newest(tmp_path) == path
        names.append(path.name)
    assert names[:4] == ["step-000007", "step-000009", "step-000003", "step-000009.4"]
    assert names[4:] == ["step-000009", "step-000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000009"]
