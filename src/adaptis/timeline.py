"""When each instruction ran: the answer of both interpreters.

A `Timeline` holds columns, one row an instruction, grouped by device in order of start; prediction
and measurement are of the same type, so that every picture and every comparison works for both. It
knows nothing of how the times came about. Idle time has a cause, and each moment of a device's
step has exactly one of: busy, or

    warm-up    before its first instruction
    transfer   the value it waits for was on its way
    memory     a forward could have run, but its activations would not have fitted
    imbalance  the value it waits for was still being computed, or nothing was there to do
    cool-down  after its last instruction, until the step ends everywhere
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.errors import InputError, ProgramError
from adaptis.files import Fields, read_json
from adaptis.notation import parse_compute
from adaptis.program import HEAD_OPS, OPS, Compute, Kind, Layout
from adaptis.rows import needed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

FORMAT, VERSION = "adaptis-timeline", 1
CAUSES = ("warm-up", "transfer", "memory", "imbalance", "cool-down")


@dataclass(frozen=True, slots=True)
class Span:
    """One row of a timeline."""

    device: int
    compute: Compute
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """One value on a link."""

    kind: Kind
    stage: int  # that wrote it
    microbatch: int
    source: int
    target: int
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each instruction of a step ran, as columns.

    Row i ran `OPS[op[i]]` of `stage[i]` on `microbatch[i]` from `start[i]` to `end[i]`, seconds.
    Rows offsets[d] to offsets[d + 1] belong to device d, in the order they ran; the step starts at
    0.
    """

    name: str  # the schedule or plan
    source: str  # "simulated" or "measured"
    placement: tuple[int, ...]  # stage -> device
    num_microbatches: int
    offsets: NDArray[np.int64]
    op: NDArray[np.int8]
    stage: NDArray[np.int32]
    microbatch: NDArray[np.int32]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    step: float  # seconds of the whole step, optimizer included
    peak_bytes: tuple[int, ...] = ()  # per device; empty: not known
    memory: tuple[
        tuple[NDArray[np.float64], NDArray[np.float64]], ...
    ] = ()  # per device: times, bytes from then on
    transfers: tuple[Transfer, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    copies: int = 1  # of the model, as in `Layout`
    reductions: int = 0  # of a sharded head, as in `Layout`
    partner: NDArray[np.int32] | None = None  # the row of the other part of a fused pair, -1: none
    held_back: NDArray[np.float64] | None = None  # idle seconds before each row, for memory's sake

    @property
    def layout(self) -> Layout:
        """What the numbers of stages and micro-batches stand for."""
        return Layout(
            self.placement,
            self.num_microbatches,
            copies=self.copies,
            reductions=self.reductions,
        )

    @property
    def num_devices(self) -> int:
        """How many devices took part."""
        return len(self.offsets) - 1

    @property
    def makespan(self) -> float:
        """Seconds from the first instruction to the end of the last one, without the optimizer."""
        return float(self.end.max()) if len(self.end) else 0.0

    def rows(self, device: int) -> slice:
        """Which rows belong to `device`."""
        return slice(int(self.offsets[device]), int(self.offsets[device + 1]))

    def spans(self, device: int) -> Iterator[Span]:
        """The rows of one device, typed."""
        for i in range(int(self.offsets[device]), int(self.offsets[device + 1])):
            compute = Compute(OPS[self.op[i]], int(self.stage[i]), int(self.microbatch[i]))
            yield Span(device, compute, float(self.start[i]), float(self.end[i]))

    def busy(self) -> NDArray[np.float64]:
        """Seconds that each device computes."""
        seconds = self.end - self.start
        return np.array([seconds[self.rows(d)].sum() for d in range(self.num_devices)])

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all devices' time until the makespan, 0 to 1."""
        total = self.makespan * self.num_devices
        return 1.0 - float(self.busy().sum()) / total if total else 0.0

    def bubbles(self) -> tuple[dict[str, float], ...]:
        """Per device: seconds of idle time until the makespan, by cause."""
        device = np.repeat(np.arange(self.num_devices), np.diff(self.offsets))
        before = np.concatenate([[0.0], self.end[:-1]])
        first = np.zeros(len(self.end), dtype=np.bool_)
        first[self.offsets[:-1][np.diff(self.offsets) > 0]] = True
        gap = np.maximum(np.where(first, 0.0, self.start - before), 0.0)
        held = np.zeros_like(gap) if self.held_back is None else np.minimum(self.held_back, gap)
        moving = np.clip(
            self.start - np.maximum(before, self._sent(device)) - held, 0.0, gap - held
        )
        idle = {"transfer": moving, "memory": held, "imbalance": gap - held - moving}
        result = []
        for d in range(self.num_devices):
            rows = self.rows(d)
            began = float(self.start[rows][0]) if rows.stop > rows.start else 0.0
            ended = float(self.end[rows][-1]) if rows.stop > rows.start else 0.0
            causes = {name: float(seconds[rows].sum()) for name, seconds in idle.items()}
            causes |= {"warm-up": began, "cool-down": self.makespan - ended}
            result.append({cause: causes[cause] for cause in CAUSES})
        return tuple(result)

    def _sent(self, device: NDArray[np.int64]) -> NDArray[np.float64]:
        """When what row i reads from another device was written there; infinity: it reads none.

        A fused pair hands over both values, and needs both, at once.
        """
        need = needed(self.op, self.stage, self.microbatch, self.layout)
        remote = (need >= 0) & (device[need] != device)
        if self.partner is None:
            return np.where(remote, self.end[need], np.inf)
        index = np.arange(len(need))
        other = np.where(self.partner < 0, index, self.partner)
        written = np.where(remote, self.end[np.maximum(index, other)[need]], -np.inf)
        written = np.maximum(written, written[other])
        return np.where(written > -np.inf, written, np.inf)

    def summary(self) -> dict[str, Any]:
        """The figures that are printed, with units in the keys."""
        return {
            "name": self.name,
            "source": self.source,
            "step_seconds": self.step,
            "makespan_seconds": self.makespan,
            "bubble_fraction": self.bubble_fraction,
            "busy_seconds": [float(x) for x in self.busy()],
            "bubble_seconds": [dict(b) for b in self.bubbles()],
            "peak_bytes": list(self.peak_bytes),
        }


def timeline_to_json(timeline: Timeline) -> dict[str, Any]:
    """The JSON form; the inverse of `timeline_from_json`. Memory curves are not kept.

    Replay the plan for them.
    """
    rare = {"copies": timeline.copies, "reductions": timeline.reductions}
    partner = [] if timeline.partner is None else timeline.partner.tolist()
    fused = [[one, two] for one, two in enumerate(partner) if two > one]
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": timeline.name,
        "source": timeline.source,
        "placement": list(timeline.placement),
        "num_microbatches": timeline.num_microbatches,
        **{key: value for key, value in rare.items() if value != getattr(Timeline, key)},
        "step_seconds": timeline.step,
        "peak_bytes": list(timeline.peak_bytes),
        "notes": timeline.notes,
        "devices": [_row_list(timeline, d) for d in range(timeline.num_devices)],
        **({"fused": fused} if fused else {}),  # rows, numbered through all devices
    }


