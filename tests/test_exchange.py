"""Other systems' formats: round trips, and one sentence with the place for all that is wrong."""

import json
import re
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_plans import make_plan, schedule_plan, seeds, uniform_profile

from adaptis import cli
from adaptis.check import check
from adaptis.errors import DeadlockError, Error, InputError, PlanError, ProgramError
from adaptis.exchange import layouts, octopipe, slackpipe
from adaptis.exchange.orders import lost, stops_of
from adaptis.exchange.torch_csv import read_schedule, write_orders, write_program
from adaptis.files import write_json
from adaptis.lower import lower
from adaptis.plan import Plan, Stage, plan_from_json, save_plan
from adaptis.profile import profile_to_json
from adaptis.program import Op, Overlap, parts
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape


def plan_named(name, p=2, m=4):
    """A schedule's plan where it has one copy and whole micro-batches; else None."""
    schedule = SCHEDULES[name]
    chunks = schedule.chunks[1] if len(schedule.chunks) > 1 else schedule.chunks[0]
    if schedule.copies > 1 or schedule.lacks(Shape(p, m, chunks)):
        return None
    return schedule_plan(name, p, m, chunks)


NAMES = [name for name in SCHEDULES if plan_named(name) is not None]
PAIRED = {
    name for name in NAMES
    if any(isinstance(work, Overlap) for row in plan_named(name).programs for work in row)
}  # fmt: skip


def same(found, plan):
    assert (found.stages, found.programs) == (plan.stages, plan.programs)
    assert found.num_microbatches == plan.num_microbatches
    return True


def stops(plan):
    return tuple(stage.stop for stage in plan.stages)


def busy(seed):
    """A random plan in which each device has a stage and the losses come in order."""
    plan = make_plan(seed, recompute=False)
    last, homes = len(plan.stages) - 1, set(plan.placement)
    forwards = [
        c.microbatch
        for row in plan.programs
        for work in row
        for c in parts(work)
        if c.op is Op.FORWARD and c.stage == last
    ]
    if forwards == sorted(forwards) and len(homes) == plan.num_devices:
        return plan
    return None


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_survives_torchs_two_forms(name):
    for p, m in ((1, 3), (2, 4), (4, 8), (3, 6)):
        plan = plan_named(name, p, m)
        if plan is not None:
            assert same(read_schedule(write_orders(plan), len(plan.stages)), plan)
            assert same(read_schedule(write_program(plan), len(plan.stages)), plan)


@pytest.mark.parametrize("name", sorted(set(NAMES) - PAIRED))
def test_a_schedule_survives_octopipes_plan_file(name):
    plan = plan_named(name)
    assert same(octopipe.read_plan(octopipe.write_plan(plan)), plan)


@given(seed=seeds)
def test_random_plans_survive_both(seed):
    plan = busy(seed)
    if plan is not None:
        assert same(read_schedule(write_orders(plan), stops(plan)), plan)
        assert same(read_schedule(write_program(plan), stops(plan)), plan)
        assert same(octopipe.read_plan(octopipe.write_plan(plan)), plan)


def legacy(text):
    """The same file in the dialect from before."""
    text = re.sub(r"(\d)B(\d)", r"\1BW\2", text)
    return re.sub(r"(\d)I(\d)", r"\1B\2", text)


@given(seed=seeds)
def test_the_old_dialect_is_found_out(seed):
    plan = busy(seed)
    if plan is not None:
        for text in (write_orders(plan), write_program(plan)):
            assert same(read_schedule(legacy(text), stops(plan)), plan)


ORDERS = "0F0,0F1,,0B0,0B1\n1F0,1B0,1F1,1B1\n"
PROGRAM = (
    "0UNSHARD,0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0RECV_B1,0B0,0B1,0REDUCE_GRAD,0RESHARD\n"
    "1UNSHARD,1RECV_F0,1RECV_F1,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1,1REDUCE_GRAD,1RESHARD\n"
)


