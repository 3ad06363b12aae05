from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from adaptis.errors import InputError  # noqa: E402
from adaptis.measure.huggingface import HuggingFaceModel, check_cut  # noqa: E402
from adaptis.measure.zoo import load_preset, preset_names, read_preset  # noqa: E402

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TWO_KINDS = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
TINY = {
    "llama": SMALL,
    "nemotron_h": {
        **SMALL,
        "hybrid_override_pattern": "ME*-M-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "gemma3_text": {**SMALL, "sliding_window": 8, "layer_types": TWO_KINDS},
    "bamba": {**SMALL, "attn_layer_indices": [1, 3], **MAMBA},
    "deepseek_v3": {
        **SMALL,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt2": {
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "vocab_size": 256,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3_moe": {**SMALL, **EXPERTS},
    "falcon_h1": {**SMALL, "mamba_d_ssm": 128, **MAMBA},
    "gpt_oss": {
        **SMALL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": TWO_KINDS,
        "sliding_window": 8,
    },
    "recurrent_gemma": {
        **SMALL,
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "attention_window_size": 8,
        "lru_width": 64,
    },
}
TIED = {"gemma3_text": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
TIED["recurrent_gemma"] = TIED["gemma3_text"]


def tiny(kind: str, **changes) -> HuggingFaceModel:
    return HuggingFaceModel({"model_type": kind, **TINY[kind], **changes})


def microbatch():
    tokens = torch.randint(0, 256, (2, 25), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[0, :3] = -100
    return {"inputs": tokens[:, :-1], "labels": labels}


def run_plain(model, batch):
    plain = model.plain(seed=5)
    loss = model.loss(plain(input_ids=batch["inputs"], use_cache=False).logits, batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in plain.named_parameters()}


def run_cut(model, cuts, batch):
    stages = [model.build(a, b, seed=5) for a, b in pairwise(cuts)]
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
    gradients = {}
    for stage in stages:
        for name, parameter in stage.global_parameters().items():
            known = gradients.get(name)
            gradients[name] = parameter.grad if known is None else known + parameter.grad
    return loss.detach(), gradients


@pytest.mark.parametrize("kind", TINY)
def test_a_cut_model_gives_the_plain_models_loss_and_gradients_bit_for_bit(kind):
    model, batch = tiny(kind), microbatch()
    loss, gradients = run_plain(model, batch)
    n = len(model.layers)
    # Two, three and four uneven stages; the embedding alone, the head alone, a block alone.
    for cuts in ([0, n], [0, 3, n], [0, 1, n - 1, n], [0, 2, 3, n - 1, n], [0, 1, 2, n]):
        cut_loss, cut_gradients = run_cut(model, cuts, batch)
        assert torch.equal(loss, cut_loss), cuts
        assert set(cut_gradients) == set(gradients)
        for name, gradient in gradients.items():
            found = cut_gradients[name]
            if gradient is None:
                assert found is None, name
            elif name == TIED.get(kind) and len(cuts) > 2:
                torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found, gradient), (cuts, name)


@pytest.mark.parametrize("kind", ["llama", "nemotron_h", "gemma3_text", "gpt2"])
def test_weights_do_not_depend_on_the_cut_and_others_are_absent(kind):
    model = tiny(kind)
    plain = dict(model.plain(seed=2).named_parameters())
    seen = {}
    for layer in range(len(model.layers)):
        stage = model.build(layer, layer + 1, seed=2)
        parameters = stage.global_parameters()
        listed = stage.layer_parameters()[layer]
        assert {id(p) for p in listed} == {id(p) for p in stage.parameters()}
        assert len(listed) == len(parameters)
        for name, parameter in parameters.items():
            assert torch.equal(parameter, plain[name]), name
            seen.setdefault(name, []).append(layer)
    assert set(seen) == set(plain)
    shared = {name for name, layers in seen.items() if len(layers) > 1}
    assert shared == ({TIED[kind]} if kind in TIED else set())
    other = tiny(kind).build(1, 2, seed=3).global_parameters()
    assert any(not torch.equal(p, plain[name]) for name, p in other.items())


def test_tied_ends_in_one_stage_are_one_parameter():
    model = tiny("gemma3_text")
    whole = model.build(0, len(model.layers), seed=0)
    first, last = whole.layer_parameters()[0], whole.layer_parameters()[len(model.layers) - 1]
    assert first[0] is next(p for p in last if p.shape == first[0].shape)


def test_layers_have_names_kinds_and_one_signature_per_kind():
    layers = tiny("nemotron_h").layers
    kinds = ["embedding", "mamba", "moe", "attention", "mlp", "mamba", "mlp", "head"]
    assert [layer.kind for layer in layers] == kinds
    assert [layers[0].name, layers[1].name, layers[-1].name] == [
        "model.embeddings",
        "model.layers.0",
        "lm_head",
    ]
    assert layers[1].signature == layers[5].signature
    assert layers[4].signature == layers[6].signature
    assert len({layer.signature for layer in layers}) == 6
    assert [layer.kind for layer in tiny("gemma3_text").layers[1:3]] == [
        "sliding_attention",
        "attention",
    ]
    assert [layer.kind for layer in tiny("deepseek_v3").layers[1:3]] == [
        "attention",
        "attention+moe",
    ]


def test_buffers_for_the_checkpoint_are_those_of_owned_layers():
    model = tiny("deepseek_v3")
    names = set(model.build(2, 4, seed=0).global_buffers())
    assert names == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}


def test_a_stage_keeps_its_precision_at_the_borders():
    model = HuggingFaceModel({"model_type": "llama", **SMALL}, dtype=torch.bfloat16)
    batch = microbatch()
    stages = [model.build(0, 2, seed=0), model.build(2, 6, seed=0)]
    hidden = stages[0](None, batch)
    assert hidden.dtype == torch.bfloat16
    assert model.loss(stages[1](hidden, batch), batch).dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "nemotron_h", "bamba"])
