"""Timelines as one HTML file to explore: no request leaves it, everything in it is escaped.

The page is complete without its script: headings, figures and tables are plain HTML. The script
(`timeline.js`, then `control.js`) adds the drawings, from the data that `pack` embeds. A content
security policy with the hashes of exactly this script and style keeps anything else from running,
should a name ever slip through.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from adaptis.report import palette
from adaptis.report.pack import pack, pairs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from adaptis.timeline import Timeline

_TIMES = {"busy": palette.BUSY, **palette.CAUSE_COLOURS}  # what a device's time goes to
OPEN_ROWS = 16  # up to this many devices, the table of devices is shown unfolded


def render(
    timelines: Iterable[Timeline], title: str = "Timelines", facts: dict[str, Any] | None = None
) -> str:
    """The report as one page.

    A pair (see `pack.pairs`) shares a section, the simulated above the measured, with the error of
    the prediction in the heading; every other timeline is a section of its own.

    Args:
        timelines: all are drawn on one time axis; the summary compares each with the first.
        title: the heading of the page.
        facts: what else to show: "tables" (a list of {"title", "columns", "rows"}), "notes" and
            "commands" (lists of text), and "layers" (one text a stage, for timelines whose notes
            have no "layers").
    """
    timelines, facts = list(timelines), facts or {}
    style = _style() + _resource("timeline.css")
    script = (
        f'"use strict";\n(() => {{\n{_resource("timeline.js")}\n{_resource("control.js")}}})();\n'
    )
    data = json.dumps(pack(timelines, facts.get("layers")), separators=(",", ":"), allow_nan=False)
    # The text of a script element ends at "</" and can be derailed by "<!--": no "<", no such text.
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
            *_header(timelines, title, facts),
            "<main>",
            *(part for group in sections(timelines) for part in _section(timelines, group)),
            *_facts(facts),
            "</main>",
            '<div id="tip" role="status" aria-live="polite" hidden></div>',
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def sections(timelines: list[Timeline]) -> list[list[int]]:
    """Which timelines share a section, by their numbers, in the order of first appearance."""
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs(timelines)):
        key = f"#{index}" if pair is None else f"pair {pair}"
        groups.setdefault(key, []).append(index)
    return [
        sorted(group, key=lambda i: timelines[i].source != "simulated") for group in groups.values()
    ]


def _resource(name: str) -> str:
    return files("adaptis.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _style() -> str:
    colours = {f"op-{op}": colour for op, colour in palette.COLOURS.items()}
    colours |= {f"time-{cause}": colour for cause, colour in _TIMES.items()}
    return "".join(f".{name}{{background:{c};fill:{c}}}\n" for name, c in colours.items())


def _header(timelines: list[Timeline], title: str, facts: dict[str, Any]) -> Iterator[str]:
    yield f"<header>\n<h1>{escape(title)}</h1>"
    for note in facts.get("notes", ()):
        yield f"<p>{escape(str(note))}</p>"
    entries = [(f"op-{op}", f"{palette.NAMES[op]} ({op})") for op in palette.used_ops(timelines)]
    entries.append(("idle", "idle"))
    if any(t.step > t.makespan * 1.001 for t in timelines):
        entries.append(("after", "optimizer"))
    if any(t.memory for t in timelines):
        entries.append(("memory", "memory in use"))
    yield _legend(entries, "Colours of the operations")
    yield (
        '<p class="quiet help">Wheel or <kbd>+</kbd> <kbd>−</kbd> zoom, drag or <kbd>←</kbd> '
        "<kbd>→</kbd> move, double-click or <kbd>0</kbd> show all; point at an instruction to see "
        "what it waited for.</p>"
    )
    yield "</header>"
    if len(timelines) > 1:
        yield f"<section>{_summary(timelines)}</section>"


def _legend(entries: Iterable[tuple[str, str]], name: str) -> str:
    items = "".join(
        f'<li><span class="swatch {kind}"></span>{escape(text)}</li>' for kind, text in entries
    )
    return f'<ul class="legend" aria-label="{escape(name)}">{items}</ul>'


def _summary(timelines: list[Timeline]) -> str:
    base = timelines[0].step
    rows = [
        [
            t.name,
            t.source,
            palette.duration(t.step),
            f"{base / t.step:.2f}×" if t.step else "",
            palette.percent(t.bubble_fraction),
            palette.size(max(t.peak_bytes)) if t.peak_bytes else "",
        ]
        for t in timelines
    ]
    columns = ["", "", "step", "speed", "bubble", "peak memory"]
    return _table("All timelines", columns, rows, text_columns=2)


def _table(
    title: str, columns: Iterable[object], rows: Iterable[Iterable[object]], text_columns: int = 1
) -> str:
    def cell(tag: str, index: int, value: object) -> str:
        text = "" if value is None else f"{value:,.6g}" if isinstance(value, float) else str(value)
        kind = "long" if len(text) > 60 else "text" if index < text_columns else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}" + (f' class="{kind}"' if kind else "") + f">{escape(text)}</{tag}>"

    head = "".join(cell("th", i, c) for i, c in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>\n" for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _section(timelines: list[Timeline], group: list[int]) -> Iterator[str]:
    members = [timelines[i] for i in group]
    pair = pairs(timelines)[group[0]]
    head = _heading(members[0]) if pair is None else _pair_heading(pair, members)
    yield f"<section>\n<h2>{head}</h2>"
    for index, timeline in zip(group, members, strict=True):
        if pair is not None:
            yield f"<h3>{_heading(timeline)}</h3>"
        name = escape(
            f"{timeline.name}, {timeline.source}: {timeline.num_devices} devices over time"
        )
        yield (
            f'<div class="chart" data-timeline="{index}">'
            '<canvas class="back" aria-hidden="true"></canvas>'
            f'<canvas class="front" tabindex="0" role="img" aria-label="{name}" '
            f'aria-describedby="devices-{index}">{name}; its figures are in the table below.'
            "</canvas></div>"
        )
        yield _devices(timeline, index)
    yield "</section>"


def _heading(timeline: Timeline) -> str:
    step, bubble = palette.duration(timeline.step), palette.percent(timeline.bubble_fraction)
    figures = f"{escape(timeline.source)} · step {step}, bubble {bubble}"
    return f'{escape(timeline.name)} <span class="quiet">{figures}</span>'


def _pair_heading(pair: str, members: list[Timeline]) -> str:
    name = escape(pair)
    simulated = next((t for t in members if t.source == "simulated"), None)
    measured = next((t for t in members if t.source == "measured"), None)
    if simulated is None or measured is None or not measured.step:
        return name
    error = f"{100 * (simulated.step / measured.step - 1):+.1f} %".replace("-", "−")
    return (
        f'{name} <span class="quiet">predicted {palette.duration(simulated.step)}, '
        f"measured {palette.duration(measured.step)}:</span> error {error}"
    )


def _devices(timeline: Timeline, index: int) -> str:
    """Per device: where its time goes, as a bar and in figures, and its peak memory."""
    peaks = timeline.peak_bytes
    columns = ["device", "", *_TIMES, "idle"] + (["peak memory"] if peaks else [])
    rows = []
    total = timeline.makespan
    for device, (busy, causes) in enumerate(
        zip(timeline.busy().tolist(), timeline.bubbles(), strict=True)
    ):
        values = [busy, *causes.values()]
        idle = palette.percent(sum(causes.values()) / total if total else 0.0)
        cells = [palette.duration(v) if v > 0 else "0" for v in values] + [idle]
        cells += [palette.size(peaks[device])] if peaks else []
        tail = "".join(f"<td>{c}</td>" for c in cells)
        rows.append(f'<tr><th scope="row">{device}</th><td>{_bar(values, total)}</td>{tail}</tr>')
    legend = _legend([(f"time-{cause}", cause) for cause in _TIMES], "Colours of the bars")
    head = "".join(f'<th scope="col">{c}</th>' for c in columns)
    unfolded = " open" if timeline.num_devices <= OPEN_ROWS else ""
    return (
        f'<details{unfolded} id="devices-{index}">'
        f"<summary>Where each device's time goes</summary>{legend}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(rows)
        + "</tbody></table></div></details>"
    )


def _bar(values: list[float], total: float) -> str:
    parts, x = [], 0.0
    for kind, value in zip(_TIMES, values, strict=True):
        width = 1000 * value / total if total else 0.0
        if width >= 0.05:
            parts.append(f'<rect class="time-{kind}" x="{x:.1f}" width="{width:.1f}" height="10"/>')
        x += width
    return (
        '<svg class="bar" viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true">'
        + "".join(parts)
        + "</svg>"
    )


def _facts(facts: dict[str, Any]) -> Iterator[str]:
    for table in facts.get("tables", ()):
        yield f"<section>{_table(table['title'], table['columns'], table['rows'])}</section>"
    if facts.get("commands"):
        lines = escape("\n".join(str(command) for command in facts["commands"]))
        yield f'<section><h2>Commands</h2><pre tabindex="0">{lines}</pre></section>'
