"""Layers that sleep for a given time: what is left of a step is order, waiting and transfers."""

from __future__ import annotations

import functools
import json
import random
import time
from dataclasses import replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from adaptis.cluster import Link, uniform
from adaptis.execute.session import Session
from adaptis.execute.world import seated
from adaptis.measure.stage import Chain
from adaptis.plan import plan_from_json
from adaptis.profile import LayerCost, Overheads, Profile
from adaptis.simulate import simulate_plan
from running.models import numbers, squares

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from adaptis.execute.launch import Seat
    from adaptis.execute.world import World
    from adaptis.measure.stage import Microbatch

WIDTH, ROWS = 16, 4
COMPUTING = ("forward", "backward", "backward_input", "backward_weight")


def sleeping_profile(num_devices: int, scale: float = 1.0) -> Profile:
    """Three layers of unequal times for each device, the same at each call; seconds x `scale`."""
    draw = random.Random(num_devices)
    layers = []
    for index in range(3 * num_devices):
        forward = scale * draw.choice((2e-3, 3e-3, 5e-3))
        half, weight = 1.1 * forward, 0.8 * forward
        layers.append(
            LayerCost(f"layers.{index}", "sleeping", forward, half, weight, half + weight)
        )
    return Profile("sleeping", 1, tuple(layers))


def sleeping_model(profile: Profile) -> Chain:
    """As many layers, which do next to nothing by themselves."""
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
    for _ in range(40):
        begin = time.perf_counter()
        time.sleep(3e-3)
        found.append(time.perf_counter() - begin - 3e-3)
    return world.sum(fmean(sorted(found)[4:-4])) / world.size


def idle_latency(world: World) -> float:
    """Seconds that a small message takes between ranks 0 and 1 while nobody computes."""
    message, trips = torch.zeros(ROWS, WIDTH), []
    world.barrier()
    for _ in range(30 if world.rank < 2 else 0):
        time.sleep(1e-3)
        begin = time.perf_counter()
        if world.rank == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        else:
            dist.recv(message, 0)
            dist.send(message, 0)
        trips.append((time.perf_counter() - begin) / 2)
    return world.sum(median(trips) if world.rank == 0 else 0.0)


def ones(count: int) -> list[Microbatch]:
    """Micro-batches that the model takes."""
    return [{"inputs": torch.ones(ROWS, WIDTH), "labels": torch.zeros(ROWS, WIDTH)}] * count


def sleeping_rank(
    seat: Seat, connection: Connection, texts: list[str], scale: float, steps: int
) -> list[dict[str, Any]]:
    """Each plan (as JSON) in turn, one step to warm up and `steps` timed ones."""
    with seated(seat, connection) as world:
        given = sleeping_profile(world.size, scale)
        return [
            run_asleep(world, given, json.loads(text), key, steps) for key, text in enumerate(texts)
        ]


def run_asleep(
    world: World, given: Profile, value: dict[str, Any], key: int, steps: int
) -> dict[str, Any]:
    """One plan, predicted and measured."""
    plan = plan_from_json(value)
    sgd = functools.partial(torch.optim.SGD, lr=1e-3)
    session = Session(world, sleeping_model(given), plan, optimizer=sgd, key=key)
    fall_asleep(session, given)
    extra, latency, results = [], [], []
    for _ in range(1 + steps):
        extra.append(oversleep(world))
        latency.append(idle_latency(world))
        world.barrier()
        results.append(session.step(ones(plan.num_microbatches)))
    measured = [session.timeline(result, plan.schedule).step for result in results[1:]]
    return {
        "oversleep_seconds": median(extra),
        "latency_seconds": median(latency),
        "measured_seconds": median(measured),
    }


def predict(given: Profile, value: dict[str, Any], found: dict[str, Any]) -> float:
    """Seconds of a step by the given times, and what sleeps and messages cost beside the run."""
    plan = plan_from_json(value)
    extra = Overheads(**dict.fromkeys(COMPUTING, found["oversleep_seconds"]))
    cluster = uniform(plan.num_devices, link=Link(found["latency_seconds"], 1e9))
    return simulate_plan(plan, replace(given, overheads=extra), cluster).step
