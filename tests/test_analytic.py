import functools
import json
import math
import resource
import time

import pytest
import tiny
import torch
from torch import nn

from adaptis.cluster import uniform
from adaptis.errors import InputError
from adaptis.measure.analytic import ACCELERATORS, Accelerator, analytic_profile
from adaptis.measure.compute import StageCompute
from adaptis.measure.huggingface import HuggingFaceModel
from adaptis.measure.stage import Chain
from adaptis.measure.zoo import read_preset
from adaptis.model import HEAD
from adaptis.profile import profile_from_text, profile_to_json
from adaptis.search import Stop, search

COUNTER = Accelerator("counter", flops=1.0, bandwidth=math.inf, efficiency=1.0)  # seconds are FLOP
MOVER = Accelerator("mover", flops=math.inf, bandwidth=1.0)  # seconds are bytes
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
SMALL = {
    **LLAMA_7B,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


@functools.cache
def profile_of(name, accelerator="h100"):
    """A published model on a published accelerator, 4096 tokens."""
    model = HuggingFaceModel(LLAMA_7B, name) if name == "llama-2-7b" else read_preset(name).model()
    return analytic_profile(model, ACCELERATORS[accelerator], 4096, 1)


def by_kind(profile):
    return {layer.kind: layer for layer in profile.layers}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_flops_are_two_a_parameter_and_token_and_attention(batch_size):
    sequence, width, blocks = 512, 128, 2
    profile = analytic_profile(HuggingFaceModel(SMALL), COUNTER, sequence, batch_size)
    tokens = sequence * batch_size
    matrices = sum(layer.parameter_bytes // 2 for layer in profile.layers[1:])
    attention = blocks * 2 * width * sequence * tokens  # two products, half of each masked
    assert sum(x.forward for x in profile.layers) == pytest.approx(
        2 * matrices * tokens + attention, rel=0.02
    )
    assert sum(x.backward_weight for x in profile.layers) == pytest.approx(
        2 * matrices * tokens, rel=0.02
    )
    assert sum(x.backward_input for x in profile.layers) == pytest.approx(
        2 * matrices * tokens + 2.5 * attention, rel=0.02
    )


def test_a_published_size_is_profiled_without_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    profile = profile_of("llama-2-7b")
    assert time.perf_counter() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    parameters = sum(layer.parameter_bytes for layer in profile.layers) // 2
    assert parameters == 6_738_415_616
    assert sum(layer.state_bytes for layer in profile.layers) == 18 * parameters
    assert profile.layers[1].output_bytes == 2 * 4096 * 4096
    assert profile.layers[-1].output_bytes == 0
    # 6 x parameters x tokens at half of the peak, and attention on top.
    total = sum(layer.work for layer in profile.layers)
    assert 1.0 < total / (6 * parameters * 4096 / (989.4e12 * 0.5)) < 1.15


def test_gemmas_head_outweighs_its_blocks():
    profile = profile_of("gemma-3-27b")
    blocks = [x for x in profile.layers[1:] if x.kind != HEAD]
    assert profile.layers[-1].work > 2.5 * max(layer.work for layer in blocks)


def test_a_tied_embedding_is_shared():
    (shared,) = profile_of("gemma-3-27b").shared
    assert shared.layers == (0, 63)
    assert shared.bytes == 2 * 262208 * 5376
    assert profile_of("llama-2-7b").shared == ()


def test_a_hybrid_has_layers_of_several_costs():
    kinds = by_kind(profile_of("nemotron-h-8b"))
    assert kinds["mlp"].forward > 1.3 * kinds["mamba"].forward > 1.6 * kinds["attention"].forward
    mamba = by_kind(analytic_profile(read_preset("nemotron-h-8b").model(), COUNTER, 4096, 1))[
        "mamba"
    ]
    assert mamba.forward > mamba.backward_weight  # the scan has no weights
    assert mamba.backward_input - mamba.forward == pytest.approx(
        mamba.forward - mamba.backward_weight
    )


def test_experts_have_their_weight_gradients_in_i():
    block = analytic_profile(read_preset("qwen3-30b-a3b").model(), COUNTER, 4096, 1).layers[1]
    experts = 2 * 4096 * 8 * 3 * 2048 * 768  # 8 of 128 experts, three matrices each
    assert block.forward > experts
    assert block.backward_input > 2 * experts
    assert block.backward_weight < experts


def test_bytes_are_those_that_the_executor_keeps():
    model = HuggingFaceModel(SMALL, dtype=torch.bfloat16)
    found = analytic_profile(model, ACCELERATORS["h100"], 256, 1).layers[1]
    stage = model.build(1, 2, seed=0)
    compute = StageCompute(model, stage, last=False, split=True)
    ids = torch.zeros(1, 256, dtype=torch.long)
    hidden = torch.randn(1, 256, 128, dtype=torch.bfloat16)
    weights = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute.forward(0, hidden, {"inputs": ids, "labels": ids}, 1.0)
    compute.backward_input(0, torch.randn_like(hidden))
    assert found.saved_weight_bytes == pytest.approx(compute.pending_bytes(0), rel=0.05)
    assert found.saved_bytes == pytest.approx(sum(s.nbytes() for s in held.values()), rel=0.05)


def test_memory_traffic_bounds_what_has_few_products():
    embedding = analytic_profile(HuggingFaceModel(SMALL), MOVER, 64, 1).layers[0]
    output, table = 2 * 64 * 128, 512 * 128
    assert embedding.forward == pytest.approx(2 * output, rel=0.1)  # rows read and written
    assert embedding.backward_input > 8 * table  # the gradient is as large as the table
    assert embedding.update == 30 * table


def test_a_faster_accelerator_takes_less_time():
    a100, h100, b200 = (profile_of("llama-2-7b", name) for name in ("a100", "h100", "b200"))
    for slow, fast in ((a100, h100), (h100, b200)):
        assert all(s.work > f.work for s, f in zip(slow.layers, fast.layers, strict=True))
    assert set(ACCELERATORS) == {"a100", "h100", "h200", "b200", "mi300x"}


def test_a_profile_says_that_it_was_computed_and_round_trips():
    profile = profile_of("nemotron-h-8b")
    assert profile.source.startswith("computed, not measured: roofline")
    assert "efficiency 0.5" in profile.source
    assert profile.machine == "h100"
    assert profile.tokens_per_microbatch == 4096
    assert profile_from_text(json.dumps(profile_to_json(profile))) == profile


def test_a_computed_profile_can_be_planned_on():
    profile = profile_of("gemma-3-27b")
    found = search(profile, uniform(4), 8, Stop(seconds=60, evaluations=200))
    assert max(stage.stop for stage in found.plan.stages) == profile.num_layers
    assert found.timeline.makespan >= sum(layer.work for layer in profile.layers) * 8 / 4


def test_a_chain_stays_as_it_was_given():
    layers = [nn.Embedding(32, 16), tiny.Block(), nn.Linear(16, 32)]
    before = [p for layer in layers for p in layer.parameters()]
    values = [p.clone() for p in before]
    block = analytic_profile(Chain(layers), COUNTER, 8, 2).layers[1]
    assert block.backward_weight == block.forward == 2 * 16 * 2 * 16 * 24
    after = [p for layer in layers for p in layer.parameters()]
    assert all(a is b and torch.equal(a, v) for a, b, v in zip(after, before, values, strict=True))


def test_frozen_weights_have_no_w_and_little_state():
    block = tiny.Block()
    chain = Chain([nn.Embedding(32, 16), block, nn.Linear(16, 32)])
    trained = analytic_profile(chain, COUNTER, 8, 2).layers[1]
    block.up.weight.requires_grad_(False)
    frozen = analytic_profile(chain, COUNTER, 8, 2).layers[1]
    assert frozen.backward_weight == trained.backward_weight / 2
    assert frozen.backward_input == trained.backward_input
    assert trained.state_bytes - frozen.state_bytes == 16 * 16 * 24


def test_a_tied_chain_is_shared():
    (shared,) = analytic_profile(tiny.chain(tied=True), COUNTER, 8, 1).shared
    assert (shared.layers, shared.bytes) == ((0, 5), 2 * 32 * 16)


class Peeks(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


def test_a_layer_that_looks_at_values_is_refused():
    chain = Chain([nn.Embedding(32, 16), Peeks(), nn.Linear(16, 32)])
    with pytest.raises(InputError, match=r"layer 1 of chain \(peeks\) does not run .* measure"):
        analytic_profile(chain, COUNTER, 8, 1)


def test_sizes_below_one_are_refused():
    with pytest.raises(InputError, match="at least 1"):
        analytic_profile(tiny.chain(), COUNTER, 0, 1)
