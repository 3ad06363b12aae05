"""The proof against brute force: all interleavings of small programs, right and spoilt ones."""

import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from random_plans import looped_plan, make_plan, seeds

from adaptis.check import Semantics, check
from adaptis.errors import DeadlockError, ProgramError
from adaptis.lower import lower
from adaptis.program import Compute, Kind, Op, Program, Receive, Send, Step, Value, parse_compute


class Explorer:
    """Walks through all reachable states of a program: how far each device has come.

    The k-th send on a link meets its k-th receive, so positions say everything.
    """

    def __init__(self, program, semantics):
        self.program, self.semantics = program, semantics
        self.sends, self.receives = defaultdict(list), defaultdict(list)
        for device, row in enumerate(program.devices):
            for index, instruction in enumerate(row):
                if isinstance(instruction, Send):
                    self.sends[device, instruction.target].append(index)
                elif isinstance(instruction, Receive):
                    self.receives[instruction.source, device].append(index)
        self.partner = {}
        for link in self.sends.keys() & self.receives.keys():
            for s, r in zip(self.sends[link], self.receives[link], strict=False):
                self.partner[link[0], s] = (link[1], r)
                self.partner[link[1], r] = (link[0], s)

    def works(self):
        """Whether the right things are computed and every interleaving comes to its end."""
        return self.complete() and self.matched() and self.readable() and not self.stuck()

    def complete(self):
        """Each computation once, on its device, R where the stage is recomputed, STEP last."""
        found = Counter()
        for device, row in enumerate(self.program.devices):
            if any(isinstance(i, Step) for i in row[:-1]):
                return False
            for i in row:
                if isinstance(i, Compute):
                    if not 0 <= i.stage < self.program.num_stages:
                        return False
                    if self.program.placement[i.stage] != device:
                        return False
                    found[i.stage, i.microbatch, i.op.value] += 1
        for s in range(self.program.num_stages):
            for b in range(self.program.num_microbatches):
                ops = "".join(sorted(op * n for (t, c, op), n in found.items() if (t, c) == (s, b)))
                again = "R" if s in self.program.recomputed else ""
                if ops not in ("BF" + again, "FI" + again + "W"):
                    return False
        return all(b < self.program.num_microbatches for _, b, _ in found)

    def matched(self):
        """The two ends of every transfer mean the same value, and neither is alone."""
        ends = sum(map(len, self.sends.values())) + sum(map(len, self.receives.values()))
        value = lambda at: self.program.devices[at[0]][at[1]].value  # noqa: E731
        return len(self.partner) == ends and all(
            value(a) == value(b) for a, b in self.partner.items()
        )

    def readable(self):
        """Before an instruction its device got what it reads, and never what it leaves."""
        for row in self.program.devices:
            there = set()
            for instruction in row:
                if not there.issuperset(self.program.reads(instruction)):
                    return False
                if not there.isdisjoint(self.program.writes(instruction)):
                    return False
                there.update(self.program.writes(instruction))
        return True

    def stuck(self):
        """The states from which nothing goes on although something is left."""
        first = (0,) * len(self.program.devices)
        last = tuple(map(len, self.program.devices))
        seen, todo, dead = {first}, [first], []
        while todo:
            state = todo.pop()
            following = list(self.next(state))
            if not following and state != last:
                dead.append(state)
            for other in following:
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return dead

    def next(self, state):
        for device, index in enumerate(state):
            if index == len(self.program.devices[device]):
                continue
            moved = list(state)
            moved[device] += 1
            if self.semantics is Semantics.RENDEZVOUS and (device, index) in self.partner:
                other, at = self.partner[device, index]
                if other != device and state[other] == at and self.may_run(state, device, index):
                    moved[other] += 1
                    yield tuple(moved)
            elif self.may_run(state, device, index):
                yield tuple(moved)

    def may_run(self, state, device, index):
        row = self.program.devices[device]
        posted = self.semantics is Semantics.POSTED
        if posted and isinstance(row[index], Step):
            mine = [i for i in range(index) if isinstance(row[i], Send)]
            return all(state[o] > at for o, at in (self.partner[device, i] for i in mine))
        if isinstance(row[index], Receive):
            other, at = self.partner[device, index]
            return self.semantics is not Semantics.BUFFERED or state[other] > at
        return not posted or all(
            self.arrived(state, device, index, value) for value in self.program.reads(row[index])
        )

    def arrived(self, state, device, index, value):
        """Every receive of the value that stands before the reader has got it."""
        row = self.program.devices[device]
        asked = [i for i in range(index) if isinstance(row[i], Receive) and row[i].value == value]
        return all(state[o] > at for o, at in (self.partner[device, i] for i in asked))


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
    program = lower(plan)
    if rng.random() < 0.5:
        return program
    return replace(program, devices=tuple(tuple(late(program, row)) for row in program.devices))


