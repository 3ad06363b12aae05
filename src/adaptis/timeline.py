"""When each instruction ran: the answer of both interpreters.

A `Timeline` holds columns, one row an instruction, grouped by device in order of start; prediction
and measurement are of the same type, so that every picture and every comparison works for both. It
knows nothing of how the times came about. Idle time has a cause, and each moment of a device's
step has exactly one of: busy, or

    warm-up    before its first instruction
    transfer   the value it waits for was on its way
    imbalance  the value it waits for was still being computed, or nothing was there to do
    cool-down  after its last instruction, until the step ends everywhere
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.errors import InputError, ProgramError
from adaptis.files import Fields, read_json
from adaptis.program import Compute, Kind, Op, parse_compute, reads

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

FORMAT, VERSION = "adaptis-timeline", 1
CAUSES = ("warm-up", "transfer", "imbalance", "cool-down")
OPS = tuple(Op)  # the codes in `Timeline.op`


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
        written = self._written()
        return tuple(self._bubbles(device, written) for device in range(self.num_devices))

    def _written(self) -> dict[tuple[Kind, int, int], tuple[int, float]]:
        """Which device wrote each value that can cross devices, and when."""
        device = np.repeat(np.arange(self.num_devices), np.diff(self.offsets))
        forward, fused, half = (
            OPS.index(op) for op in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT)
        )
        kind = {forward: Kind.OUTPUT, fused: Kind.INPUT_GRAD, half: Kind.INPUT_GRAD}
        columns = zip(self.op, self.stage, self.microbatch, device, self.end, strict=True)
        return {
            (kind[o], int(s), int(m)): (int(d), float(e)) for o, s, m, d, e in columns if o in kind
        }

    def _bubbles(
        self, device: int, written: dict[tuple[Kind, int, int], tuple[int, float]]
    ) -> dict[str, float]:
        result = dict.fromkeys(CAUSES, 0.0)
        clock, first = 0.0, True
        for span in self.spans(device):
            gap = span.start - clock
            if gap > 0 and first:
                result["warm-up"] += gap
            elif gap > 0:
                moving = max(
                    (
                        span.start - max(clock, ready)
                        for value in reads(span.compute, len(self.placement))
                        for source, ready in [
                            written.get((value.kind, value.stage, value.microbatch), (device, 0.0))
                        ]
                        if source != device
                    ),
                    default=0.0,
                )
                moving = min(max(moving, 0.0), gap)
                result["transfer"] += moving
                result["imbalance"] += gap - moving
            clock, first = span.end, False
        result["cool-down"] += self.makespan - clock
        return result

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
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": timeline.name,
        "source": timeline.source,
        "placement": list(timeline.placement),
        "num_microbatches": timeline.num_microbatches,
        "step_seconds": timeline.step,
        "peak_bytes": list(timeline.peak_bytes),
        "notes": timeline.notes,
        "devices": [
            [[str(s.compute), s.start, s.end] for s in timeline.spans(d)]
            for d in range(timeline.num_devices)
        ],
    }


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
    for compute in (compute for row in rows for compute, _, _ in row):
        if compute.stage >= len(placement) or compute.microbatch >= count:
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
    top.done()
    return timeline


def _rows(device: int, entries: object, where: str) -> list[tuple[Compute, float, float]]:
    """One device's rows, in the order they ran."""
    if not isinstance(entries, list):
        raise InputError(f"{where}: devices[{device}] is no list of [instruction, start, end]")
    rows = []
    clock = 0.0
    for index, entry in enumerate(entries):
        at = f"{where}: devices[{device}][{index}]"
        row = _row(entry, at)
        if row[1] < clock:
            raise InputError(f"{at}: starts before the one above it; give them in order")
        clock = row[1]
        rows.append(row)
    return rows


def _row(entry: object, where: str) -> tuple[Compute, float, float]:
    match entry:
        case [str() as text, (int() | float()) as start, (int() | float()) as end]:
            if bool not in (type(start), type(end)) and 0 <= start <= end <= sys.float_info.max:
                try:
                    return parse_compute(text), float(start), float(end)
                except ProgramError as error:
                    raise InputError(f"{where}: {error}") from None
    raise InputError(f"{where}: {entry!r} is no [instruction, start, end]")


def from_rows(
    rows: list[list[tuple[Compute, float, float]]],
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
        op=np.array([OPS.index(c.op) for c, _, _ in flat], dtype=np.int8),
        stage=np.array([c.stage for c, _, _ in flat], dtype=np.int32),
        microbatch=np.array([c.microbatch for c, _, _ in flat], dtype=np.int32),
        start=np.array([s for _, s, _ in flat], dtype=np.float64),
        end=np.array([e for _, _, e in flat], dtype=np.float64),
        step=step,
        peak_bytes=peak_bytes,
        notes=notes or {},
    )