def changed(text, old, new):
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize("text", [ORDERS, PROGRAM, ORDERS.replace("\n", "\r\n"), ORDERS.rstrip()])
def test_the_examples_that_the_mistakes_are_made_in_are_right(text):
    assert [len(row) for row in read_schedule(text, 2).programs] == [4, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (changed(ORDERS, "0F1", "0F1garbage"), "row 1, column 2: '0F1garbage' is no action"),
        (changed(ORDERS, "0B0", "0Bx"), "row 1, column 4: '0Bx'"),
        (changed(ORDERS, "0F1", "0F-1"), "row 1, column 2: '0F-1'"),
        (changed(ORDERS, "1B1", "1B1.5"), "row 2, column 4: '1B1.5'"),
        (changed(ORDERS, "1B1", "1B"), "row 2, column 4: '1B'"),
        (changed(ORDERS, "1B1", "1B01"), "row 2, column 4: '1B01'"),
        (changed(ORDERS, "1B1", "1B١"), "row 2, column 4"),
        (changed(ORDERS, "1B1", "1R1"), "row 2, column 4: '1R1'"),
        (changed(ORDERS, "1B1", "STEP"), "row 2, column 4: 'STEP'"),
        (changed(ORDERS, "1B1", "B1"), "row 2, column 4: 'B1'"),
        (changed(ORDERS, "1B1", "1B9999999999"), "row 2, column 4"),
        (changed(ORDERS, "1B1", "(1B1)OVERLAP_F_B"), "row 2, column 4"),
        (changed(ORDERS, "1B1", "0(1F1;1B1)OVERLAP_F_B"), "row 2, column 4"),
        (changed(ORDERS, "1B1", "(1F1;(1B1;1B0)OVERLAP_F_B)OVERLAP_F_B"), "row 2, column 4"),
        (changed(ORDERS, "1B1", "(1F1;1B1;1B0)OVERLAP_F_B"), "row 2, column 4"),
        (changed(ORDERS, "0F0", "\ufeff0F0"), "row 1, column 1"),
        (changed(ORDERS, "1B1", '"1B1'), "row 2: no CSV"),
        (changed(ORDERS, ",1B1", ",1B1,1F0"), "row 2, column 5: 1F0 is there twice, first at"),
        (changed(ORDERS, ",1B1", ""), "column 3 has micro-batch 1, but on stage 1 there is 1F1"),
        (changed(ORDERS, "1F1,1B1", ""), "has micro-batch 1, but on stage 1 there is nothing"),
        (changed(ORDERS, "1F1,", ""), "column 3 has micro-batch 1, but on stage 1 there is 1B1"),
        (changed(ORDERS, ",1B1", ",1I1"), "there is 1F1 1I1"),
        (changed(ORDERS, ",1B1", ",1B1,1I1,1W1"), "there is 1F1 1B1 1I1 1W1"),
        (changed(ORDERS, "0F1", "1F5"), "row 2, column 1: 1F0 is of stage 1, which is on device 0"),
        (ORDERS.replace("0F", "2F").replace("0B", "2B"), "row 1, column 1 names stage 2, but"),
        (ORDERS.replace("F1", "F2").replace("B1", "B2"), "names micro-batch 2, but micro-batch 1"),
        (changed(ORDERS, "0F0,0F1,,0B0", "0B0,0F1,,0F0"), "row 1, column 1: 0B0 needs 0F0"),
        (changed(ORDERS, "1F1,1B1", "(1F1;1B1)OVERLAP_F_B"), "1B1 needs 1F1, which comes no ear"),
        (f"{ORDERS}\n", "device 2 (row 3) computes nothing"),
        ("", "holds no computation"),
        ("0F0,0BW0,0F1,0I1,0W1", "row 1, column 4: I is a word of today's dialect"),
        ("0F0,0B0,0W0,0F1,0I1,0W1", "column 5: I is a word of today's"),
    ],
)  # fmt: skip
def test_what_torch_would_misread_is_refused_with_its_place(text, words):
    with pytest.raises((InputError, PlanError), match=re.escape(words)) as caught:
        read_schedule(text, 8, "a.csv")
    assert str(caught.value).startswith("a.csv: ")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (",0SEND_F1", "", "row 1: 0SEND_F1 is missing; it follows from 0F1 at row 1, column 4"),
        (",1RECV_F1", "", "row 2: 1RECV_F1 is missing; it follows from 0F1 at row 1, column 4"),
        (",0SEND_F1", ",0SEND_F1,0SEND_F1", "row 1, column 6: 0SEND_F1 is there twice"),
        (",0SEND_F1", ",0SEND_F1,0SEND_F2", "row 1, column 6: 0SEND_F2 follows from no comp"),
        (",0SEND_F1", ",0SEND_F1,0SEND_B1", "row 1, column 6: 0SEND_B1: there is no such pair"),
        (",0SEND_F1", ",0SEND_F1,", "row 1, column 6: is empty"),
        ("0F0,0SEND_F0", "0SEND_F0,0F0", "row 1, column 2: 0SEND_F0 stands before 0F0"),
        ("0RECV_B1,0B0,0B1", "0B0,0B1,0RECV_B1", "row 1, column 9: 0RECV_B1 stands behind 0B1"),
        ("1RECV_F0,1RECV_F1", "1RECV_F1,1RECV_F0", "row 1, column 3: 0SEND_F0 meets 1RECV_F1"),
        ("0B1,0REDUCE_GRAD", "0REDUCE_GRAD,0B1", "row 1, column 10: 0B1 comes after 0REDUCE_G"),
        ("0REDUCE_GRAD", "0REDUCE_GRAD,0REDUCE_GRAD", "row 1, column 11: 0REDUCE_GRAD is there"),
        ("0UNSHARD", "1UNSHARD", "row 1, column 1: 1UNSHARD: stage 1 is not on this row"),
        ("0UNSHARD", "9UNSHARD", "row 1, column 1: 9UNSHARD: stage 9 is not on this row"),
        ("0UNSHARD", "0UNSHARD0", "row 1, column 1: '0UNSHARD0' is no action"),
    ],
)
def test_communication_must_be_what_follows_from_the_computations(old, new, words):
    with pytest.raises((InputError, PlanError), match=re.escape(words)):
        read_schedule(changed(PROGRAM, old, new), 2)


