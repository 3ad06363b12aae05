"""What each layer costs: data only, whoever found it out.

One micro-batch of `tokens_per_microbatch` tokens is the unit. The least a file must hold is a
name, a kind and three times per layer; what is absent is 0, and the time of a fused backward is
the sum of its halves unless it was measured by itself (on a CPU, I and W apart can cost more than
B).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from adaptis.errors import ProfileError
from adaptis.files import Fields, parse_json, read_json
from adaptis.model import EMBEDDING, HEAD, fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

VERSION = 1
MAX_LAYERS = 1 << 16


def typical(times: Sequence[float]) -> float:
    """The mean without the outermost tenth on either side (of five or more, at least one).

    A step adds up many instructions: means add up, medians do not, and times have a long tail.
    """
    cut = max(1, len(times) // 10) if len(times) > 4 else 0
    return fmean(sorted(times)[cut : len(times) - cut])


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer costs for one micro-batch; seconds and bytes."""

    name: str
    kind: str
    forward: float
    backward_input: float  # the I half
    backward_weight: float  # the W half
    backward: float  # fused, B
    update: float = 0.0  # the optimizer's step on this layer's parameters, once a step
    parameter_bytes: int = 0
    state_bytes: int = 0  # parameters + gradients + optimizer
    saved_bytes: int = 0  # kept from F to B, or to I
    saved_weight_bytes: int = 0  # the part of it (or in its place) kept from I to W
    output_bytes: int = 0  # handed to the next layer
    overlapped: float = 0.0  # seconds hidden where F is fused with the B of a layer like this one
    carried_bytes: int = 0  # handed from slice to slice: keys and values, or a recurrent state
    workspace_bytes: int = 0  # held only while the layer computes

    @property
    def work(self) -> float:
        """Seconds of F and B."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds that each instruction adds to what its layers cost, whatever the layers."""

    forward: float = 0.0
    backward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    send: float = 0.0  # occupies the sender
    receive: float = 0.0  # occupies the receiver
    loop: float = 0.0  # the part of the first four that passes before a computation, not in it


@dataclass(frozen=True, slots=True)
class Shared:
    """One parameter that two layers use (tied embedding and head).

    Its gradients are summed each step.
    """

    layers: tuple[int, ...]
    bytes: int
    seconds: float = 0.0  # to sum them, for each device that holds it; the links' come on top


@dataclass(frozen=True, slots=True)
class Profile:
    """A model as its costs."""

    model: str
    tokens_per_microbatch: int
    layers: tuple[LayerCost, ...]
    overheads: Overheads = Overheads()
    shared: tuple[Shared, ...] = ()
    devices: int | None = None  # a hint, used where the user gives none
    microbatches: int | None = None  # likewise
    source: str = ""
    machine: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ProfileError(
                f"{self.model}: {len(self.layers)} layers, 1 to {MAX_LAYERS} are needed"
            )

    @property
    def num_layers(self) -> int:
        """How many layers the chain has, embedding and head counted."""
        return len(self.layers)

    @property
    def fingerprint(self) -> str:
        """A short id of the chain that this is a profile of."""
        return fingerprint((layer.name, layer.kind) for layer in self.layers)

    @property
    def num_blocks(self) -> int:
        """Layers that are neither embedding nor head."""
        return sum(layer.kind not in (EMBEDDING, HEAD) for layer in self.layers)

    def shared_state(self, shared: Shared) -> float:
        """Bytes of a shared parameter with its gradient and optimizer state.

        A device that holds several of its layers holds them once.
        """
        holder = self.layers[shared.layers[0]]
        share = shared.bytes / holder.parameter_bytes if holder.parameter_bytes else 0.0
        least = min(self.layers[i].state_bytes for i in shared.layers)
        return min(holder.state_bytes * min(share, 1.0), least)

    def units(self) -> tuple[tuple[int, int], ...]:
        """The chain as runs of one block each; embedding and head join the first and the last.

        Today's frameworks count layers this way: their embedding and head come on top of an even
        split.
        """
        blocks = [i for i, layer in enumerate(self.layers) if layer.kind not in (EMBEDDING, HEAD)]
        if not blocks:
            return tuple((i, i + 1) for i in range(self.num_layers))
        starts = [0, *blocks[1:], self.num_layers]
        return tuple(pairwise(starts))


