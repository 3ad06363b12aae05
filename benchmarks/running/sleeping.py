"""Layers that sleep for a given time: what is left of a step is order, waiting and transfers."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptis.cluster import Link, uniform
from adaptis.execute.links import measure_links
from adaptis.execute.session import Session
from adaptis.execute.world import seated
from adaptis.measure.stage import Chain
from adaptis.plan import plan_from_json
from adaptis.profile import Overheads, profile_from_json, typical
from adaptis.simulate import simulate_plan
from running.models import numbers, squares

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from adaptis.execute.launch import Seat
    from adaptis.execute.world import World
    from adaptis.measure.stage import Microbatch
    from adaptis.plan import Plan
    from adaptis.profile import Profile

WIDTH, ROWS = 16, 4
LONG = 20e-3  # seconds of an ordinary computation: the longer a core has slept, the later it wakes
COMPUTING = ("forward", "backward", "backward_input", "backward_weight")


def sleeping_model(profile: Profile) -> Chain:
    """As many layers as the profile has, which do next to nothing by themselves."""
    makers = [functools.partial(nn.Linear, WIDTH, WIDTH)] * profile.num_layers
    return Chain(makers, squares, name="sleeping", weight=numbers)


def fall_asleep(session: Session, profile: Profile) -> None:
    """From now on each computation of `session` takes what its layers are said to take."""

    def lasting(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*words: Any) -> Any:
            end = time.perf_counter() + seconds
            result = work(*words)
            time.sleep(max(end - time.perf_counter(), 0.0))
            return result

        return run

    for number, compute in session.stages.items():
        stage = session.plan.stages[number]
        for name in COMPUTING:
            layers = profile.layers[stage.start : stage.stop]
            seconds = sum(getattr(layer, name) for layer in layers)
            setattr(compute, name, lasting(seconds, getattr(compute, name)))


def oversleep(world: World) -> float:
    """Seconds that a sleep takes too long when all ranks sleep, the mean of all."""
    found = []
    world.barrier()
    for _ in range(20):
        begin = time.perf_counter()
        time.sleep(LONG)
        found.append(time.perf_counter() - begin - LONG)
    return world.sum(typical(found)) / world.size


def ones(count: int) -> list[Microbatch]:
    """Micro-batches that the model takes."""
    return [{"inputs": torch.ones(ROWS, WIDTH), "labels": torch.zeros(ROWS, WIDTH)}] * count


def sleeping_rank(
    seat: Seat, connection: Connection, given: str, plans: list[str], steps: int
) -> list[dict[str, Any]]:
    """Each plan (profile and plans as JSON) in turn, one step to warm up and `steps` timed ones."""
    with seated(seat, connection) as world:
        profile = profile_from_json(json.loads(given))
        cost = measure_links(world, 4 * ROWS * WIDTH, lambda _: time.sleep(LONG))
        return [
            run_asleep(world, profile, plan_from_json(json.loads(text)), key, steps)
            | {"latency_seconds": cost.link.latency}
            | {"send_seconds": cost.send, "receive_seconds": cost.receive}
            for key, text in enumerate(plans)
        ]


def run_asleep(world: World, given: Profile, plan: Plan, key: int, steps: int) -> dict[str, Any]:
    """One plan measured, and what a sleep takes too long beside it."""
    sgd = functools.partial(torch.optim.SGD, lr=1e-3)
    session = Session(world, sleeping_model(given), plan, optimizer=sgd, key=key)
    fall_asleep(session, given)
    extra, results = [], []
    for _ in range(1 + steps):
        extra.append(oversleep(world))
        world.barrier()
        results.append(session.step(ones(plan.num_microbatches)))
    measured = [session.timeline(result, plan.schedule).step for result in results[1:]]
    return {
        "oversleep_seconds": typical(extra),
        "measured_seconds": median(measured),
    }


def predict(given: Profile, plan: Plan, found: dict[str, Any]) -> float:
    """Seconds of a step by the given times, and what sleeps and messages cost beside the run."""
    extra = Overheads(
        send=found["send_seconds"],
        receive=found["receive_seconds"],
        **dict.fromkeys(COMPUTING, found["oversleep_seconds"]),
    )
    cluster = uniform(plan.num_devices, link=Link(found["latency_seconds"], 1e9))
    return simulate_plan(plan, replace(given, overheads=extra), cluster).step