def test_a_circle_between_ranks_is_found():
    with pytest.raises(DeadlockError, match="wait for each other"):
        read_schedule("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", 2)


@given(text=st.text('0123FBIWSENDRCV_UH(;)OLAP,\n -."', max_size=40))
def test_any_text_is_a_proven_plan_or_one_sentence(text):
    message = ""
    try:
        check(lower(read_schedule(text, 9)))
    except Error as error:
        message = str(error)
    assert "\n" not in message


@given(seed=seeds, data=st.data())
def test_a_file_with_one_character_wrong_is_never_read_as_another_plan(seed, data):
    plan = busy(seed)
    if plan is None:
        return
    text = write_program(plan)
    at = data.draw(st.integers(0, len(text) - 1))
    wrong = text[:at] + data.draw(st.sampled_from("0129FBIWSx-. ")) + text[at + 1 :]
    try:
        found = read_schedule(wrong, stops(plan))
    except Error:
        return
    # Read all the same: a blank at an edge, or the same letters of the old dialect.
    assert [len(row) for row in found.programs] == [len(row) for row in plan.programs]
    check(lower(found))


ONE = Plan(1, (Stage(0, 1, 0),), ((),))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            plan_from_json({"format": "adaptis-plan", "version": 1, "num_microbatches": 1,
                            "stages": [{"layers": [0, 1], "device": 0, "recompute": True}],
                            "programs": [["0F0", "0R0", "0B0"]]}),
            "torch has no word for the recomputation (R) of stage 0",
        ),
        (replace(ONE, stages=(Stage(0, 1, 0, offload=True),)), "the offloading (OFFLOAD) of stage"),
        (replace(ONE, stages=ONE.stages * 2), "2 copies of the model"),
        (replace(ONE, num_microbatches=2, previous=(-1, 0)), "slices of a micro-batch"),
        (replace(ONE, head_reductions=1), "a head that is sharded over all devices (S, T)"),
    ],
)  # fmt: skip
def test_what_torch_has_no_word_for_is_refused_by_name(plan, words):
    for write in (write_orders, write_program):
        with pytest.raises(PlanError, match=re.escape(words)):
            write(plan)


