"""What we export runs in torch's runtime, exactly; what its own schedules dump loads here."""

import csv
import io
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch_pipelines
from random_plans import make_plan, uniform_profile
from torch.distributed.pipelining import PipelineStage, schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from adaptis.check import check
from adaptis.cluster import uniform
from adaptis.errors import PlanError
from adaptis.exchange.torch_csv import read_schedule, write_orders, write_program
from adaptis.execute.launch import launch
from adaptis.lower import lower
from adaptis.plan import named_plan
from adaptis.program import Compute, Op
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.simulate import simulate_plan


def for_torch(name, p, m):
    """The plan of a schedule that torch can express, at its least chunks; else None."""
    schedule = SCHEDULES[name]
    chunks = schedule.chunks[1] if len(schedule.chunks) > 1 else schedule.chunks[0]
    shape = Shape(p, m, chunks)
    if schedule.copies > 1 or schedule.lacks(shape):
        return None
    return named_plan(schedule, shape, range(1, p * chunks + 1))


def anew(plan):
    """`plan` without idle devices, its micro-batches in the order of the last stage's forwards."""
    last = len(plan.stages) - 1
    order = [c.microbatch for row in plan.programs for c in row
             if c.op is Op.FORWARD and c.stage == last]  # fmt: skip
    number = {m: i for i, m in enumerate(order)}
    device = {old: new for new, old in enumerate(sorted({s.device for s in plan.stages}))}
    rows = [
        tuple(Compute(c.op, c.stage, number[c.microbatch]) for c in plan.programs[old])
        for old in device
    ]
    stages = tuple(replace(stage, device=device[stage.device]) for stage in plan.stages)
    return replace(plan, stages=stages, programs=tuple(rows))


def cases_of(plans):
    return [
        (write(plan), form, plan.placement, plan.num_microbatches)
        for plan in plans
        for write, form in ((write_orders, "compute_only"), (write_program, "compute_comms"))
    ]


def assert_exact(size, plans):
    named = [plan for plan in plans if plan is not None]
    cases = cases_of(named)
    found = launch(torch_pipelines.torch_rank, size, cases)
    assert len(found) == size
    for index, (_, form, *_) in enumerate(cases):
        off = max(result[index] for result in found)
        assert off <= 1e-12, f"{named[index // 2].schedule}, {form}: off by {off}"
    return {plan.schedule for plan in named}


def random_plans(seeds, least, most):
    plans = [anew(make_plan(seed, most_devices=most, recompute=False)) for seed in seeds]
    return [plan for plan in plans if least <= plan.num_devices <= most]


@pytest.mark.timeout(300)
def test_on_two_ranks_every_schedule_and_random_plans_train_exactly():
    names = assert_exact(
        2, [for_torch(name, 2, 4) for name in SCHEDULES] + random_plans(range(12), 1, 2)
    )
    assert {"gpipe", "1f1b", "interleaved", "zb-h1", "custom"} <= names


@pytest.mark.timeout(300)
def test_on_four_ranks_every_schedule_and_random_plans_train_exactly():
    names = assert_exact(
        4, [for_torch(name, 4, 8) for name in SCHEDULES] + random_plans(range(20), 3, 4)
    )
    assert {"gpipe", "1f1b", "interleaved", "zb-h1", "custom"} <= names


@pytest.mark.timeout(300)
def test_the_comparison_notices_gradients_that_were_not_reduced():
    _, (text, *rest) = cases_of([for_torch("1f1b", 2, 4)])
    off = launch(torch_pipelines.torch_rank, 2, [(text.replace(",0REDUCE_GRAD", ""), *rest)])
    assert off[0][0] > 0.1
    assert off[1][0] == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_on_more_sizes_every_schedule_and_many_random_plans_train_exactly():
    sizes = ((1, 3), (2, 6), (2, 12), (3, 6), (3, 12), (4, 12))
    plans = [for_torch(name, p, m) for name in SCHEDULES for p, m in sizes]
    assert_exact(4, plans + random_plans(range(100, 220), 1, 4))


@pytest.fixture
def four_ranks():
    """This process as rank 0 of four, whom nobody hears."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def stages_of(*indices, count=8):
    device = torch.device("cpu")
    return [PipelineStage(torch_pipelines.stage_of(i), i, count, device) for i in indices]


def text_of(order):
    file = io.StringIO()
    csv.writer(file).writerows(order.values())
    return file.getvalue()


def proven(plan):
    check(lower(plan))
    timeline = simulate_plan(plan, uniform_profile(plan.num_layers), uniform(plan.num_devices))
    assert timeline.makespan > 0
    return timeline


@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
@pytest.mark.parametrize(
    ("name", "indices"),
    [
        ("ScheduleInterleaved1F1B", (0, 4)),
        ("ScheduleLoopedBFS", (0, 4)),
        ("ScheduleInterleavedZeroBubble", (0, 4)),
        ("ScheduleZBVZeroBubble", (0, 7)),
        ("ScheduleDualPipeV", (0, 7)),
    ],
)
def test_what_torchs_schedules_dump_is_read_proven_and_simulated(
    four_ranks, tmp_path, name, indices, form
):
    schedule = getattr(schedules, name)(stages_of(*indices), 8)
    schedule._dump_csv(str(tmp_path / "dumped.csv"), format=form)
    plan = read_schedule((tmp_path / "dumped.csv").read_text(), 8)
    assert (plan.num_devices, plan.num_microbatches, len(plan.stages)) == (4, 8, 8)
    proven(plan)
    if form == "compute_comms":
        assert plan == read_schedule(write_orders(plan), 8)


def test_torchs_gpipe_is_ours(four_ranks):
    order = schedules.ScheduleGPipe(stages_of(0, count=4)[0], 8)._get_pipeline_order()
    plan = read_schedule(text_of(order), 4)
    ours = for_torch("gpipe", 4, 8)
    assert proven(plan).makespan == proven(ours).makespan


def test_torchs_1f1b_is_wrong_on_its_last_rank_and_refused_there(four_ranks):
    order = schedules.Schedule1F1B(stages_of(0, count=4)[0], 8)._get_pipeline_order()
    with pytest.raises(PlanError, match="row 4, column"):
        read_schedule(text_of(order), 4)
