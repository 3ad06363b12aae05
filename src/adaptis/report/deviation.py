"""A measured step beside its prediction, instruction by instruction, in figures.

An error is predicted minus measured: below 0 where the prediction is too short. Relative errors
are over the measured seconds, those of many instructions over the sum of theirs, so that what takes
no time counts for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptis.errors import InputError
from adaptis.report import palette
from adaptis.report.pack import pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptis.timeline import Span, Timeline

COLUMNS = ("operation", "count", "predicted", "measured", "mean", "mean abs.", "worst", "at")


def deviations(timelines: Sequence[Timeline]) -> list[dict[str, Any]]:
    """One entry for each pair of a prediction and its measurement (see `pack.pairs`).

    Where the two are of different plans it says so under "not_compared".
    """
    found: dict[str, dict[str, Timeline]] = {}
    for pair, timeline in zip(pairs(list(timelines)), timelines, strict=True):
        if pair is not None:
            found.setdefault(pair, {})[timeline.source] = timeline
    entries = []
    for name, both in found.items():
        if both.keys() == {"simulated", "measured"}:
            try:
                entry = deviation(both["simulated"], both["measured"])
            except InputError as error:
                entry = {"not_compared": str(error)}
            entries.append({"name": name, **entry})
    return entries


def deviation(predicted: Timeline, measured: Timeline) -> dict[str, Any]:
    """How far each figure of a prediction is off, the seconds of each operation, and its worst.

    Raises:
        InputError: the two are not of the same instructions.
    """
    ahead, there = _spans(predicted), _spans(measured)
    if ahead.keys() != there.keys():
        device, compute = min(ahead.keys() ^ there.keys(), key=str)
        where = "prediction" if (device, compute) in ahead else "measurement"
        raise InputError(
            f"only the {where} has {compute} on device {device}, so the two are of "
            f"different plans; give the timelines of one plan"
        )
    both = [(ahead[key], there[key]) for key in there]
    rows = [_row("all", both)] if both else []
    for op in palette.used_ops([measured]):
        rows.append(_row(str(op), [(p, m) for p, m in both if m.compute.op is op]))
    peaks = zip(predicted.peak_bytes, measured.peak_bytes, strict=False)
    return {
        "step_error": _relative(predicted.step, measured.step),
        "makespan_error": _relative(predicted.makespan, measured.makespan),
        "bubble_fraction_predicted": predicted.bubble_fraction,
        "bubble_fraction_measured": measured.bubble_fraction,
        "peak_bytes_errors": [_relative(p, m) for p, m in peaks],
        "operations": rows,
    }


def _spans(timeline: Timeline) -> dict[tuple[int, str], Span]:
    spans = ((d, span) for d in range(timeline.num_devices) for span in timeline.spans(d))
    return {(device, str(span.compute)): span for device, span in spans}


def _row(name: str, both: Sequence[tuple[Span, Span]]) -> dict[str, Any]:
    """The durations of many instructions, each predicted and measured."""
    times = [(p.end - p.start, m.end - m.start, m) for p, m in both]
    predicted, measured = sum(p for p, _, _ in times), sum(m for _, m, _ in times)
    off = sum(abs(p - m) for p, m, _ in times)
    p, m, worst = max(times, key=lambda t: abs(t[0] - t[1]))
    return {
        "operation": name,
        "count": len(times),
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "mean_error": _relative(predicted, measured),
        "mean_absolute_error": off / measured if measured else 0.0,
        "worst": {
            "instruction": str(worst.compute),
            "device": worst.device,
            "predicted_seconds": p,
            "measured_seconds": m,
        },
    }


def _relative(predicted: float, measured: float) -> float:
    return predicted / measured - 1 if measured else 0.0


def cells(entry: dict[str, Any]) -> list[tuple[str, ...]]:
    """The operations of one entry as the rows of a table with `COLUMNS`."""
    return [
        (
            row["operation"],
            str(row["count"]),
            palette.duration(row["predicted_seconds"]),
            palette.duration(row["measured_seconds"]),
            f"{row['mean_error']:+.1%}",
            f"{row['mean_absolute_error']:.1%}",
            palette.duration(row["worst"]["predicted_seconds"] - row["worst"]["measured_seconds"]),
            f"{row['worst']['instruction']} on device {row['worst']['device']}",
        )
        for row in entry["operations"]
    ]


def headline(entry: dict[str, Any]) -> str:
    """One sentence: how far the step is off."""
    idle = [entry[f"bubble_fraction_{kind}"] for kind in ("predicted", "measured")]
    return (
        f"{entry['name']}: step predicted {entry['step_error']:+.1%} off, "
        f"idle {idle[0]:.1%} predicted, {idle[1]:.1%} measured"
    )
