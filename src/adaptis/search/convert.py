"""Between the typed plan and the arrays of the search."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adaptis.plan import Plan, Stage
from adaptis.program import HEAD_OPS, Compute, Op, parts
from adaptis.search.polish import Fixed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.profile import Profile
    from adaptis.program import Work

KINDS = {
    Op.FORWARD: 0,
    Op.BACKWARD: 1,
    Op.BACKWARD_INPUT: 1,
    Op.BACKWARD_WEIGHT: 2,
    Op.SCORES: 0,
    Op.SCORES_GRADIENT: 1,
}


def fixed_of(stages: Sequence[Stage], programs: Sequence[Sequence[Work]]) -> Fixed:
    """The arrays of a plan whose micro-batches go through each stage in order."""
    split = np.zeros(len(stages), dtype=np.bool_)
    orders = [[compute for work in order for compute in parts(work)] for order in programs]
    flat = [compute for order in orders for compute in order]
    homes = [d for d, order in enumerate(orders) for _ in order]
    for compute in flat:
        if compute.op is Op.BACKWARD_WEIGHT:
            split[compute.stage] = True
    return Fixed(
        stop=np.array([stage.stop for stage in stages], dtype=np.int64),
        device=np.array([stage.device for stage in stages], dtype=np.int64),
        split=split,
        again=np.array([stage.recompute for stage in stages], dtype=np.bool_),
        offsets=np.cumsum([0, *map(len, orders)]).astype(np.int64),
        kind=np.array([KINDS[c.op] for c in flat], dtype=np.int8),
        stage=np.array(
            [c.stage + d * (c.op in HEAD_OPS) for c, d in zip(flat, homes, strict=True)],
            dtype=np.int32,
        ),
    )


def counted(plan: Plan) -> Fixed | None:
    """The arrays of `plan`, where they can say it all.

    None where it has fused pairs, copies of the model or more decisions than the search makes, or
    where micro-batches do not go through each stage in order.
    """
    plain = all(isinstance(work, Compute) for order in plan.programs for work in order)
    more = any(stage.offload or stage.sharded for stage in plan.stages)
    if not plain or more or plan.copies * plan.replicas > 1 or plan.previous:
        return None
    if plan.head_reductions > 1:
        return None
    for order in plan.programs:
        next_of: dict[tuple[Op, int], int] = {}
        for work in order:
            for c in parts(work):
                if c.op not in KINDS or next_of.setdefault((c.op, c.stage), 0) != c.microbatch:
                    return None
                next_of[c.op, c.stage] += 1
    fixed = fixed_of(plan.stages, plan.programs)
    return None if (fixed.split & fixed.again).any() else fixed


def plan_of(fixed: Fixed, num_microbatches: int, profile: Profile, name: str) -> Plan:
    """The plan that `fixed` stands for; counting gives the micro-batches."""
    starts = [0, *fixed.stop[:-1].tolist()]
    stages = tuple(
        Stage(start, stop, device, again)
        for start, stop, device, again in zip(
            starts,
            fixed.stop.tolist(),
            fixed.device.tolist(),
            fixed.again.tolist(),
            strict=True,
        )
    )
    ops = (
        (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_WEIGHT),
        (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT),
        HEAD_OPS,
    )
    real = len(stages)
    counts = np.zeros((real + len(fixed.offsets), 3), dtype=np.int64)
    programs = []
    for a, b in zip(fixed.offsets[:-1].tolist(), fixed.offsets[1:].tolist(), strict=True):
        order = []
        for kind, stage in zip(fixed.kind[a:b].tolist(), fixed.stage[a:b].tolist(), strict=True):
            names = ops[int(fixed.split[stage])] if stage < real else ops[2]
            order.append(Compute(names[kind], min(stage, real), int(counts[stage, kind])))
            counts[stage, kind] += 1
        programs.append(tuple(order))
    return Plan(
        num_microbatches=num_microbatches,
        stages=stages,
        programs=tuple(programs),
        head_reductions=int(fixed.stop[-1] < profile.num_layers),
        schedule=name,
        model=profile.model,
        fingerprint=profile.fingerprint,
    )
