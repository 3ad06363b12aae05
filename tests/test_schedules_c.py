"""Schedules of two copies, of fused pairs and of slices: published values and closed forms."""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import schedule_plan, uniform_profile

from adaptis.check import check
from adaptis.cluster import uniform
from adaptis.errors import PlanError
from adaptis.lower import lower
from adaptis.program import BACKWARDS, Op, Overlap, parts
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.simulate import simulate_plan
from adaptis.workload import Workload

EVEN_COSTS, ODD_COSTS = (1, 1, 1), (1, 1.2, 0.8)  # F, I and W of one stage
COSTS = [EVEN_COSTS, ODD_COSTS, (2, 3, 1), (1, 1.5, 0.5), (3, 1, 1)]


def run(name, p, m, v=1, s=1, costs=EVEN_COSTS, hidden=0.0, fused=True):
    """`costs` are of one stage and whole micro-batch; the peaks count slices."""
    plan = schedule_plan(name, p, m, v, s)
    if not fused:
        orders = [[c for work in order for c in parts(work)] for order in plan.programs]
        plan = replace(plan, programs=tuple(map(tuple, orders)))
    profile = uniform_profile(plan.num_layers, *costs, overlapped=hidden)
    layers = [replace(layer, saved_bytes=s, saved_weight_bytes=s) for layer in profile.layers]
    profile = replace(profile, layers=tuple(layers))
    return simulate_plan(plan, profile, uniform(p), Workload((1 / s,) * (m * s)))


def idle(timeline):
    """Seconds without work to the end of the step, per rank."""
    return timeline.makespan - timeline.busy()


def own(timeline):
    """Seconds without work between the first and the last of each rank."""
    rows = [timeline.rows(d) for d in range(timeline.num_devices)]
    spans = [timeline.end[r].max() - timeline.start[r].min() for r in rows]
    return np.array(spans) - timeline.busy()


def about(value):
    return pytest.approx(value, abs=1e-9)


def near(p):
    """How far each rank is from the nearer end."""
    return [min(rank, p - 1 - rank) for rank in range(p)]


@pytest.mark.parametrize(
    ("p", "m", "half", "makespan", "bubble", "peaks"),
    [
        (4, 4, 0.5, 10, 2, (3, 4, 4, 3)),
        (4, 4, 1, 16, 4, (3, 4, 4, 3)),
        (6, 6, 0.5, 16, 4, (4, 5, 6, 6, 5, 4)),
        (6, 6, 1, 26, 8, (4, 5, 6, 6, 5, 4)),
        (8, 8, 0.5, 22, 6, (5, 6, 7, 8, 8, 7, 6, 5)),
        (8, 8, 1, 36, 12, (5, 6, 7, 8, 8, 7, 6, 5)),
        (4, 8, 1, 32, 8, (3, 4, 4, 3)),
        (4, 16, 1, 64, 16, (3, 4, 4, 3)),
    ],
)
def test_chimera_takes_the_known_time_and_memory(p, m, half, makespan, bubble, peaks):
    timeline = run("chimera", p, m, 2, costs=(1, half, half))
    assert timeline.makespan == about(makespan)
    assert idle(timeline) == about([bubble] * p)
    assert timeline.peak_bytes == peaks


@pytest.mark.parametrize(
    ("p", "makespan", "bubble", "peaks"),
    [
        (4, 14, 2, (7, 8, 8, 7)),
        (6, 22, 4, (10, 11, 12, 12, 11, 10)),
        (8, 30, 6, (13, 14, 15, 16, 16, 15, 14, 13)),
    ],
)
def test_bitpipe_takes_the_known_time_and_memory(p, makespan, bubble, peaks):
    timeline = run("bitpipe", p, p, 4, costs=(0.5, 0.5, 0.5))
    assert timeline.makespan == about(makespan)
    assert idle(timeline) == about([bubble] * p)
    assert timeline.peak_bytes == peaks


