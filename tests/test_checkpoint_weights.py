"""Weights come from, and go to, folders of transformers: shards, ties and experts included."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import alone
from test_huggingface import TINY, tiny

from adaptis.errors import InputError
from adaptis.execute import checkpoint
from adaptis.execute.pretrained import INDEX, export_pretrained, load_pretrained
from adaptis.measure.stage import Chain

FEW = ("gemma3_text", "qwen3_moe", "nemotron_h")  # tied, with experts, with buffers


def written(kind, folder, shard="60KB"):
    """A model of transformers and the folder it was saved in."""
    plain = tiny(kind).plain(seed=7)
    plain.save_pretrained(folder, max_shard_size=shard)
    return plain


def values(plain):
    return {**dict(plain.named_parameters()), **dict(plain.named_buffers())}


def round_trip(kind, tmp_path):
    plain, model = written(kind, tmp_path / "from"), tiny(kind)
    assert (tmp_path / "from" / INDEX).is_file()
    expected, count = values(plain), len(model.layers)
    for cut in ((0, 2), (2, count - 1), (count - 1, count), (0, count)):
        session = alone(model, cut=cut)
        assert load_pretrained(session, tmp_path / "from") == []
        for name, value in {**session.parameters, **session.buffers}.items():
            assert torch.equal(value, expected[name]), (cut, name)
    path = checkpoint.save(session, tmp_path / "checkpoints", seed=0)
    export_pretrained(path, model, tmp_path / "to")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "to").eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = plain.eval()(input_ids=ids, use_cache=False).logits
        assert torch.equal(back(input_ids=ids, use_cache=False).logits, logits)


@pytest.mark.parametrize("kind", FEW)
def test_weights_come_in_for_any_cut_and_go_out_with_equal_logits(kind, tmp_path):
    round_trip(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(TINY.keys() - FEW))
def test_weights_of_every_family_come_in_and_go_out_with_equal_logits(kind, tmp_path):
    round_trip(kind, tmp_path)


def test_a_rank_reads_the_files_of_its_own_tensors_alone(tmp_path):
    plain = written("llama", tmp_path)
    session = alone(tiny("llama"), cut=(2, 3))
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            if not any(name in session.parameters for name in opened.keys()):  # noqa: SIM118
                file.unlink()
    assert 0 < len(list(tmp_path.glob("*.safetensors"))) < 8
    load_pretrained(session, tmp_path)
    for name, value in session.parameters.items():
        assert torch.equal(value, plain.get_parameter(name)), name


def test_a_tied_weight_may_be_there_twice_or_under_its_second_name(tmp_path):
    plain = written("gemma3_text", tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    first = tensors["model.embed_tokens.weight"]
    del tensors["model.embed_tokens.weight"]
    for more in ({"model.embed_tokens.weight": first.clone()}, {}):
        every = {**tensors, **more, "lm_head.weight": first}
        save_file(every, tmp_path / "model.safetensors", {"format": "pt"})
        session = alone(tiny("gemma3_text"))
        load_pretrained(session, tmp_path)
        for name, value in session.parameters.items():
            assert torch.equal(value, plain.get_parameter(name)), name


def test_tensors_without_a_use_are_named(tmp_path):
    written("llama", tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.9.up.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_pretrained(alone(tiny("llama")), tmp_path) == ["model.layers.9.up.weight"]


def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path):
    written("llama", tmp_path, "1GB")
    with pytest.raises(InputError, match=r"has shape \(32, 64\), the model needs \(64, 64\)"):
        load_pretrained(alone(tiny("llama", head_dim=32)), tmp_path)
    with pytest.raises(InputError, match=r"lacks model\.layers\.4\..* give that model's weights"):
        load_pretrained(alone(tiny("llama", num_hidden_layers=5)), tmp_path)
    with pytest.raises(InputError, match="no model of transformers"):
        load_pretrained(alone(Chain([torch.nn.Linear(2, 2)])), tmp_path)
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        load_pretrained(alone(tiny("llama")), tmp_path / "absent")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(InputError, match="no name of a file beside it"):
        load_pretrained(alone(tiny("llama")), tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 99)
    with pytest.raises(InputError, match="cannot be read"):
        load_pretrained(alone(tiny("llama")), tmp_path)


def test_export_refuses_another_model_and_a_folder_that_is_there(tmp_path):
    path = checkpoint.save(alone(tiny("llama")), tmp_path / "checkpoints", seed=0)
    with pytest.raises(InputError, match="give a new folder"):
        export_pretrained(path, tiny("llama"), tmp_path)
    with pytest.raises(InputError, match="give the model that was trained"):
        export_pretrained(path, tiny("llama", num_hidden_layers=5), tmp_path / "to")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoints"]
