"""Several plans, one model, one run: measured side by side, alternating step by step.

Every contestant trains its own copy of the same weights on the same batches in the same processes;
so does a plain single process, and the losses must agree. Alternating spreads the machine's noise
over all of them alike. The layers are measured twice: before, to plan with, and again one round
after each step of the race, so that a prediction can be held against its measurement under the same
weather.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptis.cluster import cluster_to_json
from adaptis.execute.memory import peak_bytes
from adaptis.execute.prepare import Measurement
from adaptis.execute.reference import Reference
from adaptis.execute.session import Session
from adaptis.execute.world import World, seated
from adaptis.plan import plan_from_json, plan_to_json
from adaptis.profile import profile_to_json
from adaptis.timeline import timeline_to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from adaptis.cluster import Cluster
    from adaptis.execute.launch import Seat
    from adaptis.execute.session import Optimizer
    from adaptis.measure.stage import Microbatch, TorchModel
    from adaptis.plan import Plan
    from adaptis.profile import Profile


@dataclass(frozen=True, slots=True)
class Contest:
    """What is run, on every rank; must be picklable."""

    model: Callable[[], TorchModel]
    batches: Callable[[int], Sequence[Microbatch]]  # step -> micro-batches
    optimizer: Optimizer
    plans: Callable[[Profile, Cluster, Callable[..., None]], list[Plan]]  # called on rank 0
    steps: int
    num_microbatches: int
    warmup: int = 2  # steps that count for the losses, not for the times
    rounds: int = 9
    seed: int = 0


def contest_rank(seat: Seat, connection: Connection, contest: Contest) -> dict[str, Any] | None:
    """A rank of the contest under our own supervisor; rank 0 returns the result."""
    with seated(seat, connection) as world:
        return run_contest(world, contest)


def run_contest(world: World, contest: Contest) -> dict[str, Any] | None:
    """Measure, plan, train all contestants and the reference; JSON on rank 0, None elsewhere."""
    world.phase("building the model")
    model = contest.model()
    first = contest.batches(0)
    measurement = Measurement(
        world,
        model,
        first[0],
        optimizer=contest.optimizer,
        num_microbatches=contest.num_microbatches,
        seed=contest.seed,
    )
    measurement.rounds(contest.rounds)
    measured = measurement.result()
    world.phase("planning" if world.rank == 0 else "waiting for the plan")
    world.say("profile", profile=profile_to_json(measured.profile))
    text = None
    if world.rank == 0:
        with world.every_core():
            plans = contest.plans(measured.profile, measured.cluster, world.say)
        text = json.dumps([plan_to_json(plan) for plan in plans])
    plans = [plan_from_json(value) for value in json.loads(world.broadcast(text))]
    reference = _reference(world, model, contest)
    measurement.meter.forget()
    results = _race(world, model, plans, contest, measurement)
    raced = measurement.result()
    if world.rank:
        return None
    return {
        "profile": profile_to_json(measured.profile),
        "profile_during_race": profile_to_json(raced.profile),
        "cluster": cluster_to_json(measured.cluster),
        "plans": [plan_to_json(plan) for plan in plans],
        "reference_losses": reference,
        "contestants": results,
    }


def _reference(world: World, model: TorchModel, contest: Contest) -> list[float]:
    """The losses of plain training, computed by rank 0 while the others wait."""
    losses: list[float] = []
    world.phase("plain training" if world.rank == 0 else "waiting for plain training")
    if world.rank == 0:
        plain = Reference(
            model, optimizer=contest.optimizer, seed=contest.seed, device=world.device
        )
        for step in range(contest.steps):
            losses.append(plain.step(contest.batches(step)))
            world.say("reference", step=step + 1, steps=contest.steps, loss=losses[-1])
    world.barrier()
    return losses


def _race(
    world: World,
    model: TorchModel,
    plans: list[Plan],
    contest: Contest,
    measurement: Measurement,
) -> list[dict[str, Any]]:
    """All contestants, one step of each in turn."""
    world.phase("building stages")
    sessions = [
        Session(world, model, plan, optimizer=contest.optimizer, seed=contest.seed, key=key)
        for key, plan in enumerate(plans)
    ]
    losses: list[list[float]] = [[] for _ in plans]
    timed: list[list[Any]] = [[] for _ in plans]
    world.phase("training")
    for step in range(contest.steps):
        batch = contest.batches(step)
        # Whoever goes first finds the caches cold: take turns.
        turn = [(step + k) % len(plans) for k in range(len(plans))]
        for key in turn:
            world.barrier()
            result = sessions[key].step(batch)
            losses[key].append(result.loss)
            if step >= contest.warmup:
                timed[key].append(result)
            world.say(
                "step",
                name=plans[key].schedule,
                step=step + 1,
                steps=contest.steps,
                loss=result.loss,
            )
        world.barrier()
        measurement.meter.round(keep=step >= contest.warmup)
    world.phase("collecting timelines")
    results = []
    for key, session in enumerate(sessions):
        timelines = [session.timeline(result, plans[key].schedule) for result in timed[key]]
        timelines.sort(key=lambda timeline: timeline.step)
        peak = peak_bytes(session, contest.batches(contest.steps))
        peaks = tuple(int(text) for text in world.gather(str(peak)))
        typical = replace(timelines[len(timelines) // 2], peak_bytes=peaks)
        results.append(
            {
                "name": plans[key].schedule,
                "losses": losses[key],
                "step_seconds": [timeline.step for timeline in timelines],
                "timeline": timeline_to_json(typical),
            }
        )
    return results
