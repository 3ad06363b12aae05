"""The named schedules: golden orders, the closed forms of the papers, and the drawings."""

import inspect
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import looped_plan, uniform_profile

from adaptis.check import check
from adaptis.cluster import uniform
from adaptis.errors import PlanError
from adaptis.lower import lower
from adaptis.program import Op
from adaptis.report.text import drawing
from adaptis.schedules import SCHEDULES
from adaptis.simulate import simulate_plan

GOLDEN = sorted((Path(__file__).parent / "programs").glob("*.txt"))
TRIPLES = [
    (1, 1, 1),
    (1, 1.2, 0.7),
    (2, 3, 1),
    (1, 1.5, 0.5),
]  # W <= min(F, I), as ZB-H1's form asks


def run(name, p, m, v=1, costs=(1, 1, 1)):
    profile = uniform_profile(p * v, *(c / v for c in costs))
    return simulate_plan(looped_plan(name, p, m, v), profile, uniform(p))


def numbers(text):
    """p, m and v where `text` gives them."""
    return {key: int(value) for key, value in re.findall(r"\b([pmv]) ?=? ?(\d+)", text)}


def test_every_schedule_has_a_golden_order():
    assert {path.stem.split("_")[0] for path in GOLDEN} == set(SCHEDULES)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_schedule_yields_its_golden_order(path):
    name, *sizes = path.stem.split("_")
    size = numbers(" ".join(sizes))
    orders = SCHEDULES[name].orders(size["p"], size["m"], size.get("v", 1))
    text = "".join(f"rank {r} | {' '.join(map(str, order))}\n" for r, order in enumerate(orders))
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("name", "p", "m", "v", "makespan"),
    [
        ("gpipe", 3, 4, 1, 18),
        ("1f1b", 4, 8, 1, 33),
        ("interleaved", 2, 4, 2, 13.5),
        ("interleaved", 4, 8, 2, 28.5),
        ("zb-h1", 4, 8, 1, 27),
    ],
)
def test_a_golden_order_takes_its_published_makespan(name, p, m, v, makespan):
    assert run(name, p, m, v).makespan == pytest.approx(makespan, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "v", "costs", "makespan", "bubble", "peaks"),
    [
        ("gpipe", 1, (1, 1, 1), 45, 9, (12, 12, 12, 12)),
        ("1f1b", 1, (1, 1, 1), 45, 9, (4, 3, 2, 1)),
        ("interleaved", 2, (1, 1, 1), 40.5, 4.5, (11, 9, 7, 5)),
        ("interleaved", 3, (1, 1, 1), 39, 3, (15, 13, 11, 9)),
        ("zb-h1", 1, (1, 1, 1), 39, 3, (4, 4, 4, 4)),
        ("zb-h1", 1, (1, 1.2, 0.7), 39.3, 4.5, (4, 4, 4, 4)),
    ],
)
def test_four_ranks_and_twelve_microbatches_take_the_known_time_and_memory(
    name, v, costs, makespan, bubble, peaks
):
    timeline = run(name, 4, 12, v, costs)
    assert timeline.makespan == pytest.approx(makespan, abs=1e-9)
    assert timeline.makespan - timeline.busy() == pytest.approx([bubble] * 4, abs=1e-9)
    assert timeline.peak_bytes == peaks


def bubble_of(name, p, v, costs):
    forward, half, weight = costs
    if name == "zb-h1":
        return (p - 1) * (forward + half - weight)
    return (p - 1) * (forward + half + weight) / v


def peak_of(name, p, m, v, rank):
    if name == "gpipe":
        return m
    if name == "1f1b" or (name == "interleaved" and v == 1):
        return min(p - rank, m)
    if name == "zb-h1":
        return p
    return min(2 * (p - 1 - rank) + (v - 1) * p + 1, m * v)


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    p=st.integers(2, 8),
    m=st.integers(1, 32),
    v=st.integers(1, 4),
    costs=st.sampled_from(TRIPLES),
)
def test_bubble_and_memory_are_the_closed_forms(name, p, m, v, costs):
    v = v if SCHEDULES[name].chunked else 1
    if v > 1:
        m = max(1, m // p) * p
    elif name == "zb-h1":
        m = max(m, p)
    timeline = run(name, p, m, v, costs)
    bubble = bubble_of(name, p, v, costs)
    assert timeline.makespan - timeline.busy() == pytest.approx([bubble] * p, abs=1e-9)
    assert timeline.makespan == pytest.approx(m * sum(costs) + bubble, abs=1e-9)
    assert timeline.peak_bytes == tuple(peak_of(name, p, m, v, r) for r in range(p))


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    p=st.integers(1, 9),
    m=st.integers(1, 12),
    v=st.integers(1, 3),
)
def test_every_order_of_any_size_is_proven(name, p, m, v):
    v = v if SCHEDULES[name].chunked else 1
    m = m * p if v > 1 else m
    assert check(lower(looped_plan(name, p, m, v))).num_transfers == 2 * m * (p * v - 1) * (p > 1)


@given(p=st.integers(1, 6), m=st.integers(1, 10))
def test_interleaved_with_one_chunk_is_1f1b(p, m):
    assert SCHEDULES["interleaved"].orders(p, m) == SCHEDULES["1f1b"].orders(p, m)


def test_interleaved_needs_whole_groups():
    with pytest.raises(
        PlanError, match="needs a multiple of 4 micro-batches on 4 devices, found 6"
    ):
        SCHEDULES["interleaved"].orders(4, 6, 2)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"interleaved"}))
def test_schedules_of_one_stage_refuse_more(name):
    with pytest.raises(PlanError, match=f"{name} holds one stage per device, 2 were asked for"):
        SCHEDULES[name].orders(4, 8, 2)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_drawing_of_a_schedule_is_what_it_does(name):
    # The parameters stand before the `::`, the drawing after it; cells are F = I = W = 1, B = 2.
    text = inspect.getdoc(SCHEDULES[name].generate)
    before, after = text.split("::", 1)
    drawn = "\n".join(line.strip() for line in after.split("\n\n")[1].splitlines())
    assert set(numbers(before)) >= {"p", "m"}, "the docstring says for which p and m the drawing is"
    size = numbers(before)
    v = size.get("v", 1)
    plan = looped_plan(name, size["p"], size["m"], v)
    timeline = simulate_plan(plan, uniform_profile(size["p"] * v), uniform(size["p"]))
    assert drawn == drawing(timeline)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_names_its_paper(name):
    assert "References:" in SCHEDULES[name].generate.__doc__
    assert re.search(r"20\d\d", SCHEDULES[name].paper)


def test_only_zero_bubble_splits_the_backward():
    split = {
        n
        for n in SCHEDULES
        if any(c.op is Op.BACKWARD_WEIGHT for c in SCHEDULES[n].orders(2, 2)[0])
    }
    assert split == {"zb-h1"}
