"""Tiny models, batches and rank functions that the tests' processes import."""

import functools
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from adaptis.execute import checkpoint
from adaptis.execute.reference import Reference
from adaptis.execute.session import Session
from adaptis.execute.train import adamw
from adaptis.execute.world import seated
from adaptis.measure.stage import Chain

WIDTH, VOCABULARY, LENGTH = 16, 32, 12
sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Block(nn.Module):
    def __init__(self, width=WIDTH, hidden=24):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Dies(nn.Module):
    """Kills, stops or raises in its process at the n-th forward."""

    def __init__(self, how, after):
        super().__init__()
        self.how, self.after = how, after
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.after -= 1
        if self.after < 0:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "exit":
                os._exit(3)
            raise ValueError("the layer does not like this input")
        return x * self.scale


def chain(num_blocks=4, dtype=torch.float32, tied=False):
    layers = [
        functools.partial(nn.Embedding, VOCABULARY, WIDTH, dtype=dtype),
        *[functools.partial(_block, dtype)] * num_blocks,
        functools.partial(nn.Linear, WIDTH, VOCABULARY, bias=False, dtype=dtype),
    ]
    ties = {(num_blocks + 1, "weight"): (0, "weight")} if tied else None
    return Chain(layers, name="tiny", tied=ties)


def _block(dtype):
    return Block().to(dtype)


def dying(how, after, num_blocks=4):
    layers = [
        functools.partial(nn.Embedding, VOCABULARY, WIDTH),
        *[Block] * (num_blocks - 1),
        functools.partial(Dies, how, after),
        functools.partial(nn.Linear, WIDTH, VOCABULARY),
    ]
    return Chain(layers, name="dying")


def batches(num_microbatches, step, uneven=False):
    """The micro-batches of one step; with `uneven`, some labels do not count."""
    rng = np.random.default_rng(step)
    result = []
    for m in range(num_microbatches):
        ids = torch.from_numpy(rng.integers(0, VOCABULARY, (2, LENGTH + 1)))
        labels = ids[:, 1:].clone()
        if uneven:
            labels[:, : m + 1] = -100
        result.append({"inputs": ids[:, :-1].clone(), "labels": labels})
    return result


def train_plain(make, num_microbatches, steps, uneven=False):
    """Losses and final parameters of plain training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = make()
        plain = Reference(model, optimizer=sgd, seed=3)
        losses = [plain.step(batches(num_microbatches, step, uneven)) for step in range(steps)]
        whole = plain.module.global_parameters()
        return losses, {name: p.detach().numpy().copy() for name, p in whole.items()}
    finally:
        torch.set_num_threads(threads)


def train_rank(seat, connection, cases, steps):
    """For each case (make, plan, uneven): the losses and this rank's final parameters."""
    with seated(seat, connection) as world:
        return [_train(world, make, plan, steps, uneven) for make, plan, uneven in cases]


def _train(world, make, plan, steps, uneven):
    session = Session(world, make(), plan, optimizer=sgd, seed=3)
    losses = [
        session.step(batches(plan.num_microbatches, step, uneven)).loss for step in range(steps)
    ]
    assert all(stage.idle() for stage in session.stages.values())
    return losses, {name: p.detach().numpy() for name, p in session.parameters.items()}


def resume_rank(seat, connection, make, plans, folder):
    """Two steps under plans[0], saved; two more under each plan, from the checkpoint."""
    with seated(seat, connection) as world:
        session = Session(world, make(), plans[0], optimizer=adamw(), seed=3)
        for step in range(2):
            session.step(batches(plans[0].num_microbatches, step))
        saved = checkpoint.save(session, Path(folder), seed=3)
        going_on = [session.step(batches(4, step)).loss for step in (2, 3)]
        again = []
        for plan in plans:
            other = Session(world, make(), plan, optimizer=adamw(), seed=99)
            checkpoint.load(other, saved)
            assert other.steps == 2
            again.append([other.step(batches(4, step)).loss for step in (2, 3)])
        return str(saved), going_on, again


def one_step_rank(seat, connection, make, plan):
    with seated(seat, connection) as world:
        session = Session(world, make(), plan, optimizer=sgd, seed=3)
        world.phase("training")
        for step in range(2):
            session.step(batches(plan.num_microbatches, step))


def raises_rank(seat, connection, text):
    with seated(seat, connection):
        raise ValueError(text)


def quits_rank(seat, connection):
    with seated(seat, connection) as world:
        if world.rank == 1:
            os._exit(0)
        world.barrier()


def sleeps_on_rank(seat, connection, seconds):
    with seated(seat, connection) as world:
        world.phase("sleeping")
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
