"""Schedules of whole micro-batches over a loop: published values, closed forms and limits.

Costs are F, I and W of a device and micro-batch; a stage of v per device costs a v-th of them.
"""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_plans import uniform_profile

from adaptis.check import check
from adaptis.cluster import Link, uniform
from adaptis.errors import PlanError
from adaptis.lower import lower
from adaptis.plan import named_plan
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape, most_held
from adaptis.simulate import simulate_plan

EQUAL, UNEQUAL = (1, 1, 1), (1, 1.2, 0.7)
TRIPLES = [EQUAL, UNEQUAL, (2, 3, 1), (1, 1.5, 0.5)]  # those the closed forms were confirmed for
ROOM = ("1f1b", "1f1b-eager", "gis", "zb-auto")  # those that look at `most`


def run(name, p, m, v=1, costs=EQUAL, hop=0.0, most=None):
    shape = Shape(p, m, v, seconds=tuple(c / v for c in costs), hop=hop, most=most)
    plan = named_plan(SCHEDULES[name], shape, range(1, p * v + 1))
    profile = uniform_profile(p * v, *shape.seconds)
    return simulate_plan(plan, profile, uniform(p, link=Link(latency=hop, bandwidth=1e30)))


def sync(timeline):
    """Idle seconds of each rank until the last one ends."""
    return timeline.makespan - timeline.busy()


def own(timeline):
    """Idle seconds of each rank between its first and its last computation."""
    rows = map(timeline.rows, range(timeline.num_devices))
    return np.array([timeline.end[r].max() - timeline.start[r].min() for r in rows]) - (
        timeline.busy()
    )


def about(value):
    return pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "p", "m", "v", "most", "makespan"),
    [
        ("gpipe", 3, 4, 1, None, 18),
        ("1f1b", 4, 8, 1, None, 33),
        ("interleaved", 2, 4, 2, None, 13.5),
        ("interleaved", 4, 8, 2, None, 28.5),
        ("breadth-first", 2, 4, 2, None, 13.5),
        ("zb-h1", 4, 8, 1, None, 27),
        ("zb-h2", 4, 8, 1, None, 27),
        ("gis", 4, 4, 2, 7, 16.5),
        # By hand, as 1F1B: 2 F until the last rank starts, 6 (F + B) on it, and 2 B back.
        ("1f1b-eager", 3, 6, 1, None, 24),
        # By hand. With room for two, rank 0 takes 0F2 after 0W0 at 7 s, and each further
        # micro-batch 4 s after the one before: 0F3 starts at 11 s, 0I3 ends 7 s later, then 0W3.
        ("zb-auto", 3, 4, 1, 2, 19),
    ],
)
def test_a_golden_order_takes_its_published_makespan(name, p, m, v, most, makespan):
    assert run(name, p, m, v, most=most).makespan == about(makespan)


@pytest.mark.parametrize(
    ("name", "v", "costs", "makespan", "bubble", "own_bubble", "peaks"),
    [
        ("gpipe", 1, EQUAL, 45, 9, 9, (12, 12, 12, 12)),
        ("1f1b", 1, EQUAL, 45, 9, 9, (4, 3, 2, 1)),
        ("interleaved", 2, EQUAL, 40.5, 4.5, 4.5, (11, 9, 7, 5)),
        ("interleaved", 3, EQUAL, 39, 3, 3, (15, 13, 11, 9)),
        ("breadth-first", 2, EQUAL, 40.5, 4.5, 4.5, (24, 24, 24, 24)),
        ("zb-h1", 1, EQUAL, 39, 3, 3, (4, 4, 4, 4)),
        ("zb-h1", 1, UNEQUAL, 39.3, 4.5, 4.5, (4, 4, 4, 4)),
        ("zb-h2", 1, EQUAL, 39, 3, 0, (7, 7, 7, 7)),
        ("zb-h2", 1, UNEQUAL, 37.8, 3, 2.4, (7, 7, 7, 7)),
    ],
)
def test_four_ranks_and_twelve_microbatches_take_the_known_time_and_memory(
    name, v, costs, makespan, bubble, own_bubble, peaks
):
    timeline = run(name, 4, 12, v, costs)
    assert timeline.makespan == about(makespan)
    assert sync(timeline).max() == about(bubble)
    assert own(timeline).max() == about(own_bubble)
    assert timeline.peak_bytes == peaks


@pytest.mark.parametrize(
    ("name", "makespans", "peaks"),
    [("1f1b", (57, 71, 85), (4, 3, 2, 1)), ("1f1b-eager", (57, 60, 63), (7, 5, 3, 1))],
)
def test_slow_hops_take_the_known_time(name, makespans, peaks):
    timelines = [run(name, 4, 16, hop=hop) for hop in (0, 0.5, 1)]
    assert [timeline.makespan for timeline in timelines] == about(makespans)
    assert timelines[0].peak_bytes == peaks


