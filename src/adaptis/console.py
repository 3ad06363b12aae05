"""What the command line prints: progress on stderr, results as tables on stdout.

Everything printed here can be had as JSON; nothing is computed here. Figures and paths are never
shortened or broken, however narrow the terminal: a table is plain lines.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from adaptis.profile import Profile
    from adaptis.timeline import Timeline

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def _prepare_planner() -> None:
    """Have the planner's machine code ready, and say what is going on where that takes a while."""
    from adaptis.search.tune import warm_up

    text = "compiling the planner: half a minute, once on this machine"
    note = threading.Timer(1.5, err.print, (text,))
    note.daemon = True
    note.start()
    try:
        warm_up()
    finally:
        note.cancel()


class Reporter:
    """Live progress: one line a phase, kept when the phase is over."""

    def __init__(self, prefix: str = "", *, plans: bool = False) -> None:
        """Prefix each line; `plans`: the planner will be used, compile it first where needed."""
        self.prefix = prefix
        self._plans = plans
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=err,
        )
        self._tasks: dict[str, Any] = {}
        self._live = err.is_terminal
        self._told: dict[str, int] = {}

    def __enter__(self) -> Reporter:
        if self._plans:
            _prepare_planner()
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
            half = int(2 * done / total) if total else 2
            if self._told.get(name, -1) < half:
                self._told[name] = half
                warn(f"{name}: {done:.3g} of {total:.3g}{', ' if note else ''}{note}")
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
                note = "nothing fits yet"
                if data["best"] < float("inf"):
                    note = f"best {seconds(data['best'])}, {data['gap']:.1%} above the bound"
                self.update("planning", min(data["seconds"], data["limit"]), data["limit"], note)
            case "reference":
                note = f"loss {data['loss']:.3f}"
                self.update("plain training", data["step"], data["steps"], note)
            case "step":
                name = data.get("name")
                note = f"loss {data['loss']:.3f}"
                if "seconds" in data:
                    note += f", {seconds(data['seconds'])}"
                self.update(
                    f"training {name}" if name else "training", data["step"], data["steps"], note
                )
            case _:
                for text in _news(kind, data):
                    self.line(text)

    def line(self, text: str) -> None:
        """One line beside the progress."""
        warn(f"{self.prefix}{text}")


def _news(kind: str, data: dict[str, Any]) -> list[str]:
    """What happens once in a run, in a line or a few."""
    match kind:
        case "starting":
            return [f"starting {data['processes']} process(es)"]
        case "resumed":
            passed = [f"passed over: {problem}" for problem in data.get("problems", [])]
            return [*passed, f"resumed from {data['checkpoint']} at step {data['step']}"]
        case "weights":
            unused = f", {len(data['unused'])} tensors unused" if data["unused"] else ""
            return [f"weights from {data['folder']}{unused}"]
        case "evaluation":
            return [f"held-out loss {data['loss']:.3f} after step {data['step']}"]
        case "left_out":
            return [f"{data['name']} is left out: {data['reason']}"]
    return []


def warn(text: str) -> None:
    """One line on stderr, as it is."""
    err.print(text, soft_wrap=True, markup=False)


def line(text: str) -> None:
    """One line on stdout, as it is."""
    out.print(text, soft_wrap=True, markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout; the first column is a name, the others are figures."""
    listed = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
    if title:
        out.print(Text(title, style="bold"), soft_wrap=True)
    for number, row in enumerate(listed):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        out.print(Text("  ".join(cells), style="" if number else "bold"), soft_wrap=True)
        if not number:
            out.print(Text("  ".join("─" * width for width in widths)), soft_wrap=True)


def seconds(value: float) -> str:
    """A duration with a sensible unit."""
    if value >= 1 or value == 0:
        return f"{value:.4g} s"
    return f"{value * 1e3:.4g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def size(num_bytes: float) -> str:
    """A number of bytes with a sensible unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.4g} {unit}"


