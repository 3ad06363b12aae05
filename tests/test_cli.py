"""The command line: one sentence for every mistake, the right status, and results that fit."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from adaptis import cli

VERBS = ("demo", "profile", "plan", "compare", "simulate", "check", "train", "report")
VERBS += ("export", "import", "export-weights", "ablation")
FIGURES = {"step_seconds", "lower_bound_seconds", "gap", "bubble_fraction", "peak_bytes"}
DECISIONS = {"head_reductions", "recomputed_stages"}
MIB = 1 << 20


def layer(index, **more):
    kind = {0: "embedding", 9: "head"}.get(index, "mlp")
    times = {"forward_seconds": 1e-3, "backward_input_seconds": 1.1e-3}
    sizes = {"state_bytes": 8 * MIB, "saved_bytes": MIB, "output_bytes": 1 << 16}
    named = {"name": f"layers.{index}", "kind": kind, "backward_weight_seconds": 0.9e-3}
    return named | times | sizes | more


def model(**more):
    value = {"model": "ten layers", "tokens_per_microbatch": 64}
    return value | {"devices": 4, "microbatches": 8, "layers": [layer(i) for i in range(10)]} | more


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """`adaptis` in this process, in a folder of its own: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profile.json").write_text(json.dumps(model()))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["adaptis", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        found = capsys.readouterr()
        return stop.value.code, found.out, found.err

    return call


def refused(found, status=2):
    code, out, err = found
    assert code == status, err
    last = err.splitlines()[-1]
    assert last.startswith("adaptis: ")
    assert "Traceback" not in err
    assert out == ""
    return last


@pytest.fixture
def planned(run, tmp_path):
    code, _, err = run("plan", "profile.json", "--seconds", "0.2", "-o", "plan.json", "--json")
    assert code == 0, err
    return json.loads((tmp_path / "plan.json").read_text())


