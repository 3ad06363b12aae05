"""What the command line prints: progress on stderr, results as tables on stdout.

Everything printed here can be had as JSON; nothing is computed here.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from adaptis.profile import Profile
    from adaptis.timeline import Timeline

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


class Reporter:
    """Live progress: one line a phase, kept when the phase is over."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=err,
        )
        self._tasks: dict[str, Any] = {}
        self._live = err.is_terminal
        self._told: dict[str, int] = {}

    def __enter__(self) -> Reporter:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._progress.stop()

    def update(self, phase: str, done: float, total: float, note: str = "") -> None:
        """How far a phase is."""
        name = f"{self.prefix}{phase}"
        if not self._live:
            # Without a terminal: a line at the start, in the middle and at the end.
            quarter = int(4 * done / total) if total else 4
            if self._told.get(name, -1) < quarter:
                self._told[name] = quarter
                err.print(f"{name}: {done:g} of {total:g} {note}".rstrip())
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note=note)
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)

    def say(self, kind: str, data: dict[str, Any]) -> None:
        """What a run says (see `execute`)."""
        match kind:
            case "measuring":
                self.update("measuring layers", data["done"], data["total"])
            case "planning":
                note = f"best {data['best'] * 1e3:.1f} ms, {data['gap']:.1%} above the bound"
                self.update("planning", min(data["seconds"], data["limit"]), data["limit"], note)
            case "reference":
                note = f"loss {data['loss']:.3f}"
                self.update("plain training", data["step"], data["steps"], note)
            case "step":
                name = data.get("name")
                note = f"loss {data['loss']:.3f}"
                if "seconds" in data:
                    note += f", {data['seconds'] * 1e3:.0f} ms"
                self.update(
                    f"training {name}" if name else "training", data["step"], data["steps"], note
                )
            case "resumed":
                self.line(f"resumed from {data['checkpoint']} at step {data['step']}")

    def line(self, text: str) -> None:
        """One line beside the progress."""
        err.print(f"{self.prefix}{text}")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout; the first column is a name, the others are figures."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    if out.width < 80 and not sys.stdout.isatty():
        Console(highlight=False, width=140).print(result)
    else:
        out.print(result)


def seconds(value: float) -> str:
    """A duration with a sensible unit."""
    if value >= 1:
        return f"{value:.4g} s"
    return f"{value * 1e3:.4g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def size(num_bytes: float) -> str:
    """A number of bytes with a sensible unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.4g} {unit}"


def show_profile(found: Profile) -> None:
    """A profile as a table of its layers."""
    table(
        found.model,
        ("layer", "kind", "F", "B", "I", "W", "state", "kept"),
        [
            (
                layer.name,
                layer.kind,
                seconds(layer.forward),
                seconds(layer.backward),
                seconds(layer.backward_input),
                seconds(layer.backward_weight),
                size(layer.state_bytes),
                size(layer.saved_bytes),
            )
            for layer in found.layers
        ],
    )
    split = sum(layer.backward_input + layer.backward_weight for layer in found.layers)
    fused = sum(layer.backward for layer in found.layers)
    extra = found.overheads
    out.print(
        f"I + W is {split / fused:.3f} of B; each instruction adds {seconds(extra.forward)} (F), "
        f"{seconds(extra.backward)} (B)"
    )


def show_timeline(answer: Timeline, count: int, assumed: str, bound: float) -> None:
    """Idle time by cause and memory per device, then the drawing."""
    from adaptis.timeline import CAUSES

    out.print(f"{answer.name}: {assumed}, {count} micro-batches", soft_wrap=True)
    bubbles, busy = answer.bubbles(), answer.busy()
    table(
        f"step {seconds(answer.step)}, bubble {answer.bubble_fraction:.1%}, "
        f"{answer.step / bound - 1:.1%} above the bound",
        ("device", "busy", *CAUSES, "peak memory"),
        [
            (
                str(d),
                seconds(busy[d]),
                *(seconds(bubbles[d][cause]) for cause in CAUSES),
                size(answer.peak_bytes[d]) if answer.peak_bytes else "",
            )
            for d in range(answer.num_devices)
        ],
    )
    draw_timeline(answer)


def draw_timeline(timeline: Timeline) -> None:
    """The timeline as text, as wide as the terminal."""
    from adaptis.report.text import draw

    out.print(
        draw(timeline, width=max(60, min(out.width, 160))),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
