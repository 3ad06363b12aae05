"""The plan file of OctoPipe and SimPipe: YAML.

    schedule: octopipe
    partition: [2, 3, 4, 3]            layers per stage, embedding and head not counted
    placement: [[0, 3], [1, 2]]        stages per device
    scheduling:                        what, micro-batch, stage, device, start, end
    - (f, 0, 0, 0, 0, 695)
    makespan: 127234

`b` is the input half where the micro-batch has a `w` on that stage, and the whole backward where
it has none. YAML can be hostile: aliases (a few lines that unfold to gigabytes), deep nesting,
tags, and keys that are there twice are refused.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import yaml

from adaptis.check import check
from adaptis.errors import InputError, PlanError
from adaptis.exchange.orders import MAX_TEXT_BYTES, Found, basic, plan_of, stops_from_counts
from adaptis.files import Fields
from adaptis.lower import lower
from adaptis.model import EMBEDDING, HEAD
from adaptis.program import Compute, Op, parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adaptis.plan import Plan
    from adaptis.profile import Profile
    from adaptis.program import Value

    Item = tuple[str, int, int, int, float, float]  # letter, micro-batch, stage, device, times

MAX_DEPTH = 8
_LETTERS = {Op.FORWARD: "f", Op.BACKWARD: "b", Op.BACKWARD_INPUT: "b", Op.BACKWARD_WEIGHT: "w"}
_COUNT = r"(0|[1-9][0-9]{0,8})"
_TIME = r"([0-9]{1,18}(?:\.[0-9]{1,18})?)"
_ITEM = re.compile(
    r"\(" + r"\s*,\s*".join((r"\s*(['\"]?)([fbw])\1", *[_COUNT] * 3, _TIME, _TIME)) + r"\s*\)"
)


def read_plan(text: str, profile: Profile | None = None, where: str = "plan") -> Plan:
    """The plan in `text`; of the times only the order is used.

    Raises:
        InputError: no YAML of this form.
        PlanError: the scheduling is incomplete, or contradicts the placement.
        ProgramError: the devices wait for each other in a circle.
    """
    top = Fields(_load(text, where), where)
    counts = _counts(top.take("partition", list), where)
    placement = _placement(top.take("placement", list), len(counts), where)
    items = top.take("scheduling", list)
    name = top.take("schedule", str, "")
    top.number("makespan", 0.0)
    top.done()
    parsed = [_item(item, f"{where}: scheduling[{i}]") for i, item in enumerate(items)]
    halves = {(stage, m) for letter, m, stage, *_ in parsed if letter == "w"}
    rows: list[list[Found]] = [[] for _ in range(max(placement) + 1)]
    clock = [0.0] * len(rows)
    for index, (letter, m, stage, device, start, end) in enumerate(parsed):
        at = f"scheduling[{index}]"
        if stage >= len(placement) or placement[stage] != device:
            raise PlanError(f"{where}: {at}: stage {stage} is not on device {device}")
        if start < clock[device] or end < start:
            raise PlanError(
                f"{where}: {at}: runs from {start:g} to {end:g}, but the one before it on device "
                f"{device} begins at {clock[device]:g}; list them in the order of their times"
            )
        clock[device] = start
        op = {"f": Op.FORWARD, "w": Op.BACKWARD_WEIGHT}.get(letter, Op.BACKWARD)
        if letter == "b" and (stage, m) in halves:
            op = Op.BACKWARD_INPUT
        rows[device].append(Found(at, Compute(op, stage, m)))
    cut = stops_from_counts(counts, profile, where)
    said = {"imported": f"octopipe {name}".strip()}
    return plan_of(rows, cut, where, profile, placement, said)


def _load(text: str, where: str) -> object:
    """The value of a YAML text, with nothing in it that unfolds, runs code or is there twice."""
    if len(text) > MAX_TEXT_BYTES:
        raise InputError(f"{where}: {len(text)} characters are too many, {MAX_TEXT_BYTES} at most")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_FAST):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1
            if depth > MAX_DEPTH:
                raise InputError(f"{where}: line {line}: nested too deeply to be a plan")
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{where}: line {line}: an alias; write the value out")
        return yaml.load(text, Loader=_Strict)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "a character that YAML does not allow"
        raise InputError(f"{where}: {line}not YAML ({problem})") from None
    except (ValueError, OverflowError, RecursionError):
        raise InputError(f"{where}: holds a number or a date that is none") from None


_FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Strict(_FAST):
    """The safe loader; a key that is there twice is an error, and keys are texts."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]
        if len(set(keys)) != len(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "a key is there twice, or is no text", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _counts(value: list[Any], where: str) -> list[int]:
    if not value or not all(type(n) is int and 1 <= n < 1 << 31 for n in value):
        raise InputError(f"{where}: 'partition' must list how many layers each stage has")
    return value


def _placement(value: list[Any], num_stages: int, where: str) -> list[int]:
    """Stage to device, from the stages of each device."""
    homes: dict[int, int] = {}
    for device, stages in enumerate(value):
        if not isinstance(stages, list) or not all(type(stage) is int for stage in stages):
            raise InputError(f"{where}: placement[{device}] must list the stages of a device")
        for stage in stages:
            if stage in homes or not 0 <= stage < num_stages:
                raise InputError(
                    f"{where}: placement[{device}]: stage {stage} is there twice, or is none of "
                    f"the {num_stages} in 'partition'"
                )
            homes[stage] = device
    if len(homes) != num_stages:
        raise InputError(f"{where}: 'placement' has {len(homes)} of {num_stages} stages")
    return [homes[stage] for stage in range(num_stages)]


def _item(value: object, where: str) -> Item:
    """(what, micro-batch, stage, device, start, end), as a list or as a text."""
    if isinstance(value, str) and (match := _ITEM.fullmatch(value)):
        letter, *numbers = match.groups()[1:]
        m, stage, device = map(int, numbers[:3])
        return letter, m, stage, device, float(numbers[3]), float(numbers[4])
    if isinstance(value, list) and len(value) == 6:
        letter, m, stage, device, start, end = value
        counts = all(type(n) is int and 0 <= n < 10**9 for n in (m, stage, device))
        times = all(type(t) in (int, float) and math.isfinite(t) for t in (start, end))
        if letter in ("f", "b", "w") and counts and times:
            return letter, m, stage, device, float(start), float(end)
    raise InputError(
        f"{where}: must be (f, b or w, micro-batch, stage, device, start, end), as in "
        f"'(f, 0, 0, 0, 0, 695)'"
    )


def write_plan(plan: Plan, profile: Profile | None = None) -> str:
    """`plan` for OctoPipe; the times are those of computations that take one tick each.

    With a profile, embedding and head are not counted.

    Raises:
        PlanError: OctoPipe has no word for a decision of the plan.
        ProgramError: the plan is no plan that can run.
    """
    basic(plan, "OctoPipe", fused=False)
    check(lower(plan))
    counts = [stage.stop - stage.start for stage in plan.stages]
    if profile is not None:
        plan.fits(profile)
        kinds = [layer.kind for layer in profile.layers]
        counts = [
            sum(kind not in (EMBEDDING, HEAD) for kind in kinds[stage.start : stage.stop])
            for stage in plan.stages
        ]
        if 0 in counts:
            raise PlanError(
                f"stage {counts.index(0)} holds the embedding or the head alone, which OctoPipe "
                f"does not count as layers; give it another layer, or export without a profile"
            )
    homes = [
        [s for s, home in enumerate(plan.placement) if home == device]
        for device in range(plan.num_devices)
    ]
    items = sorted(_timed(plan), key=lambda item: (item[4], item[3]))
    lines = [f"- ({', '.join(map(str, item))})" for item in items]
    return "\n".join(
        (
            f"schedule: {plan.schedule}",
            f"partition: {counts}",
            f"placement: {homes}",
            "scheduling:",
            *lines,
            f"makespan: {max(item[5] for item in items)}\n",
        )
    )


def _timed(plan: Plan) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Each computation with the earliest ticks at which it can run."""
    layout = plan.layout
    ready: dict[Value, int] = {}
    clock, position = [0] * plan.num_devices, [0] * plan.num_devices
    left = True
    while left:
        left = False
        for device, order in enumerate(plan.programs):
            for work in order[position[device] :]:
                compute = parts(work)[0]
                needs = list(layout.reads(compute))
                if any(value not in ready for value in needs):
                    break
                start = max(clock[device], *(ready[value] for value in needs), 0)
                clock[device] = start + 1
                ready |= dict.fromkeys(layout.writes(compute), start + 1)
                yield (
                    _LETTERS[compute.op],
                    compute.microbatch,
                    compute.stage,
                    device,
                    start,
                    start + 1,
                )
                position[device] += 1
                left = True
