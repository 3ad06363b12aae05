"""Plans against their devices' memory, looked at by evaluators that share no code with the planner.

`plain_memory` has the model and the plan as their files hold them, and imports nothing of AdaPtis;
the slow simulator shares the instructions with it, and no costs.
"""

import json
from pathlib import Path

import plain_memory
import pytest
from exhaustive_planning import fitting_plan
from object_simulator import SlowSimulator
from plain_memory import peak_bytes
from random_cases import make_case
from random_planning import make_problem, tiny_problem

from adaptis.errors import InfeasibleError
from adaptis.plan import plan_to_json
from adaptis.profile import profile_to_json
from adaptis.search import Stop, search


def file_of(value):
    """What the file holds."""
    return json.loads(json.dumps(value))


def test_the_plain_evaluator_imports_nothing_of_adaptis():
    lines = Path(plain_memory.__file__).read_text(encoding="utf-8").splitlines()
    assert {line.split()[1] for line in lines if line.startswith(("import ", "from "))} == {
        "re",
        "collections",
    }


def test_the_plain_evaluator_agrees_with_the_slow_simulator():
    seen = sharded = recomputed = 0
    for seed in range(800):
        plan, profile, cluster, _ = make_case(seed)
        if plan.copies > 1 or plan.previous or any(s.offload or s.sharded for s in plan.stages):
            continue
        slow = SlowSimulator(plan, profile, cluster, (1.0,) * plan.num_microbatches).run()
        expected = [slow.peak(d) for d in range(plan.num_devices)]
        plain = peak_bytes(file_of(plan_to_json(plan)), file_of(profile_to_json(profile)))
        assert plain == pytest.approx(expected, abs=1e-6), seed
        seen += 1
        sharded += plan.head_reductions > 0
        recomputed += any(stage.recompute for stage in plan.stages)
    assert min(seen, sharded, recomputed) > 20


def planned(seed, **size):
    """Whether a plan was found; it fits and takes the time that it says it takes."""
    profile, cluster, m = make_problem(seed, **size)
    try:
        answer = search(profile, cluster, m, Stop(evaluations=200), seed)
    except InfeasibleError:
        return False
    peaks = peak_bytes(file_of(plan_to_json(answer.plan)), file_of(profile_to_json(profile)))
    for d, device in enumerate(cluster.devices):
        assert peaks[d] <= device.memory_bytes, f"seed {seed}, device {d}"
    slow = SlowSimulator(answer.plan, profile, cluster, (1.0,) * m).run()
    assert slow.step() == pytest.approx(answer.timeline.step, rel=1e-9), seed
    assert answer.plan.provenance["step_seconds"] == answer.timeline.step
    assert answer.lower_bound.value <= slow.step() * (1 + 1e-9), seed
    return True


def all_planned(seeds, **size):
    found = [planned(seed, **size) for seed in seeds]
    assert any(found)
    assert not all(found)


@pytest.mark.parametrize("block", range(2))
def test_no_device_holds_more_than_its_memory_in_any_plan(block):
    all_planned(range(20 * block, 20 * block + 20), most_layers=24, most_microbatches=12)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_no_device_holds_more_than_its_memory_in_any_of_a_thousand_plans(block):
    # About a fifth of the problems have no plan: more than a thousand plans are left.
    all_planned(range(1000 + 70 * block, 1070 + 70 * block))


def refused(seed):
    """Whether the planner says that nothing fits; no plan that there is does."""
    profile, cluster, m = tiny_problem(seed)
    try:
        search(profile, cluster, m, Stop(evaluations=20_000), seed)
    except InfeasibleError:
        limits = [device.memory_bytes for device in cluster.devices]
        assert fitting_plan(file_of(profile_to_json(profile)), limits, m) is None, seed
        return True
    return False


def all_refused(seeds):
    found = [refused(seed) for seed in seeds]
    assert any(found)
    assert not all(found)


@pytest.mark.parametrize("block", range(2))
def test_what_is_said_to_fit_nowhere_fits_nowhere(block):
    all_refused(range(20 * block, 20 * block + 20))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_what_is_said_to_fit_nowhere_fits_nowhere_in_hundreds_of_problems(block):
    all_refused(range(1000 + 15 * block, 1015 + 15 * block))