def test_the_gate_passes_what_can_be_cut(kind):
    check_cut(tiny(kind))


def test_models_whose_blocks_exchange_more_are_refused():
    zamba = {
        **SMALL,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
    }
    gemma = {
        **SMALL,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "vocab_size_per_layer_input": 256,
        "hidden_size_per_layer_input": 8,
    }
    for kind, config in (
        ("zamba", zamba),
        ("gemma4_text", {**gemma, "num_kv_shared_layers": 0}),
        ("gemma4_text", {**gemma, "num_kv_shared_layers": 2}),
        ("gemma3n_text", {**gemma, "num_kv_shared_layers": 0, "activation_sparsity_pattern": None}),
    ):
        with pytest.raises(InputError, match="cannot be cut"):
            assert HuggingFaceModel({"model_type": kind, **config}).layers


def test_the_gate_finds_what_the_probe_cannot(monkeypatch):
    model = tiny("llama")
    honest = model.build

    def wrong(start, stop, *, seed, device="cpu"):
        return honest(start, stop, seed=seed + (start == 2), device=device)

    monkeypatch.setattr(model, "build", wrong)
    with pytest.raises(InputError, match="gives another result when it is cut"):
        check_cut(model)


def test_bad_configurations_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(InputError, match="knows no model type 'lama'"):
        HuggingFaceModel({"model_type": "lama"})
    with pytest.raises(InputError, match='without "model_type"'):
        HuggingFaceModel({"hidden_size": 4})
    with pytest.raises(InputError, match="refuses this configuration of llama"):
        HuggingFaceModel({"model_type": "llama", **SMALL, "hidden_size": "wide"})
    with pytest.raises(InputError, match="no causal language model"):
        assert HuggingFaceModel({"model_type": "clip"}).layers
    with pytest.raises(InputError, match="at least one layer"):
        tiny("llama").build(3, 9, seed=0)
    with pytest.raises(InputError, match="neither a preset"):
        load_preset("demo-nothing")
    broken = tmp_path / "broken.toml"
    broken.write_text("about = ")
    with pytest.raises(InputError, match="is no TOML"):
        load_preset(broken)
    broken.write_text("[config]\nmodel_type = 'llama'\n[date]\n")
    with pytest.raises(InputError, match="unknown key 'date'"):
        load_preset(broken)


def test_models_load_by_preset_name_toml_path_and_config_json(tmp_path):
    path = tmp_path / "little" / "config.json"
    path.parent.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL}
    path.write_text(json.dumps(config))
    assert load_preset(path).name == "little"
    assert len(load_preset(path).layers) == 6
    toml = tmp_path / "mine.toml"
    toml.write_text(
        '[config]\nmodel_type = "llama"\nnum_hidden_layers = 3\n[data]\nsequence = 64\n'
    )
    assert read_preset(toml).sequence == 64
    assert len(load_preset(toml).layers) == 5
    hybrid = load_preset("demo-hybrid")
    assert {layer.kind for layer in hybrid.layers} >= {"mamba", "attention", "mlp", "head"}
    assert read_preset("demo-large-vocabulary").vocabulary == 16384


PUBLISHED = {
    "nemotron-h-8b": 8_100_852_736,
    "nemotron-3-nano-30b-a3b": 31_577_937_344,
    "deepseek-v2-lite": 15_706_484_224,
    "gemma-3-27b": 27_009_346_304,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_have_the_published_size_on_the_meta_device(name):
    model = load_preset(name)
    stage = model.build(0, len(model.layers), seed=0, device="meta")
    assert sum(p.numel() for p in stage.global_parameters().values()) == PUBLISHED[name]


def test_every_preset_can_be_read():
    assert {"demo-hybrid", "demo-large-vocabulary", *PUBLISHED} <= set(preset_names())
    for name in preset_names():
        assert read_preset(name).about
