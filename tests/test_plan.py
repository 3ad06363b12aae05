import json

import pytest
from hypothesis import given
from random_plans import make_plan, make_profile, schedule_plan, seeds, uniform_profile

from adaptis.check import check
from adaptis.errors import Error, InputError, PlanError
from adaptis.files import parse_json
from adaptis.lower import lower
from adaptis.plan import Plan, Stage, load_plan, plan_from_json, plan_to_json, save_plan
from adaptis.program import Compute, Op

MINIMAL = {
    "format": "adaptis-plan",
    "version": 1,
    "num_microbatches": 1,
    "stages": [
        {"layers": [0, 2], "device": 0, "recompute": False},
        {"layers": [2, 3], "device": 1, "recompute": False},
    ],
    "programs": [["0F0", "0I0", "0W0"], ["1F0", "1B0"]],
}


def with_orders(*orders):
    return MINIMAL | {"programs": list(orders)}


def with_stages(*stages):
    return MINIMAL | {"stages": [{"layers": list(layers), "device": d} for layers, d in stages]}


@given(seed=seeds)
def test_a_plan_survives_its_file(seed):
    plan = make_plan(seed)
    assert plan_from_json(parse_json(json.dumps(plan_to_json(plan)), "plan")) == plan


def test_a_plan_file_is_written_and_read(tmp_path):
    plan = schedule_plan("interleaved", 2, 4, 2)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_the_least_plan_is_enough_for_a_proven_program():
    plan = plan_from_json(MINIMAL)
    assert plan.stages == (Stage(0, 2, 0), Stage(2, 3, 1))
    assert [" ".join(map(str, order)) for order in plan.programs] == ["0F0 0I0 0W0", "1F0 1B0"]
    assert (plan.num_devices, plan.num_layers, plan.placement, plan.split) == (2, 3, (0, 1), True)
    assert check(lower(plan)).num_transfers == 2


def test_what_is_written_has_the_keys_that_a_reader_may_count_on():
    value = plan_to_json(schedule_plan("1f1b", 2, 2))
    assert {k: value[k] for k in MINIMAL} == {
        "format": "adaptis-plan",
        "version": 1,
        "num_microbatches": 2,
        "stages": [
            {"layers": [0, 1], "device": 0, "recompute": False},
            {"layers": [1, 2], "device": 1, "recompute": False},
        ],
        "programs": [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]],
    }


@pytest.mark.parametrize(
    "text",
    ["0F0garbage", "0F-1", "0B1.5", "1Bx", "", "0f0", " 0F0", "0F0\n", "0SEND_F0", "STEP"],
)
def test_a_wrong_instruction_is_refused_with_its_place(text):
    with pytest.raises(PlanError, match=r"here\.json: device 1, position 1: .* is no instruction"):
        plan_from_json(with_orders(["0F0", "0B0"], ["1F0", text]), "here.json")


