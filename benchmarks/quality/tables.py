"""The rows of the study as text: a line a case, then tables in Markdown."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

WORST = 15  # cases that are listed


def gap(row: dict[str, Any], step: float | None) -> float:
    """How far `step` is above the bound, a share of it; nan: there is none."""
    return max(step / row["bound"] - 1, 0.0) if step else float("nan")


def ratio(over: float | None, step: float | None) -> float:
    """How many times as fast; nan where either is missing."""
    return over / step if over and step else float("nan")


def fastest(row: dict[str, Any]) -> float:
    """Our step where the planner may choose whether to shard the head."""
    return min(row[part]["step"] or float("inf") for part in ("whole", "sharded"))


def line(row: dict[str, Any]) -> str:
    """One case in one line."""
    step, other = row["whole"]["step"], row["published"]["step"]
    if step is None:
        return f"{row['case']:40} {row['whole']['error'][:150]}; published: {other}"
    best = ratio(row["best_baseline_step"], step)
    sharded = row["sharded"]["step"]
    extra = f", sharded {ratio(step, sharded):.3f}x whole" if sharded else ""
    extra += f"; sharded: {row['sharded']['error'][:60]}" if "error" in row["sharded"] else ""
    return (
        f"{row['case']:40} gap {gap(row, step):6.1%} ({row['binding']:8}) "
        f"baseline {best:5.3f}x ({row['best_baseline']}) published {ratio(other, step):5.3f}x "
        f"{row['whole']['seconds']:5.1f} s{extra}"
    )


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    """The speed-ups over interleaved 1F1B with one layer a chunk."""
    head = ("cell", "best baseline", "published, anew", "adaptis", "head sharded", "ideal")
    text = [
        f"| {' | '.join(head)} | measured by its authors | best baseline is | gap | binding |",
        "|---" * 10 + "|",
    ]
    columns: list[list[float]] = []
    for row in rows:
        over, step = row["interleaved"], row["whole"]["step"]
        sharded = row["sharded"]["step"]
        steps = (row["best_baseline_step"], row["published"]["step"], step, sharded, row["bound"])
        values = [*(ratio(over, one) for one in steps), row["measured"]]
        columns.append(values)
        numbers = " | ".join(f"{value:.3f}" for value in values)
        text.append(
            f"| {row['case']} | {numbers} | {row['best_baseline']} | {gap(row, step):.1%} "
            f"| {row['binding']} |"
        )
    means = " | ".join(f"**{mean(column):.3f}**" for column in zip(*columns, strict=True))
    text.append(f"| mean | {means} | | {mean(gap(r, r['whole']['step']) for r in rows):.1%} | |")
    return text


def _conditions(row: dict[str, Any]) -> str:
    flags = [flag for flag in ("priced", "tight", "unequal") if row[flag]]
    if row["microbatches"] > 4 * row["devices"]:
        flags.append("8 micro-batches a device")
    return ", ".join(flags) or "plain"


def _grouped(rows: list[dict[str, Any]]) -> list[str]:
    """Gaps by number of devices and by condition."""
    text = [
        "| cases | number | median gap | worst gap | over best baseline | with a sharded head | "
        "over published | published: median gap |",
        "|---" * 8 + "|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        where = "cells" if row["group"] == "cells" else _conditions(row)
        if where == "plain":
            where = f"{row['devices']} devices"
        groups.setdefault(where, []).append(row)
    groups["all with loose memory"] = [row for row in rows if not row["tight"]]
    for name, found in {**groups, "all": rows}.items():
        gaps = [gap(row, row["whole"]["step"]) for row in found]
        best = [ratio(row["best_baseline_step"], row["whole"]["step"]) for row in found]
        free = [ratio(row["best_baseline_step"], fastest(row)) for row in found]
        other = [ratio(row["published"]["step"], row["whole"]["step"]) for row in found]
        theirs = [gap(row, row["published"]["step"]) for row in found if row["published"]["step"]]
        text.append(
            f"| {name} | {len(found)} | {median(gaps):.2%} | {max(gaps):.2%} | {_mean(best)} "
            f"| {_mean(free)} | {_mean(other)} | {median(theirs) if theirs else float('nan'):.2%} |"
        )
    return text


def _mean(values: list[float]) -> str:
    """The mean and the least of those that are numbers."""
    real = [value for value in values if value == value]  # noqa: PLR0124 - nan differs from itself
    return f"{mean(real):.3f}x (least {min(real):.3f}x)" if real else "-"


def _worst(rows: list[dict[str, Any]]) -> list[str]:
    text = [
        "| worst cases | gap | binding bound | best baseline is | over it | with a sharded head | "
        "over published |",
        "|---" * 7 + "|",
    ]
    for row in sorted(rows, key=lambda row: -gap(row, row["whole"]["step"]))[:WORST]:
        step = row["whole"]["step"]
        text.append(
            f"| {row['case']} | {gap(row, step):.1%} | {row['binding']} | {row['best_baseline']} "
            f"| {ratio(row['best_baseline_step'], step):.3f}x "
            f"| {ratio(row['best_baseline_step'], fastest(row)):.3f}x "
            f"| {ratio(row['published']['step'], step):.3f}x |"
        )
    return text


def summary(rows: list[dict[str, Any]]) -> str:
    """All tables."""
    lost = [
        f"- {row['case']}, {part}: {row[part]['error']}"
        for row in rows
        for part in ("whole", "sharded")
        if "error" in row[part]
    ]
    rows = [row for row in rows if row["whole"]["step"] is not None]
    if not rows:
        return "no case is done"
    cells = [row for row in rows if row["group"] == "cells"]
    blocks = [_cells(cells)] if cells else []
    blocks += [_grouped(rows), _worst(rows)]
    if lost:
        blocks.append(["No plan:", "", *lost])
    return "\n\n".join("\n".join(block) for block in blocks)
