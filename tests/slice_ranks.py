"""Layers that look back over the slices of a sequence, and a rank that trains them."""

import functools

import torch
from random_training import VOCABULARY, WIDTH, Causal, loss
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaptis.execute.session import Session
from adaptis.execute.world import seated
from adaptis.measure.slices import carried
from adaptis.measure.stage import Chain

LENGTH, SEED, STEPS = 13, 3, 2
sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Looking(Causal):
    dropped = 0.0  # slices draw other numbers than whole sequences


class Again(Looking):
    """Computed once more in the backward, which asks once more for the slices before."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        memory = carried(self)
        state = torch.zeros_like(x[:, 0]) if memory.earlier is None else memory.earlier
        states = []
        for token in self.entry(x).unbind(1):
            state = torch.tanh(0.7 * state + token)
            states.append(state)
        memory.later = state
        return x + torch.stack(states, 1)


def model(*kinds):
    def made(kind, *sizes):
        return functools.partial(lambda: kind(*sizes).double())

    blocks = [made(kind) for kind in kinds]
    ends = made(nn.Embedding, VOCABULARY, WIDTH), made(nn.Linear, WIDTH, VOCABULARY)
    return Chain([ends[0], *blocks, ends[1]], loss, name="looking back")


def batch(count, step):
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (count, 2, LENGTH + 1), generator=random)
    return [{"inputs": t[:, :-1], "labels": t[:, 1:]} for t in tokens]


def train_rank(seat, connection, cases):
    """For each case of kinds and a plan: the losses and this rank's parameters."""
    with seated(seat, connection) as world:
        return [train(world, number, *case) for number, case in enumerate(cases)]


def train(world, number, kinds, plan):
    session = Session(world, model(*kinds), plan, optimizer=sgd, seed=SEED, key=number)
    losses = []
    for step in range(STEPS):
        losses.append(session.step(batch(plan.num_sequences, step)).loss)
        losses.append(session.evaluate(batch(plan.num_sequences, step + 1)))
    assert all(stage.idle() for stage in session.stages.values())
    return losses, {name: p.detach().numpy() for name, p in session.parameters.items()}