def simple(*rows, homes=(0, 1), count=2):
    stages = [{"layers": [s, s + 1], "device": home} for s, home in enumerate(homes)]
    value = {"format": "adaptis-plan", "version": 1, "num_microbatches": count}
    return plan_from_json(value | {"stages": stages, "programs": [row.split() for row in rows]})


def test_a_plan_that_torch_cannot_run_is_refused():
    late = simple("0F1 0F0 0B1 0B0", "1F1 1F0 1B1 1B0")
    with pytest.raises(PlanError, match="computes 1F1 where 1F0 is needed; number them anew"):
        write_orders(late)
    with pytest.raises(PlanError, match="device 1 holds no stage"):
        write_orders(simple("0F0 0B0", "", homes=(0,), count=1))
    with pytest.raises(ProgramError, match="missing"):
        write_orders(simple("0F0", homes=(0,), count=1))


def test_step_is_left_out_and_each_stage_reduces_behind_its_last_backward():
    rows = write_program(schedule_plan("interleaved", 2, 2, 2)).splitlines()
    assert all("STEP" not in row for row in rows)
    for stage in range(4):
        assert rows[stage % 2].count(f"{stage}REDUCE_GRAD") == 1
        assert f"{stage}B1,{stage}REDUCE_GRAD" in rows[stage % 2]


def test_a_fused_pair_is_one_cell():
    plan = simple("0F0 0F1 (0F2;0B0)OVERLAP_F_B 0B1 0B2", homes=(0,), count=3)
    for text in (write_orders(plan), write_program(plan)):
        assert "0F1,(0F2;0B0)OVERLAP_F_B,0B1" in text
        assert same(read_schedule(text, 1), plan)
    with pytest.raises(PlanError, match="OctoPipe has no word for the fused pair"):
        octopipe.write_plan(plan)


def test_layers_are_cut_evenly_unless_the_cut_is_given():
    profile = model(8)  # embedding, 6 blocks, head
    assert stops_of(7, 3) == (2, 4, 7)
    assert stops_of(profile, 3) == (3, 5, 8)
    assert stops_of(profile, 8) == tuple(range(1, 9))
    assert stops_of((1, 5, 8), 3) == (1, 5, 8)
    for cut, count in ((2, 3), ((1, 1), 2), ((1, 2, 3), 2)):
        with pytest.raises(PlanError):
            stops_of(cut, count)
    plan = read_schedule(ORDERS, profile)
    assert (plan.model, plan.fingerprint) == (profile.model, profile.fingerprint)


YAML = """\
schedule: octopipe
partition: [2, 3]
placement: [[0], [1]]
scheduling:
- (f, 0, 0, 0, 0, 695)
- "('f', 0, 1, 1, 695, 700.5)"
- [b, 0, 1, 1, 800, 900]
- (b, 0, 0, 0, 900, 950)
- (w, 0, 1, 1, 900, 901)
makespan: 951
"""


