"""The main job on a tiny model: every step real, every loss that of plain training."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adaptis import demo
from adaptis.plan import load_plan
from adaptis.profile import load_profile
from adaptis.simulate import simulate_plan
from adaptis.timeline import load_timeline

PRESET = """
about = "a tiny hybrid"

[config]
model_type = "nemotron_h"
hybrid_override_pattern = "M-*-"
hidden_size = 32
intermediate_size = 64
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 16
mamba_num_heads = 4
mamba_head_dim = 16
ssm_state_size = 16
n_groups = 1
chunk_size = 16
conv_kernel = 4
expand = 2
vocab_size = 512
max_position_embeddings = 256
tie_word_embeddings = false
pad_token_id = 0
bos_token_id = 0
eos_token_id = 0

[data]
tokenizer = "bytes"
sequence = 32
batch_size = 1
"""
NAMES = ["1f1b", "interleaved-tuned", "1f1b-uneven", "adaptis"]


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    preset = folder / "tiny-hybrid.toml"
    preset.write_text(PRESET)
    settings = demo.Settings(steps=5, microbatches=4, search_seconds=0.3)
    said = []
    outcome = demo.run_model(str(preset), settings, lambda kind, data: said.append(kind))
    summary = demo.write_outputs([outcome], folder / "out")
    return outcome, summary, folder / "out", said


def test_the_contestants_are_the_baselines_and_the_plan(raced):
    assert [entry.plan.schedule for entry in raced[0].entries] == NAMES


def test_every_loss_is_bitwise_that_of_plain_training(raced):
    assert raced[0].loss_difference() == 0.0
    assert raced[0].reference_losses[-1] < raced[0].reference_losses[0]


def test_predicted_peak_memory_is_what_is_measured(raced):
    for entry in raced[0].entries:
        for predicted, measured in zip(
            entry.predicted.peak_bytes, entry.measured.peak_bytes, strict=True
        ):
            assert predicted == pytest.approx(measured, rel=0.05)


def test_a_measured_timeline_holds_the_plan_s_instructions_in_order(raced):
    for entry in raced[0].entries:
        for device, order in enumerate(entry.plan.programs):
            assert tuple(span.compute for span in entry.measured.spans(device)) == order


def test_progress_is_told_from_measuring_to_training(raced):
    assert {"measuring", "profile", "planning", "reference", "step"} <= set(raced[3])


def test_all_files_are_there_and_can_be_read_again(raced):
    _, summary, folder, _ = raced
    assert json.loads((folder / "summary.json").read_text()) == summary
    home = folder / "tiny-hybrid"
    profile = load_profile(home / "profile.json")
    for name in NAMES:
        load_plan(home / f"{name}.plan.json").fits(profile)
        assert load_timeline(home / f"{name}.measured.json").source == "measured"
        assert load_timeline(home / f"{name}.simulated.json").source == "simulated"
    assert "<canvas" in (home / "report.html").read_text()
    assert json.loads((home / "trace.json").read_text())["traceEvents"]
    assert (home / "before-and-after.svg").read_text().startswith("<svg")


def test_the_written_plan_simulates_to_the_predicted_step(raced):
    outcome, _, folder, _ = raced
    home = folder / "tiny-hybrid"
    profile = load_profile(home / "profile.json")
    for entry in outcome.entries:
        plan = load_plan(home / f"{entry.plan.schedule}.plan.json")
        step = simulate_plan(plan, profile, outcome.cluster).step
        assert step == pytest.approx(entry.predicted.step, rel=1e-12)


def test_the_readme_s_ten_lines_train(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    (tmp_path / "ten.py").write_text(code[1])
    found = subprocess.run(
        [sys.executable, "ten.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert float(found.stdout.split()[0]) > 0
