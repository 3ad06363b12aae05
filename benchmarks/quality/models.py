"""The models of the study: published layer times, and layer times computed from published sizes.

The sizes are those of each model's public `config.json`. Computed profiles are kept in a folder
for temporary files, since the scan of a Mamba layer is counted for half a minute.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from adaptis.files import write_json
from adaptis.profile import LayerCost, Profile, load_profile, profile_to_json

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "tests" / "data" / "profiles"
KEPT = Path(tempfile.gettempdir()) / "adaptis-plan-quality" / "profiles"
TOKENS = 4096
ACCELERATOR = "h100"

# Hidden sizes of the models whose times were published without bytes: what a transfer carries.
PUBLISHED = {
    "nemotron-nano-v2-9b": 4480,
    "nemotron-h-8b": 4096,
    "jamba-20b": 4096,
    "llama3-8b": 4096,
    "llama3-70b": 8192,
}
PRESETS = ("gemma-3-27b", "qwen3-30b-a3b", "nemotron-3-nano-30b-a3b")  # that AdaPtis brings along


def _llama(hidden: int, wide: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }


COMPUTED: dict[str, dict[str, Any]] = {
    # meta-llama/Meta-Llama-3-8B and -70B
    "llama-3-8b-h100": _llama(4096, 14336, 32, 32),
    "llama-3-70b-h100": _llama(8192, 28672, 80, 64),
    "gemma-2-27b": {  # google/gemma-2-27b
        "model_type": "gemma2",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "vocab_size": 256000,
        "tie_word_embeddings": True,
    },
    "deepseek-v3": {  # deepseek-ai/DeepSeek-V3, without its extra prediction layer
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "tie_word_embeddings": False,
    },
    "qwen3-235b-a22b": {  # Qwen/Qwen3-235B-A22B
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "jamba-52b": {  # ai21labs/Jamba-v0.1
        "model_type": "jamba",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "vocab_size": 65536,
        "tie_word_embeddings": False,
        "use_mamba_kernels": False,
    },
}

MODELS = (*PUBLISHED, *COMPUTED, *PRESETS)
WITH_BYTES = (*COMPUTED, *PRESETS)  # whose profiles say what memory they need

# DeepSeek of the first paper: F/I/W of a dense layer, a layer of experts and the head, in units of
# the dense layer's F. The published W of dense layers is 0; as in the authors' code, 0.2 of what is
# published as I counts as W. The head's F is the published one.
_DEEPSEEK = {
    ("small", "2k"): ((1, 1.99, 0), (2.62, 3.87, 0.17), (5.11, 1.37, 0.62)),
    ("medium", "2k"): ((1, 2.1, 0), (2.69, 4.0, 0.18), (8.91, 3.0, 1.27)),
    ("large", "2k"): ((1, 2.28, 0), (2.72, 4.04, 0.18), (16.31, 5.56, 2.54)),
    ("small", "4k"): ((1, 2.05, 0), (2.28, 3.49, 0.16), (6.26, 1.98, 0.82)),
    ("medium", "4k"): ((1, 2.11, 0), (2.29, 3.52, 0.17), (11.2, 3.73, 1.59)),
    ("large", "4k"): ((1, 2.24, 0), (2.31, 3.55, 0.17), (21.57, 7.82, 3.23)),
}
_DEEPSEEK_SIZES = {"small": (16, 4), "medium": (32, 8), "large": (64, 8)}  # layers, devices


def deepseek_v1(size: str, sequence: str) -> Profile:
    """The DeepSeek of the first paper: the first L / P - 1 layers dense, all others experts."""
    layers, devices = _DEEPSEEK_SIZES[size]
    dense, experts, head = _DEEPSEEK[size, sequence]
    dense = (dense[0], dense[1] - 0.2, dense[2] + 0.2)
    first = layers // devices - 1
    kinds = [("dense", dense)] * first + [("moe", experts)] * (layers - first) + [("head", head)]
    chain = []
    for i, (kind, times) in enumerate(kinds):
        f, half, weight = (x * 1e-3 for x in times)
        chain.append(LayerCost(f"{i}.{kind}", kind, f, half, weight, half + weight))
    return Profile(
        model=f"deepseek-{size}-{sequence}",
        tokens_per_microbatch=2048 if sequence == "2k" else 4096,
        layers=tuple(chain),
        devices=devices,
        microbatches=4 * devices,
        source="layer-time ratios published by the AdaPtis v1 authors; the unit is arbitrary",
    )


@cache
def model(name: str) -> Profile:
    """The profile of a model of the study, or of a cell of the first paper (v1-...)."""
    if name.startswith("v1-deepseek-"):
        _, _, size, sequence = name.split("-")
        return deepseek_v1(size, sequence)
    if name in PUBLISHED:
        profile = load_profile(PROFILES / f"{name}.json")
        size = 2 * TOKENS * PUBLISHED[name]
        layers = [replace(layer, output_bytes=size) for layer in profile.layers[:-1]]
        return replace(profile, layers=(*layers, profile.layers[-1]))
    if name.startswith("v1-"):
        return load_profile(PROFILES / f"{name}.json")
    return _computed(name)


def _computed(name: str) -> Profile:
    """A computed profile, made once on a machine."""
    source = (ROOT / "src" / "adaptis" / "measure" / "analytic.py").read_bytes()
    config = json.dumps(COMPUTED.get(name, name)).encode()
    path = KEPT / f"{name}-{hashlib.sha256(source + config).hexdigest()[:12]}.json"
    if not path.exists():
        print(f"computing what the layers of {name} cost, once", flush=True)
        from adaptis.measure.analytic import ACCELERATORS, analytic_profile
        from adaptis.measure.huggingface import HuggingFaceModel
        from adaptis.measure.zoo import load_preset

        chain = load_preset(name) if name in PRESETS else HuggingFaceModel(COMPUTED[name], name)
        profile = analytic_profile(chain, ACCELERATORS[ACCELERATOR], TOKENS, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, profile_to_json(profile))
    return load_profile(path)