def test_octopipes_b_is_the_input_half_where_a_w_follows():
    plan = octopipe.read_plan(YAML)
    assert [" ".join(map(str, row)) for row in plan.programs] == ["0F0 0B0", "1F0 1I0 1W0"]
    assert stops(plan) == (2, 5)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("(f, 0, 0,", "(g, 0, 0,", "scheduling[0]: must be (f, b or w"),
        ("(f, 0, 0,", "(f, -1, 0,", "scheduling[0]: must be"),
        ("(f, 0, 0,", "(f, 0.5, 0,", "scheduling[0]: must be"),
        ("695)\n", "695) x\n", "scheduling[0]: must be"),
        ("[b, 0, 1, 1, 800, 900]", "[b, 0, 1, 1, 800]", "scheduling[2]: must be"),
        ("[b, 0, 1, 1, 800, 900]", "[b, true, 1, 1, 800, 900]", "scheduling[2]: must be"),
        ("[b, 0, 1, 1, 800, 900]", "[b, 0, 1, 1, 800, .inf]", "scheduling[2]: must be"),
        ("[b, 0, 1, 1, 800, 900]", "[b, 0, 1, 0, 800, 900]", "stage 1 is not on device 0"),
        ("[b, 0, 1, 1, 800, 900]", "[b, 0, 1, 1, 8, 900]", "list them in the order of their times"),
        ("- (b, 0, 0, 0, 900, 950)\n", "", "scheduling[0] has micro-batch 0, but on stage 0"),
        ("[2, 3]", "[2, 3, 1]", "'placement' has 2 of 3 stages"),
        ("[2, 3]", "[2, 0]", "'partition' must list"),
        ("[2, 3]", "[]", "'partition' must list"),
        ("[[0], [1]]", "[[0], [0, 1]]", "placement[1]: stage 0 is there twice"),
        ("[[0], [1]]", "[[0, 1], []]", "stage 1 is not on device 1"),
        ("[[0], [1]]", "[0, 1]", "placement[0] must list the stages"),
        ("schedule:", "surprise:", "unknown key 'surprise'"),
        ("makespan: 951", "partition: [1, 4]", "a key is there twice"),
        ("partition: [2, 3]", "1: 2", "a key is there twice, or is no text"),
        ("partition: [2, 3]", "<<: {partition: [2, 3]}", "a key is there twice, or is no text"),
        ("octopipe", "!!python/object/apply:os.system [ls]", "line 1: not YAML"),
        ("octopipe", "&a octopipe", "nothing"),
        ("octopipe", "*a", "line 1: an alias"),
        ("octopipe", "[" * 9 + "]" * 9, "nested too deeply"),
        ("octopipe", "[" * 20000 + "]" * 20000, "nested too deeply"),
        ("octopipe", "2020-13-45", "holds a number or a date that is none"),
        ("octopipe", "1" * 9000, "holds a number or a date that is none"),
        ("octopipe", "[", "not YAML"),
        ("octopipe", "\x07", "not YAML"),
        ("octopipe", "a\n---\nb: 1", "not YAML"),
        ("951", ".nan", "'makespan'"),
    ],
)  # fmt: skip
def test_a_wrong_or_hostile_plan_of_octopipes_is_refused(old, new, words):
    text = changed(YAML, old, new)
    if words == "nothing":
        octopipe.read_plan(text)  # an anchor that nobody uses does no harm
        return
    with pytest.raises((InputError, PlanError), match=re.escape(words)):
        octopipe.read_plan(text)


@pytest.mark.parametrize("text", ["", "[]", "a", "1", "- a", "null"])
def test_what_is_no_mapping_is_no_plan(text):
    with pytest.raises(InputError, match="an object is needed"):
        octopipe.read_plan(text)


