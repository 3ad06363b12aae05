"""From a model to a plan, on the running ranks.

Measure side by side, plan on rank 0, tell everyone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from adaptis.cluster import Cluster, Device, cluster_from_json, cluster_to_json
from adaptis.errors import InputError
from adaptis.execute.gradients import measure_sum
from adaptis.execute.links import LinkCost, measure_links, measure_loop
from adaptis.measure.layers import LayerMeter
from adaptis.profile import (
    LayerCost,
    Overheads,
    Profile,
    Shared,
    profile_from_json,
    profile_to_json,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.execute.session import Optimizer
    from adaptis.execute.world import World
    from adaptis.measure.stage import Microbatch, TorchModel


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found out on this machine, the same on every rank."""

    profile: Profile
    cluster: Cluster


class Measurement:
    """All ranks measuring at once, as they will compute, and the links between them."""

    def __init__(
        self,
        world: World,
        model: TorchModel,
        microbatch: Microbatch,
        *,
        optimizer: Optimizer,
        num_microbatches: int,
        seed: int = 0,
    ) -> None:
        """Build the layers; every rank does this.

        Raises:
            InputError: the model has fewer layers than there are devices.
        """
        if len(model.layers) < world.size:
            raise InputError(
                f"{world.size} devices for {len(model.layers)} layers: each device needs a layer; "
                f"use at most {len(model.layers)} devices"
            )
        world.phase("measuring layers")
        self._world, self._num_microbatches = world, num_microbatches
        self.meter = LayerMeter(
            model,
            microbatch,
            optimizer=optimizer,
            seed=seed,
            device=world.device,
            offset=world.rank / world.size,
        )
        self._links: LinkCost | None = None
        self._sums: list[float] = []

    def rounds(self, count: int) -> None:
        """Time each layer `count` times."""
        for done in range(count):
            self._world.barrier()
            self.meter.round()
            self._world.say("measuring", done=done + 1, total=count)

    def result(self, rounds: Sequence[int] | None = None) -> Measured:
        """The mean of what all ranks found, and the links; rank 0's figures, on every rank.

        `rounds` are those to take, among those that the meter kept; None: all.
        """
        world = self._world
        own = self.meter.profile(rounds)
        own = replace(own, overheads=_with_loop(own.overheads, measure_loop(world)))
        texts = world.gather(json.dumps(profile_to_json(own)))
        profile = mean_profile([profile_from_json(json.loads(text)) for text in texts])
        if self._links is None:
            world.phase("measuring links")
            largest = max(layer.output_bytes for layer in profile.layers)
            self._links = measure_links(world, largest)
            self._sums = [measure_sum(world, shared.bytes) for shared in profile.shared]
        cost = self._links
        profile = replace(
            profile,
            overheads=replace(profile.overheads, send=cost.send, receive=cost.receive),
            shared=tuple(map(_with_seconds, profile.shared, self._sums)),
            devices=world.size,
            microbatches=self._num_microbatches,
            source=f"{own.source}, in {world.size} process(es) at once",
        )
        cluster = Cluster((Device(),) * world.size, cost.link, cost.link)
        text = json.dumps([profile_to_json(profile), cluster_to_json(cluster)])
        values = json.loads(world.broadcast(text))
        return Measured(profile_from_json(values[0]), cluster_from_json(values[1]))


def _with_loop(extra: Overheads, loop: float) -> Overheads:
    computing = ("forward", "backward", "backward_input", "backward_weight")
    return replace(extra, loop=loop, **{name: getattr(extra, name) + loop for name in computing})


def _with_seconds(shared: Shared, seconds: float) -> Shared:
    return replace(shared, seconds=seconds)


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
