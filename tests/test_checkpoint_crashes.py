"""A save that is killed at any call to the file system leaves a whole checkpoint, never a mixed.

Two ranks, forked by a process that does nothing else, save over a pipe instead of a network; one of
them is killed by SIGKILL at its n-th call: before it, after it, or, where it writes, half-way.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")
MODES = ("before", "half", "after")


class Pair:
    """One of two ranks that talk over pipes."""

    size = 2

    def __init__(self, rank, read, write):
        self.rank, self._read, self._write = rank, read, write

    def gather(self, text):
        data = text.encode()
        try:
            REAL["write"](self._write, len(data).to_bytes(8) + data)
        except BrokenPipeError:
            os._exit(1)  # the other was killed
        other = self._exactly(int.from_bytes(self._exactly(8))).decode()
        return [text, other] if self.rank == 0 else [other, text]

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            part = os.read(self._read, size - len(data))
            if not part:
                os._exit(1)  # the other was killed
            data += part
        return data

    def broadcast(self, text, source=0):
        return self.gather(text or "")[source]

    def sum(self, number):
        return sum(float(text) for text in self.gather(str(number)))


REAL = {name: getattr(os, name) for name in CALLS}


def armed(limit, mode):
    """Every call counts; this process dies at number `limit`."""
    count = 0

    def wrap(name):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            deadly = count == limit
            if deadly and mode == "half" and name == "write":
                REAL[name](args[0], args[1][: len(args[1]) // 2])
            if deadly and mode != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return REAL[name](*args, **kwargs)
            finally:
                if deadly:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    return lambda: count


def session(world, step):
    """A rank's state, all of whose numbers tell the step."""
    import torch

    names = (f"layers.{2 * world.rank + i}.weight" for i in range(2))
    parameters = {name: torch.nn.Parameter(torch.full((40,), float(step))) for name in names}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)
    for parameter in parameters.values():
        optimizer.state[parameter] = {"momentum_buffer": torch.full((40,), float(step))}
    model = SimpleNamespace(name="toy")
    return SimpleNamespace(
        world=world,
        model=model,
        steps=step,
        parameters=parameters,
        buffers={},
        optimizer=optimizer,
        schedule=None,
        mesh=SimpleNamespace(is_first_row=True),
    )


def saved(folder, step, victim=-1, limit=0, mode="before"):
    """Two ranks save; how many calls each made, or -1 where it did not come to an end."""
    from adaptis.execute import checkpoint

    ends = [os.pipe(), os.pipe()]
    children = []
    for rank in range(2):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ends[rank][1])
            os.close(ends[1 - rank][0])
            world = Pair(rank, ends[rank][0], ends[1 - rank][1])
            state = session(world, step)
            count = armed(limit if rank == victim else 0, mode)
            checkpoint.save(state, folder, seed=0)
            REAL["write"](write, str(count()).encode())
            os._exit(0)
        os.close(write)
        children.append((child, read))
    for end in itertools.chain(*ends):
        os.close(end)
    told = []
    for child, read in children:
        told.append(int(os.read(read, 100) or b"-1"))
        os.close(read)
        os.waitpid(child, 0)
    return told


def verdict(folder, old, new):
    """The step that can be loaded, or what is wrong with it."""
    from adaptis.execute import storage

    try:
        found = storage.Checkpoint(storage.newest(folder))
    except Exception as error:
        return f"nothing can be loaded: {error}"
    numbers = {
        number
        for name, part in found.tensors.items()
        if not name.startswith("random")
        for number in part.read().tolist()
    }
    if numbers != {float(found.step)} or len(found.tensors) != 10:
        return f"mixed: step {found.step} holds {numbers} in {len(found.tensors)} tensors"
    return "" if found.step in (old, new) else f"step {found.step} is there"


def sweep(folder, every):
    """Kill at every `every`-th point, one attempt after the other in one folder."""
    import torch

    from adaptis.execute import storage

    torch.set_num_threads(1)
    session(SimpleNamespace(rank=0), 0)  # what torch imports late, it imports before the forks
    storage.CHUNK = 512  # many writes
    old, wrong, points, kept = 1, [], 0, 0
    for step in (1, 2, 3):
        totals = saved(folder, step)
    old = 3
    cases = itertools.product(range(2), MODES)
    for number, (victim, mode) in enumerate(cases):
        for limit in range(1 + number % every, totals[victim] + 1, every):
            # Every third attempt is at a step that is there already.
            new = old if points % 3 == 2 else old + 1
            done = saved(folder, new, victim, limit, mode)
            problem = verdict(folder, old, new)
            if done[victim] >= 0:
                problem = problem or f"not killed: {done}"
            if problem:
                wrong.append(f"rank {victim}, {mode} call {limit}: {problem}")
            points += 1
            found = storage.Checkpoint(storage.newest(folder))
            kept += found.step != new
            old = found.step
    totals = saved(folder, old + 1)
    left = sorted(path.name for path in folder.iterdir())
    return {
        "points": points,
        "old_kept": kept,
        "wrong": wrong,
        "last": verdict(folder, old + 1, old + 1),
        "left": len(left),
        "hidden": [name for name in left if name.startswith(".")],
    }


def swept(folder, every):
    command = [sys.executable, "-W", "ignore", __file__, str(folder), str(every)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def check_sweep(found, least):
    assert found["wrong"] == []
    assert found["points"] >= least
    assert 0 < found["old_kept"] < found["points"]
    assert found["last"] == ""
    assert found["hidden"] == []
    assert found["left"] == 2


def test_a_save_killed_at_some_calls_leaves_a_whole_checkpoint(tmp_path):
    check_sweep(swept(tmp_path, 9), 20)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_save_killed_at_every_call_leaves_a_whole_checkpoint(tmp_path):
    check_sweep(swept(tmp_path, 1), 150)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(sweep(Path(sys.argv[1]), int(sys.argv[2]))))
