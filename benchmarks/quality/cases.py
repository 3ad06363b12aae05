"""The planning problems of the study: the 18 cells of the first paper, and a design over models.

The full cross product would take days. So every model meets every number of devices under plain
conditions, and every other condition at one or two numbers of devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from adaptis.cluster import Cluster, Device, Link, uniform
from adaptis.search import BASELINES
from adaptis.simulate import simulate_plan
from quality.models import MODELS, WITH_BYTES, model

if TYPE_CHECKING:
    from adaptis.profile import Profile

DEVICES = (2, 4, 8, 16, 32, 64)
NODE = 8  # devices
WITHIN = Link(latency=3e-6, bandwidth=450e9)  # NVLink 4, one direction
BETWEEN = Link(latency=8e-6, bandwidth=50e9)  # one 400 Gb/s adapter a device
TIGHT = 1.15  # times the largest peak of "1f1b-uneven" made without a limit
SLOW = 0.7  # the speed of the second half of the devices, where they are unequal

# What the first paper measured: throughput over interleaved 1F1B with one layer a chunk.
MEASURED = {
    "gemma": {"2k": (1.16, 1.33, 1.43), "4k": (1.20, 1.37, 1.68)},
    "deepseek": {"2k": (1.27, 1.39, 1.42), "4k": (1.26, 1.31, 1.45)},
    "nemotron-h": {"2k": (1.25, 1.59, 1.68), "4k": (1.38, 1.64, 1.75)},
}


@dataclass(frozen=True)
class Case:
    """One planning problem."""

    group: str
    model: str
    devices: int
    microbatches: int
    priced: bool = False  # transfers take time
    tight: bool = False  # memory is short
    unequal: bool = False  # half the devices are slower
    measured: float | None = None  # the published ratio to interleaved 1F1B

    @property
    def name(self) -> str:
        """All that it is, in one word."""
        flags = [flag for flag in ("priced", "tight", "unequal") if getattr(self, flag)]
        return "-".join([self.model, f"{self.devices}x{self.microbatches}", *flags])

    @property
    def computations(self) -> int:
        """How many a plan of one split stage per device has."""
        return 3 * self.devices * self.microbatches

    @property
    def profile(self) -> Profile:
        """What the layers cost."""
        return model(self.model)

    @cached_property
    def cluster(self) -> Cluster:
        """What it runs on."""
        cluster = self._unlimited()
        if not self.tight:
            return cluster
        plan = BASELINES["1f1b-uneven"](self.profile, cluster, self.microbatches)
        most = TIGHT * max(simulate_plan(plan, self.profile, cluster).peak_bytes)
        devices = [replace(device, memory_bytes=most) for device in cluster.devices]
        return replace(cluster, devices=tuple(devices))

    def _unlimited(self) -> Cluster:
        half = self.devices // 2
        devices = tuple(
            Device(speed=SLOW if self.unequal and d >= half else 1.0, node=d // NODE)
            for d in range(self.devices)
        )
        if not self.priced:
            return replace(uniform(self.devices), devices=devices)
        return Cluster(devices, WITHIN, BETWEEN)


def cells() -> list[Case]:
    """The 18 cells of the first paper, with 4 micro-batches a device."""
    found = []
    for family, by_sequence in MEASURED.items():
        for sequence, ratios in by_sequence.items():
            for size, ratio in zip(("small", "medium", "large"), ratios, strict=True):
                name = f"v1-{family}-{size}-{sequence}"
                devices = model(name).devices or 0
                found.append(Case("cells", name, devices, 4 * devices, measured=ratio))
    return found


def design() -> list[Case]:
    """All models at all numbers of devices; then each condition at one or two of them."""
    found = [Case("devices", "nemotron-nano-v2-9b", 4, 8)]
    for name in MODELS:
        layers = model(name).num_layers
        found += [Case("devices", name, p, 4 * p) for p in DEVICES if p <= layers]
        for p in (8, 16):
            plain = Case("conditions", name, p, 4 * p)
            found += [
                replace(plain, microbatches=8 * p),
                replace(plain, priced=True),
                replace(plain, unequal=True),
            ]
            if name in WITH_BYTES:
                found += [
                    replace(plain, tight=True),
                    replace(plain, priced=True, tight=True, unequal=True),
                ]
    return found


def quick() -> list[Case]:
    """One plain case of each model, the devices in turn, and one condition each in turn."""
    found = [Case("devices", "nemotron-nano-v2-9b", 4, 8)]
    plain = [case for case in design()[1:] if case.group == "devices"]
    other = [case for case in design() if case.group == "conditions" and case.devices == 8]
    for index, name in enumerate(MODELS):
        for number, pool in ((index, plain), (index, other)):
            mine = [case for case in pool if case.model == name]
            found.append(mine[(number + (pool is plain)) % len(mine)])
    return found
