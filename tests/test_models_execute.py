"""Chains with all that models do, against plain training in one process.

First cut, split and recomputed in this process: the instructions of `StageCompute` are called by
hand, what crosses a cut is copied. Then as random draws of model, plan and options in real ones.
"""

from itertools import pairwise

import numpy as np
import pytest
import random_training
import torch
from random_training import (
    LENGTH,
    SEED,
    VOCABULARY,
    WIDTH,
    Convolved,
    Counted,
    Experts,
    Joined,
    Mixed,
    Plain,
    loss,
)
from torch import nn

from adaptis.errors import InputError
from adaptis.execute.launch import launch
from adaptis.execute.reference import Reference
from adaptis.measure.compute import StageCompute
from adaptis.measure.random import drawing
from adaptis.measure.stage import Chain, collecting_losses
from adaptis.measure.values import pack, replaced, tensors_of, unpack

pytestmark = pytest.mark.usefixtures("one_thread")
STEP = 3


KINDS = {
    "mixed": ([Mixed, Mixed, Mixed, Joined]),
    "experts": [Experts],
    "counted": [Counted],
    "plain": [Plain],
    "convolved": [Convolved],
}


def double(make):
    return lambda: make().double()


def frozen(make):
    return lambda: make().requires_grad_(requires_grad=False)


def draw(number):
    """A chain, tied or not, its micro-batches, and how it is cut."""
    rng = np.random.default_rng(number)
    blocks = [layer for name in rng.choice(list(KINDS), 3) for layer in KINDS[name]]
    makers = [
        lambda: nn.Embedding(VOCABULARY, WIDTH),
        *blocks,
        lambda: nn.Linear(WIDTH, VOCABULARY, bias=False),
    ]
    makers = [double(make) for make in makers]
    last = len(makers) - 1
    if rng.random() < 0.4:
        which = int(rng.integers(0, last))
        makers[which] = frozen(makers[which])
    tied = {(last, "weight"): (0, "weight")} if rng.random() < 0.5 else None
    cuts = sorted(rng.choice(range(1, last + 1), int(rng.integers(1, 4)), replace=False).tolist())
    return Chain(makers, tied=tied, loss=loss), microbatches(rng), [0, *cuts, last + 1], rng


def microbatches(rng):
    found = []
    for _ in range(3):
        tokens = torch.from_numpy(rng.integers(0, VOCABULARY, (2, LENGTH + 1)))
        labels = tokens[:, 1:].clone()
        labels[:, : int(rng.integers(0, LENGTH - 1))] = -100
        found.append({"inputs": tokens[:, :-1], "labels": labels})
    return found


def train_plain(model, batch, autocast=None):
    """Loss, gradients and buffers of one step as anybody would train, without any stage."""
    chain = model.build(0, len(model.layers), seed=1)
    tokens, total = sum(model.weight(m) for m in batch), 0.0
    for number, microbatch in enumerate(batch):
        with (
            drawing(SEED, STEP, 0, number, torch.device("cpu")),
            collecting_losses() as terms,
            torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
        ):
            value = model.loss(chain(None, microbatch), microbatch) / tokens
        # One factor: in bfloat16 a product of two is rounded twice.
        value = value + sum(terms) * (model.weight(microbatch) * (1.0 / tokens))
        value.backward()
        total += value.item()
    return total, gradients([chain]), chain.global_buffers()


def gradients(stages):
    found = {}
    for stage in stages:
        for name, parameter in stage.global_parameters().items():
            if parameter.grad is not None:
                found[name] = parameter.grad + found.get(name, 0.0)
    return found


def copied(value):
    return None if value is None else replaced(value, [t.clone() for t in tensors_of(value)])


def train_cut(model, batch, cuts, *, split, recompute, autocast=None):
    """The same in stages: all F, then the backwards, and W at the very end."""
    stages = [
        StageCompute(
            model,
            model.build(a, b, seed=1),
            last=b == len(model.layers),
            split=s in split,
            recompute=s in recompute,
            seed=SEED,
            autocast=autocast,
        )
        for s, (a, b) in enumerate(pairwise(cuts))
    ]
    weight = 1.0 / sum(model.weight(m) for m in batch)
    for m, microbatch in enumerate(batch):
        value = None
        for stage in stages:
            value = copied(stage.forward(m, value, microbatch, weight, STEP))
    for m in range(len(batch)):
        value = None
        for s, stage in reversed(list(enumerate(stages))):
            if s in recompute:
                stage.recompute(m)
            backward = stage.backward_input if s in split and m != 1 else stage.backward
            value = copied(backward(m, value))
    for s in split:
        for m in (0, 2):
            stages[s].backward_weight(m)
    assert all(stage.idle() for stage in stages)
    modules = [stage.module for stage in stages]
    buffers = {n: b for module in modules for n, b in module.global_buffers().items()}
    total = sum(float(value) for stage in stages for value in stage.losses.values())
    return total, gradients(modules), buffers


def check(number, autocast=None, tolerance=1e-12):
    model, batch, cuts, rng = draw(number)
    count = len(cuts) - 1
    split = {s for s in range(count) if rng.random() < 0.6}
    recompute = {s for s in range(count) if rng.random() < 0.5}
    expected = train_plain(model, batch, autocast)
    torch.manual_seed(number)  # the caller's own stream is of no account
    found = train_cut(model, batch, cuts, split=split, recompute=recompute, autocast=autocast)
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("number", range(40))
def test_any_chain_trains_as_in_one_piece(number):
    check(number)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(40, 2040, 100))
