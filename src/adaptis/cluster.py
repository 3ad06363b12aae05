"""What a model is trained on: devices, and the links between them.

Without a description devices are equal, memory is unlimited and transfers are free; whoever prints
a result says so. Speeds are relative to the machine that the profile was measured on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptis.errors import InputError
from adaptis.files import Fields, read_json

if TYPE_CHECKING:
    from pathlib import Path

FORMAT, VERSION = "adaptis-cluster", 1
MAX_DEVICES = 1 << 14


@dataclass(frozen=True, slots=True)
class Device:
    """One place where stages run."""

    speed: float = 1.0  # relative to the profile's machine, > 0
    memory_bytes: float = math.inf
    node: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """One directed connection: a transfer takes latency + bytes / bandwidth."""

    latency: float = 0.0  # seconds
    bandwidth: float = math.inf  # bytes per second

    def seconds(self, num_bytes: float) -> float:
        """How long `num_bytes` take, alone on the link."""
        return self.latency + num_bytes / self.bandwidth


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices in pipeline order, and what connects them with each other and the rest."""

    devices: tuple[Device, ...]
    within_node: Link = Link()
    between_nodes: Link = Link()
    host: Link = Link()  # each device's way to the host's memory, one in each direction
    between_replicas: Link = Link()  # each device's way to its like in other replicas
    overlap: bool = True  # whether devices compute while they transfer

    @property
    def num_devices(self) -> int:
        """How many devices there are."""
        return len(self.devices)

    @property
    def free_transfers(self) -> bool:
        """Whether every transfer takes no time."""
        return self.within_node == Link() and self.between_nodes == Link()

    def link(self, source: int, target: int) -> Link:
        """The directed link from `source` to `target`."""
        same = self.devices[source].node == self.devices[target].node
        return self.within_node if same else self.between_nodes

    def describe(self) -> str:
        """One line that says what is assumed, for the head of every result."""
        speeds = {device.speed for device in self.devices}
        memory = {device.memory_bytes for device in self.devices}
        parts = [f"{self.num_devices} {'equal devices' if len(speeds) == 1 else 'unequal devices'}"]
        if memory == {math.inf}:
            parts.append("unlimited memory")
        elif len(memory) == 1:
            parts.append(f"{min(memory) / 2**30:.4g} GiB each")
        else:
            parts.append(f"{min(memory) / 2**30:.4g} to {max(memory) / 2**30:.4g} GiB")
        parts.append("free transfers" if self.free_transfers else "priced transfers")
        return ", ".join(parts)


def uniform(num_devices: int, memory_bytes: float = math.inf, link: Link | None = None) -> Cluster:
    """Equal devices on one node.

    Raises:
        InputError: if `num_devices` is not a sensible number.
    """
    if not 1 <= num_devices <= MAX_DEVICES:
        raise InputError(f"{num_devices} devices: a number from 1 to {MAX_DEVICES} is needed")
    device = Device(memory_bytes=memory_bytes)
    return Cluster((device,) * num_devices, link or Link(), link or Link())


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file (format `adaptis-cluster`)."""
    return cluster_from_json(read_json(path, "cluster file"), str(path))


_LINKS = ("within_node", "between_nodes", "host", "between_replicas")


def cluster_from_json(value: dict[str, Any], where: str = "cluster") -> Cluster:
    """A cluster from its JSON form; the inverse of `cluster_to_json`."""
    fields = Fields(value, where)
    fields.format(FORMAT, VERSION)
    devices = []
    for entry in fields.objects("devices"):
        memory = entry.number("memory_bytes", math.inf)
        devices.append(
            Device(entry.number("speed", 1.0, 1e-9), memory, entry.count("node", 0)),
        )
        entry.done()
    links = {}
    for name in _LINKS:
        entry = Fields(fields.take(name, dict, {}), f"{where}: {name}")
        links[name] = Link(
            entry.number("latency_seconds", 0.0),
            entry.number("bandwidth_bytes_per_second", math.inf, 1e-9),
        )
        entry.done()
    overlap = fields.take("overlap", bool, True)
    fields.done()
    if not 1 <= len(devices) <= MAX_DEVICES:
        raise InputError(f"{where}: {len(devices)} devices, 1 to {MAX_DEVICES} are needed")
    return Cluster(tuple(devices), **links, overlap=overlap)


def cluster_to_json(cluster: Cluster) -> dict[str, Any]:
    """The JSON form of `cluster`; what is unlimited or free is left out."""

    def link(value: Link) -> dict[str, float]:
        result = {"latency_seconds": value.latency}
        if math.isfinite(value.bandwidth):
            result["bandwidth_bytes_per_second"] = value.bandwidth
        return result

    devices = []
    for device in cluster.devices:
        entry: dict[str, float] = {"speed": device.speed, "node": device.node}
        if math.isfinite(device.memory_bytes):
            entry["memory_bytes"] = device.memory_bytes
        devices.append(entry)
    links = {name: getattr(cluster, name) for name in _LINKS}
    rare = () if cluster.overlap else (("overlap", False),)
    return {
        "format": FORMAT,
        "version": VERSION,
        "devices": devices,
        **{
            name: link(value)
            for name, value in links.items()
            if value != Link() or name in ("within_node", "between_nodes")
        },
        **dict(rare),
    }
