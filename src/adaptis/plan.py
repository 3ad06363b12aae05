"""Every decision, and nothing that follows from it.

A `Plan` says which layers form a stage (partition), on which device each stage runs (placement),
what is recomputed, and in which order each device computes (schedule). Its file is enough for
anyone to simulate it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaptis.errors import PlanError, ProgramError
from adaptis.files import Fields, read_json, write_json
from adaptis.program import Compute, Op, parse_order

if TYPE_CHECKING:
    from pathlib import Path

    from adaptis.profile import Profile

FORMAT, VERSION = "adaptis-plan", 1


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `start` to `stop` - 1, on one device."""

    start: int
    stop: int
    device: int
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is trained."""

    num_microbatches: int
    stages: tuple[Stage, ...]
    programs: tuple[tuple[Compute, ...], ...]  # one order of computations per device
    schedule: str = "custom"  # a name of SCHEDULES, "list" or "custom"
    model: str = ""
    fingerprint: str = ""  # of the chain of layers; empty: not bound to one
    provenance: dict[str, Any] = field(
        default_factory=dict
    )  # predicted figures, seed, cluster: for readers

    @property
    def num_devices(self) -> int:
        """How many devices the plan uses."""
        return len(self.programs)

    @property
    def num_layers(self) -> int:
        """How many layers the stages cover."""
        return self.stages[-1].stop

    @property
    def placement(self) -> tuple[int, ...]:
        """Stage to device."""
        return tuple(stage.device for stage in self.stages)

    @property
    def split(self) -> bool:
        """Whether any backward is split into I and W."""
        return any(c.op is Op.BACKWARD_WEIGHT for order in self.programs for c in order)

    def layers_of(self, device: int) -> str:
        """The layers on `device`, as ranges: "0-3 17"."""
        parts: list[list[int]] = []
        for stage in self.stages:
            if stage.device == device:
                if parts and parts[-1][1] == stage.start:
                    parts[-1][1] = stage.stop
                else:
                    parts.append([stage.start, stage.stop])
        return " ".join(f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in parts)

    def fits(self, profile: Profile) -> None:
        """Refuse to be used for another model.

        Raises:
            PlanError: saying how the two differ.
        """
        if self.num_layers != profile.num_layers:
            raise PlanError(
                f"the plan covers {self.num_layers} "
                f"layers{f' of {self.model}' if self.model else ''}, but "
                f"{profile.model} has {profile.num_layers}; make a plan for it with `adaptis plan`"
            )
        if self.fingerprint and self.fingerprint != profile.fingerprint:
            raise PlanError(
                f"the plan was made for {self.model or 'another model'}, whose layers differ "
                f"from those of "
                f"{profile.model}; make a plan for it with `adaptis plan`"
            )


def load_plan(path: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        InputError, PlanError: one sentence that names the file and what is wrong.
    """
    return plan_from_json(read_json(path, "plan"), str(path))


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan file."""
    write_json(path, plan_to_json(plan))


def plan_from_json(value: dict[str, Any], where: str = "plan") -> Plan:
    """A plan from its JSON form; the inverse of `plan_to_json`."""
    top = Fields(value, where)
    top.format(FORMAT, VERSION)
    orders = top.take("programs", list)
    stages = tuple(_stage(entry, len(orders)) for entry in top.objects("stages"))
    programs = []
    for device, order in enumerate(orders):
        if not isinstance(order, list):
            raise PlanError(f"{where}: programs[{device}] is no list of instructions")
        try:
            programs.append(parse_order(order, f"{where}: device {device}"))
        except ProgramError as error:
            raise PlanError(str(error)) from None
    plan = Plan(
        num_microbatches=top.count("num_microbatches", least=1),
        stages=stages,
        programs=tuple(programs),
        schedule=top.take("schedule", str, "custom"),
        model=top.take("model", str, ""),
        fingerprint=top.take("fingerprint", str, ""),
        provenance=top.take("provenance", dict, {}),
    )
    top.done()
    _covers(plan, where)
    return plan


def _stage(entry: Fields, num_devices: int) -> Stage:
    layers = entry.take("layers", list)
    if len(layers) != 2 or not all(type(i) is int for i in layers):
        raise PlanError(f"{entry.where}: 'layers' must be [start, stop], found {layers!r}")
    device = entry.count("device")
    if device >= num_devices:
        raise PlanError(f"{entry.where}: device {device} has no program, there are {num_devices}")
    stage = Stage(layers[0], layers[1], device, entry.take("recompute", bool, False))
    entry.done()
    return stage


def _covers(plan: Plan, where: str) -> None:
    """The stages must tile the chain from layer 0 on."""
    if not plan.stages:
        raise PlanError(f"{where}: has no stages; at least one is needed")
    expected = 0
    for index, stage in enumerate(plan.stages):
        if stage.start != expected or stage.stop <= stage.start:
            raise PlanError(
                f"{where}: stage {index} holds layers [{stage.start}, {stage.stop}), but must "
                f"start at layer "
                f"{expected} and hold at least one layer"
            )
        expected = stage.stop


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The JSON form of `plan`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "num_microbatches": plan.num_microbatches,
        "schedule": plan.schedule,
        "stages": [
            {"layers": [s.start, s.stop], "device": s.device, "recompute": s.recompute}
            for s in plan.stages
        ],
        "programs": [[str(c) for c in order] for order in plan.programs],
        "provenance": plan.provenance,
    }