@settings(max_examples=60, deadline=None)
@given(p=st.sampled_from([2, 4, 6, 8]), units=st.integers(1, 4), costs=st.sampled_from(COSTS))
def test_two_directions_have_one_bubble_a_unit(p, units, costs):
    # Published for F = 1 and B = 1 or 2 alone; (p - 2) max(F, B) of a stage is both, and holds for
    # all costs tried. BitPipe's chunks are half as long.
    bubble = units * (p - 2) * max(costs[0], costs[1] + costs[2])
    chimera = run("chimera", p, units * p, 2, costs=costs)
    assert idle(chimera) == about([bubble] * p)
    assert chimera.peak_bytes == tuple(p // 2 + 1 + n for n in near(p))
    bitpipe = run("bitpipe", p, units * p, 4, costs=[c / 2 for c in costs])
    assert idle(bitpipe) == about([bubble / 2] * p)
    assert bitpipe.peak_bytes == tuple(3 * p // 2 + 1 + n for n in near(p))


# Makespan and own bubble for m = 5 p: a pair as its two parts in a row, a pair of F + B seconds,
# and one that hides a fifth of them.
DUALPIPE_V = [
    (2, EVEN_COSTS, (61, 62, 52.4), (1, 2, 1.4)),
    (2, ODD_COSTS, (61.4, 62.4, 52.8), (1.4, 2.4, 1.8)),
    (4, EVEN_COSTS, (123, 126, 105.6), (3, 6, 3.0)),
    (4, ODD_COSTS, (124.2, 127.2, 106.8), (4.2, 7.2, 4.2)),
    (8, EVEN_COSTS, (247, 254, 212), (7, 14, 6.2)),
    (8, ODD_COSTS, (250.2, 257.2, 215.2), (10.2, 17.2, 9.4)),
]


@pytest.mark.parametrize(("p", "costs", "makespans", "bubbles"), DUALPIPE_V)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["in a row", "fused", "a fifth hidden"])
def test_dualpipe_v_takes_the_known_time_and_memory(p, costs, makespans, bubbles, kind):
    hidden = 0.6 if kind == 2 else 0.0
    timeline = run("dualpipe-v", p, 5 * p, 2, costs=costs, hidden=hidden, fused=kind > 0)
    assert timeline.makespan == about(makespans[kind])
    assert own(timeline).max() == about(bubbles[kind])
    assert timeline.peak_bytes == (2 * p + 1,) * p


@pytest.mark.parametrize(
    ("p", "costs", "in_a_row", "fused"),
    [
        (4, EVEN_COSTS, (25, 1), (26, 2)),
        (8, EVEN_COSTS, (51, 3), (54, 6)),
        (16, EVEN_COSTS, (103, 7), (110, 14)),
        (4, ODD_COSTS, (25.4, 1.4), (26.4, 2.4)),
        (8, ODD_COSTS, (52.2, 4.2), (55.2, 7.2)),
        (16, ODD_COSTS, (106.2, 10.2), (113.2, 17.2)),
    ],
)
def test_dualpipe_takes_the_known_time_and_memory(p, costs, in_a_row, fused):
    for together, (makespan, bubble) in ((False, in_a_row), (True, fused)):
        timeline = run("dualpipe", p, 2 * p, 2, costs=costs, fused=together)
        assert timeline.makespan == about(makespan)
        assert idle(timeline).max() == about(bubble)
        assert timeline.peak_bytes == (p + 1,) * p


@settings(max_examples=40, deadline=None)
@given(p=st.integers(1, 8), more=st.integers(0, 12), copies=st.sampled_from([1, 2]))
def test_a_pair_that_hides_nothing_has_the_bubble_of_the_paper(p, more, copies):
    # (X + B - 3 W) = 2 for each further rank where F = I = W = 1 and X = F + B; 1 without pairs.
    name, ranks = ("dualpipe-v", p) if copies == 1 else ("dualpipe", 2 * p)
    m = copies * (2 * p + more)
    fused = run(name, ranks, m, 2)
    assert own(fused).max() == about(2 * (p - 1))
    assert own(run(name, ranks, m, 2, fused=False)).max() == about(p - 1)
    assert fused.peak_bytes == (2 * p + 1,) * ranks


@pytest.mark.parametrize(("name", "p", "m"), [("dualpipe-v", 4, 12), ("dualpipe", 4, 12)])
def test_a_pair_is_a_forward_and_a_backward_of_two_directions(name, p, m):
    works = [work for order in SCHEDULES[name].orders(Shape(p, m, 2)) for work in order]
    pairs = [work for work in works if isinstance(work, Overlap)]
    assert pairs
    for pair in pairs:
        assert (pair.first.op, pair.second.op) == (Op.FORWARD, Op.BACKWARD)
        assert pair.first.stage != pair.second.stage


@pytest.mark.parametrize(
    ("name", "m", "v", "s", "makespan", "bubble", "peaks"),
    [
        ("seq1f1b", 12, 1, 2, 40.5, 4.5, (5, 4, 3, 2)),
        ("seq1f1b", 12, 1, 4, 38.25, 2.25, (7, 6, 5, 4)),
        ("seq1f1b", 12, 1, 8, 37.125, 1.125, (11, 10, 9, 8)),
        ("terapipe", 12, 1, 4, 38.25, 2.25, (48, 48, 48, 48)),
        ("slimpipe", 4, 1, 4, 14.25, 2.25, (10, 8, 6, 4)),
        ("slimpipe", 4, 1, 8, 13.125, 1.125, (14, 12, 10, 8)),
        ("slimpipe", 4, 2, 8, 12.5625, 0.5625, (22, 20, 18, 16)),
        ("slimpipe", 4, 2, 16, 12.28125, 0.28125, (38, 36, 34, 32)),
        ("slimpipe", 4, 2, 4, 13.125, 1.125, (14, 12, 10, 8)),
    ],
)
def test_slices_take_the_known_time_and_memory(name, m, v, s, makespan, bubble, peaks):
    timeline = run(name, 4, m, v, s, costs=[1 / v] * 3)
    assert timeline.makespan == about(makespan)
    assert idle(timeline) == about([bubble] * 4)
    assert own(timeline).max() == about(bubble)  # that of rank 0, which starts and ends the step
    assert timeline.peak_bytes == peaks


@pytest.mark.parametrize(
    ("name", "p", "m", "v", "s", "makespan"),
    [("seq1f1b", 4, 2, 1, 4, 8.25), ("slimpipe", 2, 2, 2, 4, 6.375)],
)
def test_a_golden_order_of_slices_takes_its_known_makespan(name, p, m, v, s, makespan):
    assert run(name, p, m, v, s, costs=[1 / v] * 3).makespan == about(makespan)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(["terapipe", "seq1f1b", "slimpipe"]),
    p=st.integers(1, 6),
    rounds=st.integers(1, 4),
    v=st.integers(1, 3),
    s=st.integers(1, 9),
    costs=st.sampled_from(COSTS),
)
def test_bubble_and_memory_of_slices_are_the_closed_forms(name, p, rounds, v, s, costs):
    # Published of interleaved Seq1F1B: groups of p slices, for s <= p. It runs only where s divides
    # p: a micro-batch begins its backward with its last slice, which must be in the group. So our
    # groups are whole micro-batches of at least p slices, p where s divides p; any s will do.
    v, s = (1 if name == "terapipe" else v), (p * ceil(s / p) if name == "slimpipe" else s)
    m, group = rounds, s
    if name == "seq1f1b":
        group = s * ceil(p / s) if v > 1 else 1
        m *= ceil(p / s) if v > 1 else 1
    timeline = run(name, p, m, v, s, costs=[c / v for c in costs])
    assert idle(timeline) == about([(p - 1) * sum(costs) / (v * s)] * p)
    each = 1 if name == "seq1f1b" and v == 1 else 2
    peaks = [each * (p - 1 - r) + (v - 1) * group + s for r in range(p)]
    all_of_them = m * v * s
    expected = [all_of_them if name == "terapipe" else min(n, all_of_them) for n in peaks]
    assert timeline.peak_bytes == tuple(expected)


