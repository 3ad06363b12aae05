"""`adaptis train` and `adaptis.train` as their users run them: whole processes, tiny models."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from processes import helpers_of, ranks_of

PRESET = """
about = "four tiny blocks"

[config]
model_type = "llama"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 4
num_attention_heads = 2
num_key_value_heads = 1
vocab_size = 512
max_position_embeddings = 64
tie_word_embeddings = false
pad_token_id = 0
bos_token_id = 0
eos_token_id = 0

[data]
tokenizer = "bytes"
sequence = 32
"""
TRAINING = """
[model]
preset = "tiny.toml"

[data]
text = "text"

[train]
devices = 2
microbatches = 4
steps = 4
search_seconds = 0.5
folder = "run"
"""
SCRIPT = """
import functools

import torch
from torch import nn

import adaptis


def batches(step):
    ids = torch.arange(4 * 9).reshape(4, 1, 9).add(step) % 16
    return [
        {{"inputs": row[:, :-1].contiguous(), "labels": row[:, 1:].contiguous()}} for row in ids
    ]


def layers(make):
    return [make(nn.Embedding, 16, 8), *[make(nn.Linear, 8, 8) for _ in range(3)],
            make(nn.Linear, 8, 16)]


def run():
    for make in (functools.partial, lambda kind, *sizes: kind(*sizes)):
        model = adaptis.Chain(layers(make))
        result = adaptis.train(model, batches, devices=2, steps=3, search_seconds=0.3)
        print("losses", *result.losses)
        print("plan", result.plan.num_devices, result.plan.num_layers)