def _row_list(timeline: Timeline, device: int) -> list[list[Any]]:
    """[instruction, start, end], and the seconds that memory held it back where it did."""
    rows: list[list[Any]] = [[str(s.compute), s.start, s.end] for s in timeline.spans(device)]
    if timeline.held_back is not None:
        for row, seconds in zip(rows, timeline.held_back[timeline.rows(device)], strict=True):
            if seconds > 0:
                row.append(float(seconds))
    return rows


def load_timeline(path: str | Path) -> Timeline:
    """Read a timeline file."""
    return timeline_from_json(read_json(path, "timeline"), str(path))


def timeline_from_json(value: dict[str, Any], where: str = "timeline") -> Timeline:
    """A timeline from its JSON form."""
    top = Fields(value, where)
    top.format(FORMAT, VERSION)
    rows = [_rows(d, entries, where) for d, entries in enumerate(top.take("devices", list))]
    placement = top.take("placement", list)
    if not all(type(d) is int and 0 <= d < len(rows) for d in placement):
        raise InputError(
            f"{where}: 'placement' must give each stage one of the {len(rows)} devices"
        )
    count = top.count("num_microbatches", least=1)
    copies, reductions = top.count("copies", 1, 1), top.count("reductions", 0)
    if reductions > 2 or len(placement) % copies:
        raise InputError(
            f"{where}: {copies} copies of a model in {len(placement)} stages, {reductions} "
            f"reductions of its head: 0, 1 or 2, and copies that divide the stages, are needed"
        )
    for compute in (row[0] for device in rows for row in device):
        stages = len(placement) + (reductions > 0 and compute.op in HEAD_OPS)
        if compute.stage >= stages or compute.microbatch >= count:
            raise InputError(
                f"{where}: {compute} is beyond {len(placement)} stages and {count} micro-batches"
            )
    peak = top.take("peak_bytes", list, [])
    if not all(type(b) is int and b >= 0 for b in peak) or len(peak) not in (0, len(rows)):
        raise InputError(
            f"{where}: 'peak_bytes' must hold one number of bytes for each device, or none"
        )
    timeline = from_rows(
        rows,
        name=top.take("name", str),
        source=top.take("source", str),
        placement=tuple(placement),
        num_microbatches=count,
        step=top.number("step_seconds"),
        peak_bytes=tuple(peak),
        notes=top.take("notes", dict, {}),
    )
    fused = top.take("fused", list, [])
    top.done()
    held = np.array([row[3] for device in rows for row in device])
    return replace(
        timeline,
        copies=copies,
        reductions=reductions,
        partner=_partner(fused, timeline.offsets, where),
        held_back=held if held.any() else None,
    )