def test_a_billion_laughs_are_refused_at_the_first():
    lines = ["a0: &a0 [ha]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(InputError, match="line 2: an alias; write the value out"):
        octopipe.read_plan("\n".join(lines))


def test_too_large_a_text_is_refused_unread(monkeypatch):
    monkeypatch.setattr(octopipe, "MAX_TEXT_BYTES", 100)
    with pytest.raises(InputError, match="are too many, 100 at most"):
        octopipe.read_plan(YAML)


def model(num_layers, ends=True):
    profile = uniform_profile(num_layers)
    kinds = {0: "embedding", num_layers - 1: "head"} if ends else {}
    layers = [replace(layer, kind=kinds.get(i, "mlp")) for i, layer in enumerate(profile.layers)]
    return replace(profile, layers=tuple(layers))


def test_octopipe_counts_blocks_and_the_ends_come_on_top():
    assert stops(octopipe.read_plan(YAML, model(7))) == (3, 7)
    assert stops(octopipe.read_plan(YAML, model(5))) == (2, 5)
    with pytest.raises(PlanError, match="cuts 5 layers, but uniform has 9 \\(7 without"):
        octopipe.read_plan(YAML, model(9))
    plan = replace(schedule_plan("1f1b", 2, 2), stages=(Stage(0, 3, 0), Stage(3, 7, 1)))
    assert "partition: [2, 3]" in octopipe.write_plan(plan, model(7))
    assert "partition: [3, 4]" in octopipe.write_plan(plan)
    alone = replace(plan, stages=(Stage(0, 1, 0), Stage(1, 7, 1)))
    with pytest.raises(PlanError, match="stage 0 holds the embedding or the head alone"):
        octopipe.write_plan(alone, model(7))


SLACK = {
    "schema_version": "slackpipe.plan.v2",
    "num_microbatches": 1,
    "num_stages": 2,
    "num_workers": 2,
    "num_layers": 5,
    "stage_layer_ranges": [[0, 2], [2, 5]],
    "stage_to_worker": [0, 1],
    "operations": [
        [{"kind": "F", "microbatch": 0, "stage": 0}, {"kind": "B", "microbatch": 0, "stage": 0}],
        [{"kind": "F", "microbatch": 0, "stage": 1}, {"kind": "B", "microbatch": 0, "stage": 1}],
    ],
    "model_manifest_hash": "abc",
}


def slack(drop=(), **more):
    return {key: value for key, value in (SLACK | more).items() if key not in drop}


OLD = ("schema_version", "stage_layer_ranges")


@pytest.mark.parametrize(
    "value",
    [
        SLACK,
        slack(OLD, layer_split=[2, 3]),
        slack(OLD[1:], layer_cuts=[2]),
        slack(OLD[1:], cuts=[0, 2, 5]),
        slack(("operations",), worker_operations=dict(enumerate(SLACK["operations"]))),
    ],
)
def test_both_versions_of_slackpipes_plan_are_read(value):
    plan = slackpipe.read_plan(json.loads(json.dumps(value)))
    assert stops(plan) == (2, 5)
    assert [" ".join(map(str, row)) for row in plan.programs] == ["0F0 0B0", "1F0 1B0"]
    assert plan.provenance["model_manifest_hash"] == "abc"
    assert stops(slackpipe.read_plan(json.loads(json.dumps(value)), model(7))) == (3, 7)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (slack(schema_version="slackpipe.plan.v3"), "'schema_version' is 'slackpipe.plan.v3'"),
        (slack(surprise=1), "unknown key 'surprise'"),
        (slack(("num_layers",)), "'num_layers' is missing"),
        (slack(num_microbatches=2), "'num_microbatches' is 2, but the operations are of 1"),
        (slack(stage_to_worker=[0]), "'stage_to_worker' must give"),
        (slack(stage_to_worker=[0, 2]), "'stage_to_worker' must give"),
        (slack(stage_to_worker=[1, 0]), "the stages are said to be on devices [1, 0]"),
        (slack(stage_layer_ranges=[[0, 2], [3, 5]]), "must cut 5 layers into 2 stages"),
        (slack(stage_layer_ranges=[[0, 2], [2, 2], [2, 5]]), "must cut 5 layers"),
        (slack(stage_layer_ranges=[0, 5]), "must cut 5 layers"),
        (slack(stage_layer_ranges=[[0, 5]]), "must cut 5 layers"),
        (slack(OLD[1:], cuts=["2"]), "must cut 5 layers"),
        (slack(cuts=[2]), "found stage_layer_ranges and cuts"),
        (slack(OLD[1:]), "found none"),
        (slack(OLD, layer_split=[2, 2]), "must cut 5 layers"),
        (slack(operations=1), "must have a list for each of 2 workers"),
        (slack(operations=[1, 2]), "operations[0] must be a list"),
        (slack(operations={"0": []}), "must have a key for each of 2 workers"),
        (slack(operations=[[{"kind": "W"}], []]), "operations[0][0]: 'kind' is 'W'"),
        (slack(operations=[[{"kind": "F", "stage": 0, "microbatch": -1}], []]), "'microbatch'"),
        (slack(operations=[SLACK["operations"][0], []]), "device 1 (row 2) computes nothing"),
        (slack(worker_operations=[]), "found operations and worker_operations"),
    ],
)
def test_a_wrong_plan_of_slackpipes_is_refused(value, words):
    with pytest.raises((InputError, PlanError), match=re.escape(words)):
        slackpipe.read_plan(value)


def cut(name, p, v, *ends):
    plan = schedule_plan(name, p, 2 * p, v)
    stages = [
        replace(stage, start=a, stop=b)
        for stage, a, b in zip(plan.stages, (0, *ends), ends, strict=False)
    ]
    return replace(plan, stages=tuple(stages))


