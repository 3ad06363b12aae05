"""What the ranks of `test_gpu` and `test_device` do: train small models in float64, tell all."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import tiny
import tiny_ops
import torch
from random_plans import schedule_plan
from test_execute_ops import head_plan, merged
from test_transparency import CUTS, plan_of
from torch import nn

from adaptis.execute import checkpoint
from adaptis.execute.device import CPU
from adaptis.execute.reference import Reference
from adaptis.execute.session import Session
from adaptis.execute.train import adamw
from adaptis.execute.wire import NcclWire, StagedWire, wire_of
from adaptis.execute.world import seated
from adaptis.measure.stage import Chain
from adaptis.plan import Stage

SEED, STEPS = 3, 3
CHAIN = functools.partial(tiny_ops.model_of, 6)


class Dropped(nn.Module):
    """No parameters: a stage of it alone knows its device from elsewhere."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.3, self.training)


def dropping():
    """Six layers, two of them dropout."""
    double = torch.float64
    layers = [
        functools.partial(nn.Embedding, tiny.VOCABULARY, tiny.WIDTH, dtype=double),
        Dropped,
        functools.partial(tiny._block, double),
        Dropped,
        functools.partial(tiny._block, double),
        functools.partial(tiny_ops.head, False, False),
    ]
    return Chain(layers, tiny_ops.entropy, name="dropping")


def cases():
    """Name -> (how the model is made, plan)."""
    tied = functools.partial(tiny_ops.model_of, 6, tied=True)
    away = tuple(Stage(2 * d, 2 * d + 2, d, offload=True) for d in range(2))
    away = replace(schedule_plan("gpipe", 2, 4), stages=away)
    again = plan_of("zb-h1", CUTS["zb-h1"], 4, recompute=(0, 1))
    result = {
        "1f1b": (CHAIN, plan_of("1f1b", CUTS["1f1b"], 4)),
        "tied": (tied, plan_of("1f1b", CUTS["1f1b"], 4)),
        "interleaved": (CHAIN, plan_of("interleaved", CUTS["interleaved"], 4)),
        "zb-v": (CHAIN, plan_of("zb-v", CUTS["zb-v"], 4)),
        "recomputed": (CHAIN, again),
        "dropout": (dropping, plan_of("interleaved", CUTS["interleaved"], 4)),
        "dropout, recomputed": (dropping, again),
        "offloaded": (functools.partial(tiny_ops.model_of, 4), away),
    }
    for reductions in (1, 2):
        plan = head_plan(4, reductions)
        tied = reductions == 2
        head = functools.partial(tiny_ops.model_of, plan.num_layers, tied=tied, bias=True)
        result[f"head, {reductions}"] = (head, plan)
    return result


def expected(make, plan, device=CPU):
    """Losses, those of evaluations and final parameters of plain training."""
    plain = Reference(make(), optimizer=tiny.sgd, seed=SEED, device=device)
    losses = []
    for step in range(STEPS):
        batch = tiny.batches(plan.num_microbatches, step, uneven=True)
        losses += [plain.step(batch), plain.evaluate(batch)]
    return losses, numbers(plain.module.global_parameters())


def numbers(parameters):
    return {name: p.detach().cpu().numpy().copy() for name, p in parameters.items()}


def train_rank(seat, connection, names, ways=("own",)):
    """For each way of the messages and each case: losses, parameters, steps and their rows."""
    with seated(seat, connection) as world:
        own = wire_of(world)
        wires = {"own": own, "staged": StagedWire(own)}
        if "ordered" in ways:
            wires["ordered"] = NcclWire(world)
        found = {}
        for way in ways:
            world.wires[world.ranks()] = wires[way]
            for name in names:
                world.phase(f"in {name}, {way}")
                found[name, way] = train(world, *cases()[name])
        return str(world.device), type(own).__name__, found


def train(world, make, plan):
    session = Session(world, make(), plan, optimizer=tiny.sgd, seed=SEED)
    losses, steps = [], []
    for step in range(STEPS):
        batch = tiny.batches(plan.num_microbatches, step, uneven=True)
        steps.append(session.step(batch))
        losses += [steps[-1].loss, session.evaluate(batch)]
    assert all(p.device == world.device for p in session.parameters.values())
    assert all(stage.idle() for stage in session.stages.values())
    return {
        "losses": losses,
        "parameters": numbers(session.parameters),
        "steps": [(s.begin, s.end, [(b, e) for _, b, e in s.rows]) for s in steps],
        "moved": session._executor._host.moved_bytes,
    }


def assert_same(parts, make, plan, device=CPU, tolerance=1e-12):
    """What the ranks found in one case is what one process finds on `device`."""
    losses, weights = expected(make, plan, device)
    for part in parts:
        np.testing.assert_allclose(part["losses"], losses, rtol=tolerance)
    parameters = merged(parts)
    assert parameters.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(parameters[name], value, tolerance, tolerance, err_msg=name)


def assert_rows_lie_in_their_steps(part):
    """One after the other, as the program has them."""
    for begin, end, rows in part["steps"]:
        times = [begin, *(time for row in rows for time in row), end]
        assert rows
        assert times == sorted(times)


def resume_rank(seat, connection, folder):
    """Losses of two steps after a save, without a break and from the checkpoint."""
    with seated(seat, connection) as world:
        make, plan = cases()["1f1b"]
        session = Session(world, make(), plan, optimizer=adamw(), seed=SEED)
        session.step(tiny.batches(4, 0))
        saved = checkpoint.save(session, Path(folder), seed=SEED)
        going_on = [session.step(tiny.batches(4, step)).loss for step in (1, 2)]
        again = []
        for name in ("1f1b", "zb-v"):
            other = Session(world, make(), cases()[name][1], optimizer=adamw(), seed=99)
            checkpoint.load(other, saved)
            again.append([other.step(tiny.batches(4, step)).loss for step in (1, 2)])
        return going_on, again
