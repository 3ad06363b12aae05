import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptis.errors import Error, InputError, ProfileError
from adaptis.profile import (
    LayerCost,
    Overheads,
    Profile,
    Shared,
    load_profile,
    profile_from_json,
    profile_from_text,
    profile_to_json,
)

PUBLISHED = sorted((Path(__file__).parent / "data" / "profiles").glob("*.json"))
LAYER = {
    "name": "0",
    "kind": "mlp",
    "forward_seconds": 1.0,
    "backward_input_seconds": 2.0,
    "backward_weight_seconds": 3,
}
MINIMAL = {"model": "least", "tokens_per_microbatch": 1, "layers": [LAYER]}

seconds = st.floats(0, 1e6)
sizes = st.integers(0, 1 << 50)
layers = st.builds(
    LayerCost,
    name=st.text(st.characters(exclude_categories=["Cs"])),
    kind=st.sampled_from(["embedding", "mlp", "head"]),
    forward=seconds,
    backward_input=seconds,
    backward_weight=seconds,
    backward=seconds,
    update=seconds,
    parameter_bytes=sizes,
    state_bytes=sizes,
    saved_bytes=sizes,
    saved_weight_bytes=sizes,
    output_bytes=sizes,
)
hints = st.none() | st.integers(1, 1 << 20)
profiles = st.builds(
    Profile,
    model=st.text(min_size=1),
    tokens_per_microbatch=st.integers(1, 1 << 40),
    layers=st.lists(layers, min_size=2, max_size=5).map(tuple),
    overheads=st.builds(Overheads, *[seconds] * 6),
    shared=st.just(()) | st.just((Shared((0, 1), 8, 0.25),)),
    devices=hints,
    microbatches=hints,
    source=st.text(),
    machine=st.text(),
)


def chain(*kinds):
    costs = [LayerCost(str(i), kind, 1.0, 1.0, 1.0, 2.0) for i, kind in enumerate(kinds)]
    return Profile("chain", 1, tuple(costs))


def test_all_published_profiles_are_there():
    assert len(PUBLISHED) == 17


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_profile_loads_as_it_is(path):
    raw = json.loads(path.read_text())
    profile = load_profile(path)
    assert profile.model == raw["model"]
    assert profile.source == raw["source"]
    assert (profile.devices, profile.microbatches) == (raw.get("devices"), raw.get("microbatches"))
    assert profile.num_layers == len(raw["layers"])
    for layer, entry in zip(profile.layers, raw["layers"], strict=True):
        halves = entry["backward_input_seconds"], entry["backward_weight_seconds"]
        assert (layer.forward, layer.backward_input, layer.backward_weight) == (
            entry["forward_seconds"],
            *halves,
        )
        assert layer.backward == sum(halves)
        assert layer.saved_bytes == layer.state_bytes == layer.output_bytes == 0
    assert profile_from_json(json.loads(json.dumps(profile_to_json(profile)))) == profile


def test_the_readme_names_every_published_profile():
    text = (PUBLISHED[0].parent / "README.md").read_text()
    assert [p.stem for p in PUBLISHED if p.stem not in text and not p.stem.startswith("v1-")] == []


@given(profile=profiles)
def test_a_profile_survives_its_file(profile):
    text = json.dumps(profile_to_json(profile), allow_nan=False)
    assert profile_from_text(text) == profile


def test_a_profile_without_a_name_survives_its_file():
    profile = profile_from_json(MINIMAL | {"model": ""})
    assert profile_from_json(profile_to_json(profile)) == profile


def test_the_least_profile_is_three_times_a_layer():
    (layer,) = profile_from_json(MINIMAL).layers
    assert layer == LayerCost("0", "mlp", 1.0, 2.0, 3.0, 5.0)
    assert layer.work == 6.0


def test_a_measured_backward_stands_beside_its_halves():
    measured = MINIMAL | {"layers": [LAYER | {"backward_seconds": 4.5}]}
    assert profile_from_json(measured).layers[0].backward == 4.5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layers": []}, "0 layers, 1 to"),
        ({"layers": {}}, "'layers' is an object, a list is needed"),
        ({"layers": [LAYER | {"forward_seconds": -1}]}, r"layers\[0\]: 'forward_seconds' is -1"),
        ({"layers": [LAYER | {"forward_seconds": "1"}]}, "'forward_seconds' is a string"),
        ({"layers": [LAYER | {"saved_bytes": 1.5}]}, "'saved_bytes' is a fraction"),
        ({"layers": [LAYER | {"saved_byte": 1}]}, r"layers\[0\]: unknown key 'saved_byte'"),
        ({"layers": [{"name": "0", "kind": "mlp"}]}, "the key 'forward_seconds' is missing"),
        ({"layers": [LAYER, None]}, r"layers\[1\]: null where an object is needed"),
        ({"tokens_per_microbatch": 0}, "'tokens_per_microbatch' is 0"),
        ({"devices": 0}, "'devices' is 0"),
        ({"microbatches": None}, "'microbatches' is null"),
        ({"overheads": {"send": 1}}, "overheads: unknown key 'send'"),
        ({"shared": [{"layers": [0, 1], "bytes": 1}]}, "two or more of the layers 0..0"),
        ({"shared": [{"layers": [0], "bytes": 1}]}, "two or more"),
        ({"shared": [{"layers": [0, True], "bytes": 1}]}, "two or more"),
        ({"format": "adaptis-profile", "version": 2}, "version 2 of adaptis-profile is newer"),
        ({"format": "adaptis-profile"}, "the key 'version' is missing"),
        ({"version": 1}, "the key 'format' is missing"),
        ({"layer": 1}, "unknown key 'layer'"),
    ],
)
def test_a_wrong_profile_is_refused_in_one_sentence(change, sentence):
    with pytest.raises((InputError, ProfileError), match=sentence) as caught:
        profile_from_json(MINIMAL | change, "here.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model", "tokens_per_microbatch", "layers"])
def test_what_every_profile_has_may_not_be_missing(key):
    with pytest.raises(Error, match=f"the key '{key}' is missing"):
        profile_from_json({k: v for k, v in MINIMAL.items() if k != key})


def test_units_hold_one_block_each_with_embedding_and_head_at_the_ends():
    assert chain("embedding", "mlp", "mlp", "mlp", "head").units() == ((0, 2), (2, 3), (3, 5))
    assert chain("mlp", "mlp", "head").units() == ((0, 1), (1, 3))
    assert chain("embedding", "mlp", "head").units() == ((0, 3),)
    assert chain("embedding", "head").units() == ((0, 1), (1, 2))


@given(
    kinds=st.lists(st.sampled_from(["embedding", "mlp", "moe", "head"]), min_size=1, max_size=12)
)
def test_units_tile_the_chain_with_one_block_each(kinds):
    profile = chain(*kinds)
    units = profile.units()
    assert [layer for start, stop in units for layer in range(start, stop)] == list(
        range(len(kinds))
    )
    if profile.num_blocks:
        assert len(units) == profile.num_blocks
        inner = [k in ("embedding", "head") for k in kinds]
        assert all(inner[start:stop].count(False) == 1 for start, stop in units)


def test_the_fingerprint_is_of_names_and_kinds_alone():
    profile = chain("embedding", "mlp", "head")
    slower = Profile("other", 9, tuple(replace(layer, forward=9.0) for layer in profile.layers))
    assert slower.fingerprint == profile.fingerprint
    assert chain("embedding", "moe", "head").fingerprint != profile.fingerprint
    assert chain("embedding", "mlp").fingerprint != profile.fingerprint
