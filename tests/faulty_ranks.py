"""Runs of four ranks in which one dies, stops, raises or hangs at a chosen instruction.

As a program, it runs a list of such runs one after another and prints what became of them as JSON.
"""

import functools
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import tiny
from test_transparency import plan_of

from adaptis.errors import RankError
from adaptis.execute.launch import launch
from adaptis.execute.train import Job, run
from adaptis.execute.world import launched, seated

MICROBATCHES, STEPS, FAULTY_STEP = 4, 4, 2
PLAN = plan_of("1f1b", ((0, 1, 0), (1, 3, 1), (3, 5, 2), (5, 6, 3)), MICROBATCHES)


class Trap:
    """A rank's progress record, in which something happens at one instruction."""

    def __init__(self, record, how, position, folder):
        self.record, self.how, self.position, self.folder = record, how, position, folder
        self.step = -1

    def __getattr__(self, name):
        return getattr(self.record, name)

    def begin(self, program, step):
        self.step = step
        self.record.begin(program, step)

    def at(self, position):
        self.record.at(position)
        if (self.step, position) == (FAULTY_STEP, self.position):
            Path(self.folder, "when").write_text(str(time.monotonic()))
            act(self.how)


def act(how):
    match how:
        case "kill" | "stop":
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        case "raise":
            raise ValueError("the trap was sprung")
        case "sleep":
            time.sleep(3600)
        case "spin":
            while True:
                pass


def job_of(folder, *, resume=False):
    batches = functools.partial(tiny.batches, MICROBATCHES)
    chain = functools.partial(tiny.chain, 4)
    return Job(chain, batches, STEPS, PLAN, seed=3, folder=folder, save_every=1, resume=resume)


def trapped_run(world, job, rank, how, position):
    if world.rank == rank:
        world.progress = Trap(world.progress, how, position, job.folder)
    return run(world, job)


def trapped_rank(seat, connection, *args):
    with seated(seat, connection) as world:
        return trapped_run(world, *args).losses


def plain_rank(seat, connection, job):
    with seated(seat, connection) as world:
        return run(world, job).losses


def endless_rank(seat, connection, folder):
    with seated(seat, connection) as world:
        Path(folder, str(os.getpid())).touch()
        time.sleep(3600)
        world.barrier()


def episode(folder, rank, how, position, *, resume):
    """What a fault was called, after how many seconds, and the losses of the resumed run."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir()
    try:
        launch(trapped_rank, 4, job_of(folder), rank, how, position)
        raise SystemExit("the trap was not sprung")
    except RankError as error:
        seconds = time.monotonic() - float(Path(folder, "when").read_text())
        found = {"text": str(error), "rank": error.rank, "seconds": seconds}
    if resume:
        found["losses"] = launch(plain_rank, 4, job_of(folder, resume=True))[0]
    return found


def main(folder, cases):
    whole = launch(plain_rank, 4, replace(job_of(str(folder / "whole")), save_every=0))[0]
    episodes = []
    for rank, how, position, resume in cases:
        found = episode(str(folder / "run"), rank, how, position, resume=resume)
        episodes.append(found | {"case": [rank, how, position]})
    sys.stdout.write(json.dumps({"whole": whole, "episodes": episodes}))


def under_torchrun(folder, rank, how, position):
    """One rank of a run that torchrun started."""
    with launched(lambda kind, data: None) as world:
        trapped_run(world, job_of(folder), rank, how, position)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["torchrun", folder, rank, how, position]:
            under_torchrun(folder, int(rank), how, int(position))
        case ["endless", folder]:
            launch(endless_rank, 4, folder)
        case [folder, cases]:
            main(Path(folder), json.loads(cases))
