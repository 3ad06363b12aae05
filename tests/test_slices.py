"""Training in slices is training on whole sequences."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import slice_ranks
import torch
from slice_ranks import Again, Looking, Running
from test_huggingface import TINY
from torch import nn

from adaptis.errors import InputError, PlanError
from adaptis.execute.launch import launch
from adaptis.execute.reference import Reference
from adaptis.execute.session import Session
from adaptis.measure.compute import StageCompute
from adaptis.measure.huggingface import HuggingFaceModel
from adaptis.measure.layers import LayerMeter
from adaptis.measure.slices import Slice, carried, cut, is_sliced, slicing
from adaptis.measure.stage import Chain
from adaptis.plan import named_plan
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = (Looking, Running, Again, Looking)
SLICES = (-1, 0, 1, -1, 3, 4)  # two sequences of three slices


def plan_of(name, m, v, s, *recomputed):
    stops = (2, 6) if v == 1 else (1, 3, 4, 6)
    plan = named_plan(SCHEDULES[name], Shape(2, m, v, s), stops)
    stages = (replace(stage, recompute=i in recomputed) for i, stage in enumerate(plan.stages))
    return replace(plan, stages=tuple(stages))


PLANS = {
    "terapipe": plan_of("terapipe", 2, 1, 3),
    "seq1f1b": plan_of("seq1f1b", 3, 1, 4),
    "seq1f1b, interleaved": plan_of("seq1f1b", 2, 2, 2),
    "slimpipe": plan_of("slimpipe", 2, 2, 4),
    "slimpipe, recomputed": plan_of("slimpipe", 2, 2, 4, 0, 1, 2),
    "seq1f1b, recomputed": plan_of("seq1f1b", 2, 1, 5, 0, 1),
}


@pytest.fixture(scope="module")
def trained():
    """What each rank has of each plan, from one start of the processes."""
    ranks = launch(slice_ranks.train_rank, 2, [(KINDS, plan) for plan in PLANS.values()])
    return dict(zip(PLANS, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("name", PLANS)
def test_every_schedule_of_slices_trains_as_one_process_on_whole_sequences(name, trained):
    whole = Reference(slice_ranks.model(*KINDS), optimizer=slice_ranks.sgd, seed=slice_ranks.SEED)
    count, losses = PLANS[name].num_sequences, []
    for step in range(slice_ranks.STEPS):
        losses.append(whole.step(slice_ranks.batch(count, step)))
        losses.append(whole.evaluate(slice_ranks.batch(count, step + 1)))
    expected = whole.module.global_parameters()
    seen = set()
    for found, parameters in trained[name]:
        np.testing.assert_allclose(found, losses, rtol=1e-12)
        for key, value in parameters.items():
            close(torch.from_numpy(value), expected[key].detach())
            seen.add(key)
    assert seen == expected.keys()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kind", ["llama", "gemma3_text", "gpt2", "deepseek_v3", "qwen3_moe", "gpt_oss"]
)
def test_models_of_transformers_train_in_slices_as_in_one_piece(kind):
    model = HuggingFaceModel({"model_type": kind, **TINY[kind]})
    tokens = torch.randint(3, 250, (2, 2, 33), generator=torch.Generator().manual_seed(0))
    batch = [{"inputs": t[:, :-1], "labels": t[:, 1:]} for t in tokens]
    found = []
    for previous in ((), SLICES):
        plain = Reference(model, optimizer=slice_ranks.sgd, seed=1)
        parts = cut(batch, previous) if previous else batch
        losses = [plain.step(parts, previous) for _ in range(2)]
        found.append((losses, plain.evaluate(parts, previous), dict(plain.module.state_dict())))
    (whole, held, weights), (sliced, held_sliced, sliced_weights) = found
    assert sliced == pytest.approx(whole, rel=1e-6)
    assert held_sliced == pytest.approx(held, rel=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(sliced_weights[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_cut_model_of_transformers_hands_on_keys_and_values(kind):
    """Stage by stage, the first one recomputed, against the whole model on whole sequences."""
    model = HuggingFaceModel({"model_type": kind, **TINY[kind]}, dtype=torch.float64)
    tokens = torch.randint(3, 250, (2, 2, 33), generator=torch.Generator().manual_seed(0))
    batch = [{"inputs": t[:, :-1], "labels": t[:, 1:]} for t in tokens]
    whole = model.plain(1)
    tokens_in_all = sum(map(model.weight, batch))
    for microbatch in batch:
        (model.loss(model.logits(whole, microbatch), microbatch) / tokens_in_all).backward()
    stages = [
        StageCompute(
            model,
            model.build(a, b, seed=1),
            last=b == 6,
            recompute=a == 0,
            split=a == 1,
            previous=SLICES,
        )
        for a, b in ((0, 1), (1, 3), (3, 6))
    ]
    parts = cut(batch, SLICES)
    for m, microbatch in enumerate(parts):
        value = None
        for stage in stages:
            value = stage.forward(m, value, microbatch, 1 / tokens_in_all)
    for m in (2, 1, 5, 0, 4, 3):
        stages[0].recompute(m)
        value = None
        for stage in reversed(stages):
            value = stage.backward(m, value)
    assert all(stage.idle() for stage in stages)
    expected = {name: p.grad for name, p in whole.named_parameters()}
    for stage in stages:
        for name, parameter in stage.parameters().items():
            if kind == "gemma3_text" and "embed_tokens" in name:
                continue  # tied: each end has its part
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("bamba", r"model\.layers\.0 \(mamba\)"), ("recurrent_gemma", r"\(linear_attention\)")],
)
def test_models_with_other_states_are_refused_in_slices(kind, words):
    model = HuggingFaceModel({"model_type": kind, **TINY[kind]})
    plain = Reference(model, optimizer=slice_ranks.sgd)
    batch = [{"inputs": torch.ones(1, 8, dtype=torch.long), "labels": torch.zeros(1, 8).long()}]
    with pytest.raises(InputError, match=f"cannot be trained in slices: .*{words}"):
        plain.step(cut(batch, (-1, 0)), (-1, 0))


def test_all_slices_of_a_sequence_lie_in_one_buffer():
    layer = Looking().double()
    place, buffers = Slice(after=3), set()
    for _ in range(4):
        with slicing(place):
            layer(torch.randn(2, 5, slice_ranks.WIDTH, dtype=torch.float64))
        (both,) = place.left.values()
        buffers.add(tuple(t.untyped_storage().data_ptr() for t in both.tensors))
        length = both.tensors[0].shape[1]
        place = place.following()
    assert length == 20
    assert len(buffers) == 1
    assert both.tensors[0].untyped_storage().nbytes() == 2 * 20 * slice_ranks.WIDTH * 8


def test_longer_slices_than_the_first_find_room_too():
    layer = Looking().double()
    x = torch.randn(2, 12, slice_ranks.WIDTH, dtype=torch.float64)
    place, found = Slice(after=2), []
    for part in x.split((2, 3, 7), 1):
        with slicing(place):
            found.append(layer(part))
        place = place.following(live=True)
    close(torch.cat(found, 1), layer(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at all tensors
def test_a_compiled_layer_looks_back_as_well():
    layer = Looking().double()
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(2, 12, slice_ranks.WIDTH, dtype=torch.float64)
    place, found = Slice(after=2), []
    for part in x.split(4, 1):
        with slicing(place):
            found.append(compiled(part))
        place = place.following(live=True)
    close(torch.cat(found, 1), layer(x))
    close(compiled(x), layer(x))
    parameters = list(layer.parameters())
    ours = torch.autograd.grad(torch.cat(found, 1).square().sum(), parameters)
    for gradient, expected in zip(
        ours, torch.autograd.grad(layer(x).square().sum(), parameters), strict=True
    ):
        close(gradient, expected)


def test_a_layer_that_is_not_sliced_gets_its_own_back():
    own = torch.ones(2, 3)
    memory = carried(nn.Identity())
    assert memory.append(own, dim=1)[0] is own
    assert memory.earlier is None
    assert not is_sliced()


def test_a_layer_that_asks_twice_for_the_same_is_refused():
    class Twice(nn.Module):
        def forward(self, x):
            carried(self)
            carried(self, "other")
            return carried(self)

    refused = pytest.raises(InputError, match=r"a Twice asks twice .* a name of its own")
    with refused, slicing(Slice(after=1)):
        Twice()(None)
    assert not is_sliced()


def test_a_profile_says_what_a_layer_carries():
    model = Chain([lambda: nn.Embedding(16, 8), Looking, Running, lambda: nn.Linear(8, 16)])
    tokens = torch.zeros(2, 6, dtype=torch.long)
    meter = LayerMeter(model, {"inputs": tokens, "labels": tokens}, optimizer=slice_ranks.sgd)
    meter.round()
    carried_bytes = [layer.carried_bytes for layer in meter.profile().layers]
    assert carried_bytes == [0, 2 * 2 * 6 * 8 * 4, 2 * 8 * 4, 0]


def test_sequences_are_cut_where_they_are_as_long_as_the_inputs():
    tokens = torch.arange(14).reshape(2, 7)
    sequence = {"inputs": tokens, "labels": tokens + 1, "image": torch.ones(2, 4)}
    other = {name: tensor + 100 for name, tensor in sequence.items()}
    found = cut([sequence, other], (-1, -1, 0, 2, 1))
    assert [m["inputs"].shape[1] for m in found] == [2, 3, 2, 3, 4]
    order = [found[i] for i in (0, 2, 3)]
    assert torch.equal(torch.cat([m["labels"] for m in order], 1), tokens + 1)
    assert torch.equal(torch.cat([found[i]["inputs"] for i in (1, 4)], 1), tokens + 100)
    assert all(m["image"].shape == (2, 4) for m in found)
    with pytest.raises(InputError, match="a sequence of 7 tokens cannot be cut into 8 slices"):
        cut([sequence], tuple(range(-1, 7)))


def test_a_batch_of_another_size_is_refused_in_words_of_sequences_and_slices():
    session = object.__new__(Session)
    session.plan = PLANS["terapipe"]
    with pytest.raises(PlanError, match="has 3 micro-batches, the plan is for 2 in 6 slices"):
        session.step(slice_ranks.batch(3, 0))


@pytest.mark.slow
def test_the_example_of_the_page_trains(tmp_path):
    page = Path(__file__).parents[1] / "docs" / "slices.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    found = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=110,
    )
    losses = [float(word) for word in found.stdout.strip(" []\n").split(",")]
    assert len(losses) == 3
    assert 4 < losses[0] < 6