def test_megatrons_layout_names_ends_and_blocks():
    plan = cut("interleaved", 2, 2, 4, 5, 7, 9)
    assert layouts.megatron(plan, model(9)) == "Et*3|t|t*2|tL\n"
    last = replace(model(9).layers[7], kind="mtp")
    profile = replace(model(9), layers=(*model(9).layers[:7], last, model(9).layers[8]))
    assert layouts.megatron(plan, profile) == "Et*3|t|t*2|mL\n"
    early = replace(model(9), layers=(*model(9).layers[:1], last, *model(9).layers[2:]))
    with pytest.raises(PlanError, match="stage 0 holds an MTP layer"):
        layouts.megatron(plan, early)


def test_torchtitan_and_automodel_get_the_names_of_the_modules():
    plan = cut("1f1b", 2, 1, 2, 4)
    value = json.loads(layouts.torchtitan(plan, model(4), "s.csv"))
    parts_of = [["tok_embeddings", "layers.0"], ["layers.1", "norm", "lm_head"]]
    assert value["module_fqns_per_model_part"] == parts_of
    assert (value["pipeline_parallel_degree"], value["num_pp_microbatches"]) == (2, 4)
    assert value["pipeline_parallel_schedule_csv"] == "s.csv"
    value = json.loads(layouts.automodel(plan, model(4)))
    first = ["model.embed_tokens", "model.layers.0", "model.rotary_emb"]
    assert value["module_fqns_per_model_part"][0] == first


def test_deepspeed_gets_the_boundaries():
    assert layouts.deepspeed(cut("1f1b", 2, 1, 3, 8)) == "[0, 3, 8]\n"
    with pytest.raises(PlanError, match="DeepSpeed has stage i on rank i"):
        layouts.deepspeed(cut("interleaved", 2, 2, 1, 2, 3, 4))


def test_the_flags_of_stages_that_a_form_cannot_carry_are_told(monkeypatch, capsys, tmp_path):
    plan = cut("interleaved", 2, 2, 1, 2, 3, 4)
    flags = ({"recompute": True}, {"offload": True}, {"recompute": True, "sharded": True}, {})
    stages = [replace(stage, **some) for stage, some in zip(plan.stages, flags, strict=True)]
    save_plan(replace(plan, stages=tuple(stages), replicas=2), tmp_path / "plan.json")
    write_json(tmp_path / "profile.json", profile_to_json(model(4)))
    note = (
        "this form does not say that stages 0, 2 are recomputed and that stage 1 is offloaded and "
        "that stage 2 is sharded; set that in the other system"
    )
    monkeypatch.chdir(tmp_path)
    words = ["adaptis", "export", "plan.json", "--profile", "profile.json", "--json", "--to"]
    for target, told in (("megatron", note), ("text", None)):
        monkeypatch.setattr(sys, "argv", [*words, target])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        out, err = capsys.readouterr()
        assert json.loads(out).get("note") == told
        assert (f"note: {note}" in err.splitlines()) == (told is not None)
    assert lost(plan) == ""


def test_a_placement_or_a_model_that_a_layout_cannot_say_is_refused():
    turned = simple("1F0 1B0", "0F0 0B0", homes=(1, 0), count=1)
    for write in (layouts.megatron, layouts.torchtitan, layouts.automodel):
        with pytest.raises(PlanError, match="puts stage 0 on rank 0 mod 2 = 0, but the plan has"):
            write(turned, model(2))
        with pytest.raises(PlanError, match="needs one layer of kind 'embedding'"):
            write(cut("1f1b", 2, 1, 1, 2), model(2, ends=False))
        with pytest.raises(PlanError, match="covers 2 layers"):
            write(cut("1f1b", 2, 1, 1, 2), model(3))
    uneven = simple("0F0 2F0 2B0 0B0", "1F0 1B0", homes=(0, 1, 0), count=1)
    with pytest.raises(PlanError, match="needs as many stages on each rank, found 3 on 2"):
        layouts.megatron(uneven, model(3))
    with pytest.raises(PlanError, match="has no word for 2 copies"):
        layouts.deepspeed(replace(ONE, stages=ONE.stages * 2))
