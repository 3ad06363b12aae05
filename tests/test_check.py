"""The proof against brute force: all interleavings of small programs, right and spoilt ones."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from mutants import Explorer, spoil, swap, swap_with_next
from random_plans import make_plan, schedule_plan, seeds
from random_programs import make_any_plan

from adaptis.check import Semantics, check, check_memory
from adaptis.check.rules import Rules
from adaptis.errors import DeadlockError, InfeasibleError, ProgramError
from adaptis.lower import lower
from adaptis.notation import parse_compute, parse_program, print_program
from adaptis.program import Kind, Layout, Program, Receive, Send, Step, Value


def proven(program, semantics):
    try:
        check(program, semantics)
    except ProgramError:
        return False
    return True


def small(seed):
    """A program with transfers, in half of the cases as a blocking runtime would have it."""
    rng = random.Random(seed)
    while True:
        plan = make_plan(rng.random(), most_devices=3, most_stages=4, most_microbatches=2)
        if len(set(plan.placement)) > 1:
            break
    return perhaps_late(lower(plan), rng)


def small_with_all(seed):
    """A program with whatever a plan can ask for."""
    rng = random.Random(seed)
    while True:
        sizes = rng.choice(((3, 2, 2), (2, 4, 2), (2, 2, 3)))
        program = lower(make_any_plan(rng.random(), *sizes))
        if len(program.devices) > 1 and max(map(len, program.devices)) < 40:
            return perhaps_late(program, rng)


def perhaps_late(program, rng):
    if rng.random() < 0.5:
        return program
    return replace(program, devices=tuple(tuple(late(program, row)) for row in program.devices))


def late(program, row):
    """The instructions of `row` with each receive right before the one that reads its value."""
    asked = {i.value: i for i in row if isinstance(i, Receive)}
    for instruction in row:
        if not isinstance(instruction, Receive):
            for value in program.layout.reads(instruction):
                if value in asked:
                    yield asked.pop(value)
            yield instruction


def compare(seed, mistakes=1, make=small):
    rng = random.Random(seed)
    program = make(seed)
    for _ in range(mistakes):
        program = spoil(program, rng)
    verdicts = []
    for semantics in Semantics:
        verdicts.append(Explorer(program, semantics).works())
        assert proven(program, semantics) == verdicts[-1], f"{semantics}:\n{print_program(program)}"
    return verdicts


@settings(max_examples=200)
@given(seed=seeds)
def test_every_valid_plan_is_proven_under_posted_semantics(seed):
    proof = check(lower(make_plan(seed)))
    plan = make_plan(seed)
    hops = sum(a != b for a, b in zip(plan.placement[:-1], plan.placement[1:], strict=True))
    assert proof.num_transfers == 2 * hops * plan.num_microbatches


@settings(max_examples=150)
@given(seed=seeds)
def test_the_verdict_on_a_valid_plan_is_that_of_all_interleavings(seed):
    program = small(seed)
    for semantics in Semantics:
        assert proven(program, semantics) == Explorer(program, semantics).works(), str(program)


@settings(max_examples=400)
@given(seed=seeds)
def test_the_verdict_on_a_spoilt_program_is_that_of_all_interleavings(seed):
    compare(seed)


def test_mistakes_are_of_all_kinds_and_some_do_no_harm():
    verdicts = Counter(tuple(compare(seed)) for seed in range(400))
    assert verdicts[False, False, False] > 30  # posted, buffered, rendezvous
    assert verdicts[True, True, True] > 3
    assert verdicts[True, False, False] > 3
    assert verdicts[True, True, False] > 3


@settings(max_examples=60)
@given(seed=seeds)
def test_the_verdict_on_a_plan_with_all_instructions_is_that_of_all_interleavings(seed):
    program = small_with_all(seed)
    for semantics in Semantics:
        assert proven(program, semantics) == Explorer(program, semantics).works(), str(program)


def test_the_verdict_on_spoilt_programs_of_all_instructions_is_that_of_all_interleavings():
    verdicts = Counter(tuple(compare(seed, make=small_with_all)) for seed in range(400))
    assert verdicts[True, True, True] > 10
    assert verdicts[True, False, False] > 5
    assert verdicts[False, False, False] > 100


@pytest.mark.slow
@pytest.mark.parametrize("make", [small, small_with_all])
@pytest.mark.parametrize("mistakes", [1, 2])
def test_the_verdict_on_thousands_of_spoilt_programs_is_that_of_all_interleavings(mistakes, make):
    for seed in range(4000):
        compare(1_000_000 * mistakes + seed, mistakes, make)


@settings(max_examples=150)
@given(seed=seeds)
def test_a_deadlock_prints_a_cycle_of_instructions_that_never_run(seed):
    program = small(seed)
    explorer = Explorer(program, Semantics.RENDEZVOUS)
    if not explorer.matched():
        return
    stuck = explorer.stuck()
    if not stuck:
        check(program, Semantics.RENDEZVOUS)
        return
    assert len(stuck) == 1  # the moves commute: there is one place to be stuck in
    with pytest.raises(DeadlockError) as caught:
        check(program, Semantics.RENDEZVOUS)
    cycle = caught.value.cycle
    assert len(cycle) >= 2
    assert len(set(cycle)) == len(cycle)
    assert str(caught.value) == (
        f"{len(cycle)} instructions wait for each other in a circle: "
        + " <- ".join((*cycle, cycle[0]))
    )
    nodes = []
    for line in cycle:
        place, instruction = line.split(": ")
        device, index = (int(word) for word in place.replace("device ", "").split(", position "))
        assert str(program.devices[device][index]) == instruction
        assert index >= stuck[0][device]
        nodes.append((device, index))
    for (device, index), needed in zip(nodes, nodes[1:] + nodes[:1], strict=True):
        other, at = explorer.partner.get((device, index), (device, index))
        assert needed in ((device, index - 1), (other, at), (other, at - 1))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("torch")
    from gloo_ranks import Ranks

    found = Ranks(tmp_path_factory.mktemp("ranks"))
    yield found
    found.end()


def compare_with_gloo(ranks, seeds):
    """Programs in another order, if they break no other rule: which finish, which hang."""
    verdicts = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        make = rng.choice((small, small_with_all))
        program = make(seed)
        semantics = rng.choice((Semantics.POSTED, Semantics.RENDEZVOUS))
        for _ in range(rng.choice((0, 1, 2))):
            rows = [list(row) for row in program.devices]
            device = rng.choice([d for d, row in enumerate(rows) if len(row) > 2])
            rng.choice((swap, swap_with_next))(
                rows, device, rng.randrange(len(rows[device]) - 1), rng
            )
            program = replace(program, devices=tuple(map(tuple, rows)))
        try:
            check(program, semantics)
            ends = True
        except DeadlockError:
            ends = False
        except ProgramError:
            continue
        # Long enough for a busy machine where it must end, short where it must not.
        answers = ranks.run(program, semantics, 30.0 if ends else 1.0)
        assert any(answers) != ends, f"{semantics}: {answers}\n{print_program(program)}"
        assert not any("AssertionError" in answer for answer in answers), answers
        verdicts[ends, semantics] += 1
    return verdicts


def test_a_blocking_send_of_gloo_waits_for_the_receive_so_it_is_a_rendezvous(ranks):
    program = written("0F0 1>0F0 1<1B0 0B0", "0<0F0 1F0 1B0 0>1B0", placement=(0, 1))
    assert ranks.run(program, Semantics.RENDEZVOUS, 30.0) == ["", ""]
    crossing = written(
        "0F0 1>0F0 0F1 1>0F1 1<1B0 0B0 1<1B1 0B1",
        "0<0F0 1F0 1B0 0>1B0 0<0F1 1F1 1B1 0>1B1",
        placement=(0, 1),
        microbatches=2,
    )
    assert proven(crossing, Semantics.BUFFERED)
    assert not proven(crossing, Semantics.RENDEZVOUS)
    # Whoever gives up first closes its connections, which the other may hear of before its own end.
    answers = ranks.run(crossing, Semantics.RENDEZVOUS, 1.0)
    assert all(answers)
    assert any("Timed out" in answer for answer in answers)


def test_spoilt_programs_end_or_hang_over_gloo_as_the_proof_says(ranks):
    verdicts = compare_with_gloo(ranks, range(14))
    assert len(verdicts) >= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_spoilt_programs_end_or_hang_over_gloo_as_the_proof_says(ranks):
    verdicts = compare_with_gloo(ranks, range(1000, 1100))
    assert sum(verdicts.values()) >= 40
    assert all(verdicts[ends, Semantics.RENDEZVOUS] > 3 for ends in (True, False))


def written(*rows, placement, microbatches=1, recomputed=()):
    """A program from text: `0F0`, or `2>1F0` and `1<2F0` for a value sent to or received from."""

    def instruction(word):
        if word == "STEP":
            return Step()
        for sign, kind in ((">", Send), ("<", Receive)):
            if sign in word:
                other, value = word.split(sign)
                stage, letter, microbatch = value[0], value[1], value[2:]
                return kind(Value(Kind(letter), int(stage), int(microbatch)), int(other))
        return parse_compute(word)

    devices = tuple(tuple(map(instruction, row.split())) for row in rows)
    return Program(devices, Layout(placement, microbatches, frozenset(recomputed)))


GOOD = ("0F0 1>0F0 1<1B0 0B0 STEP", "0<0F0 1F0 1B0 0>1B0 STEP")


def test_two_devices_that_both_send_first_pass_buffered_and_not_rendezvous():
    # Stages 0 and 3 on device 0, stages 1 and 2 on device 1; each sends before it receives.
    crossing = (
        "0F0 1>0F0 0F1 1>0F1 1<1B0 0B0 1<1B1 0B1",
        "0<0F0 1F0 1B0 0>1B0 0<0F1 1F1 1B1 0>1B1",
    )
    program = written(*crossing, placement=(0, 1), microbatches=2)
    check(program, Semantics.POSTED)
    check(program, Semantics.BUFFERED)
    with pytest.raises(DeadlockError) as caught:
        check(program, Semantics.RENDEZVOUS)
    assert "device 0, position 3: 0SEND_F1" in caught.value.cycle
    assert "device 1, position 3: 1SEND_B0" in caught.value.cycle


# Device 0 wants B0 before it computes F1, device 1 wants F1 before it computes B0.
WANTING = (
    "0F0 1>0F0 1<1B0 1<1B1 0B0 0F1 1>0F1 0B1 STEP",
    "0<0F0 0<0F1 1F0 1F1 1B0 0>1B0 1B1 0>1B1 STEP",
)


def test_a_deadlock_of_computations_is_found_under_posted_semantics():
    with pytest.raises(DeadlockError) as caught:
        check(written(*WANTING, placement=(0, 1), microbatches=2))
    assert len(caught.value.cycle) == 6
    assert "device 0, position 4: 0B0" in caught.value.cycle
    assert "device 1, position 3: 1F1" in caught.value.cycle


def test_a_deadlock_of_computations_hangs_over_gloo(ranks):
    program = written(*WANTING, placement=(0, 1), microbatches=2)
    # Whoever gives up first closes its connections, which the other may hear of before its own end.
    answers = ranks.run(program, Semantics.POSTED, 1.0)
    assert all(answers)
    assert any("Timed out" in answer for answer in answers)


def test_the_good_program_of_the_next_tests_is_good():
    for semantics in (Semantics.POSTED, Semantics.BUFFERED, Semantics.RENDEZVOUS):
        proof = check(written(*GOOD, placement=(0, 1)), semantics)
        assert (proof.num_instructions, proof.num_transfers) == (10, 2)


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ("0F0 1>0F0 1<1B0 STEP", GOOD[1], "stage 0, micro-batch 0: 0B0 is missing"),
        ("1>0F0 1<1B0 0B0 STEP", GOOD[1], "stage 0, micro-batch 0: 0F0 is missing"),
        ("0F0 1>0F0 1<1B0 0I0 STEP", GOOD[1], "0W0 is missing"),
        ("0F0 1>0F0 1<1B0 0B0 0W0 STEP", GOOD[1], "has B and also I or W"),
        (
            "0F0 1>0F0 1<1B0 0R0 0B0 STEP",
            GOOD[1],
            "has an R though the stage keeps its activations",
        ),
        (
            "0F0 0F0 1>0F0 1<1B0 0B0 STEP",
            GOOD[1],
            "device 0, position 1: 0F0: was computed before, at device 0, position 0: 0F0",
        ),
        (
            "0F0 1F0 1>0F0 1<1B0 0B0 STEP",
            GOOD[1],
            "device 0, position 1: 1F0: stage 1 is on device 1",
        ),
        (
            "0F0 5F0 1>0F0 1<1B0 0B0 STEP",
            GOOD[1],
            "device 0, position 1: 5F0: there are 2 stages and 1 micro-batches",
        ),
        (
            "0F0 1>0F0 STEP 1<1B0 0B0",
            GOOD[1],
            "device 0, position 2: STEP: only the last instruction can be STEP",
        ),
        (
            "0F0 1>0F0 0B0 1<1B0 STEP",
            GOOD[1],
            "device 0, position 2: 0B0: reads the input gradient of stage 1, micro-batch 0, which "
            "nothing before it on this device computes or receives",
        ),
        (
            GOOD[0],
            "1F0 0<0F0 1B0 0>1B0 STEP",
            "device 1, position 0: 1F0: reads the output of stage 0, micro-batch 0",
        ),
        (
            "0F0 1<1B0 0B0 STEP",
            GOOD[1],
            "link 0 to 1: device 1, position 0: 1RECV_F0 has no send",
        ),
        (
            GOOD[0],
            "0<0F0 1F0 1B0 0>1B0 0>1B0 STEP",
            "link 1 to 0: device 1, position 4: 1SEND_B0 has no receive",
        ),
    ],
)
def test_a_broken_rule_is_named_with_its_place(first, second, sentence):
    with pytest.raises(ProgramError) as caught:
        check(written(first, second, placement=(0, 1)))
    assert sentence in str(caught.value)


def test_transfers_of_one_link_in_another_order_are_refused():
    program = written(
        "0F0 1>0F0 0F1 1>0F1 1<1B0 1<1B1 0B0 0B1 STEP",
        "0<0F1 0<0F0 1F0 1B0 0>1B0 1F1 1B1 0>1B1 STEP",
        placement=(0, 1),
        microbatches=2,
    )
    with pytest.raises(ProgramError) as caught:
        check(program)
    assert str(caught.value) == (
        "link 0 to 1: device 0, position 1: 0SEND_F0 meets device 1, position 0: 1RECV_F1; "
        "sends and receives must stand in the same order"
    )


def test_a_recomputed_stage_without_r_is_refused():
    with pytest.raises(ProgramError, match="stage 1, micro-batch 0: R is missing"):
        check(written(*GOOD, placement=(0, 1), recomputed={1}))


def test_a_transfer_that_is_made_twice_is_refused():
    program = written(
        "0F0 1>0F0 1>0F0 1<1B0 0B0 STEP",
        "0<0F0 0<0F0 1F0 1B0 0>1B0 STEP",
        placement=(0, 1),
    )
    with pytest.raises(ProgramError, match="device 1, position 1: 1RECV_F0: leaves the output of"):
        check(program)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_schedules_of_one_chunk_finish_on_any_runtime_that_buffers(name):
    program = lower(schedule_plan(name, 4, 8))
    assert check(program, Semantics.POSTED).num_transfers == 48


HEAD = (
    "stages 0 1; microbatches 1; reductions 1; replicas 2; sharded 0\n"
    "device 0 | 0UNSHARD 0F0 0SEND_F0 2TAKE_F0 2S0 2SUM_S0 2T0 0RECV_B0 0B0 0RESHARD 0REDUCE_GRAD"
    " 2REDUCE_GRAD STEP\n"
    "device 1 | 1RECV_F0 1F0 1OFFLOAD0 2SHARE_F0 2S0 2SUM_S0 1RELOAD0 1B0 1SEND_B0 1REDUCE_GRAD 2T0"
    " 2REDUCE_GRAD STEP\n"
)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("", "", ""),
        ("0UNSHARD ", "", "0F0: reads the whole parameters of stage 0"),
        ("0RESHARD", "1RESHARD", "stage 1 is not on device 0"),
        ("0RESHARD ", "", "stage 0 are still whole at the end; 0RESHARD is missing"),
        ("0RESHARD", "0RESHARD 0UNSHARD", "device 0: the parameters of stage 0 are still whole"),
        ("0UNSHARD", "0UNSHARD 0UNSHARD", "0UNSHARD: leaves the whole parameters of stage 0"),
        ("0RESHARD", "0RESHARD 0RESHARD", "0RESHARD: reads the whole parameters of stage 0, which"),
        ("0RESHARD", "2RESHARD", "2RESHARD: stage 2 is not sharded"),
        ("2SHARE_F0", "1UNSHARD 2SHARE_F0", "1UNSHARD: stage 1 is not sharded"),
        ("0REDUCE_GRAD ", "", "device 0: 0REDUCE_GRAD is missing"),
        ("1REDUCE_GRAD", "1REDUCE_GRAD 1REDUCE_GRAD", "was summed before, at device 1, position 9"),
        ("2REDUCE_GRAD ", "", "device 0: 2REDUCE_GRAD is missing"),
        ("2T0 2REDUCE_GRAD", "2REDUCE_GRAD 2T0", "device 1, position 11: 2T0: adds to gradients"),
        ("1B0 1SEND_B0 1REDUCE_GRAD", "1REDUCE_GRAD 1B0 1SEND_B0", "1B0: adds to gradients"),
        ("; replicas 2", "", "nothing is to be summed"),
        ("1OFFLOAD0 ", "", "1RELOAD0: reads the kept host of stage 1"),
        ("1RELOAD0 1B0", "1B0 1RELOAD0", "1B0: reads the activations of stage 1"),
        ("1OFFLOAD0", "1OFFLOAD1", "there are 2 stages and the head and 1 micro-batches"),
        ("2S0 2SUM_S0 2T0", "2SUM_S0 2S0 2T0", "2SUM_S0: reads the kept S of stage 2"),
        ("1REDUCE_GRAD 2T0", "1REDUCE_GRAD", "device 1: 2T0 is missing"),
        ("2SHARE_F0", "2TAKE_F0", "SHARE there, TAKE elsewhere"),
        ("2SHARE_F0 ", "", "device 1: SHARE/TAKE must be there once for each micro-batch"),
        ("2T0 0RECV", "2SUM_T0 2T0 0RECV", "with one reduction SUM_S adds up the input gradient"),
        ("2SUM_S0 2T0", "1SUM_S0 2T0", "only the sharded head, stage 2, is joined in"),
        ("GRAD STEP", "GRAD CLIPPED_STEP", "device 1: does not end with CLIPPED_STEP"),
        ("2S0 2SUM_S0 2T0", "2F0 2S0 2SUM_S0 2T0", "S and T are of a sharded head"),
        ("stages 0 1", "stages 0 1; copies 3", "layout: 2 stages are not 3 copies"),
        ("microbatches 1", "microbatches 1; previous 0", "layout: each slice continues an earlier"),
        ("reductions 1", "reductions 3", "layout: a sharded head has 1 or 2 reductions"),
    ],
)
def test_a_broken_rule_of_the_rarer_instructions_is_named(old, new, sentence):
    assert old in HEAD
    program = parse_program(HEAD.replace(old, new, 1) if old else HEAD)
    if not sentence:
        check(program)
        return
    with pytest.raises(ProgramError) as caught:
        check(program)
    assert sentence in str(caught.value)


def test_all_devices_must_join_in_the_same_order():
    text = (
        "stages 0; microbatches 2; reductions 1\n"
        "device 0 | 0F0 1SHARE_F0 0F1 1SHARE_F1 1S0 1SUM_S0 1S1 1SUM_S1 1T0 1T1 0B0 0B1\n"
        "device 1 | 1TAKE_F0 1TAKE_F1 1S0 1S1 1SUM_S0 1SUM_S1 1T0 1T1\n"
    )
    check(parse_program(text))
    with pytest.raises(ProgramError, match=r"device 1: SUM_S comes in the order \[1, 0\]"):
        check(parse_program(text.replace("1S1 1SUM_S0 1SUM_S1", "1S1 1SUM_S1 1SUM_S0")))


@settings(max_examples=100)
@given(seed=seeds)
def test_the_rules_in_integers_are_those_of_the_layout(seed):
    program = lower(make_any_plan(seed))
    layout, rules = program.layout, Rules(program.layout)
    for instruction in (i for row in program.devices for i in row):
        if isinstance(instruction, Send | Receive | Step):
            continue
        reads, writes, takes, whole, m = rules.of(instruction)
        for numbers, values in (
            ((*(base + m for base in reads), *whole), layout.reads(instruction)),
            ([base + m for base in writes], layout.writes(instruction)),
            ([base + m for base in takes], layout.takes(instruction)),
        ):
            assert Counter(map(rules.value, numbers)) == Counter(values)


def test_memory_names_the_device_that_misses_most():
    check_memory([2**30, 5], [2**30, 5])
    with pytest.raises(InfeasibleError, match=r"device 1 would need 2\.000 GiB") as caught:
        check_memory([2**30, 2**31], [2**30 - 1, 2**30])
    assert (caught.value.device, caught.value.missing_bytes) == (1, 2**30)