def test_many_chains_train_as_in_one_piece(start):
    for number in range(start, start + 100):
        check(number)


def train_drawn(numbers, devices):
    """Every draw in one start of the processes; those that differ from one process, and by what."""
    wrong = []
    ranks = launch(random_training.rank_of, devices, numbers, devices)
    for number, parts in zip(numbers, zip(*ranks, strict=True), strict=True):
        case = random_training.draw(number, devices)
        losses, whole = plain_draw(case)
        tolerance = 1e-12
        if case.options["autocast"]:
            tolerance = 1e-2 if case.plan.head_reductions else 1e-5
        for rank, (found, state) in enumerate(parts):
            problems = [] if np.allclose(found, losses, tolerance, 0) else [f"{found} {losses}"]
            for name, value in state.items():
                expected = rows_of(whole, name)
                if not np.allclose(value, expected, tolerance, tolerance):
                    problems.append(f"{name} by {np.abs(value - expected).max():.3g}")
            if problems:
                wrong.append((number, devices, rank, problems))
    return wrong


def plain_draw(case):
    plain = Reference(case.make(), optimizer=random_training.sgd, seed=SEED, **case.options)
    losses, previous = [], case.plan.previous
    for step in range(case.steps):
        losses.append(plain.step(random_training.batch_of(case, step), previous))
        losses.append(plain.evaluate(random_training.batch_of(case, step + 1), previous))
    state = {**plain.module.global_parameters(), **plain.module.global_buffers()}
    return losses, {name: tensor.detach().numpy() for name, tensor in state.items()}


def rows_of(whole, name):
    """The parameter `name`, or those rows of one that it stands for."""
    if not name.endswith("]"):
        return whole[name]
    name, _, place = name.rpartition("[")
    return whole[name][slice(*map(int, place[:-1].split(":")))]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("devices", "count"), [(2, 75), (3, 30)])
def test_any_model_under_any_plan_with_any_options_trains_as_in_one_process(devices, count):
    assert train_drawn(range(count), devices) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("start", range(100, 2100, 100))
def test_two_thousand_draws_train_as_in_one_process(start):
    assert train_drawn(range(start, start + 100), 1 + start // 100 % 4) == []


def test_under_autocast_an_input_used_several_times_gets_the_gradient_of_one_piece():
    makers = [lambda: nn.Embedding(VOCABULARY, WIDTH), Experts]
    model = Chain([*makers, lambda: nn.Linear(WIDTH, VOCABULARY)], loss=loss)
    batch = microbatches(np.random.default_rng(0))
    expected = train_plain(model, batch, torch.bfloat16)
    found = train_cut(
        model, batch, [0, 1, 3], split=set(), recompute=set(), autocast=torch.bfloat16
    )
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value), name


def test_under_autocast_a_cut_chain_trains_as_in_one_piece():
    makers = [lambda: nn.Embedding(VOCABULARY, WIDTH), Plain, Experts, Convolved]
    model = Chain([*makers, lambda: nn.Linear(WIDTH, VOCABULARY)], loss=loss)
    batch = microbatches(np.random.default_rng(0))
    expected = train_plain(model, batch, torch.bfloat16)
    cut = {"split": {0, 1, 2}, "recompute": {1}, "autocast": torch.bfloat16}
    found = train_cut(model, batch, [0, 2, 3, 5], **cut)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-6)


def test_random_numbers_depend_on_seed_step_layer_and_microbatch_alone():
    model = Chain([lambda: nn.Dropout(0.5), lambda: nn.Dropout(0.5)], weight=lambda m: 1.0)
    batch = {"inputs": torch.ones(50)}

    def drawn(seed=0, step=0, m=0):
        stage = StageCompute(model, model.build(0, 1, seed=0), last=False, seed=seed)
        return stage.forward(m, None, batch, 1.0, step)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = drawn()
    assert torch.equal(torch.get_rng_state(), state), "the caller's stream goes on"
    torch.rand(3)
    assert torch.equal(drawn(), first)
    for other in (drawn(seed=1), drawn(step=1), drawn(m=1)):
        assert not torch.equal(other, first)


def test_evaluation_between_steps_changes_nothing():
    model = Chain([lambda: nn.Embedding(VOCABULARY, WIDTH), Counted, Plain, Experts], loss=loss)
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    batch = {"inputs": tokens, "labels": tokens}
    stage = StageCompute(model, model.build(0, 4, seed=0), last=False, split=True)
    before = {name: b.clone() for name, b in stage.module.global_buffers().items()}
    first = stage.evaluate(None, batch)
    assert torch.equal(first, stage.evaluate(None, batch))
    assert not first.requires_grad
    assert stage.module.training
    assert stage.idle()
    for name, buffer in stage.module.global_buffers().items():
        assert torch.equal(buffer, before[name]), name
    stage.forward(0, None, batch, 1.0)
    assert not torch.equal(stage.module.global_buffers()["layers.1.mean"], before["layers.1.mean"])


def test_values_of_several_tensors_come_back_as_they_were():
    value = {"a": torch.ones(2), "b": (torch.zeros(1, dtype=torch.long), None, [torch.ones(3)])}
    bundle = pack(value)
    assert [tuple(t.shape) for t in bundle.tensors] == [(2,), (1,), (3,)]
    assert str(unpack(bundle)) == str(value)
    with pytest.raises(InputError, match="returns a float"):
        pack({"a": 1.0})
