"""What is saved in rows of a sharded head, and how the learning rate moves, go on under any plan.

The functions named `..._rank` run in the processes of `launch`.
"""

import functools
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_execute_ops import head_plan
from test_transparency import CUTS, irregular, plan_of
from tiny_ops import model_of
from torch.optim import lr_scheduler

from adaptis.errors import InputError
from adaptis.execute import checkpoint, train
from adaptis.execute.launch import launch
from adaptis.execute.reference import Reference
from adaptis.execute.session import Session
from adaptis.execute.world import seated

ROWS, WIDTH = 11, 3


class Together:
    """Ranks that are threads of this process."""

    def __init__(self, size):
        self.size, self.texts, self.barrier = size, [""] * size, threading.Barrier(size)

    def seat(self, rank):
        def gather(text):
            self.texts[rank] = text
            self.barrier.wait()
            found = list(self.texts)
            self.barrier.wait()
            return found

        return SimpleNamespace(
            rank=rank,
            size=self.size,
            gather=gather,
            broadcast=lambda text, source=0: gather(text or "")[source],
            sum=lambda number: sum(map(float, gather(str(number)))),
        )


def names_of(size, whole, tied):
    """What each of `size` ranks holds of the head."""
    if whole:
        return [["head"] if rank == size - 1 else [f"layers.{rank}"] for rank in range(size)]
    cuts = [(ROWS * r // size, ROWS * (r + 1) // size) for r in range(size)]
    names = [[f"head[{a}:{b}]"] for a, b in cuts]
    if tied:
        names[0] = ["head"]
    return names


def state_of(name, values):
    """A parameter, and as Adam keeps them a counter and two averages, cut out of whole ones."""
    whole, _, place = name.partition("[")
    if whole != "head":
        return torch.zeros(2), {}
    rows = slice(*map(int, place[:-1].split(":"))) if place else slice(None)
    first, second, third = (v[rows].clone() for v in values)
    return first, {"step": torch.tensor(5.0), "exp_avg": second, "exp_avg_sq": third}


def in_threads(size, action):
    """What each rank's action gives back."""
    world, found, failed = Together(size), [None] * size, []

    def run(rank):
        try:
            found[rank] = action(world.seat(rank), rank)
        except BaseException as error:
            failed.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def session_of(world, names, values):
    parameters, states = {}, {}
    for name in names:
        value, states[name] = state_of(name, values)
        parameters[name] = torch.nn.Parameter(value)
    optimizer = torch.optim.Adam(parameters.values())
    for name, parameter in parameters.items():
        if states[name]:
            optimizer.state[parameter] = states[name]
    return SimpleNamespace(
        world=world,
        model=SimpleNamespace(name="toy"),
        steps=4,
        parameters=parameters,
        buffers={},
        optimizer=optimizer,
        schedule=None,
        mesh=SimpleNamespace(is_first_row=True),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_a_head_go_from_two_ranks_to_three_to_a_whole_one_and_back(tmp_path, tied):
    numbers = torch.Generator().manual_seed(0)
    values = [torch.randn(ROWS, WIDTH, generator=numbers) for _ in range(3)]
    nothing = [torch.zeros(ROWS, WIDTH)] * 3
    stops = [(2, False), (3, False), (1, True), (2, False)]
    for index, (size, whole) in enumerate(stops):
        names = names_of(size, whole, tied)

        def stop(world, rank, names=names, index=index):
            session = session_of(world, names[rank], nothing if index else values)
            if index:
                checkpoint.resume(session, tmp_path)
            session.steps += index
            checkpoint.save(session, tmp_path, seed=0)
            return session

        for session, own in zip(in_threads(size, stop), names, strict=True):
            for name in own:
                value, state = state_of(name, values)
                parameter = session.parameters[name]
                assert torch.equal(parameter, value), (size, name)
                found = session.optimizer.state[parameter]
                assert found.keys() == state.keys()
                assert all(torch.equal(found[key], state[key]) for key in state), (size, name)


def test_a_state_that_does_not_consist_of_rows_is_refused_where_the_head_is_cut_anew(tmp_path):
    def begin(world, rank):
        session = session_of(world, ["head"], [torch.zeros(ROWS, WIDTH)] * 3)
        session.optimizer.state[session.parameters["head"]] = {"column": torch.zeros(1, WIDTH)}
        checkpoint.save(session, tmp_path, seed=0)

    def go_on(world, rank):
        names = names_of(2, False, False)[rank]
        checkpoint.load(session_of(world, names, [torch.zeros(ROWS, WIDTH)] * 3), path)

    in_threads(1, begin)
    path = next(tmp_path.iterdir())
    with pytest.raises(InputError, match="cannot be divided by rows; resume with the same number"):
        in_threads(2, go_on)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=6)


def milestones(optimizer):
    return lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.3)


def warm_up(optimizer):
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    return lr_scheduler.SequentialLR(
        optimizer, [first, lr_scheduler.CosineAnnealingLR(optimizer, 4)], milestones=[2]
    )


SCHEDULES = (one_cycle, milestones, warm_up)


def scheduled_rank(seat, connection, folder):
    """For each schedule, two steps, saved; two more after loading under another plan."""
    with seated(seat, connection) as world:
        plans = [plan_of("1f1b", CUTS["1f1b"], 4), irregular(4)]
        found = []
        for number, schedule in enumerate(SCHEDULES):
            losses = []
            for plan in plans:
                options = {"optimizer": train.adamw(), "schedule": schedule, "seed": 3}
                session = Session(world, tiny.chain(), plan, **options)
                inner = Path(folder, str(number))
                if losses:
                    checkpoint.resume(session, inner)
                steps = range(session.steps, session.steps + 2)
                losses += [session.step(tiny.batches(4, step)).loss for step in steps]
                checkpoint.save(session, inner, seed=3)
            found.append((losses, session.optimizer.param_groups[0]["lr"]))
        return found, sharded(world, Path(folder, "sharded"))


def sharded(world, folder):
    """Losses after loading under the same plan, and the same with a whole head, and going on."""
    model = functools.partial(model_of, 3)
    session = Session(world, model(), head_plan(4, 1), optimizer=train.adamw(), seed=3)
    session.step(tiny.batches(4, 0))
    saved = checkpoint.save(session, folder, seed=3)
    losses = [[session.step(tiny.batches(4, step)).loss for step in (1, 2)]]
    for plan in (head_plan(4, 1), plan_of("1f1b", ((0, 1, 0), (1, 3, 1)), 4), head_plan(4, 2)):
        other = Session(world, model(), plan, optimizer=train.adamw(), seed=99)
        checkpoint.load(other, saved)
        losses.append([other.step(tiny.batches(4, step)).loss for step in (1, 2)])
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return launch(scheduled_rank, 2, str(tmp_path_factory.mktemp("run")))[0]


@pytest.mark.usefixtures("one_thread")
def test_a_learning_rate_goes_on_bitwise_after_a_resume_under_another_plan(trained):
    for schedule, (losses, rate) in zip(SCHEDULES, trained[0], strict=True):
        plain = Reference(tiny.chain(), optimizer=train.adamw(), seed=3, schedule=schedule)
        assert losses == [plain.step(tiny.batches(4, step)) for step in range(4)]
        assert rate == plain.optimizer.param_groups[0]["lr"] != 1e-3


def test_training_with_a_sharded_head_goes_on_bitwise_and_alike_with_a_whole_one(trained):
    going_on, same, *others = trained[1]
    assert same == going_on
    for losses in others:
        assert losses == pytest.approx(going_on, rel=1e-12)


@pytest.mark.usefixtures("one_thread")
def test_a_run_evaluates_what_is_held_out_under_autocast_as_one_process_does():
    held_out = functools.partial(tiny.batches, 4)
    options = {"optimizer": tiny.sgd, "autocast": torch.bfloat16, "schedule": milestones, "seed": 3}
    found = train.train(
        tiny.chain,
        held_out,
        devices=1,
        steps=4,
        plan=plan_of("gpipe", ((0, 6, 0),), 4),
        evaluate_every=2,
        held_out=held_out,
        **options,
    )
    plain = Reference(tiny.chain(), **options)
    losses, evaluations = [], {}
    for step in range(4):
        losses.append(plain.step(held_out(step)))
        if step % 2:
            evaluations[step + 1] = plain.evaluate(held_out(step + 1))
    assert found.losses == losses
    assert found.evaluations == evaluations
