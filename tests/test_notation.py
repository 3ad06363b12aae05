import pytest
from hypothesis import given, settings
from random_plans import schedule_plan, seeds
from random_programs import make_any_plan

from adaptis.errors import ProgramError
from adaptis.lower import lower
from adaptis.notation import (
    parse_instruction,
    parse_program,
    parse_work,
    print_program,
)
from adaptis.program import (
    Compute,
    Copy,
    Join,
    Kind,
    Layout,
    Op,
    Overlap,
    Receive,
    Send,
    Shard,
    Sharding,
    Step,
    Together,
    Value,
    Way,
)

FOUR = Layout((0, 1, 2, 3), 8, reductions=2)
F, B = Compute(Op.FORWARD, 0, 4), Compute(Op.BACKWARD, 3, 1)

TEXTS = {
    "0F4": F,
    "4S0": Compute(Op.SCORES, 4, 0),
    "4T0": Compute(Op.SCORES_GRADIENT, 4, 0),
    "(0F4;3B1)OVERLAP_F_B": Overlap(F, B),
    "2SEND_F5": Send(Value(Kind.OUTPUT, 2, 5), 3),
    "3RECV_F5": Receive(Value(Kind.OUTPUT, 2, 5), 2),
    "3SEND_B5": Send(Value(Kind.INPUT_GRAD, 3, 5), 2),
    "2RECV_B5": Receive(Value(Kind.INPUT_GRAD, 3, 5), 3),
    "4SHARE_F0": Join(Together.SHARE, 4, 0),
    "4TAKE_F0": Join(Together.TAKE, 4, 0),
    "4SUM_S0": Join(Together.SUM_S, 4, 0),
    "4SUM_T0": Join(Together.SUM_T, 4, 0),
    "1OFFLOAD7": Copy(Way.OFFLOAD, 1, 7),
    "1RELOAD7": Copy(Way.RELOAD, 1, 7),
    "1UNSHARD": Shard(Sharding.GATHER, 1),
    "1RESHARD": Shard(Sharding.FREE, 1),
    "1REDUCE_GRAD": Shard(Sharding.REDUCE, 1),
    "STEP": Step(),
    "CLIPPED_STEP": Step(clipped=True),
}


@pytest.mark.parametrize("text", TEXTS)
def test_an_instruction_is_printed_and_read_back(text):
    assert str(TEXTS[text]) == text
    assert parse_instruction(text, FOUR) == TEXTS[text]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("around", [" {}", "{} ", "{}x", "x{}", "0{}", "{}\n", "({})", "{};{}"])
def test_nothing_around_an_instruction_is_tolerated(text, around):
    with pytest.raises(ProgramError):
        parse_instruction(around.format(text, text), FOUR)


@pytest.mark.parametrize(
    "text",
    ["3SEND_F0", "0RECV_F0", "0SEND_B0", "3RECV_B0", "4SEND_B0", "9SEND_F0", "4RECV_F0"],
)
def test_a_transfer_beyond_the_ends_of_the_chain_is_refused(text):
    with pytest.raises(ProgramError, match="there is no such pair among 4 stages"):
        parse_instruction(text, FOUR)


@pytest.mark.parametrize(
    "text", ["(0F0;STEP)OVERLAP_F_B", "(0F0)OVERLAP_F_B", "((0F0;1B0)OVERLAP_F_B;0F1)OVERLAP_F_B"]
)
def test_only_two_computations_can_be_fused(text):
    with pytest.raises(ProgramError, match="is no instruction"):
        parse_work(text)


@settings(max_examples=200)
@given(seed=seeds)
def test_a_program_is_printed_and_read_back(seed):
    program = lower(make_any_plan(seed))
    assert parse_program(print_program(program)) == program


def test_a_program_reads_as_expected():
    assert print_program(lower(schedule_plan("1f1b", 2, 1))) == (
        "stages 0 1; microbatches 1\n"
        "device 0 | 0RECV_B0 0F0 0SEND_F0 0B0 STEP\n"
        "device 1 | 1RECV_F0 1F0 1B0 1SEND_B0 STEP\n"
    )


GOOD = "stages 0 1; microbatches 1\ndevice 0 | 0F0\ndevice 1 | 1F0\n"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("stages 0 1; ", "", "line 1: 'stages' is missing"),
        ("; microbatches 1", "", "line 1: 'microbatches' is missing"),
        ("stages 0 1", "stages 0 1; stages 0 1", "'stages 0 1' is no fact of a program, or is"),
        ("stages 0 1", "stages 0 1; colour 3", "'colour 3' is no fact of a program"),
        ("stages 0 1", "stages 0 x", "'stages 0 x' must be a name and numbers"),
        ("stages 0 1", "stages 0 01", "'stages 0 01' must be a name and numbers"),
        ("stages 0 1", "stages 0 -1", "'stages 0 -1' must be"),
        ("microbatches 1", "microbatches 1 2", "'microbatches' needs one number"),
        ("microbatches 1", "microbatches 1; copies", "'copies' needs one number"),
        ("stages 0 1", "stages 0 2", "beyond the 2 that have a line"),
        ("device 1", "device 2", "line 3: 'device 1 | ...' is needed"),
        ("device 1 |", "device 1", "line 3: 'device 1 | ...' is needed"),
        ("1F0", "1F0 1X0", "device 1, position 1: '1X0' is no instruction"),
        ("1F0", "1SEND_F0", "device 1, position 0: 1SEND_F0: there is no such pair"),
        ("1F0\n", "1F0\n\n", "line 4: 'device 2 | ...' is needed"),
        (GOOD, "", "line 1: '' is no fact of a program"),
    ],
)
def test_a_program_that_is_written_wrongly_is_refused_with_its_place(old, new, sentence):
    parse_program(GOOD)
    with pytest.raises(ProgramError) as caught:
        parse_program(GOOD.replace(old, new, 1))
    assert sentence in str(caught.value)