@pytest.mark.parametrize("word", [0, None, 1.5, True, ["1F0"], {"op": "F"}])
def test_an_instruction_that_is_no_text_is_refused(word):
    with pytest.raises(PlanError, match=r"device 0, position 0: .* is no instruction but"):
        plan_from_json(with_orders([word], []))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            with_stages(((0, 2), 0), ((3, 4), 1)),
            r"stage 1 holds layers \[3, 4\), but must start at layer 2",
        ),
        (
            with_stages(((0, 2), 0), ((1, 3), 1)),
            r"stage 1 holds layers \[1, 3\), but must start at layer 2",
        ),
        (with_stages(((1, 2), 0)), "must start at layer 0"),
        (with_stages(((0, 0), 0)), "hold at least one layer"),
        (with_stages(((0, -1), 0)), "hold at least one layer"),
        (with_stages(((-1, 2), 0)), "must start at layer 0"),
        (with_stages(((0, 2), 2)), r"stages\[0\]: device 2 has no program, there are 2"),
        (with_stages(((0, 2), -1)), "'device' is -1"),
        (with_stages(((0, 2), True)), "'device' is true or false"),
        (with_stages(((0, True), 0)), r"'layers' must be \[start, stop\]"),
        (with_stages(((0, 1.0), 0)), r"'layers' must be \[start, stop\]"),
        (with_stages(((0, 1, 2), 0)), r"'layers' must be \[start, stop\]"),
        (with_stages(), "has no stages"),
        (MINIMAL | {"stages": None}, "'stages' is null, a list is needed"),
        (MINIMAL | {"programs": [["0F0"], "1F0"]}, r"programs\[1\] is no list"),
        (MINIMAL | {"programs": {}}, "'programs' is an object"),
        (MINIMAL | {"num_microbatches": 0}, "'num_microbatches' is 0"),
        (MINIMAL | {"num_microbatches": 1.0}, "'num_microbatches' is a fraction"),
        (MINIMAL | {"version": 2}, "version 2 of adaptis-plan is newer"),
        (MINIMAL | {"version": "1"}, "'version' is a string"),
        (MINIMAL | {"format": "adaptis-profile"}, "the format is 'adaptis-profile'"),
        (MINIMAL | {"step_seconds": 1.0}, "unknown key 'step_seconds'"),
        (MINIMAL | {"provenance": []}, "'provenance' is a list, an object is needed"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_sentence(value, sentence):
    with pytest.raises((InputError, PlanError), match=sentence) as caught:
        plan_from_json(value, "here.json")
    assert str(caught.value).startswith("here.json: ")
    assert "\n" not in str(caught.value)


def test_an_unknown_key_of_a_stage_is_refused():
    stages = [{"layers": [0, 3], "device": 0, "recomputed": True}]
    with pytest.raises(InputError, match=r"stages\[0\]: unknown key 'recomputed'"):
        plan_from_json(MINIMAL | {"stages": stages})


@pytest.mark.parametrize("key", MINIMAL)
def test_what_every_plan_has_may_not_be_missing(key):
    with pytest.raises(Error, match=f"the key '{key}' is missing"):
        plan_from_json({k: v for k, v in MINIMAL.items() if k != key})


def test_a_stage_is_not_both_recomputed_and_offloaded():
    stages = [{"layers": [0, 3], "device": 0, "recompute": True, "offload": True}]
    sentence = r"the stage of layers \[0, 3\) is to be recomputed and offloaded, .* choose one"
    with pytest.raises(PlanError, match=rf"^here\.json: stages\[0\]: {sentence}"):
        plan_from_json(MINIMAL | {"stages": stages}, "here.json")
    with pytest.raises(PlanError, match=f"^{sentence}"):
        Stage(0, 3, 0, recompute=True, offload=True)


def test_a_plan_for_more_layers_is_refused():
    with pytest.raises(PlanError, match="the plan covers 3 layers, but uniform has 5; make a plan"):
        plan_from_json(MINIMAL).fits(uniform_profile(5))


def test_a_plan_for_another_model_with_as_many_layers_is_refused():
    profile = uniform_profile(3)
    plan = plan_from_json(MINIMAL | {"model": "mine", "fingerprint": profile.fingerprint})
    plan.fits(profile)
    with pytest.raises(PlanError, match="made for mine, whose layers differ from those of random"):
        plan.fits(make_profile(0, 3))


def test_a_plan_without_a_fingerprint_fits_any_model_with_its_layers():
    plan_from_json(MINIMAL).fits(make_profile(0, 3))


def test_the_layers_of_a_device_are_printed_as_ranges():
    stages = (Stage(0, 4, 0), Stage(4, 5, 1), Stage(5, 6, 0), Stage(6, 7, 0), Stage(7, 8, 1))
    plan = Plan(1, stages, ((Compute(Op.FORWARD, 0, 0),), ()))
    assert (plan.layers_of(0), plan.layers_of(1)) == ("0-3 5-6", "4 7")