def test_the_command_line_starts_without_anything_heavy():
    code = (
        "import sys, adaptis.cli; "
        "print([m for m in ('torch', 'numpy', 'numba', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_an_example_and_json(run, verb):
    code, out, err = run(verb, "--help")
    assert (code, err) == (0, "")
    assert f"Example: adaptis {verb}" in out
    assert "--json" in out


def test_no_words_show_the_help(run):
    code, out, _ = run()
    assert code == 0
    assert all(verb in out for verb in VERBS)


def test_the_version_needs_no_verb(run):
    assert run("--version")[:2] == (0, "0.1.0\n")


def test_an_exact_plan_says_what_is_proven(run):
    words = ("plan", "profile.json", "--devices", 2, "--microbatches", 3, "--exact")
    code, out, err = run(*words, "--seconds", 20, "-o", "plan.json", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result.keys() >= {*FIGURES, *DECISIONS, "optimal"}
    assert result["optimal"] == (result["gap"] <= 1e-3)
    code, out, err = run(*words, "--seconds", 20)
    assert code == 0, err
    assert "proven" in out
    assert run("check", "plan.json")[0] == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("nonsense", "nonsense"),
        ("plan", "PROFILE"),
        ("plan profile.json --devices", "--devices"),
        ("plan profile.json --devices two", "--devices"),
        ("plan profile.json --nonsense", "--nonsense"),
        ("plan profile.json --devices 0", "0 devices"),
        ("plan profile.json --devices 11", "11 devices for 10 layers"),
        ("plan profile.json --microbatches 0", "0 micro-batches"),
        ("plan profile.json --seconds 0", "--seconds 0"),
        ("plan profile.json --seconds nan", "--seconds nan"),
        ("plan profile.json --memory-gib -1", "--memory-gib -1"),
        ("plan profile.json --shard-head perhaps", "--shard-head perhaps"),
        ("compare profile.json --shard-head perhaps", "--shard-head perhaps"),
        ("plan profile.json --shard-head auto --exact", "leave it or --exact out"),
        ("plan profile.json --microbatches 4-8 --exact", "leave --exact out"),
        ("plan profile.json --microbatches many", "such as 4-16"),
        ("plan profile.json --microbatches 8-", "such as 4-16"),
        ("plan profile.json --microbatches=-4", "such as 4-16"),
        ("plan profile.json --microbatches 4-8-16", "such as 4-16"),
        ("plan profile.json --microbatches 8-4", "smaller number must come first"),
        ("plan profile.json --microbatches 0-4", "0 micro-batches"),
        ("plan profile.json --microbatches 4-999999999", "999999999 micro-batches"),
        ("compare profile.json --microbatches 4-8", "--microbatches"),
        ("ablation profile.json --seconds 0", "--seconds 0"),
        ("plan profile.json -o .", "is a folder"),
        ("plan profile.json -o profile.json/plan.json", "cannot be written"),
        ("plan profile.json --cluster profile.json", "format"),
        ("plan profile.json --exact --microbatches 17", "at most 16 layers, 6 devices and 16"),
        ("compare profile.json --seconds inf", "--seconds inf"),
        ("simulate profile.json", "PLAN"),
        ("simulate profile.json profile.json", "profile.json"),
        ("check absent.json", "absent.json: no such plan"),
        ("report profile.json -o picture.pdf", ".html"),
        ("report profile.json", "profile.json"),
        ("demo --only nothing", "--only nothing"),
        ("demo --steps 3", "--steps 3"),
        ("profile no-such-model", "no-such-model"),
        ("profile demo-hybrid --devices 0", "--devices 0"),
        ("profile demo-hybrid --sequence 0", "--sequence 0"),
        ("profile demo-hybrid --analytic abacus", "--analytic abacus"),
        ("train --model.preset no-such-model", "no-such-model"),
        ("train absent.toml", "absent.toml"),
        ("train --nonsense", "--nonsense"),
        ("train --train.steps", "a value is missing"),
        ("train --train.steps many", "train.steps is 'many'"),
        ("train --plan absent.json", "absent.json"),
        ("export profile.json", "--to"),
        ("export absent.json --to torch", "absent.json: no such plan"),
        ("export absent.json --to nothing", "--to nothing: one of torch, torch-comms, megatron"),
        ("export a.json --to text -o ./a.json", "a.json: is what is read"),
        ("import absent.csv --from torch --layers 3", "absent.csv: no such schedule"),
        ("import absent.yaml --from octopipe", "absent.yaml: no such plan"),
        ("import absent.json --from slackpipe", "absent.json: no such plan"),
        ("import . --from octopipe", "cannot be read"),
        ("import profile.json --from octopipe", "the key 'partition' is missing"),
        ("import profile.json --from torch --layers 3", "row 1, column 1"),
        ("import profile.json --from torch", "give --profile or --layers"),
        ("import profile.json --from torch --layers 0", "--layers 0"),
        ("import profile.json --from torch --layers 3 --profile profile.json", "leave --layers"),
        ("import profile.json --from nothing", "--from nothing: one of torch, octopipe"),
        ("import profile.json --from torch --layers 3 -o profile.json", "is what is read"),
        ("train --train.folder profile.json/x", "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(run, words, part):
    code, out, err = run(*words.split())
    assert part in refused((code, out, err))
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"\x80\x81\x00", "is not text"),
        (b"{", "not JSON"),
        (b"[]", "a JSON object is needed"),
        (b'{"model": "a", "model": "b"}', "twice"),
        (json.dumps(model(surprise=1)).encode(), "surprise"),
        (json.dumps(model(layers=[layer(0, forward_seconds=float("nan"))])).encode(), "NaN"),
        (json.dumps(model(layers=[])).encode(), "0 layers"),
        (json.dumps(model(format="adaptis-plan", version=1)).encode(), "format"),
        (json.dumps(model(format="adaptis-profile", version=99)).encode(), "version 99"),
        (json.dumps(model(devices=None)).encode(), "devices"),
    ],
)
def test_a_bad_profile_is_refused_by_name(run, tmp_path, text, part):
    (tmp_path / "bad.json").write_bytes(text)
    sentence = refused(run("plan", "bad.json"))
    assert "bad.json" in sentence or "layers" in sentence
    assert part in sentence


def test_a_profile_without_hints_asks_for_the_options(run, tmp_path):
    value = model()
    del value["devices"], value["microbatches"]
    (tmp_path / "bare.json").write_text(json.dumps(value))
    assert "give --devices" in refused(run("plan", "bare.json"))
    assert "give --microbatches" in refused(run("plan", "bare.json", "--devices", 2))