@given(p=st.integers(1, 5), rounds=st.integers(1, 3), v=st.integers(1, 3))
def test_whole_micro_batches_give_the_schedules_without_slices(p, rounds, v):
    orders = {name: SCHEDULES[name].orders for name in SCHEDULES}
    shape = Shape(p, rounds * p, v)
    assert orders["seq1f1b"](shape) == orders["interleaved"](shape)
    if v > 1:
        sliced = Shape(p, rounds, v, 2 * p)
        assert orders["slimpipe"](sliced) == orders["seq1f1b"](sliced)


@pytest.mark.parametrize("name", ["terapipe", "seq1f1b", "slimpipe"])
def test_the_backward_of_a_micro_batch_goes_from_its_last_slice_to_its_first(name):
    for order in SCHEDULES[name].orders(Shape(2, 3, 1, 4)):
        backwards = [work.microbatch for work in order if work.op in BACKWARDS]
        for first in range(0, 12, 4):
            own_slices = [number for number in backwards if number // 4 == first // 4]
            assert own_slices == [first + 3, first + 2, first + 1, first]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["chimera", "bitpipe", "dualpipe", "dualpipe-v"]),
    half=st.integers(1, 4),
    rounds=st.integers(2, 4),
    more=st.integers(0, 3),
)
def test_every_order_of_two_directions_is_proven(name, half, rounds, more):
    p = 2 * half
    m = rounds * p + (2 * more if name.startswith("dualpipe") else 0)
    v = 4 if name == "bitpipe" else 2
    plan = schedule_plan(name, p, m, v)
    # A V crosses no link where it turns.
    hops = {"chimera": p - 1, "dualpipe": p - 1}.get(name, 2 * (p - 1))
    assert check(lower(plan)).num_transfers == 2 * m * hops


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["terapipe", "seq1f1b", "slimpipe"]),
    p=st.integers(1, 5),
    m=st.integers(1, 4),
    v=st.integers(1, 3),
    s=st.integers(1, 7),
)
def test_every_order_of_slices_is_proven(name, p, m, v, s):
    v, s = (1 if name == "terapipe" else v), (p * ceil(s / p) if name == "slimpipe" else s)
    m *= ceil(p / s)
    plan = schedule_plan(name, p, m, v, s)
    assert check(lower(plan)).num_transfers == 2 * m * s * (p * v - 1) * (p > 1)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("chimera", Shape(3, 3, 2), "chimera needs an even number of devices, found 3"),
        ("bitpipe", Shape(4, 6, 4), "needs a multiple of 4 micro-batches on 4 devices, found 6"),
        ("bitpipe", Shape(4, 8, 2), "bitpipe needs 4 stages per device, found 2"),
        ("dualpipe", Shape(3, 8, 2), "dualpipe needs an even number of devices, found 3"),
        ("dualpipe", Shape(4, 9, 2), "dualpipe needs an even number of micro-batches, found 9"),
        ("dualpipe", Shape(4, 6, 2), "needs at least 8 micro-batches on 4 devices, found 6"),
        ("dualpipe-v", Shape(4, 7, 2), "needs at least 8 micro-batches on 4 devices, found 7"),
        ("dualpipe-v", Shape(2, 4, 2, 2), "dualpipe-v needs whole micro-batches, found 2 slices"),
        (
            "seq1f1b",
            Shape(4, 3, 2, 2),
            "seq1f1b needs a multiple of 2 micro-batches of 2 slices on 4 devices, found 3",
        ),
        ("slimpipe", Shape(4, 2, 1, 6), "needs a multiple of 4 slices on 4 devices, found 6"),
        ("terapipe", Shape(4, 2, 2, 4), "terapipe needs 1 stages per device, found 2"),
    ],
)
def test_a_schedule_says_what_it_needs(name, shape, message):
    with pytest.raises(PlanError, match=message):
        SCHEDULES[name].orders(shape)
