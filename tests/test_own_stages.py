"""A rank holds its own stages and nothing else: what one process cannot hold trains on four."""

import functools
import resource
from pathlib import Path

import pytest
import torch
from test_transparency import plan_of
from torch import nn

from adaptis.execute.launch import launch
from adaptis.execute.session import Session
from adaptis.execute.world import seated
from adaptis.measure.stage import Chain

MIB = 1 << 20
WIDTH, LAYERS = 2048, 32  # 16 MiB of weights each
ROOM = 480 * MIB  # beyond what a process has before it builds anything: 30 layers
CUTS = [(8 * d, 8 * d + 8, d) for d in range(4)]


class Layer(nn.Linear):
    def forward(self, x):
        return x + super().forward(x)


def total(output, microbatch):
    return output.square().mean()


def large():
    layers = [functools.partial(Layer, WIDTH, WIDTH, bias=False)] * LAYERS
    return Chain(layers, total, weight=len_of, name="large")


def len_of(microbatch):
    return float(len(microbatch["inputs"]))


def limit_data():
    """No more than `ROOM` of private memory from now on."""
    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split()[0]) * 1024
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + ROOM, most))


def limited_rank(seat, connection):
    """The losses of training; then, in one of these processes, what becomes of the whole model."""
    with seated(seat, connection) as world:
        limit_data()
        losses = train(world)
        return losses, whole() if world.rank == 0 else ""


def whole():
    try:
        large().build(0, LAYERS, seed=0)
    except (RuntimeError, MemoryError) as error:
        return str(error)
    return "it was built"


def train(world):
    sgd = functools.partial(torch.optim.SGD, lr=1e-9)
    session = Session(world, large(), plan_of("1f1b", CUTS, 2), optimizer=sgd)
    batch = [{"inputs": torch.ones(2, WIDTH)} for _ in range(2)]
    return [session.step(batch).loss for _ in range(2)]


@pytest.mark.slow
def test_four_ranks_train_under_a_limit_in_which_one_process_cannot_build_the_model():
    ranks = launch(limited_rank, 4)
    for losses, _ in ranks:
        assert losses[1] < losses[0]
    assert "memory" in ranks[0][1]