def late(program, row):
    """The instructions of `row` with each receive right before the one that reads its value."""
    asked = {i.value: i for i in row if isinstance(i, Receive)}
    for instruction in row:
        if not isinstance(instruction, Receive):
            for value in program.reads(instruction):
                if value in asked:
                    yield asked.pop(value)
            yield instruction


def spoil(program, rng):
    """One random mistake; now and then it is none."""
    rows = [list(row) for row in program.devices]
    full = [d for d, row in enumerate(rows) if len(row) > 1]
    device = rng.choice(full)
    row = rows[device]
    index = rng.randrange(len(row))
    mistakes = (swap, swap_with_next, drop, duplicate, move, retarget, another, repeat_transfer)
    rng.choice(mistakes)(rows, device, index, rng)
    return replace(program, devices=tuple(map(tuple, rows)))


def swap(rows, device, index, rng):
    row, other = rows[device], rng.randrange(len(rows[device]))
    row[index], row[other] = row[other], row[index]


def swap_with_next(rows, device, index, rng):
    row = rows[device]
    index = min(index, len(row) - 2)
    row[index], row[index + 1] = row[index + 1], row[index]


def drop(rows, device, index, rng):
    del rows[device][index]


def duplicate(rows, device, index, rng):
    rows[device].insert(rng.randrange(len(rows[device])), rows[device][index])


def move(rows, device, index, rng):
    instruction = rows[device].pop(index)
    row = rows[rng.choice((device, rng.randrange(len(rows))))]
    row.insert(rng.randrange(len(row) + 1), instruction)


def retarget(rows, device, index, rng):
    places = [i for i, x in enumerate(rows[device]) if isinstance(x, Send | Receive)]
    if places:
        i = rng.choice(places)
        name = "target" if isinstance(rows[device][i], Send) else "source"
        rows[device][i] = replace(rows[device][i], **{name: rng.randrange(len(rows) + 1)})


def another(rows, device, index, rng):
    """Another operation, stage, micro-batch or kind in place of the right one."""
    found = rows[device][index]
    if isinstance(found, Compute):
        change = rng.choice(
            (
                {"op": rng.choice(list(Op))},
                {"stage": rng.randrange(4)},
                {"microbatch": rng.randrange(3)},
            )
        )
        rows[device][index] = replace(found, **change)
    elif isinstance(found, Send | Receive):
        change = rng.choice(
            (
                {"kind": rng.choice(list(Kind))},
                {"stage": rng.randrange(4)},
                {"microbatch": rng.randrange(3)},
            )
        )
        rows[device][index] = replace(found, value=replace(found.value, **change))


def repeat_transfer(rows, device, index, rng):
    """Both ends of one transfer twice."""
    sends = [i for i, x in enumerate(rows[device]) if isinstance(x, Send)]
    if not sends:
        return
    i = rng.choice(sends)
    send = rows[device][i]
    there = rows[send.target] if send.target < len(rows) else []
    ends = [j for j, x in enumerate(there) if isinstance(x, Receive) and x.value == send.value]
    if ends:
        rows[device].insert(i, send)
        there.insert(ends[0], there[ends[0]])


def compare(seed, mistakes=1):
    rng = random.Random(seed)
    program = small(seed)
    for _ in range(mistakes):
        program = spoil(program, rng)
    verdicts = []
    for semantics in Semantics:
        verdicts.append(Explorer(program, semantics).works())
        assert proven(program, semantics) == verdicts[-1], f"{semantics}:\n{program}"
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
    verdicts = Counter(tuple(compare(seed)) for seed in range(300))
    assert verdicts[False, False, False] > 30  # posted, buffered, rendezvous
    assert verdicts[True, True, True] > 3
    assert verdicts[True, False, False] > 3
    assert verdicts[True, True, False] > 3


@pytest.mark.slow
@pytest.mark.parametrize("mistakes", [1, 2])
def test_the_verdict_on_thousands_of_spoilt_programs_is_that_of_all_interleavings(mistakes):
    for seed in range(4000):
        compare(1_000_000 * mistakes + seed, mistakes)


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
    return Program(devices, placement, microbatches, frozenset(recomputed))


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


def test_a_deadlock_of_computations_is_found_under_posted_semantics():
    # Device 0 wants B0 before it computes F1, device 1 wants F1 before it computes B0.
    program = written(
        "0F0 1>0F0 1<1B0 1<1B1 0B0 0F1 1>0F1 0B1 STEP",
        "0<0F0 0<0F1 1F0 1F1 1B0 0>1B0 1B1 0>1B1 STEP",
        placement=(0, 1),
        microbatches=2,
    )
    with pytest.raises(DeadlockError) as caught:
        check(program)
    assert len(caught.value.cycle) == 6
    assert "device 0, position 4: 0B0" in caught.value.cycle
    assert "device 1, position 3: 1F1" in caught.value.cycle


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
    program = lower(looped_plan(name, 4, 8))
    assert check(program, Semantics.POSTED).num_transfers == 48
