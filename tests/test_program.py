import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_plans import make_plan, schedule_plan, seeds
from random_programs import make_any_plan

from adaptis.errors import ProgramError
from adaptis.lower import LOOKAHEAD, lower
from adaptis.notation import parse_compute, parse_order
from adaptis.plan import Plan, Stage
from adaptis.program import Compute, Kind, Layout, Op, Program, Receive, Send, Step, Value, parts

THREE = Layout((0, 0, 0), 8)

computes = st.builds(
    Compute, st.sampled_from(Op), st.integers(0, 999_999_999), st.integers(0, 999_999_999)
)


@given(compute=computes)
def test_the_text_of_a_computation_is_read_back(compute):
    assert parse_compute(str(compute)) == compute


@given(text=st.text(alphabet="0123456789FBIWRSTX -+._\n٣", max_size=6))
def test_only_the_printed_form_is_read(text):
    if re.fullmatch("(0|[1-9][0-9]*)[FBIWRST](0|[1-9][0-9]*)", text):
        assert str(parse_compute(text)) == text
    else:
        with pytest.raises(ProgramError, match="is no instruction"):
            parse_compute(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0F",
        "F0",
        "0F0 ",
        " 0F0",
        "0F0\n",
        "0F0garbage",
        "0F-1",
        "-1F0",
        "0B1.5",
        "1Bx",
        "00F0",
        "0F00",
        "0f0",
        "0X0",
        "0F0F0",
        "٣F0",
        "0F٣",
        "1_0F0",
        "9999999999F0",
        "0SEND_F0",
        "STEP",
    ],
)
def test_what_is_no_computation_is_refused(text):
    with pytest.raises(
        ProgramError, match="is no instruction: stage, one of F B I W R S T, micro-batch"
    ):
        parse_compute(text)


def test_an_order_names_the_position_that_is_wrong():
    with pytest.raises(ProgramError, match="device 3, position 1: '0X0' is no instruction"):
        parse_order(["0F0", "0X0"], "device 3")
    with pytest.raises(ProgramError, match="device 3, position 2: 7 is no instruction but int"):
        parse_order(["0F0", "0F1", 7], "device 3")


def test_the_text_is_that_of_torch():
    sent = Value(Kind.OUTPUT, 2, 5), Value(Kind.INPUT_GRAD, 3, 5)
    assert [str(Send(v, 0)) for v in sent] == ["2SEND_F5", "3SEND_B5"]
    assert [str(Receive(v, 0)) for v in sent] == ["3RECV_F5", "2RECV_B5"]
    assert str(Compute(Op.BACKWARD_INPUT, 0, 3)) == "0I3"
    assert str(Step()) == "STEP"


def test_a_lowered_program_reads_as_expected():
    assert str(lower(schedule_plan("1f1b", 2, 2))).splitlines() == [
        "0RECV_B0 0F0 0SEND_F0 0RECV_B1 0F1 0SEND_F1 0B0 0B1 STEP",
        "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1 STEP",
    ]


MEANING = {  # of stage 1 of 3: what it reads, what it writes
    Op.FORWARD: ("output 0", "saved 1, output 1"),
    Op.BACKWARD: ("saved 1, input_grad 2", "input_grad 1"),
    Op.BACKWARD_INPUT: ("saved 1, input_grad 2", "input_grad 1, saved_weight 1"),
    Op.BACKWARD_WEIGHT: ("saved_weight 1", ""),
    Op.RECOMPUTE: ("saved_input 1", "saved 1"),
    Op.SCORES: ("output 0", "saved 1, share_s 1"),
    Op.SCORES_GRADIENT: ("saved 1, sums 1", ""),
}


def named(values):
    assert all(value.microbatch == 7 for value in values)
    return ", ".join(f"{value.kind.name.lower()} {value.stage}" for value in values)


@pytest.mark.parametrize("op", Op)
def test_each_operation_reads_and_writes_what_the_table_says(op):
    compute = Compute(op, 1, 7)
    assert (named(list(THREE.reads(compute))), named(list(THREE.writes(compute)))) == MEANING[op]


def test_the_ends_of_the_chain_have_no_neighbour():
    assert list(THREE.reads(Compute(Op.FORWARD, 0, 7))) == []
    assert named(list(THREE.writes(Compute(Op.FORWARD, 2, 7)))) == "saved 2"
    assert named(list(THREE.reads(Compute(Op.BACKWARD, 2, 7)))) == "saved 2"
    assert list(THREE.writes(Compute(Op.BACKWARD, 0, 7))) == []
    assert named(list(THREE.writes(Compute(Op.BACKWARD_INPUT, 0, 7)))) == "saved_weight 0"


def test_a_recomputed_stage_keeps_its_input():
    kept = list(Layout((0, 0, 0), 8, frozenset({1})).writes(Compute(Op.FORWARD, 1, 7)))
    assert named(kept) == "saved_input 1, output 1"