_SECONDS = {
    "forward_seconds": "forward",
    "backward_input_seconds": "backward_input",
    "backward_weight_seconds": "backward_weight",
}
_BYTES = (
    "parameter_bytes",
    "state_bytes",
    "saved_bytes",
    "saved_weight_bytes",
    "output_bytes",
    "carried_bytes",
    "workspace_bytes",
)


def load_profile(path: str | Path) -> Profile:
    """Read a profile file.

    Raises:
        InputError: the file is no strict JSON of this form.
        ProfileError: it describes no model.
    """
    return profile_from_json(read_json(path, "profile"), str(path))


def profile_from_text(text: str, where: str = "profile") -> Profile:
    """Read a profile from its JSON text."""
    return profile_from_json(parse_json(text, where), where)


def profile_from_json(value: dict[str, Any], where: str = "profile") -> Profile:
    """A profile from its JSON form; the inverse of `profile_to_json`."""
    top = Fields(value, where)
    if "format" in value or "version" in value:
        top.format("adaptis-profile", VERSION)
    layers = tuple(_layer(entry) for entry in top.objects("layers"))
    overheads = Fields(top.take("overheads", dict, {}), f"{where}: overheads")
    found = {f.name: overheads.number(f"{f.name}_seconds", 0.0) for f in fields(Overheads)}
    overheads.done()
    shared = []
    for entry in top.objects("shared") if "shared" in value else ():
        indices = tuple(entry.take("layers", list))
        if not all(type(i) is int and 0 <= i < len(layers) for i in indices) or len(indices) < 2:
            raise ProfileError(
                f"{entry.where}: 'layers' must list two or more of the layers 0..{len(layers) - 1}"
            )
        shared.append(Shared(indices, entry.count("bytes"), entry.number("sum_seconds", 0.0)))
        entry.done()
    profile = Profile(
        model=top.take("model", str),
        tokens_per_microbatch=top.count("tokens_per_microbatch", least=1),
        layers=layers,
        overheads=Overheads(**found),
        shared=tuple(shared),
        devices=top.count("devices", None, 1),
        microbatches=top.count("microbatches", None, 1),
        source=top.take("source", str, ""),
        machine=top.take("machine", str, ""),
    )
    top.done()
    return profile


def _layer(entry: Fields) -> LayerCost:
    times = {name: entry.number(key) for key, name in _SECONDS.items()}
    sizes = {name: entry.count(name, 0) for name in _BYTES}
    layer = LayerCost(
        name=entry.take("name", str),
        kind=entry.take("kind", str),
        forward=times["forward"],
        backward_input=times["backward_input"],
        backward_weight=times["backward_weight"],
        backward=entry.number(
            "backward_seconds", times["backward_input"] + times["backward_weight"]
        ),
        update=entry.number("update_seconds", 0.0),
        overlapped=entry.number("overlapped_seconds", 0.0),
        **sizes,
    )
    entry.done()
    return layer


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """The JSON form of `profile`; zeros and absent hints are left out."""
    layers = []
    for layer in profile.layers:
        entry: dict[str, Any] = {"name": layer.name, "kind": layer.kind}
        entry |= {key: getattr(layer, name) for key, name in _SECONDS.items()}
        if layer.backward != layer.backward_input + layer.backward_weight:
            entry["backward_seconds"] = layer.backward
        if layer.update:
            entry["update_seconds"] = layer.update
        if layer.overlapped:
            entry["overlapped_seconds"] = layer.overlapped
        entry |= {name: getattr(layer, name) for name in _BYTES if getattr(layer, name)}
        layers.append(entry)
    result: dict[str, Any] = {
        "format": "adaptis-profile",
        "version": VERSION,
        "model": profile.model,
        "tokens_per_microbatch": profile.tokens_per_microbatch,
        "devices": profile.devices,
        "microbatches": profile.microbatches,
        "source": profile.source,
        "machine": profile.machine,
        "overheads": {
            f"{f.name}_seconds": getattr(profile.overheads, f.name)
            for f in fields(Overheads)
            if getattr(profile.overheads, f.name)
        },
        "shared": [_shared_to_json(shared) for shared in profile.shared],
        "layers": layers,
    }
    optional = ("devices", "microbatches", "source", "machine", "overheads", "shared")
    return {key: item for key, item in result.items() if item or key not in optional}


def _shared_to_json(shared: Shared) -> dict[str, Any]:
    entry: dict[str, Any] = {"layers": list(shared.layers), "bytes": shared.bytes}
    return entry | ({"sum_seconds": shared.seconds} if shared.seconds else {})