@pytest.mark.parametrize(
    ("p", "v", "distance", "peak", "bubble"),
    [
        (4, 2, 2, 7, 4.5),
        (4, 2, 4, 9, 4.5),
        (8, 2, 4, 13, 11.5),
        (8, 2, 8, 17, 10.5),
        (8, 4, 4, 23, 10.25),
        (8, 4, 8, 35, 9.25),
        (16, 2, 8, 25, 25.5),
        (16, 2, 16, 33, 22.5),
        (16, 4, 8, 43, 23.25),
        (16, 4, 16, 67, 20.25),
    ],
)
def test_gis_takes_the_known_time_and_memory(p, v, distance, peak, bubble):
    timeline = run("gis", p, 4 * p, v, most=peak if distance < p else None)
    assert timeline.peak_bytes == tuple(peak - rank for rank in range(p))
    assert sync(timeline).max() == about(bubble)


BUBBLES = {
    "gpipe": lambda p, v, f, i, w: (p - 1) * (f + i + w),
    "1f1b": lambda p, v, f, i, w: (p - 1) * (f + i + w),
    "1f1b-eager": lambda p, v, f, i, w: (p - 1) * (f + i + w),
    "interleaved": lambda p, v, f, i, w: (p - 1) * (f + i + w) / v,
    "breadth-first": lambda p, v, f, i, w: (p - 1) * (f + i + w) / v,
    "zb-h1": lambda p, v, f, i, w: (p - 1) * (f + i - w),
}
PEAKS = {
    "gpipe": lambda p, m, v, r: m,
    "1f1b": lambda p, m, v, r: min(p - r, m),
    "1f1b-eager": lambda p, m, v, r: min(2 * (p - r) - 1, m),
    "interleaved": lambda p, m, v, r: min(
        2 * (p - 1 - r) + (v - 1) * p + 1 if v > 1 else p - r, m * v
    ),
    "breadth-first": lambda p, m, v, r: m * v,
    "zb-h1": lambda p, m, v, r: p,
    "zb-h2": lambda p, m, v, r: 2 * p - 1,
}
LEAST = {"breadth-first": lambda p: p, "zb-h1": lambda p: p, "zb-h2": lambda p: 2 * p - 1}


