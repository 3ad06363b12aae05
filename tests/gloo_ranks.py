"""Real processes that run one program after another over gloo; computations do nothing.

Under posted semantics a send is `isend`, a receive `irecv`, and who reads a value waits for it.
Under rendezvous both are waited for at once, as in `dist.send` and `dist.recv`: gloo ends a send
only when the other end receives, whatever the size. Joins are asynchronous collectives under both,
each kind in a process group of its own.
"""

import contextlib
import multiprocessing
from datetime import timedelta

import torch
import torch.distributed as dist

from adaptis.check import Semantics
from adaptis.program import Join, Kind, Receive, Send, Together

KINDS = list(Kind)


class Ranks:
    """Three processes, spawned once."""

    def __init__(self, folder, count=3):
        context = multiprocessing.get_context("spawn")
        self.number, self.ranks = 0, []
        for rank in range(count):
            here, there = context.Pipe()
            args = (rank, str(folder / "store"), there)
            process = context.Process(target=serve, args=args, daemon=True)
            process.start()
            self.ranks.append((process, here))

    def run(self, program, semantics, seconds):
        """What each rank has to say at the end: "" if all went well."""
        self.number += 1
        ranks = self.ranks[: len(program.devices)]
        for _, connection in ranks:
            connection.send((self.number, program, semantics, seconds))
        return [connection.recv() for _, connection in ranks]

    def end(self):
        for process, connection in self.ranks:
            connection.send(None)
            process.join(10)
            process.kill()


def serve(rank, path, connection):
    torch.set_num_threads(1)
    store = dist.FileStore(path, -1)
    while (task := connection.recv()) is not None:
        number, program, semantics, seconds = task
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(str(number), store),
            rank=rank,
            world_size=len(program.devices),
            timeout=timedelta(seconds=60),
        )
        answer = ""
        try:
            groups = [dist.new_group(timeout=timedelta(seconds=60)) for _ in range(3)]
            dist.barrier()
            run(rank, program, semantics, timedelta(seconds=seconds), groups)
        except (RuntimeError, AssertionError) as error:
            answer = f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
        connection.send(answer)


def run(rank, program, semantics, limit, groups):
    """One device's program; raises where it waits longer than `limit`."""
    brought, sent, joined = {}, [], []  # value -> (work, buffer, what it has to hold)
    blocking = semantics is Semantics.RENDEZVOUS
    for instruction in program.devices[rank]:
        for value in program.layout.reads(instruction):
            if value in brought:
                arrived(*brought.pop(value), limit)
        match instruction:
            case Send(value, target):
                work = dist.isend(content(value), target)
                if blocking:
                    work.wait(limit)
                else:
                    sent.append(work)
            case Receive(value, source):
                buffer = torch.zeros(3)
                entry = (dist.irecv(buffer, source), buffer, content(value))
                if blocking:
                    arrived(*entry, limit)
                else:
                    brought[value] = entry
            case Join():
                joined += join(instruction, program, groups, brought)
    for work in (*sent, *joined):
        work.wait(limit)
    dist.barrier()


def join(instruction, program, groups, brought):
    what, last = instruction.what, program.layout.placement[-1]
    tensor = torch.full((3,), float(instruction.microbatch))
    if what is Together.SHARE:
        others = [rank for rank in range(len(program.devices)) if rank != last]
        return [dist.isend(tensor, rank, group=groups[0]) for rank in others]
    if what is Together.TAKE:
        buffer = torch.zeros(3)
        work = dist.irecv(buffer, last, group=groups[0])
    else:
        buffer, tensor = tensor.clone(), tensor * len(program.devices)
        group = groups[1 if what is Together.SUM_S else 2]
        work = dist.all_reduce(buffer, group=group, async_op=True)
    for value in program.layout.writes(instruction):
        brought[value] = (work, buffer, tensor)
    # A received value is waited for by who reads it, and a second wait would not end.
    return [] if what is Together.TAKE else [work]


def arrived(work, buffer, expected, limit):
    work.wait(limit)
    assert torch.equal(buffer, expected), f"{buffer} in place of {expected}"


def content(value):
    """What tells one value from another."""
    numbers = KINDS.index(value.kind), value.stage, value.microbatch
    return torch.tensor(numbers, dtype=torch.float32)
