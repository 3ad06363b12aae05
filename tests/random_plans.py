"""Random plans, profiles and clusters that hang together, for tests that compare two opinions."""

import random

from hypothesis import strategies as st

from adaptis.cluster import Cluster, Device, Link
from adaptis.plan import Plan, Stage, named_plan
from adaptis.profile import LayerCost, Overheads, Profile, Shared
from adaptis.program import Compute, Op
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape

seeds = st.integers(0, 2**32 - 1)


def uniform_profile(num_layers, forward=1.0, half=1.0, weight=1.0, **more):
    """Layers that all cost the same; one saved byte each counts what is held."""
    return Profile(
        model="uniform",
        tokens_per_microbatch=1,
        layers=tuple(
            LayerCost(
                name=str(i),
                kind="mlp",
                forward=forward,
                backward_input=half,
                backward_weight=weight,
                backward=half + weight,
                saved_bytes=1,
                saved_weight_bytes=1,
                **more,
            )
            for i in range(num_layers)
        ),
    )


def schedule_plan(name, p, m, v=1, s=1, **more):
    """The plan of a named schedule with one layer a stage."""
    schedule = SCHEDULES[name]
    return named_plan(schedule, Shape(p, m, v, s, **more), range(1, p * v // schedule.copies + 1))


def make_plan(seed, most_devices=4, most_stages=6, most_microbatches=4, recompute=True):
    """A valid plan: any placement, any order that can run, B or I and W, some stages recomputed."""
    rng = random.Random(seed)
    p, m = rng.randint(1, most_devices), rng.randint(1, most_microbatches)
    stages, start = [], 0
    for _ in range(rng.randint(1, most_stages)):
        stop = start + rng.randint(1, 3)
        again = recompute and rng.random() < 0.3
        stages.append(Stage(start, stop, rng.randrange(p), again))
        start = stop
    return Plan(m, tuple(stages), _orders(rng, stages, p, m))


def _orders(  # noqa: C901 - a small state machine
    rng, stages, p, m
):
    last = len(stages) - 1
    split = {(s, b): rng.random() < 0.5 for s in range(last + 1) for b in range(m)}
    explicit = {(s, b): rng.random() < 0.5 for s in range(last + 1) for b in range(m)}
    ready = [Compute(Op.FORWARD, 0, b) for b in range(m)]
    forward_done, backward_done = set(), set()
    orders = [[] for _ in range(p)]

    def backward(s, b):
        """What comes when F of stage s is done and its output gradient is there."""
        if (s, b) in forward_done and (s == last or (s + 1, b) in backward_done):
            if stages[s].recompute and explicit[s, b]:
                ready.append(Compute(Op.RECOMPUTE, s, b))
            else:
                ready.append(Compute(Op.BACKWARD_INPUT if split[s, b] else Op.BACKWARD, s, b))

    while ready:
        c = ready.pop(rng.randrange(len(ready)))
        s, b = c.stage, c.microbatch
        orders[stages[s].device].append(c)
        if c.op is Op.FORWARD:
            forward_done.add((s, b))
            if s < last:
                ready.append(Compute(Op.FORWARD, s + 1, b))
            backward(s, b)
        elif c.op is Op.RECOMPUTE:
            ready.append(Compute(Op.BACKWARD_INPUT if split[s, b] else Op.BACKWARD, s, b))
        elif c.op in (Op.BACKWARD, Op.BACKWARD_INPUT):
            backward_done.add((s, b))
            if s > 0:
                backward(s - 1, b)
            if split[s, b]:
                ready.append(Compute(Op.BACKWARD_WEIGHT, s, b))
    return tuple(map(tuple, orders))


def make_profile(seed, num_layers, overheads=True):
    """Seconds up to 0.01, bytes that add up exactly; now and then a shared parameter."""
    rng = random.Random(seed)

    def seconds():
        return rng.choice((rng.random(), rng.randint(1, 4) / 4)) / 100 + 1e-6

    def size():
        return 8 * rng.randint(0, 40)

    layers = []
    for i in range(num_layers):
        half, weight, saved = seconds(), seconds(), size()
        layers.append(
            LayerCost(
                name=f"layer {i}",
                kind=rng.choice(("attention", "mlp", "embedding", "head")),
                forward=seconds(),
                backward_input=half,
                backward_weight=weight,
                backward=half + weight if rng.random() < 0.5 else seconds(),
                update=rng.choice((0.0, seconds())),
                state_bytes=size(),
                saved_bytes=saved,
                saved_weight_bytes=min(size(), saved),
                output_bytes=size(),
            )
        )
    shared = ()
    if num_layers > 1 and rng.random() < 0.5:
        shared = (Shared(tuple(sorted(rng.sample(range(num_layers), 2))), size()),)
    return Profile(
        model="random",
        tokens_per_microbatch=128,
        layers=tuple(layers),
        overheads=Overheads(*(seconds() for _ in range(6))) if overheads else Overheads(),
        shared=shared,
    )


def make_cluster(seed, num_devices):
    """Devices of three speeds on up to two nodes, with links that matter."""
    rng = random.Random(seed)
    devices = tuple(
        Device(speed=rng.choice((0.5, 1.0, 2.0)), node=rng.randrange(2)) for _ in range(num_devices)
    )
    links = [Link(rng.choice((0.0, 0.001, 0.02)), rng.choice((1e4, 1e5, 1e6))) for _ in range(2)]
    return Cluster(devices, *links)
