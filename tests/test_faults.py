"""Dead, stopped, raising and hanging ranks are named exactly, at once, and no process is left."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import faulty_ranks
import pytest

from adaptis.execute import watch
from adaptis.execute.executor import describe
from adaptis.lower import lower

PROGRAM = lower(faulty_ranks.PLAN)
SCRIPT = str(Path(faulty_ranks.__file__))
FAULTS = [  # rank, what happens, at which position, resume?
    [0, "kill", 11, True],
    [1, "kill", 24, False],
    [2, "kill", 6, False],
    [2, "raise", 15, False],
    [3, "stop", 4, False],
    [1, "sleep", 12, False],
]
WORDS = {
    "kill": "was killed by SIGKILL",
    "raise": "ValueError: the trap was sprung",
    "stop": "is stopped by a signal",
    "sleep": "is hanging",
}


def environment():
    paths = [str(Path(SCRIPT).parent), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(filter(None, paths)))


def place(rank, position):
    return f"(step {faulty_ranks.FAULTY_STEP}, {describe(PROGRAM, rank, position)}"


def inject(folder, faults):
    command = [sys.executable, SCRIPT, str(folder), json.dumps(faults)]
    found = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True)
    return json.loads(found.stdout)


def check(fault, episode, whole):
    rank, how, position, _ = fault
    text = episode["text"]
    assert episode["rank"] == rank
    assert text.startswith(f"rank {rank} ")
    assert place(rank, position) in text
    assert WORDS[how] in text
    if losses := episode.get("losses"):
        assert 1 <= len(losses) <= 3
        assert losses == whole[-len(losses) :]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return inject(tmp_path_factory.mktemp("faults"), FAULTS)


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=lambda n: "-".join(map(str, FAULTS[n])))
def test_a_fault_is_named_with_rank_step_stage_micro_batch_and_instruction(sample, number):
    check(FAULTS[number], sample["episodes"][number], sample["whole"])


def test_every_process_has_ended_a_second_after_a_death_and_five_after_anything_else(sample):
    for fault, episode in zip(FAULTS, sample["episodes"], strict=True):
        assert episode["seconds"] < (1 if fault[1] in ("kill", "raise") else 5), fault


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_a_kill_at_any_instruction_is_named_in_a_second_and_resumes_bitwise(tmp_path, rank):
    faults = [[rank, "kill", position, True] for position in range(len(PROGRAM.devices[rank]))]
    found = inject(tmp_path, faults)
    for fault, episode in zip(faults, found["episodes"], strict=True):
        check(fault, episode, found["whole"])
        assert "losses" in episode
    seconds = [episode["seconds"] for episode in found["episodes"]]
    assert statistics.median(seconds) <= 0.5
    assert max(seconds) <= 1


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def errors_under_torchrun(folder, rank, how, position):
    """What each rank left in its error file, and what all of them printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--log-dir", str(folder / "logs"), "--master-port", free_port(), SCRIPT]
    command += ["torchrun", str(folder), str(rank), how, str(position)]
    run = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert run.returncode == 1
    sprung = float((folder / "when").read_text())
    files = folder.glob("logs/*/attempt_0/*/error.json")
    errors = {int(file.parent.name): json.loads(file.read_text()) for file in files}
    for error in errors.values():
        assert int(error["message"]["extraInfo"]["timestamp"]) > 0
    ended = max(file.stat().st_mtime for file in folder.glob("logs/*/attempt_0/*/error.json"))
    seconds = ended - time.time() + time.monotonic() - sprung
    return {n: error["message"]["message"] for n, error in errors.items()}, run.stderr, seconds


@pytest.mark.parametrize(
    "how",
    ["kill", *(pytest.param(how, marks=pytest.mark.slow) for how in ("raise", "stop", "sleep"))],
)
def test_under_torchrun_every_other_rank_names_the_culprit_and_its_own_place(tmp_path, how):
    errors, printed, seconds = errors_under_torchrun(tmp_path, 1, how, 12)
    words = WORDS | {"kill": "died"}
    assert errors.keys() >= {0, 2, 3}
    for rank in (0, 2, 3):
        cause, _, own = errors[rank].partition(f"; rank {rank} was at: step 2, stage {rank}, ")
        assert cause.startswith("RankError: rank 1 ")
        assert place(1, 12) in cause
        assert words[how] in cause
        assert own.endswith("waiting for its input")
        assert f"adaptis: {errors[rank].removeprefix('RankError: ')}\n" in printed
    assert (1 in errors) == (how in ("raise", "sleep"))
    assert seconds < 5


