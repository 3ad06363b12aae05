"""Measured steps folded back into the profile, and compared with their predictions."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from adaptis import cli
from adaptis.cluster import uniform
from adaptis.errors import Error, InputError, PlanError
from adaptis.files import write_json
from adaptis.plan import named_plan, plan_to_json, save_plan
from adaptis.profile import LayerCost, Overheads, Profile, load_profile, profile_to_json
from adaptis.program import OPS, Op
from adaptis.refine import refine, refined_file
from adaptis.report.deviation import deviation, deviations
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.simulate import simulate_plan
from adaptis.timeline import timeline_to_json

KINDS = ("embedding", *("attention", "mlp", "mlp") * 2, "head")
COSTS = {"embedding": 0.2, "attention": 3.0, "mlp": 1.0, "head": 4.0}  # milliseconds of F
EXTRA = Overheads(forward=1e-4, backward=2e-4, backward_input=1e-4, backward_weight=5e-5)
STOPS = (3, 6, 8)
SECONDS = ("forward", "backward", "backward_input", "backward_weight")


def profile(scale=None):
    """Eight layers; `scale` says how far each kind is off."""
    layers = []
    for index, kind in enumerate(KINDS):
        f = COSTS[kind] * 1e-3 * (scale or {}).get(kind, 1.0)
        times = {"forward": f, "backward_input": 1.1 * f, "backward_weight": 0.9 * f}
        sizes = {"saved_bytes": 100, "state_bytes": 1000, "output_bytes": 10}
        layers.append(LayerCost(f"l{index}", kind, **times, backward=1.9 * f, update=1e-4, **sizes))
    return Profile("eight", 64, tuple(layers), EXTRA)


def plan_of(name, stops=STOPS, chunks=1):
    return named_plan(SCHEDULES[name], Shape(len(stops) // chunks, 6, chunks), stops)


def measured(plan, truth, noise=0.0, seed=0):
    """What a step takes if the layers cost what `truth` says."""
    timeline = simulate_plan(plan, truth, uniform(plan.num_devices))
    factor = 1 + noise * np.random.default_rng(seed).standard_normal(len(timeline.end))
    end = timeline.start + (timeline.end - timeline.start) * factor
    return replace(timeline, source="measured", end=end)


def step_of(plan, found):
    return simulate_plan(plan, found, uniform(plan.num_devices)).step


TRUTH = {"attention": 1.3, "mlp": 0.8, "head": 1.5}


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "zb-h1"])
def test_a_refined_profile_predicts_the_measured_step_exactly(name):
    plan, truth = plan_of(name, (3, 6, 8)), profile(TRUTH)
    found = refine(profile(), plan, measured(plan, truth))
    assert step_of(plan, profile()) != pytest.approx(step_of(plan, truth), rel=0.05)
    assert step_of(plan, found) == pytest.approx(step_of(plan, truth), rel=1e-9)


def test_a_profile_that_was_right_stays_as_it_was():
    plan = plan_of("zb-h1")
    found = refine(profile(), plan, measured(plan, profile()))
    for old, new in zip(profile().layers, found.layers, strict=True):
        for name in SECONDS:
            assert getattr(new, name) == pytest.approx(getattr(old, name), rel=1e-9)


def test_what_passes_between_computations_is_not_learnt_as_a_part_of_them():
    plan, loop = plan_of("zb-h1"), 4e-5
    computed = profile()  # a timeline has the computations alone, the profile what goes with them
    more = {name: getattr(EXTRA, name) + loop for name in SECONDS}
    given = replace(computed, overheads=replace(EXTRA, loop=loop, **more))
    found = refine(given, plan, measured(plan, computed))
    assert found.overheads == given.overheads
    for old, new in zip(given.layers, found.layers, strict=True):
        for name in SECONDS:
            assert getattr(new, name) == pytest.approx(getattr(old, name), rel=1e-9)


def test_enough_stages_tell_the_kinds_of_layers_apart():
    plan, truth = plan_of("interleaved", (1, 2, 4, 5, 7, 8), chunks=2), profile(TRUTH)
    found = refine(profile(), plan, measured(plan, truth))
    for expected, layer in zip(truth.layers, found.layers, strict=True):
        assert layer.forward == pytest.approx(expected.forward, rel=0.01)
        assert layer.backward == pytest.approx(expected.backward, rel=0.01)


def test_what_one_plan_teaches_holds_for_others():
    taught, asked, truth = plan_of("1f1b"), plan_of("1f1b", (2, 5, 8)), profile(TRUTH)
    found = refine(profile(), taught, measured(taught, truth, noise=0.02))
    off = [abs(step_of(asked, p) / step_of(asked, truth) - 1) for p in (profile(), found)]
    assert off[1] < off[0] / 2


def test_plans_folded_in_one_after_the_other_find_the_layers():
    found, truth = profile(), profile(TRUTH)
    for stops in ((3, 6, 8), (2, 5, 8), (1, 4, 8), (4, 7, 8)) * 6:
        plan = plan_of("1f1b", stops)
        found = refine(found, plan, measured(plan, truth))
    for expected, layer in zip(truth.layers, found.layers, strict=True):
        assert layer.forward == pytest.approx(expected.forward, rel=0.1, abs=1e-4)


def test_what_did_not_run_keeps_its_proportion_to_what_did():
    truth = profile(dict.fromkeys(COSTS, 2.0))
    fused, split = plan_of("1f1b"), plan_of("zb-h1")
    plain = replace(profile(), overheads=Overheads())
    truth = replace(truth, overheads=Overheads())
    for plan in (fused, split):
        found = refine(plain, plan, measured(plan, truth))
        for name in SECONDS:
            assert getattr(found.layers[4], name) == pytest.approx(
                getattr(truth.layers[4], name), rel=1e-3
            )


def test_a_recomputation_counts_as_a_forward():
    plan, truth = plan_of("1f1b"), profile(TRUTH)
    again = replace(plan, stages=tuple(replace(s, recompute=True) for s in plan.stages))
    rows = [measured(p, truth) for p in (plan, with_recomputes(again))]
    assert OPS.index(Op.RECOMPUTE) in rows[1].op
    one, two = (refine(profile(), p, t) for p, t in zip((plan, again), rows, strict=True))
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.forward == pytest.approx(b.forward, rel=1e-9)


def with_recomputes(plan):
    rows = []
    for order in plan.programs:
        row = []
        for work in order:
            if work.op is Op.BACKWARD:
                row.append(replace(work, op=Op.RECOMPUTE))
            row.append(work)
        rows.append(tuple(row))
    return replace(plan, programs=tuple(rows))


def test_overheads_sizes_and_the_optimizer_stay():
    plan = plan_of("1f1b")
    found = refine(profile(), plan, measured(plan, profile(TRUTH)))
    assert found.overheads == EXTRA
    zero = dict.fromkeys(SECONDS, 0.0)
    assert [replace(x, **zero) for x in found.layers] == [
        replace(x, **zero) for x in profile().layers
    ]
    assert "refined by a measured step of 1f1b" in found.source


def test_heavier_micro_batches_are_brought_back_to_the_profile_s_unit():
    plan = replace(plan_of("1f1b"), provenance={"microbatch_weight": 2.0})
    truth = profile(dict.fromkeys(COSTS, 2.0))  # as if each layer took twice the seconds
    found = refine(profile(), plan, measured(plan, truth))
    for old, new in zip(profile().layers, found.layers, strict=True):
        assert new.forward == pytest.approx(old.forward, rel=1e-9)


def test_one_outlier_changes_nothing_of_note():
    plan = named_plan(SCHEDULES["1f1b"], Shape(3, 20), STOPS)
    timeline = measured(plan, profile())
    timeline.end[3] += 0.5
    found = refine(profile(), plan, timeline)
    assert step_of(plan, found) == pytest.approx(step_of(plan, profile()), rel=1e-9)


def test_layers_without_cost_get_what_was_measured():
    free = replace(
        profile(), layers=tuple(replace(x, **dict.fromkeys(SECONDS, 0.0)) for x in profile().layers)
    )
    plan = plan_of("1f1b")
    found = refine(free, plan, measured(plan, profile()))
    assert step_of(plan, found) == pytest.approx(step_of(plan, profile()), rel=1e-9)


def test_what_does_not_belong_together_is_refused():
    plan, other = plan_of("1f1b"), plan_of("1f1b", (2, 5, 8))
    timeline = measured(plan, profile())
    with pytest.raises(InputError, match="only what was measured"):
        refine(profile(), plan, replace(timeline, source="simulated"))
    with pytest.raises(InputError, match="give the plan that was run"):
        refine(profile(), plan_of("interleaved", (1, 2, 4, 5, 7, 8), chunks=2), timeline)
    with pytest.raises(PlanError, match="make a plan for it"):
        refine(profile(), plan_of("1f1b", (2, 5, 7)), timeline)
    with pytest.raises(InputError, match="sharded over all devices"):
        refine(profile(), other, replace(timeline, reductions=1))
    nothing = replace(timeline, partner=np.zeros_like(timeline.stage))
    with pytest.raises(InputError, match="no computation to learn from"):
        refine(profile(), plan, nothing)


@pytest.fixture
def folder(tmp_path):
    plan = plan_of("1f1b")
    write_json(tmp_path / "profile.json", profile_to_json(profile()))
    save_plan(plan, tmp_path / "plan.json")
    predicted = simulate_plan(plan, profile(), uniform(3))
    write_json(tmp_path / "predicted.json", timeline_to_json(predicted))
    real = timeline_to_json(measured(plan, profile(TRUTH)))
    write_json(tmp_path / "timeline.json", real)
    return tmp_path


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["adaptis", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    found = capsys.readouterr()
    return stop.value.code, found.out, found.err


def test_the_command_line_refines_and_says_what_is_next(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = ("profile", "profile.json", "--refine", "timeline.json", "-o", "refined.json")
    code, out, err = call(monkeypatch, capsys, *words, "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads((folder / "refined.json").read_text())
    assert "next: adaptis plan refined.json" in err
    plan = plan_of("1f1b")
    expected = step_of(plan, profile(TRUTH))
    assert step_of(plan, load_profile("refined.json")) == pytest.approx(expected, rel=1e-9)


def test_the_command_line_refuses_what_it_cannot_refine(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    start = ("profile", "profile.json", "--refine")
    for words, sentence in (
        (("predicted.json",), "only what was measured"),
        (("absent.json",), "absent.json: no such timeline"),
        (("profile.json",), "the format is 'adaptis-profile'"),
        (("timeline.json", "--plan", "absent.json"), "absent.json: no such plan"),
        (("timeline.json", "--analytic", "h100"), "leave one of the two out"),
    ):
        code, out, err = call(monkeypatch, capsys, *start, *words)
        assert (code, out) == (2, "")
        assert sentence in err
        assert "Traceback" not in err
    (folder / "plan.json").unlink()
    code, _, err = call(monkeypatch, capsys, *start, "timeline.json")
    assert code == 2
    assert "give the plan that was run with --plan" in err


def test_a_damaged_timeline_is_one_sentence_or_a_finite_profile(folder):
    path = folder / "timeline.json"
    text = path.read_text()
    refusals = 0
    for cut in range(0, len(text), 53):
        path.write_text(text[:cut] + "9" + text[cut + 1 :])
        found, said = profile(), ""
        try:
            found = refined_file(folder / "profile.json", path, None)
        except Error as error:
            refusals, said = refusals + 1, str(error)
        assert "\n" not in said
        assert all(np.isfinite(getattr(x, name)) for x in found.layers for name in SECONDS)
    assert refusals > 10


def test_a_prediction_is_compared_instruction_by_instruction():
    plan = plan_of("1f1b")
    predicted = simulate_plan(plan, profile(), uniform(3))
    late = replace(predicted, source="measured", end=predicted.end.copy(), step=2 * predicted.step)
    late.end[2] += 0.25
    found = deviation(predicted, late)
    assert found["step_error"] == pytest.approx(-0.5)
    rows = {row["operation"]: row for row in found["operations"]}
    assert rows.keys() == {"all", "F", "B"}
    assert rows["all"]["count"] == rows["F"]["count"] + rows["B"]["count"] == len(predicted.op)
    worst = rows["all"]["worst"]
    assert worst["instruction"] == str(list(predicted.spans(0))[2].compute)
    assert worst["device"] == 0
    assert worst["measured_seconds"] - worst["predicted_seconds"] == pytest.approx(0.25)
    total = float(predicted.busy().sum())
    assert rows["all"]["mean_error"] == pytest.approx(total / (total + 0.25) - 1)
    assert rows["all"]["mean_absolute_error"] == pytest.approx(0.25 / (total + 0.25))
    other = "B" if worst["instruction"].find("F") >= 0 else "F"
    assert rows[other]["mean_absolute_error"] == 0.0


def test_a_perfect_prediction_is_off_by_nothing():
    plan = plan_of("zb-h1")
    found = deviation(simulate_plan(plan, profile(), uniform(3)), measured(plan, profile()))
    assert found["step_error"] == found["makespan_error"] == 0.0
    assert found["peak_bytes_errors"] == [0.0] * 3
    assert all(row["mean_absolute_error"] == 0.0 for row in found["operations"])


def test_timelines_of_different_plans_are_drawn_and_not_compared():
    one = simulate_plan(plan_of("1f1b"), profile(), uniform(3))
    two = replace(measured(plan_of("gpipe", (4, 8)), profile()), name="1f1b")
    (entry,) = deviations([one, two])
    assert "the two are of different plans" in entry["not_compared"]
    assert deviations([one]) == []


def test_report_prints_the_comparison_as_text_and_json(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = ("report", "predicted.json", "timeline.json", "-o", "page.txt")
    code, out, err = call(monkeypatch, capsys, *words)
    assert code == 0, err
    assert out.startswith("1f1b: step predicted -")
    assert "mean abs." in out
    code, out, _ = call(monkeypatch, capsys, *words, "--json")
    (entry,) = json.loads(out)["comparisons"]
    assert entry["name"] == "1f1b"
    assert entry["step_error"] < -0.1
    assert [row["operation"] for row in entry["operations"]] == ["all", "F", "B"]


def test_a_plan_and_its_file_refine_alike(folder):
    plan = plan_of("1f1b")
    assert json.loads((folder / "plan.json").read_text()) == plan_to_json(plan)
    one = refined_file(folder / "profile.json", folder / "timeline.json", folder / "plan.json")
    assert one == refine(profile(), plan, measured(plan, profile(TRUTH)))
