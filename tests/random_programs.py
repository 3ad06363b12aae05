"""Random valid plans with all that a plan can ask for: `make_any_plan(seed)`.

Slices, fused pairs, two copies, copies to the host, sharded stages, replicas, a head sharded over
all devices with one or two reductions. What must come before what is asked of `Layout`, so the
orders are as many as the rules allow.
"""

import random
from dataclasses import replace

from adaptis.check import check
from adaptis.errors import DeadlockError
from adaptis.lower import lower
from adaptis.plan import Plan, Stage
from adaptis.program import BACKWARDS, Compute, Kind, Op, Overlap


def make_any_plan(seed, most_devices=4, most_stages=6, most_microbatches=4):
    """A valid plan; the smaller the numbers, the less of everything.

    Args:
        seed: anything that `random.Random` takes.
        most_devices: at most so many devices, at least one.
        most_stages: of all copies together.
        most_microbatches: slices counted.
    """
    rng = random.Random(seed)
    p, m = rng.randint(1, most_devices), rng.randint(1, most_microbatches)
    copies = 2 if most_stages > 1 and rng.random() < 0.25 else 1
    length = rng.randint(1, most_stages // copies)
    reductions = rng.choice((0, 0, 1, 2)) if copies == 1 else 0
    replicas = rng.choice((1, 1, 2))
    sharded = replicas > 1 and rng.random() < 0.7
    cuts, start = [], 0
    for _ in range(length):
        cuts.append((start, start + rng.randint(1, 3)))
        start = cuts[-1][1]
    stages = []
    for a, b in cuts * copies:
        again = rng.random() < 0.3
        offload = not again and rng.random() < 0.4
        stages.append(Stage(a, b, rng.randrange(p), again, offload, sharded and rng.random() < 0.7))
    plan = Plan(
        num_microbatches=m,
        stages=tuple(stages),
        programs=((),) * p,
        previous=_slices(rng, m, copies) if rng.random() < 0.4 else (),
        replicas=replicas,
        head_reductions=reductions,
        clipped=rng.random() < 0.3,
    )
    computes, needs = _computations(rng, plan)
    while True:
        found = replace(plan, programs=_orders(rng, plan, computes, needs))
        try:
            check(lower(found))
        except DeadlockError:
            # Only a broadcast of the head's input, which waits for all devices, can be in the way.
            assert reductions
            continue
        return found


def _slices(rng, m, copies):
    """Each micro-batch continues an earlier one of its copy, or none."""
    free, previous = set(range(m)), []
    for i in range(m):
        earlier = [j for j in free if j < i and j % copies == i % copies]
        previous.append(rng.choice(earlier) if earlier and rng.random() < 0.7 else -1)
        free.discard(previous[-1])
    return tuple(previous)


def _computations(rng, plan):
    """Each computation as (device, computation), and what must have been before it."""
    layout, computes = plan.layout, []
    for m in range(plan.num_microbatches):
        for s in layout.stages_of(m):
            ops = [Op.FORWARD, Op.BACKWARD]
            if rng.random() < 0.5:
                ops[1:] = Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT
            if s in layout.recomputed and rng.random() < 0.5:  # else `lower` adds it
                ops.append(Op.RECOMPUTE)
            computes += [(layout.placement[s], Compute(op, s, m)) for op in ops]
        if layout.reductions:
            for device in range(plan.num_devices):
                ops = (Op.SCORES, Op.SCORES_GRADIENT)
                computes += [(device, Compute(op, layout.num_stages, m)) for op in ops]
    writers = {}
    for device, compute in computes:
        if compute.op not in (Op.SCORES, Op.SCORES_GRADIENT):
            for value in layout.writes(compute):
                writers[value] = (device, compute)
    return computes, {at: set(_needs(layout, computes, writers, at)) for at in computes}


def _needs(layout, computes, writers, at):
    device, compute = at
    head, m = layout.num_stages, compute.microbatch
    for value in layout.reads(compute):
        summed = Op.SCORES_GRADIENT if layout.reductions == 2 else Op.SCORES
        if value.kind is Kind.SUMS:
            yield from ((d, c) for d, c in computes if c == Compute(Op.SCORES, head, m))
        elif layout.reductions and value == next(_gradient_of_head(layout, m)):
            yield from ((d, c) for d, c in computes if c == Compute(summed, head, m))
        elif value in writers:
            yield writers[value]
        elif value.kind is Kind.SAVED and value.stage == head:
            yield device, Compute(Op.SCORES, head, m)
        elif value.kind is Kind.SAVED:  # of an R that `lower` adds
            yield device, Compute(Op.FORWARD, value.stage, m)
        else:
            assert value.kind is Kind.PARAMETERS


def _gradient_of_head(layout, m):
    last = Compute(Op.BACKWARD, layout.num_stages - 1, m)
    return (value for value in layout.reads(last) if value.kind is Kind.INPUT_GRAD)


def _orders(rng, plan, computes, needs):
    """Any order that can run; now and then two computations that can both run are one."""
    orders, done, left = [[] for _ in plan.programs], set(), list(computes)
    fuse = rng.choice((0.0, 0.3))
    sums = {op: [] for op in (Op.SCORES, Op.SCORES_GRADIENT)}  # all devices add up in one order
    while left:
        ready = [at for at in left if needs[at] <= done and _in_turn(sums, at, orders)]
        device, compute = rng.choice(ready)
        works = [compute]
        others = [c for d, c in ready if d == device and c.op is not compute.op]
        others = [c for c in others if _fusible(compute, c)]
        if others and rng.random() < fuse:
            works.append(rng.choice(others))
        orders[device].append(compute if len(works) == 1 else Overlap(*works))
        for work in works:
            done.add((device, work))
            left.remove((device, work))
            if work.op in sums and work.microbatch not in sums[work.op]:
                sums[work.op].append(work.microbatch)
    return tuple(map(tuple, orders))


def _fusible(a, b):
    return {a.op, b.op} <= {Op.FORWARD, Op.BACKWARD_WEIGHT, *BACKWARDS}


def _in_turn(sums, at, orders):
    """Whether no other micro-batch of the head comes before, by the order of the first device."""
    device, compute = at
    if compute.op not in sums:
        return True
    own = [c.microbatch for c in orders[device] if isinstance(c, Compute) and c.op is compute.op]
    order = sums[compute.op]
    if len(own) < len(order):
        return order[len(own)] == compute.microbatch
    return True