def test_no_rank_outlives_a_killed_supervisor(tmp_path):
    with subprocess.Popen(
        [sys.executable, SCRIPT, "endless", str(tmp_path)], env=environment()
    ) as run:
        while len(ranks := list(tmp_path.iterdir())) < 4:
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    while any(watch._letter(int(rank.name)) not in ("", "Z") for rank in ranks):
        assert time.monotonic() - killed < 1
        time.sleep(0.01)


class Machine:
    """Ranks whose processes do what the test says, and a clock that it moves."""

    def __init__(self, monkeypatch, folder, count=3):
        path = folder / "records"
        path.write_bytes(watch.blank_records(count))
        self.now, self.letters, self.used = 0.0, ["S"] * count, [0.0] * count
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watch.os, "getpid", lambda: 1 + len(self.ranks))
        monkeypatch.setattr(watch, "_letter", lambda process: self.letters[process - 1])
        monkeypatch.setattr(watch, "_processor_seconds", lambda process: self.used[process - 1])
        self.ranks = []
        for rank in range(count):
            self.ranks.append(watch.ProgressRecord(path, rank))
        self.accounts = [watch.Account("training", {0: ["0F0", "0B0", "STEP"]}) for _ in self.ranks]
        self.watch = watch.Watch(path, self.accounts.__getitem__)

    def stands(self, *positions, step=1):
        """Positions in a step; the ranks after rank 0 wait."""
        for rank, position in zip(self.ranks, positions, strict=True):
            rank.begin(0, step)
            rank.at(position)
        for rank in self.ranks[1:]:
            rank.waits()

    def passes(self, seconds, busy=(), share=1.0):
        """Look until someone is at fault."""
        for _ in range(round(seconds / watch.POLL)):
            self.now += watch.POLL
            for rank in busy:
                self.used[rank] += share * watch.POLL
            if fault := self.watch.look():
                return fault
        return None


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def test_only_the_rank_that_does_not_wait_is_at_fault(machine):
    machine.stands(0, 1, 1)
    fault = machine.passes(4)
    assert fault.rank == 0
    assert fault.text == "rank 0 (step 1, 0F0) is hanging: no progress for 3.0 s"


def test_the_predicted_step_extends_the_deadline(machine):
    machine.accounts[0].take(("program", 0, ["0F0", "0B0", "STEP"], 10.0))
    machine.stands(0, 1, 1)
    assert machine.passes(29) is None
    assert "where a whole step takes 10 s" in machine.passes(2).text


def test_the_longest_step_so_far_extends_the_deadline(machine):
    machine.ranks[0].begin(0, 0)
    machine.now += 10
    machine.ranks[0].leave()
    machine.stands(0, 1, 1)
    assert machine.passes(29) is None
    assert machine.passes(2).rank == 0


def test_a_first_step_may_compile_for_long(machine):
    machine.stands(0, 1, 1, step=0)
    assert machine.passes(100, busy=[0]) is None
    assert machine.passes(30, busy=[0]).rank == 0


def test_a_rank_that_gets_no_processor_is_not_at_fault(machine):
    machine.stands(0, 1, 1)
    machine.letters[0] = "R"
    assert machine.passes(1000, busy=[0], share=0.001) is None


def test_a_phase_outside_of_the_steps_has_no_deadline_while_someone_works(machine):
    machine.ranks[1].waits()
    assert machine.passes(2000, busy=[0]) is None
    assert machine.passes(700).text.startswith(
        "rank 0 (training) and rank 2 (training) are hanging"
    )


def test_a_rank_at_the_end_of_its_step_waits_for_those_behind(machine):
    machine.stands(2, 2, 0)
    machine.ranks[2].resumes()
    assert machine.passes(4).text.startswith("rank 2 (step 1, 0F0) is hanging")


def test_a_circle_of_waiting_ranks_is_named(machine):
    machine.stands(0, 1, 1)
    machine.ranks[0].waits()
    assert machine.passes(4).text.startswith(
        "rank 0 (step 1, 0F0, waiting for its input) and rank 1 (step 1, 0B0, waiting for its "
        "input) and rank 2 (step 1, 0B0, waiting for its input) are waiting in a circle"
    )


def test_a_short_stop_is_forgiven_and_a_long_one_is_named(machine):
    machine.letters[1] = "T"
    assert machine.passes(1) is None
    machine.letters[1] = "S"
    assert machine.passes(1) is None
    machine.letters[1] = "T"
    assert machine.passes(2).text.startswith("rank 1 (training) is stopped by a signal")


def test_the_time_in_which_the_watcher_stood_still_is_not_counted(machine):
    machine.stands(0, 1, 1)
    machine.now += 3600
    assert machine.watch.look() is None
