"""Double precision models with all that a program can ask for, and how a rank trains one."""

import functools

import tiny
import torch
from random_plans import schedule_plan
from torch import nn
from torch.nn import functional

from adaptis.errors import RankError
from adaptis.execute.session import Session
from adaptis.execute.transport import WireTransport
from adaptis.execute.wire import wire_of
from adaptis.execute.world import seated
from adaptis.measure.stage import Chain
from adaptis.measure.values import Bundle
from adaptis.program import Kind, Value
from adaptis.timeline import timeline_to_json

STEPS = 3
NORM = 0.02  # small enough to clip every step


def entropy(logits, microbatch):
    """As `cross_entropy`, in float64."""
    labels = microbatch["labels"].reshape(-1)
    return functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels, ignore_index=-100, reduction="sum"
    )


def model_of(num_layers, *, tied=False, bias=False, frozen=False):
    """An embedding, blocks and a head, in float64."""
    double = torch.float64
    layers = [
        functools.partial(nn.Embedding, tiny.VOCABULARY, tiny.WIDTH, dtype=double),
        *[functools.partial(tiny._block, double)] * (num_layers - 2),
        functools.partial(head, bias, frozen),
    ]
    ties = {(num_layers - 1, "weight"): (0, "weight")} if tied else None
    return Chain(layers, entropy, name="tiny", tied=ties)


def head(bias, frozen):
    layer = nn.Linear(tiny.WIDTH, tiny.VOCABULARY, bias=bias, dtype=torch.float64)
    return layer.requires_grad_(not frozen)


def rank_of(seat, connection, named):
    """For each case: losses, norms and final parameters; and what `transfer` finds."""
    with seated(seat, connection) as world:
        found = {name: train(world, *case) for name, case in named.items()}
        return found | {"transfer": transfer(world)}


def train(world, plan, options):
    model = model_of(plan.num_layers, **options)
    norm = NORM if plan.clipped else 0.0
    session = Session(world, model, plan, optimizer=tiny.sgd, seed=3, max_norm=norm)
    steps = [
        session.step(tiny.batches(plan.num_microbatches, s, uneven=True)) for s in range(STEPS)
    ]
    idle = all(stage.idle() for stage in session.stages.values())
    assert idle
    assert session.head is None or session.head.idle()
    assert not session._executor._values
    assert not session._executor._coming
    assert session._executor._host.num_bytes == 0
    return {
        "losses": [step.loss for step in steps],
        "norms": [step.norm for step in steps],
        "parameters": {name: p.detach().numpy() for name, p in session.parameters.items()},
        "moved": session._executor._host.moved_bytes,
        "timeline": timeline_to_json(session.timeline(steps[-1], "test")),
    }


def transfer(world):
    """How many receive buffers there are after each step, and what a transport hands on."""
    plan = schedule_plan("1f1b", world.size, 16)
    session = Session(world, model_of(plan.num_layers), plan, optimizer=tiny.sgd, seed=3)
    counts = []
    for length in (12, 12, 7, 12):
        batch = [
            {name: ids[:, :length] for name, ids in microbatch.items()}
            for microbatch in tiny.batches(plan.num_microbatches, 0)
        ]
        session.step(batch)
        counts.append(session._transport.buffers.count())
    return counts, _hand_over(world) if world.rank < 2 else True


def _hand_over(world):
    """A bundle of two types through a transport, and how it refuses another form."""
    values = [Value(Kind.OUTPUT, 0, m) for m in range(3)]
    there = Bundle("[0,1]", (torch.arange(3.0), torch.tensor([[True], [False]])))
    transport = WireTransport(2, 3, wire_of(world))
    transport.begin(["same"] * 3)
    if world.rank == 0:
        transport.send(values[0], 1, there)
        transport.send(values[1], 1, there)
        try:
            transport.send(values[2], 1, torch.zeros(2))
        except RankError as error:
            transport.finish()
            return str(error)
    transport.post(values[0], 0)
    transport.post(values[1], 0)
    second, first = (transport.wait(value) for value in values[1::-1])
    pairs = ((first, there), (second, there))
    return all(
        one.structure == two.structure
        and all(map(torch.equal, one.tensors, two.tensors))
        and [t.dtype for t in one.tensors] == [t.dtype for t in two.tensors]
        for one, two in pairs
    )
