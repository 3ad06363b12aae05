"""Every decision, and nothing that follows from it.

A `Plan` says which layers form a stage (partition), on which device each stage runs (placement),
what is recomputed, and in which order each device computes (schedule). Its file is enough for
anyone to simulate it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from adaptis.errors import PlanError, ProgramError
from adaptis.files import Fields, read_json, write_json
from adaptis.notation import parse_order
from adaptis.program import Layout, Op, parts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adaptis.profile import Profile
    from adaptis.program import Work
    from adaptis.schedules import Schedule
    from adaptis.schedules.shape import Shape

FORMAT, VERSION = "adaptis-plan", 1


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `start` to `stop` - 1, on one device."""

    start: int
    stop: int
    device: int
    recompute: bool = False  # keep only the input from F on
    offload: bool = False  # send what F saves to the host's memory until the backward
    sharded: bool = False  # its parameters lie in parts on the replicas, and are gathered for use

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.recompute and self.offload:
            raise PlanError(
                f"the stage of layers [{self.start}, {self.stop}) is to be recomputed and "
                f"offloaded, but what is recomputed is not kept; choose one of the two"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is trained."""

    num_microbatches: int
    stages: tuple[Stage, ...]
    programs: tuple[tuple[Work, ...], ...]  # one order of computations per device
    schedule: str = "custom"  # a name of SCHEDULES, "list" or "custom"
    model: str = ""
    fingerprint: str = ""  # of the chain of layers; empty: not bound to one
    previous: tuple[int, ...] = ()  # the slice before each micro-batch, as `Layout.previous`
    replicas: int = 1  # of the whole pipeline (data parallel)
    head_reductions: int = 0  # 1 or 2: the last layer is sharded over all devices, in no stage
    clipped: bool = False  # gradients are clipped by their global norm
    provenance: dict[str, Any] = field(
        default_factory=dict
    )  # predicted figures, seed, cluster: for readers

    @property
    def num_devices(self) -> int:
        """How many devices the plan uses."""
        return len(self.programs)

    @property
    def num_sequences(self) -> int:
        """How many micro-batches a batch has before any is cut into slices."""
        return sum(before < 0 for before in self.previous) or self.num_microbatches

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return self.stages[-1].stop + (self.head_reductions > 0)

    @property
    def copies(self) -> int:
        """How often the model is there: how many stages begin with its first layer."""
        return sum(stage.start == 0 for stage in self.stages)

    @property
    def layout(self) -> Layout:
        """What the numbers in the programs stand for."""
        return Layout(
            placement=self.placement,
            num_microbatches=self.num_microbatches,
            recomputed=frozenset(s for s, stage in enumerate(self.stages) if stage.recompute),
            previous=self.previous,
            copies=self.copies,
            replicas=self.replicas,
            sharded=frozenset(s for s, stage in enumerate(self.stages) if stage.sharded),
            reductions=self.head_reductions,
        )

    @property
    def placement(self) -> tuple[int, ...]:
        """Stage to device."""
        return tuple(stage.device for stage in self.stages)

    @property
    def split(self) -> bool:
        """Whether any backward is split into I and W."""
        works = (work for order in self.programs for work in order)
        return any(c.op is Op.BACKWARD_WEIGHT for work in works for c in parts(work))

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
        previous=tuple(top.take("previous", list, [])),
        replicas=top.count("replicas", 1, 1),
        head_reductions=top.count("head_reductions", 0),
        clipped=top.take("clipped", bool, False),
        provenance=top.take("provenance", dict, {}),
    )
    top.done()
    _covers(plan, where)
    _slices(plan, where)
    return plan


def _stage(entry: Fields, num_devices: int) -> Stage:
    layers = entry.take("layers", list)
    if len(layers) != 2 or not all(type(i) is int for i in layers):
        raise PlanError(f"{entry.where}: 'layers' must be [start, stop], found {layers!r}")
    device = entry.count("device")
    if device >= num_devices:
        raise PlanError(f"{entry.where}: device {device} has no program, there are {num_devices}")
    flags = {name: entry.take(name, bool, False) for name in ("recompute", "offload", "sharded")}
    entry.done()
    try:
        return Stage(layers[0], layers[1], device, **flags)
    except PlanError as error:
        raise PlanError(f"{entry.where}: {error}") from None


def _covers(plan: Plan, where: str) -> None:
    """The stages must tile the chain from layer 0 on, and each copy in the same way."""
    if not plan.stages:
        raise PlanError(f"{where}: has no stages; at least one is needed")
    expected = 0
    for index, stage in enumerate(plan.stages):
        if stage.start == 0:
            expected = 0
        if stage.start != expected or stage.stop <= stage.start:
            raise PlanError(
                f"{where}: stage {index} holds layers [{stage.start}, {stage.stop}), but must "
                f"start at layer "
                f"{expected} and hold at least one layer"
            )
        expected = stage.stop
    cuts = [(stage.start, stage.stop) for stage in plan.stages]
    length = len(cuts) // plan.copies
    if cuts != cuts[:length] * plan.copies:
        raise PlanError(f"{where}: the model is there {plan.copies} times, but cut in another way")


def _slices(plan: Plan, where: str) -> None:
    """Slices must name an earlier micro-batch each, and no two the same."""
    count = plan.num_microbatches
    if plan.head_reductions > 2:
        raise PlanError(
            f"{where}: 'head_reductions' is {plan.head_reductions}; 0, 1 or 2 is needed"
        )
    if len(plan.previous) not in (0, count):
        raise PlanError(
            f"{where}: 'previous' has {len(plan.previous)} entries for {count} micro-batches"
        )
    seen = set()
    for m, before in enumerate(plan.previous):
        if type(before) is not int or not -1 <= before < m or before in seen:
            raise PlanError(
                f"{where}: previous[{m}] is {before!r}; -1 or an earlier micro-batch that no other "
                f"continues is needed"
            )
        if before >= 0:
            seen.add(before)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The JSON form of `plan`."""
    rare = {
        "previous": list(plan.previous),
        "replicas": plan.replicas if plan.replicas > 1 else 0,
        "head_reductions": plan.head_reductions,
        "clipped": plan.clipped,
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "num_microbatches": plan.num_microbatches,
        "schedule": plan.schedule,
        **{key: value for key, value in rare.items() if value},
        "stages": [_stage_to_json(stage) for stage in plan.stages],
        "programs": [[str(c) for c in order] for order in plan.programs],
        "provenance": plan.provenance,
    }


def _stage_to_json(stage: Stage) -> dict[str, Any]:
    entry = {
        "layers": [stage.start, stage.stop],
        "device": stage.device,
        "recompute": stage.recompute,
    }
    return entry | {name: True for name in ("offload", "sharded") if getattr(stage, name)}


def named_plan(
    schedule: Schedule, shape: Shape, stops: Sequence[int], profile: Profile | None = None
) -> Plan:
    """The plan of a named schedule over the stages that end before layer stops[0], stops[1] ...

    The stops are of one copy of the model.

    Raises:
        PlanError: the schedule does not exist for `shape`, or the stops are not as many as it asks.
    """
    placement = schedule.placement(shape)
    if len(stops) * schedule.copies != len(placement):
        raise PlanError(
            f"{schedule.name} cuts a model into {len(placement) // schedule.copies} stages for "
            f"{shape}, found {len(stops)}"
        )
    cuts = [*pairwise((0, *stops))] * schedule.copies
    return Plan(
        num_microbatches=shape.units,
        stages=tuple(Stage(a, b, rank) for (a, b), rank in zip(cuts, placement, strict=True)),
        programs=schedule.orders(shape),
        schedule=schedule.name,
        model=profile.model if profile else "",
        fingerprint=profile.fingerprint if profile else "",
        previous=shape.previous,
    )
