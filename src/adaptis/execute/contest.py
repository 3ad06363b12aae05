"""Several plans, one model, one run: measured side by side, alternating step by step.

Every contestant trains its own copy of the same weights on the same batches in the same processes;
so does a plain single process, and the losses must agree. Alternating spreads the machine's noise
over all of them alike. The layers are measured twice: before, to plan with, and again between the
steps of the race, so that a prediction can be held against its measurement under the same weather.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptis.cluster import cluster_to_json
from adaptis.execute.memory import peak_bytes
from adaptis.execute.prepare import Measurement
from adaptis.execute.reference import Reference
from adaptis.execute.session import Session, StepResult
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
    closely: bool = False  # time the layers before every step of each plan, not once for all
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
    meter, closely = measurement.meter, contest.closely
    losses: list[list[float]] = [[] for _ in plans]
    timed: list[list[StepResult]] = [[] for _ in plans]
    beside: list[list[int]] = [[] for _ in plans]  # the rounds before and after each timed step
    world.phase("training")
    for step in range(contest.steps):
        batch, kept = contest.batches(step), step >= contest.warmup
        # Each finds the caches and the memory as the one before left them: mix.
        for key in random.Random(step).sample(range(len(plans)), len(plans)):
            if closely:
                world.barrier()
                meter.round(keep=kept)
            world.barrier()
            result = sessions[key].step(batch)
            losses[key].append(result.loss)
            if kept:
                timed[key].append(result)
                beside[key] += [meter.kept - 1, meter.kept]
            world.say(
                "step",
                name=plans[key].schedule,
                step=step + 1,
                steps=contest.steps,
                loss=result.loss,
            )
        if not closely or step + 1 == contest.steps:
            world.barrier()
            meter.round(keep=kept)
    world.phase("collecting timelines")
    last = contest.batches(contest.steps)
    results = []
    for key, session in enumerate(sessions):
        found = _typical(session, timed[key], last)
        near = measurement.result(beside[key]).profile if closely else None
        found |= {"losses": losses[key], "profile": near and profile_to_json(near)}
        results.append(found)
    return results


def _typical(
    session: Session, steps: Sequence[StepResult], batch: Sequence[Microbatch]
) -> dict[str, Any]:
    """A contestant's steps, and the median one's timeline with the memory that `batch` takes."""
    name = session.plan.schedule
    timelines = [session.timeline(step, name) for step in steps]
    timelines.sort(key=lambda timeline: timeline.step)
    peak = peak_bytes(session, batch)
    peaks = tuple(int(text) for text in session.world.gather(str(peak)))
    median = replace(timelines[len(timelines) // 2], peak_bytes=peaks)
    return {
        "name": name,
        "step_seconds": [timeline.step for timeline in timelines],
        "timeline": timeline_to_json(median),
    }