{guard}
    run()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    (path / "tiny.toml").write_text(PRESET)
    (path / "train.toml").write_text(TRAINING)
    (path / "text").mkdir()
    (path / "text" / "words.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 99)
    return path


def environment(folder, **more):
    return dict(os.environ, ADAPTIS_CACHE=str(folder / "cache"), PYTHONWARNINGS="default") | more


def adaptis(folder, *words, **more):
    command = [sys.executable, "-m", "adaptis", *words]
    env = environment(folder, **more)
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture(scope="module")
def first(folder):
    found = adaptis(folder, "train", "train.toml", "--json")
    assert found.returncode == 0, found.stderr
    return found


def test_a_run_prints_one_json_object_and_leaves_every_file(folder, first):
    result = json.loads(first.stdout)
    assert len(result["losses"]) == result["step"] == 4
    assert result["losses"][0] == result["loss_first"]
    assert result == json.loads((folder / "run" / "result.json").read_text())
    for name in ("plan", "profile", "cluster", "timeline"):
        json.loads((folder / "run" / f"{name}.json").read_text())
    assert (folder / result["checkpoint"]).is_dir()


def test_progress_without_a_terminal_is_a_few_lines(first):
    lines = first.stderr.splitlines()
    assert len(lines) < 15
    assert sum(line.startswith("training") for line in lines) in (2, 3, 4)


def test_the_next_command_of_a_run_works_as_printed(folder, first):
    last = first.stderr.splitlines()[-1]
    words = shlex.split(last.removeprefix("next: "))
    assert words[0] == "adaptis"
    assert adaptis(folder, *words[1:]).returncode == 0
    assert (folder / words[words.index("-o") + 1]).is_file()


def test_resume_goes_on_where_the_run_ended_under_its_own_plan(folder, first):
    before = (folder / "run" / "plan.json").read_text()
    found = adaptis(
        folder, "train", "--train.steps", "6", "train.toml", "--resume", "--train.folder=run"
    )
    assert found.returncode == 0, found.stderr
    assert "at step 4" in found.stderr
    assert "measuring" not in found.stderr
    assert (folder / "run" / "plan.json").read_text() == before
    assert found.stdout.startswith("step: 6\n")
    assert len(json.loads((folder / "run" / "result.json").read_text())["losses"]) == 2


def test_torchrun_trains_to_the_same_losses(folder, first):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(port), "-m", "adaptis", "train", "train.toml"]
    command += ["--plan", "run/plan.json", "--train.folder", "under-torchrun", "--json"]
    found = subprocess.run(
        command,
        cwd=folder,
        env=environment(folder, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["losses"] == json.loads(first.stdout)["losses"]


@pytest.mark.slow
def test_two_replicas_train_to_the_losses_of_one_pipeline_and_go_on_from_their_checkpoint(
    folder, first
):
    expected = json.loads(first.stdout)["losses"]
    options = ["--train.microbatches", "2", "--train.folder", "replicas", "--json"]
    options += ["--train.devices", "4", "--train.replicas", "2"]
    found = adaptis(folder, "train", "train.toml", *options)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["losses"] == pytest.approx(expected, rel=1e-5)
    plan = (folder / "replicas" / "plan.json").read_text()
    assert json.loads(plan)["replicas"] == 2
    more = adaptis(folder, "train", "train.toml", *options, "--resume", "--train.steps", "5")
    assert more.returncode == 0, more.stderr
    assert "measuring" not in more.stderr
    assert len(json.loads(more.stdout)["losses"]) == 1


def test_a_port_in_use_under_torchrun_is_one_sentence(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        found = adaptis(folder, "train", "train.toml", **rank, MASTER_PORT=port)
    assert found.returncode == 2
    assert found.stderr.startswith("adaptis: the rendezvous port 127.0.0.1:")
    assert len(found.stderr.splitlines()) == 1


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def disturbed(folder, first, disturb):
    """A run that would train for ever, and what became of it: status, stderr, seconds, orphans."""
    assert first.returncode == 0
    command = [sys.executable, "-m", "adaptis", "train", "train.toml"]
    command += ["--train.steps=100000000", "--train.folder=endless", "--plan", "run/plan.json"]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        assert run.stderr is not None
        lines = []
        for line in run.stderr:
            lines.append(line)
            if line.startswith("training"):
                break
        ranks, started = ranks_of(run.pid), helpers_of(run.pid)
        assert len(ranks) == 2, lines
        begin = time.monotonic()
        disturb(run, ranks)
        rest = run.stderr.read()
        status = run.wait(timeout=30)
        seconds = time.monotonic() - begin
        while time.monotonic() - begin < 5 and any(map(alive, started)):
            time.sleep(0.05)
        return status, rest, seconds, [process for process in started if alive(process)]


def test_an_interrupt_ends_every_process_at_once_with_one_sentence(folder, first):
    status, text, seconds, orphans = disturbed(
        folder, first, lambda run, ranks: os.killpg(run.pid, signal.SIGINT)
    )
    assert status == 130
    assert text == "adaptis: interrupted; every process of the run has ended\n"
    assert seconds < 5
    assert orphans == []


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_named_with_its_place(folder, first):
    status, text, seconds, orphans = disturbed(
        folder, first, lambda run, ranks: os.kill(max(ranks), signal.SIGKILL)
    )
    assert status == 1
    last = text.splitlines()[-1]
    named = "adaptis: rank 1 was killed by SIGKILL ("
    assert last.startswith((f"{named}step ", f"{named}training"))  # within a step, or between two
    assert "Traceback" not in text
    assert seconds < 5
    assert orphans == []


def script(tmp_path, guard):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(SCRIPT).format(guard=guard))
    return subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.slow
def test_a_script_trains_a_chain_of_functions_and_one_of_modules(tmp_path):
    found = script(tmp_path, 'if __name__ == "__main__":')
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 4
    for line in (lines[0], lines[2]):
        losses = [float(word) for word in line.split()[1:]]
        assert len(losses) == 3
        assert all(2 < loss < 4 for loss in losses)
    assert lines[1] == lines[3] == "plan 2 5"


def test_a_script_without_the_main_guard_ends_with_a_clear_sentence(tmp_path):
    found = script(tmp_path, "if True:")
    assert found.returncode != 0
    assert '__name__ == "__main__"' in found.stderr.splitlines()[-1]
