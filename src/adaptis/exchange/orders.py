"""What all readers and writers share: orders with their places in a file become a proven plan.

Another system's file names computations and where they run. `plan_of` refuses what is there twice,
missing, on two devices or before what it needs, and says where in the file; `basic` refuses a plan
that holds decisions for which another system has no word.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptis.check import check
from adaptis.errors import InputError, PlanError
from adaptis.lower import lower
from adaptis.plan import Plan, Stage
from adaptis.profile import Profile
from adaptis.program import Compute, Layout, Op, Overlap, parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.program import Work

MAX_TEXT_BYTES = 16 << 20
Cut = Profile | int | tuple[int, ...]  # a model, how many layers it has, or where its stages end


@dataclass(frozen=True, slots=True)
class Found:
    """A computation, or a fused pair, and where a file has it."""

    at: str  # "row 1, column 3"
    work: Work

    def __str__(self) -> str:
        return f"{self.at}: {self.work}"


def read_text(path: str | Path, what: str) -> str:
    """The text in `path`, or one sentence why there is none.

    Raises:
        InputError: the file is absent, no text, or too large.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise InputError(
                f"{path}: {size} bytes is too large for a {what} (at most {MAX_TEXT_BYTES})"
            )
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}; check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text, a {what} is needed") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def stops_of(cut: Cut, num_stages: int) -> tuple[int, ...]:
    """Where each of `num_stages` stages ends: as given, or evenly.

    Raises:
        PlanError: there are too few layers, or the stops are no cut into so many stages.
    """
    if isinstance(cut, tuple):
        if len(cut) != num_stages or any(b <= a for a, b in pairwise((0, *cut))):
            raise PlanError(
                f"the stages end before layers {list(cut)}; {num_stages} numbers that rise are "
                f"needed"
            )
        return cut
    if isinstance(cut, Profile):
        units = cut.units() if cut.num_blocks >= num_stages else ()
        ends = [stop for _, stop in units] or list(range(1, cut.num_layers + 1))
    else:
        ends = list(range(1, cut + 1))
    if len(ends) < num_stages:
        raise PlanError(f"{len(ends)} layers cannot fill {num_stages} stages; one each is needed")
    return tuple(ends[len(ends) * (s + 1) // num_stages - 1] for s in range(num_stages))


def stops_from_counts(counts: Sequence[int], profile: Profile | None, where: str) -> Cut:
    """Where stages end whose layers were counted, by a system that may not count the ends.

    Others count blocks; the embedding and the head of a profile come on top, as in
    `Profile.units`.

    Raises:
        PlanError: the counts add up to another number of layers than the profile has.
    """
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    if profile is None or ends[-1] == profile.num_layers:
        return tuple(ends)
    if ends[-1] == profile.num_blocks:
        return tuple(profile.units()[end - 1][1] for end in ends)
    raise PlanError(
        f"{where}: cuts {ends[-1]} layers, but {profile.model} has {profile.num_layers} "
        f"({profile.num_blocks} without embedding and head)"
    )


def plan_of(
    rows: Sequence[Sequence[Found]],
    cut: Cut,
    where: str,
    profile: Profile | None = None,
    placement: Sequence[int] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Plan:
    """The proven plan of these orders, one a device; bound to `profile` where there is one.

    Raises:
        PlanError: something is there twice, missing, or in an order that cannot run; with its
            place.
        ProgramError: the devices wait for each other in a circle.
    """
    places = _places(rows, where)
    found = _placement(rows, where)
    if placement is not None and tuple(placement) != found:
        raise PlanError(
            f"{where}: the stages are said to be on devices {list(placement)}, but their "
            f"computations are on {list(found)}"
        )
    count = _complete(rows, places, len(found), where)
    _in_order(rows, places, Layout(found, count), where)
    ends = stops_of(cut, len(found))
    plan = Plan(
        num_microbatches=count,
        stages=tuple(Stage(a, b, d) for (a, b), d in zip(pairwise((0, *ends)), found, strict=True)),
        programs=tuple(tuple(entry.work for entry in row) for row in rows),
        model=profile.model if profile else "",
        fingerprint=profile.fingerprint if profile else "",
        provenance=dict(provenance or {}),
    )
    check(lower(plan))
    return plan


Places = dict[Compute, tuple[int, int]]  # device and position in its order


def _places(rows: Sequence[Sequence[Found]], where: str) -> Places:
    """Where each computation is; none may be there twice."""
    result: Places = {}
    for device, row in enumerate(rows):
        for position, entry in enumerate(row):
            for compute in parts(entry.work):
                if compute in result:
                    first, index = result[compute]
                    raise PlanError(
                        f"{where}: {entry.at}: {compute} is there twice, first at "
                        f"{rows[first][index].at}; keep one"
                    )
                result[compute] = (device, position)
    return result


def _placement(rows: Sequence[Sequence[Found]], where: str) -> tuple[int, ...]:
    """Stage to device, as the orders tell it."""
    homes: dict[int, tuple[int, str]] = {}
    for device, row in enumerate(rows):
        if not row:
            raise PlanError(f"{where}: device {device} (row {device + 1}) computes nothing")
        for entry in row:
            for compute in parts(entry.work):
                home, at = homes.setdefault(compute.stage, (device, entry.at))
                if home != device:
                    raise PlanError(
                        f"{where}: {entry.at}: {compute} is of stage {compute.stage}, which is on "
                        f"device {home} at {at}; a stage has one device"
                    )
    if not homes:
        raise PlanError(f"{where}: holds no computation")
    if len(homes) != max(homes) + 1:
        missing = next(stage for stage in range(len(homes)) if stage not in homes)
        raise PlanError(
            f"{where}: {homes[max(homes)][1]} names stage {max(homes)}, but stage {missing} is "
            f"nowhere"
        )
    return tuple(homes[stage][0] for stage in range(len(homes)))


def _complete(rows: Sequence[Sequence[Found]], places: Places, num_stages: int, where: str) -> int:
    """How many micro-batches there are; each must be there whole, on each stage."""
    numbers = {compute.microbatch for compute in places}
    last = max(numbers)
    if len(numbers) != last + 1:
        missing = next(m for m in range(last) if m not in numbers)
        device, position = next(at for c, at in places.items() if c.microbatch == last)
        raise PlanError(
            f"{where}: {rows[device][position].at} names micro-batch {last}, but micro-batch "
            f"{missing} is nowhere"
        )
    for stage in range(num_stages):
        for m in range(last + 1):
            there = {op for op in Op if Compute(op, stage, m) in places}
            if there in ({Op.FORWARD, Op.BACKWARD}, {Op.FORWARD, *"IW"}):
                continue
            wanted = f"{stage}F{m} and {stage}B{m}, or {stage}F{m}, {stage}I{m} and {stage}W{m}"
            names = " ".join(f"{stage}{op}{m}" for op in Op if op in there)
            same = (c for c in places if c.microbatch == m and (not there or c.stage == stage))
            device, position = places[next(same)]
            raise PlanError(
                f"{where}: {rows[device][position].at} has micro-batch {m}, but on stage {stage} "
                f"there is {names or 'nothing'} of it; {wanted} are needed"
            )
    return last + 1


def _in_order(rows: Sequence[Sequence[Found]], places: Places, layout: Layout, where: str) -> None:
    """On its own device, nothing may stand before what it needs."""
    writer = {value: compute for compute in places for value in layout.writes(compute)}
    for compute, (device, position) in places.items():
        for value in layout.reads(compute):
            needed = writer[value]
            other, index = places[needed]
            if other == device and index >= position:
                raise PlanError(
                    f"{where}: {rows[device][position].at}: {compute} needs {needed}, which comes "
                    f"no earlier, at {rows[device][index].at}"
                )


def lost(plan: Plan) -> str:
    """What a reader of cut and order alone misses of the stages, as one sentence; "": nothing."""
    found = []
    for flag, state in (("recompute", "recomputed"), ("offload", "offloaded"), ("sharded",) * 2):
        stages = [str(s) for s, stage in enumerate(plan.stages) if getattr(stage, flag)]
        if stages:
            verb = "are" if len(stages) > 1 else "is"
            found.append(f"stage{'s' * (len(stages) > 1)} {', '.join(stages)} {verb} {state}")
    if not found:
        return ""
    return f"this form does not say that {' and that '.join(found)}; set that in the other system"


def basic(plan: Plan, reader: str, *, fused: bool) -> None:
    """Refuse a plan for whose decisions `reader` has no word; `fused`: it knows fused pairs.

    Raises:
        PlanError: naming the decision.
    """
    again = [s for s, stage in enumerate(plan.stages) if stage.recompute]
    away = [s for s, stage in enumerate(plan.stages) if stage.offload]
    works = (work for order in plan.programs for work in order)
    pair = next((work for work in works if isinstance(work, Overlap)), None)
    lacking = {
        f"{plan.copies} copies of the model": plan.copies > 1,
        "slices of a micro-batch": any(before >= 0 for before in plan.previous),
        "a head that is sharded over all devices (S, T)": plan.head_reductions > 0,
        f"the recomputation (R) of stage {again[0] if again else ''}": bool(again),
        f"the offloading (OFFLOAD) of stage {away[0] if away else ''}": bool(away),
        f"the fused pair {pair}": pair is not None and not fused,
    }
    for decision, there in lacking.items():
        if there:
            raise PlanError(
                f"{reader} has no word for {decision}; export a plan without it, or train it here"
            )
