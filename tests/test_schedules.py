"""What holds for every named schedule: golden orders, proofs at any size, drawings and limits."""

import inspect
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_plans import schedule_plan, uniform_profile

from adaptis.check import check
from adaptis.cluster import uniform
from adaptis.errors import PlanError
from adaptis.lower import lower
from adaptis.report.text import drawing
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.simulate import simulate_plan

GOLDEN = sorted((Path(__file__).parent / "programs").glob("*.txt"))
every_schedule = pytest.mark.parametrize("name", sorted(SCHEDULES))


def numbers(text):
    """p, m, v, s and most where `text` gives them."""
    found = re.findall(r"\b(most|[pmvs]) ?=? ?(\d+)", text)
    return {key: int(value) for key, value in found}


def draw_shape(data, schedule, most_ranks=6):
    """Numbers that often fit: many schedules ask for multiples of p, some for many micro-batches.

    Few stages per rank first, and only a few of those that are allowed.
    """
    p = data.draw(st.integers(1, most_ranks), "p")
    m = data.draw(st.integers(1, 10) | st.integers(1, 4).map(lambda k: k * p), "m")
    v = data.draw(st.sampled_from(schedule.chunks[:4]), "v")
    s = data.draw(st.integers(1, 4) | st.sampled_from((p, 2 * p)), "s") if schedule.sliced else 1
    shape = Shape(p, m, v, s)
    assume(not schedule.lacks(shape))
    return shape


def test_every_schedule_has_a_golden_order():
    assert {path.stem.split("_")[0] for path in GOLDEN} == set(SCHEDULES)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_schedule_yields_its_golden_order(path):
    name, *sizes = path.stem.split("_")
    orders = SCHEDULES[name].orders(Shape(**numbers(" ".join(sizes))))
    text = "".join(f"rank {r} | {' '.join(map(str, order))}\n" for r, order in enumerate(orders))
    assert text == path.read_text()


@every_schedule
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_order_of_any_size_is_proven(name, data):
    shape = draw_shape(data, SCHEDULES[name])
    program = lower(schedule_plan(name, shape.p, shape.m, shape.v, shape.s))
    layout = program.layout
    crossings = sum(
        layout.placement[a] != layout.placement[b]
        for m in range(shape.units)
        for a, b in pairwise(layout.stages_of(m))
    )
    assert check(program).num_transfers == 2 * crossings


@every_schedule
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_rank_holds_as_many_stages_as_it_was_asked_to(name, data):
    shape = draw_shape(data, SCHEDULES[name])
    assert Counter(SCHEDULES[name].placement(shape)) == dict.fromkeys(range(shape.p), shape.v)


@every_schedule
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_an_order_is_the_same_when_it_is_made_again(name, data):
    shape = draw_shape(data, SCHEDULES[name])
    assert SCHEDULES[name].orders(shape) == SCHEDULES[name].orders(shape)


@every_schedule
@settings(max_examples=25, deadline=None)
@given(p=st.integers(0, 6), m=st.integers(0, 12), v=st.integers(0, 5), s=st.integers(0, 4))
def test_a_schedule_is_refused_with_what_it_lacks_or_can_run(name, p, m, v, s):
    schedule, shape = SCHEDULES[name], Shape(p, m, v, s)
    lacking = schedule.lacks(shape)
    if lacking:
        with pytest.raises(PlanError, match=re.escape(f"{name} needs {lacking}")):
            schedule.orders(shape)
    else:
        check(lower(schedule_plan(name, p, m, v, s)))


@every_schedule
def test_other_numbers_of_stages_per_rank_are_refused(name):
    chunks = SCHEDULES[name].chunks
    for v in set(range(1, 9)) - set(chunks):
        with pytest.raises(PlanError, match=rf"{name} needs {chunks[0]}.* stages .*, found {v}"):
            SCHEDULES[name].orders(Shape(4, 8, v))


@pytest.mark.parametrize("name", sorted(n for n in SCHEDULES if not SCHEDULES[n].sliced))
def test_slices_are_refused_by_schedules_of_whole_microbatches(name):
    with pytest.raises(PlanError, match=f"{name} needs whole micro-batches, found 2 slices each"):
        SCHEDULES[name].orders(Shape(4, 8, SCHEDULES[name].chunks[0], 2))


def test_interleaved_needs_whole_groups():
    with pytest.raises(
        PlanError, match="needs a multiple of 4 micro-batches on 4 devices, found 6"
    ):
        SCHEDULES["interleaved"].orders(Shape(4, 6, 2))


@every_schedule
def test_the_drawing_of_a_schedule_is_what_it_does(name):
    # The parameters stand before the `::`, the drawing after it; cells are F = I = W = 1, B = 2.
    before, after = inspect.getdoc(SCHEDULES[name].generate).split("::", 1)
    drawn = "\n".join(line.strip() for line in after.split("\n\n")[1].splitlines())
    size = numbers(before)
    assert set(size) >= {"p", "m"}, "the docstring says for which p and m the drawing is"
    plan = schedule_plan(name, **size)
    timeline = simulate_plan(plan, uniform_profile(plan.num_layers), uniform(size["p"]))
    assert drawn == drawing(timeline)


@every_schedule
def test_a_schedule_names_its_paper(name):
    assert "References:" in SCHEDULES[name].generate.__doc__
    assert re.search(r"20\d\d", SCHEDULES[name].paper)