def _partner(fused: list[Any], offsets: NDArray[np.int64], where: str) -> NDArray[np.int32] | None:
    """For each row the other part of its fused pair; None: there are no pairs."""
    partner = np.full(int(offsets[-1]), -1, np.int32)
    for index, pair in enumerate(fused):
        match pair:
            case [int() as one, int() as two] if 0 <= one < two < len(partner):
                here, there = np.searchsorted(offsets, (one, two), side="right")
                if here == there and partner[one] == partner[two] == -1:
                    partner[one], partner[two] = two, one
                    continue
        raise InputError(
            f"{where}: fused[{index}]: {pair!r} is no pair of two rows of one device, each in "
            f"one pair only"
        )
    return partner if fused else None


_Row = tuple[Compute, float, float, float]  # what, from, to, and how long memory held it back


def _rows(device: int, entries: object, where: str) -> list[_Row]:
    """One device's rows, in the order they ran."""
    if not isinstance(entries, list):
        raise InputError(f"{where}: devices[{device}] is no list of [instruction, start, end]")
    rows: list[_Row] = []
    clock = 0.0
    for index, entry in enumerate(entries):
        at = f"{where}: devices[{device}][{index}]"
        row = _row(entry, at)
        if row[1] < clock:
            raise InputError(f"{at}: starts before the one above it; give them in order")
        clock = row[1]
        rows.append(row)
    return rows


def _row(entry: object, where: str) -> _Row:
    match entry:
        case [str() as text, (int() | float()) as start, (int() | float()) as end, *rest]:
            numbers = [start, end, *(rest or [0.0])]
            plain = len(numbers) == 3 and all(type(x) in (int, float) for x in numbers)
            if plain and 0 <= start <= end <= sys.float_info.max and 0 <= numbers[2] <= end:
                try:
                    return parse_compute(text), float(start), float(end), float(numbers[2])
                except ProgramError as error:
                    raise InputError(f"{where}: {error}") from None
    raise InputError(f"{where}: {entry!r} is no [instruction, start, end]")


def from_rows(
    rows: Sequence[Sequence[tuple[Compute, float, float] | _Row]],
    *,
    name: str,
    source: str,
    placement: tuple[int, ...],
    num_microbatches: int,
    step: float,
    peak_bytes: tuple[int, ...] = (),
    notes: dict[str, Any] | None = None,
) -> Timeline:
    """A timeline from (computation, start, end) per device, each device in the order it ran."""
    flat = [row for device in rows for row in device]
    return Timeline(
        name=name,
        source=source,
        placement=placement,
        num_microbatches=num_microbatches,
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        op=np.array([OPS.index(row[0].op) for row in flat], dtype=np.int8),
        stage=np.array([row[0].stage for row in flat], dtype=np.int32),
        microbatch=np.array([row[0].microbatch for row in flat], dtype=np.int32),
        start=np.array([row[1] for row in flat], dtype=np.float64),
        end=np.array([row[2] for row in flat], dtype=np.float64),
        step=step,
        peak_bytes=peak_bytes,
        notes=notes or {},
    )