def size(name, p, m, v):
    """The nearest m and v for which the schedule exists and its closed form holds."""
    v = v if v in SCHEDULES[name].chunks else 1
    if name == "interleaved" and v > 1:
        m = max(1, m // p) * p
    if name != "breadth-first" or v > 1:
        m = max(m, LEAST.get(name, lambda p: 1)(p))
    return m, v


@pytest.mark.parametrize("name", BUBBLES)
@settings(max_examples=40, deadline=None)
@given(
    p=st.integers(1, 8),
    m=st.integers(1, 32),
    v=st.integers(1, 4),
    costs=st.sampled_from(TRIPLES),
)
def test_bubble_and_memory_are_the_closed_forms(name, p, m, v, costs):
    m, v = size(name, p, m, v)
    timeline = run(name, p, m, v, costs)
    bubble = BUBBLES[name](p, v, *costs)
    assert sync(timeline) == about([bubble] * p)
    assert own(timeline)[0] == about(bubble)
    assert timeline.peak_bytes == tuple(PEAKS[name](p, m, v, r) for r in range(p))


@pytest.mark.parametrize("name", ["zb-h1", "zb-h2"])
@given(p=st.integers(2, 8), m=st.integers(1, 15))
def test_few_microbatches_are_all_held_by_zero_bubble_orders(name, p, m):
    most = {"zb-h1": p, "zb-h2": 2 * p - 1}[name]
    held = [most_held(order) for order in SCHEDULES[name].orders(Shape(p, m))]
    assert max(held) == min(most, m)


@settings(max_examples=60, deadline=None)
@given(p=st.integers(1, 8), more=st.integers(0, 20), costs=st.sampled_from(TRIPLES))
def test_zb_h2_has_the_closed_own_bubble_and_memory(p, more, costs):
    forward, half, weight = costs
    timeline = run("zb-h2", p, 2 * p - 1 + more, 1, costs)
    assert own(timeline).max() == about(max(0, (p - 1) * (forward + half - 2 * weight)))
    assert timeline.peak_bytes == (2 * p - 1,) * p


@pytest.mark.parametrize(
    ("name", "costs", "bubble", "own_bubble"),
    [
        ("zb-h1", (1, 1.2, 1.1), 3.6, None),
        ("zb-h1", (2, 1, 1.5), 6, None),
        ("zb-h2", (1, 1.2, 1.1), None, 0.6),
    ],
)
def test_zero_bubble_orders_wait_longer_than_the_formula_where_w_is_long(
    name, costs, bubble, own_bubble
):
    timeline = run(name, 4, 12, 1, costs)
    assert bubble is None or sync(timeline).max() == about(bubble)
    assert own_bubble is None or own(timeline).max() == about(own_bubble)


@given(p=st.integers(1, 6), m=st.integers(1, 10))
def test_with_one_chunk_interleaved_is_1f1b_and_breadth_first_is_gpipe(p, m):
    orders = {name: SCHEDULES[name].orders(Shape(p, m)) for name in BUBBLES}
    assert orders["interleaved"] == orders["1f1b"]
    assert orders["breadth-first"] == orders["gpipe"]


@pytest.mark.parametrize("name", ["1f1b", "1f1b-eager"])
@given(p=st.integers(1, 8), m=st.integers(1, 16), most=st.integers(1, 18))
def test_1f1b_runs_in_any_room_and_holds_what_dapple_says(name, p, m, most):
    plan = named_plan(SCHEDULES[name], Shape(p, m, most=most), range(1, p + 1))
    check(lower(plan))
    assert [most_held(order) for order in plan.programs] == [
        min(PEAKS[name](p, m, 1, rank), most) for rank in range(p)
    ]


@settings(max_examples=60, deadline=None)
@given(p=st.integers(1, 12), groups=st.integers(1, 4), v=st.integers(2, 6), most=st.integers(1, 60))
def test_gis_runs_at_any_size_in_the_room_it_is_given(p, groups, v, most):
    shape = Shape(p, groups * p, v, most=most)
    assume(not SCHEDULES["gis"].lacks(shape))
    plan = named_plan(SCHEDULES["gis"], shape, range(1, p * v + 1))
    check(lower(plan))
    held = [most_held(order) for order in plan.programs]
    assert held[0] == max(held) <= most


@pytest.mark.parametrize(("p", "v"), [(2, 2), (3, 3), (4, 2), (5, 4), (6, 3)])
def test_more_room_never_makes_gis_slower_with_equal_costs(p, v):
    rooms = [
        r for r in range(1, 2 * p * v) if not SCHEDULES["gis"].lacks(Shape(p, 4 * p, v, most=r))
    ]
    makespans = [run("gis", p, 4 * p, v, most=room).makespan for room in rooms]
    assert all(a >= b - 1e-9 for a, b in combinations(makespans, 2))


@pytest.mark.parametrize("name", ROOM)
def test_no_room_is_refused(name):
    v = SCHEDULES[name].chunks[0]
    with pytest.raises(PlanError, match=f"{name} needs room for .* found 0"):
        SCHEDULES[name].orders(Shape(4, 8, v, most=0))


def test_gis_says_how_much_room_it_needs():
    with pytest.raises(PlanError, match="gis needs room for 7 micro-batches of a stage, found 6"):
        SCHEDULES["gis"].orders(Shape(4, 12, 2, most=6))


seconds = st.sampled_from((0.5, 1.0, 2.0)) | st.floats(0.1, 3)


@settings(max_examples=80, deadline=None)
@given(
    p=st.integers(1, 8),
    m=st.integers(1, 24),
    costs=st.tuples(seconds, seconds, seconds | st.just(0.0)),
    hop=st.just(0.0) | st.floats(0, 1),
    most=st.none() | st.integers(1, 18),
)
def test_zb_auto_keeps_to_its_room_and_is_no_slower_than_what_fits(p, m, costs, hop, most):
    plan = named_plan(SCHEDULES["zb-auto"], Shape(p, m, 1, 1, costs, hop, most), range(1, p + 1))
    check(lower(plan))
    room = 2 * p - 1 if most is None else most
    assert max(map(most_held, plan.programs)) <= room
    makespan = run("zb-auto", p, m, 1, costs, hop, most).makespan
    for name, needed in (("zb-h1", p), ("zb-h2", 2 * p - 1)):
        if room >= needed:
            assert makespan <= run(name, p, m, 1, costs, hop).makespan * (1 + 1e-9)


def test_zb_auto_makes_use_of_the_room_between_h1_and_h2():
    makespans = [run("zb-auto", 4, 12, 1, UNEQUAL, most=most).makespan for most in range(4, 8)]
    assert makespans == about([39.3, 38.6, 37.9, 37.8])


def test_zb_auto_hides_a_part_of_slow_hops_with_room_for_one_more_than_zb_h1():
    makespans = [run("zb-auto", 4, 24, hop=1, most=most).makespan for most in (4, 5, 7)]
    assert makespans == about([101, 93, 78])  # 78: 24 * 3 and 3 (F + hop), which nothing can beat


def test_zb_auto_is_best_with_a_different_rule_for_different_costs():
    orders = {
        SCHEDULES["zb-auto"].orders(Shape(4, 12, seconds=costs, most=5))
        for costs in (EQUAL, UNEQUAL, (1, 2, 0.5), (2, 1, 1.5))
    }
    assert len(orders) > 2
