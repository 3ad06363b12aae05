from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from adaptis.errors import InputError
from adaptis.measure.stage import Chain, StageModule, cross_entropy, seeded

VOCABULARY, WIDTH = 32, 16


class Block(nn.Module):
    def __init__(self, width: int, repeats: int = 1) -> None:
        super().__init__()
        self.repeats = repeats
        self.linear = nn.Linear(width, width)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for _ in range(self.repeats):
            hidden = hidden + torch.tanh(self.linear(hidden)) * self.scale
        return hidden


LAYERS = [
    partial(nn.Embedding, VOCABULARY, WIDTH),
    partial(Block, WIDTH),
    partial(Block, WIDTH),
    partial(Block, WIDTH, 3),
    partial(nn.Linear, WIDTH, VOCABULARY, bias=False),
]
TIED = {(4, "weight"): (0, "weight")}


def microbatch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[0, :3] = -100
    return {"inputs": tokens[:, :-1], "labels": labels}


def run(model: Chain, cuts: list[int], seed: int = 0):
    """Loss, gradients by global name (tied ones summed) and the stages."""
    batch = microbatch()
    stages = [model.build(a, b, seed=seed) for a, b in pairwise(cuts)]
    value, joints = None, []
    for stage in stages:
        value = stage(value, batch)
        if stage is not stages[-1]:
            joints.append((value, value.detach().requires_grad_()))
            value = joints[-1][1]
    loss = model.loss(value, batch)
    loss.backward()
    for output, leaf in reversed(joints):
        output.backward(leaf.grad)
    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.global_parameters().items():
            gradients[name] = parameter.grad + gradients.get(name, torch.tensor(0.0))
    return loss.detach(), gradients, stages


@pytest.mark.parametrize("cuts", [[0, 3, 5], [0, 1, 4, 5], [0, 1, 2, 4, 5]])
@pytest.mark.parametrize("tied", [{}, TIED])
def test_a_cut_chain_gives_the_whole_chains_loss_and_gradients(cuts, tied):
    model = Chain(LAYERS, tied=tied)
    loss, gradients, _ = run(model, [0, 5])
    cut_loss, cut_gradients, _ = run(model, cuts)
    assert torch.equal(loss, cut_loss)
    assert gradients.keys() == cut_gradients.keys()
    for name, gradient in gradients.items():
        if tied and name == "layers.0.weight":
            torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(cut_gradients[name], gradient), name


def test_weights_depend_on_the_seed_and_not_on_the_cut():
    model = Chain(LAYERS)
    whole = model.build(0, 5, seed=3).global_parameters()
    for layer in range(5):
        for name, parameter in model.build(layer, layer + 1, seed=3).global_parameters().items():
            assert torch.equal(parameter, whole[name]), name
    other = model.build(1, 2, seed=4).global_parameters()
    assert not torch.equal(other["layers.1.linear.weight"], whole["layers.1.linear.weight"])
    assert not torch.equal(whole["layers.1.linear.weight"], whole["layers.2.linear.weight"])


def test_tied_ends_share_one_name_and_inside_one_stage_one_parameter():
    model = Chain(LAYERS, tied=TIED)
    head = model.build(4, 5, seed=0).global_parameters()
    embedding = model.build(0, 1, seed=0).global_parameters()
    assert list(head) == list(embedding) == ["layers.0.weight"]
    assert torch.equal(head["layers.0.weight"], embedding["layers.0.weight"])
    whole = model.build(0, 5, seed=0)
    first, last = whole.layer_parameters()[0], whole.layer_parameters()[4]
    assert first[0] is last[0]
    assert len(list(whole.parameters())) == len(whole.global_parameters())


def test_layers_that_are_not_owned_are_made_on_the_meta_device_only():
    made: list[tuple[int, str]] = []

    def make(index: int) -> nn.Module:
        layer = nn.Linear(4, 4)
        made.append((index, layer.weight.device.type))
        return layer

    model = Chain([partial(make, index) for index in range(4)])
    assert made == [(index, "meta") for index in range(4)]
    made.clear()
    stage = model.build(2, 3, seed=0)
    assert made == [(2, "cpu")]
    assert set(stage.global_parameters()) == {"layers.2.weight", "layers.2.bias"}
    made.clear()
    assert model.build(0, 4, seed=0, device="meta").layer_parameters()[3][0].is_meta
    assert made == []


def test_equal_layers_have_equal_signatures_and_different_ones_do_not():
    layers = Chain(LAYERS).layers
    assert layers[1].signature == layers[2].signature
    assert layers[1].signature != layers[3].signature, "they differ in a plain attribute"
    assert [layer.kind for layer in layers] == ["embedding", "block", "block", "block", "head"]
    assert [layer.name for layer in layers] == [f"layers.{index}" for index in range(5)]


def test_given_modules_are_used_as_they_are_and_keep_their_values_on_meta_builds():
    block = Block(WIDTH)
    model = Chain([block, partial(Block, WIDTH)])
    stage = model.build(0, 1, seed=0)
    assert stage.global_parameters()["layers.0.linear.weight"] is block.linear.weight
    model.build(0, 2, seed=0, device="meta")
    assert not block.linear.weight.is_meta


def test_buffers_of_owned_layers_have_global_names():
    stage = Chain(LAYERS).build(2, 4, seed=0)
    assert isinstance(stage, StageModule)
    assert set(stage.global_buffers()) == {"layers.2.scale", "layers.3.scale"}


def test_building_leaves_the_callers_random_numbers_alone():
    model = Chain(LAYERS)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model.build(0, 5, seed=1)
    with seeded(1, "x"):
        torch.rand(2)
    assert torch.equal(torch.rand(3), expected)


def test_cross_entropy_sums_over_the_labels_that_count():
    batch = microbatch()
    logits = torch.randn(2, 8, VOCABULARY)
    counted = batch["labels"] != -100
    by_hand = -logits.log_softmax(-1)[counted, batch["labels"][counted]].sum()
    torch.testing.assert_close(cross_entropy(logits, batch), by_hand)
    assert cross_entropy(logits.bfloat16(), batch).dtype == torch.float32
    assert Chain(LAYERS).weight(batch) == 13


@pytest.mark.parametrize("bounds", [(0, 0), (-1, 2), (2, 1), (3, 6)])
def test_a_range_that_is_no_stage_is_refused(bounds):
    with pytest.raises(InputError, match="at least one layer"):
        Chain(LAYERS).build(*bounds, seed=0)


def test_bad_chains_are_refused():
    with pytest.raises(InputError, match="no layers"):
        Chain([])
    with pytest.raises(InputError, match="2 kinds for 1 layers"):
        Chain([nn.Linear(1, 1)], kinds=["a", "b"])
    with pytest.raises(InputError, match=r"layer 0 makes a list"):
        Chain([list])  # type: ignore[list-item]
    with pytest.raises(InputError, match="meta device"):
        Chain([lambda: nn.Linear(int(torch.ones(1).item()), 1)])
    for tied in ({(4, "weight"): (1, "linear.weight")}, {(0, "weight"): (4, "weight")}):
        with pytest.raises(InputError, match="one shape"):
            Chain(LAYERS, tied=tied)