def test_an_error_with_json_is_one_json_object(run):
    code, out, err = run("check", "absent.json", "--json")
    assert code == 2
    assert json.loads(out) == {"error": err.strip().removeprefix("adaptis: "), "exit_status": 2}


def test_only_debug_shows_the_traceback_wherever_it_stands(run):
    for words in (("--debug", "check", "absent.json"), ("check", "absent.json", "--debug")):
        code, _, err = run(*words)
        assert code == 2
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("adaptis: ")


def test_what_nobody_foresaw_is_one_sentence_too(run, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("of\nall things")

    monkeypatch.setattr("adaptis.plan.load_plan", fails)
    sentence = refused(run("check", "plan.json"), status=1)
    assert "unexpected ZeroDivisionError: of all things" in sentence


def test_an_interrupt_is_status_130(run, monkeypatch):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("adaptis.plan.load_plan", stops)
    assert "interrupted" in refused(run("check", "plan.json"), status=130)


def test_the_json_of_plan_and_simulate_holds_the_promised_keys(run, planned):
    assert planned["num_microbatches"] == 8
    code, out, _ = run("plan", "profile.json", "--seconds", "0.1", "--json")
    assert code == 0
    assert set(json.loads(out)) == FIGURES | DECISIONS | {"search_seconds", "evaluated"}
    code, out, _ = run("simulate", "profile.json", "plan.json", "--json")
    assert code == 0
    assert set(json.loads(out)) == FIGURES | {"bubble_seconds", "busy_seconds", "fits"}


def test_compare_names_every_schedule_and_what_does_not_apply(run):
    words = ("compare", "profile.json", "--devices", 4, "--microbatches", 6, "--seconds", "0.1")
    code, out, err = run(*words, "--json")
    assert code == 0, err
    result = json.loads(out)
    names = [row["name"] for row in result["results"]]
    assert names[-1] == "adaptis"
    assert {"1f1b", "gpipe"} <= set(names)
    assert "interleaved" in result["not_applicable"]
    for row in result["results"]:
        keys = {"name", "step_seconds", "bubble_fraction", "peak_bytes", "fits", "recomputed"}
        assert set(row) == keys
        assert row["step_seconds"] >= result["lower_bound_seconds"] * (1 - 1e-9)


@pytest.fixture
def heavy_head(tmp_path):
    """A profile whose head outweighs all its other layers."""
    times = ("forward_seconds", "backward_input_seconds", "backward_weight_seconds")
    layers = [*(layer(i) for i in range(9)), layer(9, name="head", **dict.fromkeys(times, 2e-2))]
    (tmp_path / "heavy.json").write_text(json.dumps(model(layers=layers)))
    return "heavy.json"


def test_a_head_is_sharded_only_when_asked_for_and_simulated_against_its_own_bound(run, heavy_head):
    words = ("plan", heavy_head, "--seconds", "0.2", "-o", "plan.json")
    code, out, err = run(*words)
    assert code == 0, err
    assert "try --shard-head auto" in out
    code, out, _ = run("simulate", heavy_head, "plan.json", "--json")
    whole = json.loads(out)
    for mode in ("auto", "always"):
        code, out, err = run(*words, "--shard-head", mode, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["head_reductions"] == 1
        code, out, _ = run("simulate", heavy_head, "plan.json", "--json")
        again = json.loads(out)
        assert again["step_seconds"] == found["step_seconds"]
        assert again["lower_bound_seconds"] <= again["step_seconds"] < whole["step_seconds"]
        assert again["lower_bound_seconds"] < whole["lower_bound_seconds"]
    _, _, err = run(*words[:4], "--shard-head", "auto")
    assert err.splitlines()[-1] == "next: adaptis plan heavy.json --shard-head auto -o plan.json"


def test_compare_shards_the_head_of_its_own_plan_alone(run, heavy_head):
    words = ("compare", heavy_head, "--seconds", "0.2", "--shard-head", "always", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    result = json.loads(out)
    steps = [row["step_seconds"] for row in result["results"]]
    assert result["lower_bound_seconds"] <= min(steps) == steps[-1]


def test_a_model_without_a_head_has_none_to_shard(run, tmp_path):
    (tmp_path / "bare.json").write_text(json.dumps(model(layers=[layer(1)] * 8)))
    found = run("plan", "bare.json", "--shard-head", "always")
    assert "no head to shard" in refused(found)
    assert run("plan", "bare.json", "--shard-head", "auto", "--seconds", "0.1")[0] == 0


def test_compare_recomputes_a_baseline_that_fits_only_so(run):
    words = ("compare", "profile.json", "--seconds", "0.1", "--memory-gib", 29 / 1024)
    code, out, err = run(*words, "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["results"]}
    assert rows["1f1b"]["fits"]
    assert rows["1f1b"]["recomputed"]
    plain = [row for row in rows.values() if not row["fits"]]
    assert plain
    assert not any(row["recomputed"] for row in plain)
    code, out, _ = run(*words)
    assert "1f1b * " in out
    assert "* with every stage recomputed" in out
    assert all(len(line) <= 80 for line in out.splitlines() if " ms  " in line)


def test_a_range_of_microbatches_is_searched_and_its_plan_simulates_alike(run, tmp_path):
    words = ("plan", "profile.json", "--seconds", "0.4", "--microbatches", "3-8")
    code, out, err = run(*words, "-o", "plan.json", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["num_microbatches"] for row in found["counts"]] == [4, 8]
    assert [row["microbatch_weight"] for row in found["counts"]] == [2.0, 1.0]
    assert found["num_microbatches"] == 8
    assert found["step_seconds"] == min(row["step_seconds"] for row in found["counts"])
    assert json.loads((tmp_path / "plan.json").read_text())["num_microbatches"] == 8
    code, out, err = run("plan", *words[1:-1], "4-4", "-o", "plan.json")
    assert code == 0, err
    assert "4 micro-batches of 1 times the profile's size: step " in out


def test_a_plan_is_simulated_at_the_size_of_its_microbatches(run, planned, tmp_path):
    steps = []
    for weight in (1, 2.0):
        changed = planned | {"provenance": {"microbatch_weight": weight}}
        (tmp_path / "plan.json").write_text(json.dumps(changed))
        code, out, err = run("simulate", "profile.json", "plan.json", "--json")
        assert code == 0, err
        steps.append(json.loads(out))
    assert steps[1]["step_seconds"] == pytest.approx(2 * steps[0]["step_seconds"])
    assert steps[1]["lower_bound_seconds"] == pytest.approx(2 * steps[0]["lower_bound_seconds"])
    assert max(steps[1]["peak_bytes"]) > max(steps[0]["peak_bytes"])
    limit = (max(steps[0]["peak_bytes"]) + 1) / 2**30
    words = ("check", "plan.json", "--profile", "profile.json", "--memory-gib", limit)
    assert "GiB" in refused(run(*words), status=1)


@pytest.mark.parametrize("weight", [0, -1.0, "2", True, None, 10**400])
def test_a_weight_that_is_none_is_refused(run, planned, tmp_path, weight):
    changed = planned | {"provenance": {"microbatch_weight": weight}}
    (tmp_path / "plan.json").write_text(json.dumps(changed))
    sentence = refused(run("simulate", "profile.json", "plan.json"))
    assert "a finite number above 0 is needed" in sentence


def test_ablation_divides_the_gain_between_the_decisions(run):
    words = ("ablation", "profile.json", "--seconds", "0.05", "--microbatches", 4)
    code, out, err = run(*words, "--json")
    assert code == 0, err
    assert err.splitlines()[-1] == "next: adaptis plan profile.json --microbatches 4 -o plan.json"
    found = json.loads(out)
    assert set(found) == {"ablation", "gained_seconds", "gained_seconds_by_decision"}
    assert len(found["ablation"]) == 9
    code, out, _ = run(*words)
    assert "nothing: uniform 1F1B" in out
    assert " ms gained: placement " in out


@pytest.mark.parametrize("verb", ["plan", "compare", "ablation"])
def test_too_little_memory_is_a_no_that_names_device_and_bytes(run, verb):
    code, _, err = run(verb, "profile.json", "--memory-gib", "0.001", "--seconds", "0.1")
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("adaptis: ")
    assert "device " in last
    assert " bytes)" in last


def test_a_plan_that_does_not_fit_is_one_json_object_and_status_1(run, planned):
    words = ("simulate", "profile.json", "plan.json", "--memory-gib", "0.001")
    code, out, err = run(*words, "--json")
    result = json.loads(out)
    assert (code, result["fits"], result["exit_status"]) == (1, False, 1)
    assert err == f"adaptis: {result['error']}\n"
    assert "device " in result["error"]


def test_memory_cannot_be_limited_where_the_profile_holds_no_sizes(run, tmp_path):
    none = {"state_bytes": 0, "saved_bytes": 0}
    (tmp_path / "bare.json").write_text(json.dumps(model(layers=[layer(0, **none)] * 1)))
    words = ("plan", "bare.json", "--devices", 1, "--memory-gib", 1)
    assert "holds no sizes" in refused(run(*words))


def test_a_plan_for_another_model_is_refused(run, planned, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps(model(layers=[layer(i) for i in range(7)])))
    assert "10 layers" in refused(run("simulate", "other.json", "plan.json"))


def test_a_cluster_of_another_size_is_refused(run, planned, tmp_path):
    cluster = {"format": "adaptis-cluster", "version": 1, "devices": [{}, {}]}
    (tmp_path / "two.json").write_text(json.dumps(cluster))
    words = ("simulate", "profile.json", "plan.json", "--cluster", "two.json")
    assert "4 devices, two.json has 2" in refused(run(*words))
    words = ("plan", "profile.json", "--cluster", "two.json", "--devices", "3")
    assert "leave one of the two out" in refused(run(*words))


def test_a_plan_for_other_settings_is_refused_before_any_process_starts(run, planned):
    words = ("train", "--plan", "plan.json", "--model.preset", "demo-hybrid")
    assert "give --train.devices 4" in refused(run(*words))
    words = (*words, "--train.devices", 4, "--train.microbatches", 2)
    assert "give --train.microbatches 8" in refused(run(*words))
    assert "a multiple of 3" in refused(run(*words, "--train.replicas", 3))
    assert "each of 2 replicas; give --train.devices 8" in refused(
        run(*words, "--train.replicas", 2)
    )


@pytest.mark.parametrize(
    ("programs", "part"),
    [
        ([["0F0", "0B0"], ["1F0"]], "1B0 is missing"),
        ([["0F0", "0B0", "0F1", "0B1"], ["1F1", "1B1", "1F0", "1B0"]], "wait for each other"),
    ],
)
def test_a_plan_that_fails_its_check_is_a_no(run, tmp_path, programs, part):
    count = 2 if "0F1" in programs[0] else 1
    plan = {"format": "adaptis-plan", "version": 1, "num_microbatches": count}
    stages = [{"layers": [0, 5], "device": 0}, {"layers": [5, 10], "device": 1}]
    (tmp_path / "bad.json").write_text(json.dumps(plan | {"stages": stages, "programs": programs}))
    for words in (("check", "bad.json"), ("simulate", "profile.json", "bad.json")):
        assert part in refused(run(*words), status=1)


def test_every_verb_ends_with_a_next_command_that_works(run, tmp_path):
    plan = ("plan", "profile.json", "--seconds", "0.1", "--memory-gib", "1", "-o", "a plan.json")
    seen, words = [], plan
    while len(seen) < 4:
        code, _, err = run(*words)
        assert code == 0, err
        seen.append(words[0])
        last = err.splitlines()[-1]
        assert last.startswith("next: ")
        words = shlex.split(last.removeprefix("next: "))[1:]
    assert seen == ["plan", "simulate", "simulate", "report"]
    assert (tmp_path / "report.html").is_file()
    code, _, err = run("check", "a plan.json")
    assert err.splitlines()[-1] == "next: adaptis train --help"
    _, _, err = run("compare", "profile.json", "--seconds", "0.1", "--microbatches", "6")
    assert err.splitlines()[-1] == "next: adaptis plan profile.json --microbatches 6 -o plan.json"


def test_check_of_a_presets_plan_says_how_to_train_under_it(run, planned, tmp_path):
    (tmp_path / "its.json").write_text(json.dumps(planned | {"model": "demo-hybrid"}))
    _, _, err = run("check", "its.json")
    words = "train --plan its.json --model.preset demo-hybrid --train.devices 4"
    assert err.splitlines()[-1] == f"next: adaptis {words} --train.microbatches 8"


def test_an_analytic_profile_needs_no_device_and_its_next_command_works(run):
    code, out, err = run("profile", "demo-hybrid", "--analytic", "h100", "-o", "h100.json")
    assert code == 0, err
    assert all(len(line) <= 80 for line in out.splitlines())
    words = shlex.split(err.splitlines()[-1].removeprefix("next: "))
    assert run(*words[1:], "--seconds", "0.1")[0] == 0


@pytest.mark.parametrize("columns", ["80", "40"])
def test_no_figure_is_shortened_and_tables_fit_80_columns(run, planned, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    for words in (
        ("compare", "profile.json", "--seconds", "0.1"),
        ("simulate", "profile.json", "plan.json"),
    ):
        code, out, err = run(*words)
        assert code == 0, err
        rows = [line for line in out.splitlines() if " ms  " in line or "schedule" in line]
        assert len(rows) >= 4
        for line in rows:
            assert len(line) <= 80, line
            assert "…" not in line
            assert "│" not in line


def test_paths_are_never_broken(run, planned, tmp_path):
    deep = tmp_path.joinpath(*["a-rather-long-name"] * 8)
    deep.mkdir(parents=True)
    (tmp_path / "plan.json").rename(deep / "plan.json")
    code, out, _ = run("check", deep / "plan.json")
    assert code == 0
    assert f"{deep / 'plan.json'}: proven." in out
    sentence = refused(run("check", deep / "absent[bold].json"))
    assert f"{deep / 'absent[bold].json'}: no such plan" in sentence
    assert "cannot be" in refused(run("check", "x" * 5000))
    assert "cannot be" in refused(run("plan", "profile.json", "-o", "x" * 5000))


def test_report_writes_every_form_and_spares_its_input(run, planned, tmp_path):
    assert run("simulate", "profile.json", "plan.json", "-o", "timeline.json")[0] == 0
    for name in ("page.html", "page.svg", "page.json", "page.txt"):
        code, out, _ = run("report", "timeline.json", "-o", name, "--json")
        assert code == 0
        assert json.loads(out)["output"] == name
        assert (tmp_path / name).stat().st_size > 100
    assert "give another name" in refused(run("report", "timeline.json", "-o", "timeline.json"))


def process(tmp_path, line, **more):
    return subprocess.run(
        ["/bin/sh", "-c", line.replace("adaptis", f"{sys.executable} -m adaptis")],
        cwd=tmp_path,
        env=dict(os.environ, **more),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


def test_a_reader_that_has_seen_enough_is_no_error(run, planned, tmp_path):
    found = process(tmp_path, "adaptis simulate profile.json plan.json --json | head -1")
    assert found.stdout == "{\n"
    assert "Traceback" not in found.stderr
    assert "BrokenPipe" not in found.stderr


def test_a_terminal_that_knows_ascii_only_gets_the_drawing_all_the_same(run, planned, tmp_path):
    found = process(
        tmp_path, "adaptis simulate profile.json plan.json", PYTHONIOENCODING="ascii", LC_ALL="C"
    )
    assert found.returncode == 0, found.stderr
    assert "device 0" in found.stdout
    assert found.stdout.isascii()


def test_what_needs_torch_says_what_to_install(monkeypatch):
    from adaptis import jobs
    from adaptis.errors import InputError

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'this needs torch: pip install "adaptis\[torch\]"'):
        jobs.measure_profile(jobs.ProfileJob("demo-hybrid"), lambda kind, data: None)


@pytest.fixture
def looped(run, tmp_path):
    """A 1F1B plan of ten layers on two devices, in plan.json."""
    plan = {"format": "adaptis-plan", "version": 1, "num_microbatches": 2}
    stages = [{"layers": [0, 5], "device": 0}, {"layers": [5, 10], "device": 1}]
    programs = [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]]
    plan |= {"stages": stages, "programs": programs}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return plan


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("torch", "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"),
        ("torch-comms", "0SEND_F0"),
        ("megatron", "Et*4|t*4L\n"),
        ("torchtitan", '"tok_embeddings"'),
        ("automodel", '"model.embed_tokens"'),
        ("deepspeed", "[0, 5, 10]\n"),
        ("octopipe", "partition: [4, 4]"),
        ("text", "device 1 |"),
    ],
)
def test_export_writes_each_form_and_says_what_to_do_with_it(run, looped, tmp_path, target, part):
    words = ("export", "plan.json", "--to", target, "--profile", "profile.json")
    code, printed, err = run(*words)
    assert code == 0, err
    assert part in printed
    again = shlex.split(err.splitlines()[-1].removeprefix("next: "))[1:]
    code, out, err = run(*again)
    assert code == 0, err
    assert (tmp_path / again[-1]).read_text() == printed.replace(
        "schedule.csv", f"plan-{target}.csv"
    )
    assert again[-1] in out
    assert err.splitlines()[-1].startswith("next: ")
    code, out, _ = run(*words, "--json")
    assert json.loads(out) == {"to": target, "output": None, "text": printed}


def test_export_refuses_what_it_cannot_say(run, looped, tmp_path):
    assert "give --profile PROFILE" in refused(run("export", "plan.json", "--to", "megatron"))
    (tmp_path / "other.json").write_text(json.dumps(model(layers=[layer(i) for i in range(7)])))
    words = ("export", "plan.json", "--to", "torch", "--profile", "other.json")
    assert "10 layers" in refused(run(*words))
    looped["stages"][0]["recompute"] = True
    (tmp_path / "again.json").write_text(json.dumps(looped))
    assert "no word for the recomputation" in refused(run("export", "again.json", "--to", "torch"))
    looped["programs"][0].pop()
    (tmp_path / "less.json").write_text(json.dumps(looped))
    assert "missing" in refused(run("export", "less.json", "--to", "text"), status=1)


@pytest.mark.parametrize("source", ["torch", "octopipe"])
def test_what_is_exported_is_imported_again(run, looped, tmp_path, source):
    words = ("export", "plan.json", "--to", source, "--profile", "profile.json", "-o", "file")
    assert run(*words)[0] == 0
    code, out, err = run("import", "file", "--from", source, "--profile", "profile.json")
    assert code == 0, err
    assert "file: proven. 10 layers in 2 stages on 2 devices, 2 micro-batches." in out
    code, _, err = run(*shlex.split(err.splitlines()[-1].removeprefix("next: "))[1:-1], "b.json")
    assert code == 0, err
    again = json.loads((tmp_path / "b.json").read_text())
    assert again["programs"] == looped["programs"]
    assert [stage["layers"] for stage in again["stages"]] == [[0, 5], [5, 10]]
    assert run(*shlex.split(err.splitlines()[-1].removeprefix("next: "))[1:])[0] == 0


def test_import_needs_no_profile_and_checks_the_number_of_layers(run, tmp_path):
    (tmp_path / "s.csv").write_text("0F0,0B0\n1F0,1B0\n")
    words = ("import", "s.csv", "--from", "torch", "--layers", 5)
    code, out, err = run(*words, "--json")
    facts = {"num_devices": 2, "num_stages": 2, "num_layers": 5, "num_microbatches": 1}
    assert json.loads(out) == facts | {"output": None}
    code, _, err = run(*words, "-o", "p.json")
    assert (code, err.splitlines()[-1]) == (0, "next: adaptis check p.json")
    operations = [[{"kind": k, "stage": 0, "microbatch": 0} for k in "FB"]]
    names = ("num_microbatches", "num_stages", "num_workers")
    value = dict.fromkeys(names, 1) | {"num_layers": 4, "layer_split": [4]}
    value |= {"stage_to_worker": [0], "operations": operations}
    (tmp_path / "s.json").write_text(json.dumps(value))
    assert run("import", "s.json", "--from", "slackpipe", "--layers", 4)[0] == 0
    words = ("import", "s.json", "--from", "slackpipe", "--layers", 5)
    assert "cuts 4 layers, but --layers says 5" in refused(run(*words))
    (tmp_path / "s.csv").write_text("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    words = ("import", "s.csv", "--from", "torch", "--layers", 5)
    assert "wait for each other" in refused(run(*words), status=1)


def test_check_with_a_profile_proves_the_memory_too(run, planned):
    words = ("check", "plan.json", "--profile", "profile.json")
    code, out, _ = run(*words, "--json")
    assert (code, json.loads(out)["memory_proven"]) == (0, True)
    assert "GiB" in refused(run(*words, "--memory-gib", "0.001"), status=1)
