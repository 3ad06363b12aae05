"""Who is at fault, judged from outside the ranks.

Each rank writes where it stands into a few bytes of shared memory; the operating system says what
its process does. Of the two follows who holds up the others: ::

    ended             ──▶ at fault at once
    stopped           ──▶ at fault after `STOPPED`
    in a program:
      computing       ──▶ at fault when it stands still for far longer than a whole step takes
      waiting         ──▶ at fault only when everyone waits
    in other phases   ──▶ may take as long as it likes, while anyone uses a processor

A rank that uses its processor may be compiling: until a first step has shown how long that takes
it gets `STALL`, and a machine that is short of processors never makes a rank guilty. The clock of
a wait stands still while the watcher itself does not run.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_RECORD = struct.Struct("<qqqqqd")
COMPUTING, WAITING = 0, 1
POLL = 0.25  # seconds between two looks
STOPPED = 1.5  # seconds that a process may be stopped
FLOOR = 3.0  # seconds without progress that are never held against a rank
FACTOR = 3.0  # times a whole step, for a single instruction
STALL = 120.0  # seconds of computing in an instruction of the first step
QUIET = 600.0  # seconds in which no rank uses a processor, whatever it does
BUSY = 0.1  # part of a processor that a rank at work uses at least
_TICKS = os.sysconf("SC_CLK_TCK")


class Spot(NamedTuple):
    """Where a rank stands."""

    process: int  # 0: not yet there, or gone in peace
    program: int  # -1: none runs
    step: int
    position: int
    state: int
    longest: float  # seconds of the longest step of this program so far; 0: none is complete


def blank_records(num_ranks: int) -> bytes:
    """The records before any rank has come."""
    return _RECORD.pack(0, -1, -1, -1, COMPUTING, 0.0) * num_ranks


class ProgressRecord:
    """Where one rank stands, in memory that a watcher reads.

    A write costs well under a microsecond.
    """

    def __init__(self, path: str | Path, rank: int) -> None:
        with Path(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._offset = rank * _RECORD.size
        self._process = os.getpid()
        self._program, self._step, self._position = -1, -1, -1
        self._longest: dict[int, float] = {}
        self._begun = 0.0
        self.resumes()

    def begin(self, program: int, step: int) -> None:
        """A step of a program begins."""
        self._program, self._step = program, step
        self._begun = time.monotonic()
        self.at(-1)

    def at(self, position: int) -> None:
        """The instruction at `position` begins."""
        self._position = position
        self._write(COMPUTING)

    def waits(self) -> None:
        """It waits for another device."""
        self._write(WAITING)

    def resumes(self) -> None:
        """What it waited for is there."""
        self._write(COMPUTING)

    def leave(self) -> None:
        """The step is over; no program runs now."""
        seconds = time.monotonic() - self._begun
        self._longest[self._program] = max(self._longest.get(self._program, 0.0), seconds)
        self._program = -1
        self.at(-1)

    def depart(self) -> None:
        """The rank has done its work; the end of its process is no failure."""
        self._process = 0
        self.at(-1)

    def _write(self, state: int) -> None:
        _RECORD.pack_into(
            self._memory,
            self._offset,
            self._process,
            self._program,
            self._step,
            self._position,
            state,
            self._longest.get(self._program, 0.0),
        )


@dataclass(slots=True)
class Account:
    """What a rank has told of itself."""

    phase: str = "starting"
    programs: dict[int, list[str]] = field(default_factory=dict)  # what stands at each position
    expected: dict[int, float] = field(default_factory=dict)  # predicted seconds of a step

    def take(self, message: tuple[object, ...]) -> bool:
        """Note a message of the rank; False if it is about something else."""
        match message:
            case ("phase", str() as phase):
                self.phase = phase
            case ("program", int() as key, list() as lines):
                self.programs[key] = lines
            case ("program", int() as key, list() as lines, (int() | float()) as seconds):
                self.programs[key], self.expected[key] = lines, seconds
            case _:
                return False
        return True

    def place(self, spot: Spot) -> str:
        """Step, stage, micro-batch and instruction, or what the rank was doing."""
        lines = self.programs.get(spot.program, [])
        inside = 0 <= spot.position < len(lines)
        what = lines[spot.position] if inside else self.phase
        step = f"step {spot.step}, " if spot.step >= 0 else ""
        source = "its input" if inside and not self.ends(spot) else "the other ranks"
        return f"{step}{what}{f', waiting for {source}' if spot.state == WAITING else ''}"

    def ends(self, spot: Spot) -> bool:
        """Whether it stands at the last instruction, where it may wait for everyone."""
        lines = self.programs.get(spot.program)
        return lines is not None and spot.position == len(lines) - 1

    def limit(self, spot: Spot) -> float:
        """Seconds that an instruction may take."""
        return max(FLOOR, FACTOR * max(self.expected.get(spot.program, 0.0), spot.longest))


class Fault(NamedTuple):
    """Who is at fault, in one sentence."""

    rank: int
    text: str


@dataclass(slots=True)
class _Mark:
    """How long a rank has stood still, and what its process did meanwhile, in seconds."""

    spot: Spot
    quiet: float = 0.0
    stopped: float = 0.0
    idle: float = 0.0  # neither running nor ready to run
    used: float = 0.0  # of the processors
    total: float = -1.0  # of the processors, since the process began


class Watch:
    """Looks at all ranks of this machine again and again.

    Args:
        path: the file of the records.
        account: what a rank has told of itself; asked only about ranks that stand still.
    """

    def __init__(self, path: str | Path, account: Callable[[int], Account]) -> None:
        with Path(path).open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._account = account
        self._marks = [_Mark(spot) for spot in self.spots()]
        self._last = time.monotonic()

    def spots(self) -> list[Spot]:
        """Where every rank stands now."""
        return [Spot(*fields) for fields in _RECORD.iter_unpack(self._memory[:])]

    def place(self, rank: int) -> str:
        """Where a rank stands now, in words."""
        return self._account(rank).place(self.spots()[rank])

    def ended(self) -> Fault | None:
        """A rank whose process is gone."""
        for rank, spot in enumerate(self.spots()):
            if spot.process and _letter(spot.process) in ("", "Z", "X"):
                return Fault(rank, f"rank {rank} died ({self._account(rank).place(spot)})")
        return None

    def look(self) -> Fault | None:
        """Who holds up the others, if anyone does."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, 2 * POLL), now
        for rank, spot in enumerate(self.spots()):
            if spot != self._marks[rank].spot:
                self._marks[rank] = _Mark(spot)
            else:
                _observe(self._marks[rank], passed)
        for judge in (self._stopped, self._hanging, self._waiting, self._quiet):
            if fault := judge():
                return fault
        return None

    def _stopped(self) -> Fault | None:
        ranks = [n for n, mark in enumerate(self._marks) if mark.stopped >= STOPPED]
        return self._fault(ranks, "stopped by a signal") if ranks else None

    def _hanging(self) -> Fault | None:
        found = []
        for n in self._overdue():
            spot = self._marks[n].spot
            if spot.state == COMPUTING and not (self._ends(n) and self._behind(spot)):
                found.append(n)
        return self._fault(found, "hanging") if found else None

    def _overdue(self) -> list[int]:
        """Ranks that have been in one instruction for too long."""
        found = []
        for n, mark in enumerate(self._marks):
            if mark.spot.program < 0 or mark.quiet < FLOOR:
                continue
            limit = self._account(n).limit(mark.spot)
            if mark.idle >= limit or mark.used >= (limit if mark.spot.longest else STALL):
                found.append(n)
        return found

    def _ends(self, rank: int) -> bool:
        return self._account(rank).ends(self._marks[rank].spot)

    def _behind(self, spot: Spot) -> bool:
        """Whether any rank has not yet come to the end of this step."""
        return any(
            (other.spot.program, other.spot.step) == (spot.program, spot.step) and not self._ends(n)
            for n, other in enumerate(self._marks)
        )

    def _waiting(self) -> Fault | None:
        """Everyone waits for another: a message was lost, or the plan's order is wrong."""
        ranks = range(len(self._marks))
        if not all(self._marks[n].spot.process for n in ranks):
            return None  # some are on other machines
        late = self._overdue()
        for n in ranks:
            mark = self._marks[n]
            waits = mark.spot.state == WAITING or self._ends(n)
            if not waits or not (n in late or (mark.spot.program < 0 and mark.quiet >= FLOOR)):
                return None
        if not late and min(mark.quiet for mark in self._marks) < STALL:
            return None
        return self._fault(late or ranks, "waiting in a circle")

    def _quiet(self) -> Fault | None:
        """Nothing moves in any phase, and no processor is used."""
        if not all(mark.idle >= QUIET for mark in self._marks):
            return None
        ranks = range(len(self._marks))
        busy = [n for n in ranks if self._marks[n].spot.state == COMPUTING]
        return self._fault(busy or ranks, "hanging")

    def _fault(self, ranks: Iterable[int], what: str) -> Fault:
        ranks = list(ranks)
        named = " and ".join(f"rank {n} ({self.place(n)})" for n in ranks)
        mark = self._marks[ranks[0]]
        usual = max(mark.spot.longest, self._account(ranks[0]).expected.get(mark.spot.program, 0.0))
        step = f", where a whole step takes {usual:.3g} s" if usual else ""
        verb = "is" if len(ranks) == 1 else "are"
        return Fault(ranks[0], f"{named} {verb} {what}: no progress for {mark.quiet:.1f} s{step}")


def this_machine() -> str:
    """Equal for two processes that can see each other in `/proc`."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


def _observe(mark: _Mark, passed: float) -> None:
    """Another `passed` seconds without progress."""
    mark.quiet += passed
    process = mark.spot.process
    letter, total = _letter(process), _processor_seconds(process)
    mark.stopped = mark.stopped + passed if letter == "T" else 0.0
    used = total - mark.total if mark.total >= 0 else 0.0
    mark.total = total
    if letter in ("R", "D") or used > BUSY * passed:
        mark.used += min(used, passed)
    else:
        mark.idle += passed


def _fields(process: int) -> list[str]:
    """What /proc says of a process, from its state on; nothing when it is gone."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _letter(process: int) -> str:
    """R running, S sleeping, D on a disk, T stopped, Z ended; empty when it is gone."""
    return (_fields(process) or [""])[0]


def _processor_seconds(process: int) -> float:
    """Processor time of a process and all below it, those that have ended included."""
    fields = _fields(process)
    if not fields:
        return 0.0
    seconds = sum(int(ticks) for ticks in fields[11:15]) / _TICKS
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            children = (task / "children").read_text().split()
            seconds += sum(_processor_seconds(int(child)) for child in children)
    return seconds