@given(seed=seeds)
def test_every_value_that_is_read_is_written_before_on_its_device(seed):
    program = lower(make_plan(seed))
    for row in program.devices:
        there = set()
        for instruction in row:
            assert set(program.layout.reads(instruction)) <= there
            there |= set(program.layout.writes(instruction))


@given(seed=seeds)
def test_every_value_that_is_written_is_read(seed):
    program = lower(make_plan(seed))
    for row in program.devices:
        written = {value for i in row for value in program.layout.writes(i)}
        assert written == {value for i in row for value in program.layout.reads(i)}


@given(seed=seeds)
def test_lowering_keeps_the_computations_and_adds_matching_transfers(seed):
    plan = make_plan(seed, recompute=False)
    program = lower(plan)
    links = {}
    for device, row in enumerate(program.devices):
        assert tuple(i for i in row if isinstance(i, Compute)) == plan.programs[device]
        assert [i for i in row if isinstance(i, Step)] == [row[-1]]
        for instruction in row:
            if isinstance(instruction, Send):
                links.setdefault((device, instruction.target), ([], []))[0].append(
                    instruction.value
                )
            elif isinstance(instruction, Receive):
                links.setdefault((instruction.source, device), ([], []))[1].append(
                    instruction.value
                )
    for (source, target), (sent, received) in links.items():
        assert source != target
        assert sent == received
        assert len(set(sent)) == len(sent)


@given(seed=seeds)
def test_a_send_follows_its_computation_and_a_receive_comes_ahead_of_its_reader(seed):
    program = lower(make_plan(seed))
    for row in program.devices:
        for position, instruction in enumerate(row):
            if isinstance(instruction, Send):
                assert instruction.value in program.layout.writes(row[position - 1])
            elif isinstance(instruction, Receive):
                later = [i for i in row[position:] if isinstance(i, Compute)]
                reader = next(
                    n for n, i in enumerate(later) if instruction.value in program.layout.reads(i)
                )
                before = [i for i in row[:position] if isinstance(i, Compute)]
                assert reader >= LOOKAHEAD or not before


@given(seed=seeds)
def test_a_recomputed_stage_runs_r_before_each_backward(seed):
    program = lower(make_plan(seed))
    for row in program.devices:
        backwards = {
            (i.stage, i.microbatch): n
            for n, i in enumerate(row)
            if isinstance(i, Compute) and i.op in (Op.BACKWARD, Op.BACKWARD_INPUT)
        }
        again = [
            (n, i) for n, i in enumerate(row) if isinstance(i, Compute) and i.op is Op.RECOMPUTE
        ]
        assert {(i.stage, i.microbatch) for _, i in again} == {
            key for key in backwards if key[0] in program.layout.recomputed
        }
        assert all(n < backwards[i.stage, i.microbatch] for n, i in again)


def test_a_program_prints_one_line_a_device():
    program = Program(((Compute(Op.FORWARD, 0, 0), Step()), (Step(),)), Layout((0,), 1))
    assert str(program) == "0F0 STEP\nSTEP"


@given(seed=seeds)
def test_what_is_taken_is_read_and_what_is_lowered_keeps_the_computations(seed):
    plan = make_any_plan(seed)
    program = lower(plan)
    for row, order in zip(program.devices, plan.programs, strict=True):
        for instruction in row:
            taken, read = program.layout.takes(instruction), program.layout.reads(instruction)
            assert set(taken) <= set(read)
        given_ops = [c for work in order for c in parts(work)]
        kept = [c for work in row for c in parts(work)]
        assert [c for c in kept if c.op is not Op.RECOMPUTE or c in given_ops] == given_ops


def test_slices_pass_their_state_on_and_its_gradient_back():
    layout = Layout((0, 0), 3, previous=(-1, 0, -1))
    forward, backward = Compute(Op.FORWARD, 0, 1), Compute(Op.BACKWARD, 0, 0)
    assert Value(Kind.STATE, 0, 0) in layout.reads(forward)
    assert Value(Kind.STATE, 0, 0) in layout.writes(Compute(Op.FORWARD, 0, 0))
    assert Value(Kind.STATE_GRAD, 0, 1) in layout.reads(backward)
    assert Value(Kind.STATE_GRAD, 0, 1) in layout.writes(Compute(Op.BACKWARD, 0, 1))
    assert not [v for v in layout.writes(Compute(Op.FORWARD, 0, 2)) if v.kind is Kind.STATE]


def test_a_stage_that_no_micro_batch_goes_through_is_summed_all_the_same():
    orders = (parse_order(["0F0", "0B0"], ""), ())
    stages = (Stage(0, 1, 0), Stage(0, 1, 1))
    assert str(lower(Plan(1, stages, orders))).splitlines() == [
        "0F0 0B0 0REDUCE_GRAD STEP",
        "1REDUCE_GRAD STEP",
    ]
