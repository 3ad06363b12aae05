"""From a model to a plan, on the running ranks.

Measure side by side, plan on rank 0, tell everyone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from adaptis.cluster import Cluster, Device, cluster_from_json, cluster_to_json
from adaptis.errors import InputError
from adaptis.measure.layers import measure_layers
from adaptis.measure.links import measure_links
from adaptis.profile import LayerCost, Overheads, Profile, profile_from_json, profile_to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.execute.session import Optimizer
    from adaptis.execute.world import World
    from adaptis.measure.stage import Microbatch, TorchModel


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found out on this machine."""

    profile: Profile
    cluster: Cluster


def measure(
    world: World,
    model: TorchModel,
    microbatch: Microbatch,
    *,
    optimizer: Optimizer,
    num_microbatches: int,
    rounds: int = 9,
    seed: int = 0,
) -> Measured:
    """Measure layers on all ranks at once, as they will compute, and the links between them.

    Raises:
        InputError: the model has fewer layers than there are devices.
    """
    if len(model.layers) < world.size:
        raise InputError(
            f"{world.size} devices for {len(model.layers)} layers: each device needs a layer; "
            f"use at most {len(model.layers)} devices"
        )
    world.phase("measuring layers")
    profile = measure_layers(
        model,
        microbatch,
        optimizer=optimizer,
        rounds=rounds,
        seed=seed,
        together=world.barrier,
        progress=lambda done, total: world.say("measuring", done=done, total=total),
    )
    parts = [
        profile_from_json(json.loads(text))
        for text in world.gather(json.dumps(profile_to_json(profile)))
    ]
    world.phase("measuring links")
    cost = measure_links(max(layer.output_bytes for layer in profile.layers))
    profile = replace(
        mean_profile(parts),
        devices=world.size,
        microbatches=num_microbatches,
        source=f"{profile.source}, in {world.size} process(es) at once",
    )
    extra = replace(profile.overheads, send=cost.send, receive=cost.receive)
    profile = replace(profile, overheads=extra)
    return Measured(profile, Cluster((Device(),) * world.size, cost.link, cost.link))


def mean_profile(parts: Sequence[Profile]) -> Profile:
    """The mean of what several ranks measured, each layer and each figure by itself."""
    times = ("forward", "backward", "backward_input", "backward_weight", "update")
    layers = []
    for same in zip(*(part.layers for part in parts), strict=True):
        means = {name: _mean([getattr(layer, name) for layer in same]) for name in times}
        layers.append(_with_times(same[0], means))
    overheads = {
        f.name: _mean([getattr(part.overheads, f.name) for part in parts])
        for f in fields(Overheads)
    }
    return replace(parts[0], layers=tuple(layers), overheads=Overheads(**overheads))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _with_times(layer: LayerCost, times: dict[str, float]) -> LayerCost:
    return replace(layer, **times)  # pyrefly: ignore[bad-argument-type]


def share(world: World, measured: Measured) -> Measured:
    """Rank 0's figures, on every rank."""
    text = json.dumps([profile_to_json(measured.profile), cluster_to_json(measured.cluster)])
    profile, cluster = json.loads(world.broadcast(text))
    return Measured(profile_from_json(profile), cluster_from_json(cluster))