def show_profile(found: Profile) -> None:
    """A profile as a table of its layers."""
    longest = max(max(layer.forward, layer.backward) for layer in found.layers)
    largest = max(max(layer.state_bytes, layer.saved_bytes) for layer in found.layers)
    per, time = (1e3, "ms") if longest >= 1e-3 else (1e6, "us")
    unit, name = (2**30, "GiB") if largest >= 1000 * 2**20 else (2**20, "MiB")
    table(
        f"{found.model}: times in {time}, sizes in {name}",
        ("layer", "kind", "F", "B", "I", "W", "state", "kept"),
        [
            (
                layer.name,
                layer.kind,
                f"{layer.forward * per:.3f}",
                f"{layer.backward * per:.3f}",
                f"{layer.backward_input * per:.3f}",
                f"{layer.backward_weight * per:.3f}",
                f"{layer.state_bytes / unit:.2f}",
                f"{layer.saved_bytes / unit:.2f}",
            )
            for layer in found.layers
        ],
    )
    split = sum(layer.backward_input + layer.backward_weight for layer in found.layers)
    fused = sum(layer.backward for layer in found.layers)
    extra = found.overheads
    ratio = f"I + W is {split / fused:.3f} of B; " if fused else ""
    line(
        f"{ratio}each instruction adds {seconds(extra.forward)} (F), {seconds(extra.backward)} (B)"
    )


def show_comparison(result: Mapping[str, Any], assumed: str) -> None:
    """Every schedule beside the plan."""
    line(assumed)
    best = result["results"][-1]["step_seconds"]
    bound = result["lower_bound_seconds"]
    table(
        "",
        ("schedule", "step", "above bound", "vs adaptis", "bubble", "peak", "fits"),
        [
            (
                row["name"],
                seconds(row["step_seconds"]),
                _above(row["step_seconds"], bound),
                f"{row['step_seconds'] / best:.2f}x" if best else "",
                f"{row['bubble_fraction']:.1%}",
                _peak(max(row["peak_bytes"])),
                "yes" if row["fits"] else "no",
            )
            for row in result["results"]
        ],
    )
    for name, reason in result["not_applicable"].items():
        line(f"{name}: {reason}")
    line(f"lower bound {seconds(bound)}")


def show_timeline(answer: Timeline, count: int, assumed: str, bound: float) -> None:
    """Idle time by cause and memory per device, then the drawing."""
    from adaptis.timeline import CAUSES

    line(f"{answer.name}: {assumed}, {count} micro-batches")
    bubbles, busy = answer.bubbles(), answer.busy()
    table(
        f"step {seconds(answer.step)}, bubble {answer.bubble_fraction:.1%}, "
        f"{_above(answer.step, bound)} above the bound",
        ("device", "busy", *CAUSES, "peak"),
        [
            (
                str(d),
                seconds(busy[d]),
                *(seconds(bubbles[d][cause]) for cause in CAUSES),
                _peak(answer.peak_bytes[d]) if answer.peak_bytes else "?",
            )
            for d in range(answer.num_devices)
        ],
    )
    draw_timeline(answer)


def _above(step: float, bound: float) -> str:
    return f"{max(step / bound - 1, 0.0):.1%}" if bound else "0.0%"


def _peak(num_bytes: float) -> str:
    return size(num_bytes) if num_bytes else "?"  # the profile holds no sizes


def show_training(result: Mapping[str, Any]) -> None:
    """What a run has reached."""
    for key in ("step", "loss_first", "loss_last"):
        if result[key] is not None:
            line(f"{key.replace('_', ' ')}: {result[key]:.6g}")
    if result["step_seconds"] is not None:
        line(f"step time: {seconds(result['step_seconds'])} (median)")
    if result["checkpoint"]:
        line(f"checkpoint: {result['checkpoint']}")


def draw_timeline(timeline: Timeline) -> None:
    """The timeline as text, as wide as the terminal."""
    from adaptis.report.text import draw

    line(draw(timeline, width=max(60, min(out.width, 160))))
