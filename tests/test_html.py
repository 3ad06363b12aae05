"""The report in a real browser: headless Chromium opens it, its `#selftest` answers from inside.

Everything goes through the events that a person's pointer and keys cause.
"""

from __future__ import annotations

import dataclasses
import functools
import html as markup
import json
import re
import shutil
import struct
import subprocess
import urllib.parse
import zlib
from typing import Any

import numpy as np
import pytest

from adaptis.program import Compute, Op
from adaptis.report import html, palette
from adaptis.timeline import Timeline, from_rows

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1200,900",
]
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine to open the report in"
)


def run(page: str, folder, *flags: str, calls: list | None = None) -> str:
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    fragment = "#selftest=" + urllib.parse.quote(json.dumps(calls)) if calls is not None else ""
    command = [
        str(BROWSER),
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        *flags,
        file.as_uri() + fragment,
    ]
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode()


def ask(page: str, folder, *calls: list, flags: tuple[str, ...] = ()) -> list[Any]:
    dom = run(page, folder, "--dump-dom", *flags, calls=list(calls))
    match = re.search(r'<pre id="selftest">(.*?)</pre>', dom, re.S)
    assert match, dom[-500:]
    answers = json.loads(markup.unescape(match[1]))
    assert isinstance(answers, list), answers
    return answers


def two_devices(unit: float = 1e-3, **changes: Any) -> Timeline:
    """1F0 starts 2 late for its transfer, 0B0 waits for 1B0 and 3 more for the transfer."""
    rows = [
        [
            (Compute(Op.FORWARD, 0, 0), 0, 10),
            (Compute(Op.FORWARD, 0, 1), 10, 20),
            (Compute(Op.BACKWARD, 0, 0), 45, 65),
        ],
        [(Compute(Op.FORWARD, 1, 0), 12, 22), (Compute(Op.BACKWARD, 1, 0), 22, 42)],
    ]
    arguments: dict[str, Any] = {
        "name": "two",
        "source": "simulated",
        "placement": (0, 1),
        "num_microbatches": 2,
        "step": 100 * unit,
    }
    scaled = [[(c, start * unit, end * unit) for c, start, end in row] for row in rows]
    return from_rows(scaled, **(arguments | changes))


def large(devices: int, microbatches: int) -> Timeline:
    rows = [
        [
            (Compute(op, d, m), (d + 3 * m + k) * 1e-3, (d + 3 * m + k + 1) * 1e-3)
            for m in range(microbatches)
            for k, op in enumerate((Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT))
        ]
        for d in range(devices)
    ]
    return from_rows(
        rows,
        name="large",
        source="simulated",
        placement=tuple(range(devices)),
        num_microbatches=microbatches,
        step=rows[-1][-1][2],
    )


@functools.cache
def page() -> str:
    layers = ["layers 0 to 3", "layers 4 to 7"]
    return html.render(
        [two_devices(notes={"layers": layers}), two_devices(name="second", unit=5e-4)], "Report"
    )


def test_pointing_at_an_instruction_tells_what_it_is_and_what_it_waited_for(tmp_path):
    began, waited, idle, after, outside = ask(
        page(),
        tmp_path,
        ["point", 0, 0, 0.015],
        ["point", 0, 0, 0.050],
        ["point", 0, 0, 0.030],
        ["point", 0, 1, 0.090],
        ["hover", 0, 5, 5],
    )
    assert began == [
        "0F1: forward, stage 0, micro-batch 1, device 0",
        "layers 0 to 3",
        "10.0 ms to 20.0 ms, 10.00 ms long",
        "Began at once after 0F0",
    ]
    assert waited == [
        "0B0: backward, stage 0, micro-batch 0, device 0",
        "layers 0 to 3",
        "45.0 ms to 65.0 ms, 20.00 ms long",
        "Idle for 25.00 ms after 0F1",
        "22.00 ms (imbalance) until 1B0 on device 1 was done",
        "3.000 ms (transfer) until its result came over from device 1",
    ]
    assert idle == ["Idle before 0B0, device 0", *waited[3:]]
    assert after == ["Optimizer, device 1", "35.00 ms"]
    assert outside is None


def test_a_pair_tells_how_a_prediction_and_its_measurement_differ(tmp_path):
    slower = two_devices(name="two", unit=1.1e-3, source="measured")
    predicted, first, measured = ask(
        html.render([two_devices(), slower]),
        tmp_path,
        ["point", 0, 0, 0.050],
        ["point", 0, 1, 0.015],
        ["point", 1, 0, 0.005],
    )
    assert "measured: 22.00 ms long (+10.0 %), began 4.500 ms later" in predicted
    assert "Idle for 12.00 ms at the start of the step (warm-up)" in first
    assert "10.00 ms until 0F0 on device 0 was done" in first
    assert "simulated: 10.00 ms long (−9.1 %), began at the same time" in measured


def test_a_sharded_head_waits_for_all_its_devices(tmp_path):
    rows = [
        [(Compute(Op.FORWARD, 0, 0), 0, 1), (Compute(Op.SCORES, 2, 0), 2, 3)],
        [(Compute(Op.FORWARD, 1, 0), 1, 2), (Compute(Op.SCORES, 2, 0), 2, 5)],
    ]
    for row in rows:
        row.append((Compute(Op.SCORES_GRADIENT, 2, 0), 6, 7))
    timeline = from_rows(
        rows, name="head", source="simulated", placement=(0, 1), num_microbatches=1, step=7.0
    )
    timeline = dataclasses.replace(timeline, reductions=2)
    (gradient,) = ask(html.render([timeline]), tmp_path, ["point", 0, 0, 6.5])
    assert gradient == [
        "2T0: head gradient, micro-batch 0, device 0",
        "6.00 s to 7.00 s, 1.000 s long",
        "Idle for 3.000 s after 2S0",
        "2.000 s (imbalance) until 2S0 on device 1 was done",
        "1.000 s (transfer) until its result came over from device 1",
    ]


def test_what_memory_held_back_is_called_so(tmp_path):
    data = html.pack([two_devices()])
    assert data["timelines"][0]["devices"][0]["held"] == []
    held = {"held": [[2, 20_000_000]]}  # of ticks of a nanosecond
    text = page().replace('"held":[]', json.dumps(held)[1:-1], 1)
    (waited,) = ask(text, tmp_path, ["point", 0, 0, 0.050])
    assert "22.00 ms (20.00 ms memory, 2.000 ms imbalance) until 1B0 on device 1 was done" in waited


def test_wheel_drag_keys_and_double_click_move_the_view(tmp_path):
    start, (x, y), wheel, drag, key, left, back = ask(
        page(),
        tmp_path,
        ["state"],
        ["place", 0, 0, 0.025],
        ["wheel", 0, 350, 60, -400],
        ["drag", 0, 500, 400],
        ["key", 0, "+"],
        ["key", 0, "ArrowLeft"],
        ["double", 0],
    )
    assert (start["from"], start["to"], start["limit"]) == (0, 0.1, 0.1)
    assert start["spans"] == [5, 5]
    assert x > 76
    assert y > 24
    share = (350 - 76) / (x - 76) * 0.25  # of the plot, left of the wheel's cursor
    length = wheel["to"] - wheel["from"]
    assert length == pytest.approx(0.1 * 2.718281828 ** (-400 * 0.0018))
    assert wheel["from"] + share * length == pytest.approx(share * 0.1, rel=1e-6)
    assert drag["from"] > wheel["from"]
    assert drag["to"] - drag["from"] == pytest.approx(length)
    assert key["to"] - key["from"] == pytest.approx(length / 1.5)
    assert left["from"] < key["from"]
    assert (back["from"], back["to"]) == (0, 0.1)


@pytest.mark.parametrize("ratio", [1, 1.5])
def test_a_drag_moves_a_dense_picture_and_paints_only_what_comes_into_view(tmp_path, ratio):
    timeline = large(8, 1000)
    times = np.linspace(0, timeline.step, 500)
    curve = (times, 1e9 * (1 + np.sin(40 * times)))
    rendered = html.render([dataclasses.replace(timeline, memory=(curve,) * 8)])
    moves = [["drag", 0, 500, 493], ["drag", 0, 400, 650], ["drag", 0, 900, 560]]
    calls = [["wheel", 0, 700, 60, -500], ["moved", 0]]
    calls += [call for move in moves for call in (move, ["moved", 0])]
    flag = f"--force-device-scale-factor={ratio}"
    _, whole, _, little, _, back, _, on = ask(rendered, tmp_path, *calls, flags=(flag,))
    assert whole[0] > 900
    # Chromium takes the place of an event that was made up as one in pixels of the screen.
    painted = [answer[0] for answer in (little, back, on)]
    assert painted == pytest.approx([7, 250, 340], abs=4)
    for _, different in (little, back, on):  # rounding may turn over the end of a share
        assert different < 1e-4 * whole[0] * 8 * 28


def test_charts_show_the_colours_of_the_operations_on_one_axis(tmp_path):
    (place,) = ask(page(), tmp_path, ["place", 0, 0, 0.0485])
    same, *pixels = ask(
        page(),
        tmp_path,
        ["place", 1, 0, 0.0485],
        ["pixel", 0, place[0], place[1]],
        ["pixel", 0, place[0] * 0.2, place[1]],
        ["pixel", 1, place[0], place[1]],
    )
    assert same == place
    backward = palette.COLOURS[Op.BACKWARD]
    assert pixels[0] == [*(int(backward[i : i + 2], 16) for i in (1, 3, 5)), 255]
    assert pixels[2] != pixels[0]  # the second has half the length: its backward ends before


def test_hostile_names_run_nothing(tmp_path):
    facts = {"notes": [HOSTILE], "layers": [HOSTILE] * 2, "commands": [HOSTILE]}
    hostile = html.render([two_devices(name=HOSTILE, notes={"pair": HOSTILE})], HOSTILE, facts)
    dom = run(hostile, tmp_path, "--dump-dom", calls=[["point", 0, 0, 0.015]])
    assert "<title>owned" not in dom
    assert "<img" not in dom.replace(json.dumps(HOSTILE), "").split("<script")[0]
    match = re.search(r'<pre id="selftest">(.*?)</pre>', dom, re.S)
    assert match
    assert json.loads(markup.unescape(match[1]))[0][1] == HOSTILE


def test_two_hundred_thousand_instructions_stay_fluid(tmp_path):
    timeline = large(64, 1000)
    text = html.render([timeline], "large")
    assert len(text) < 4_000_000
    state, first, frames = ask(
        text, tmp_path, ["state"], ["point", 0, 63, timeline.step - 1.5e-3], ["frames", 8]
    )
    assert state["spans"] == [192_000]
    assert state["dense"] == [True]
    assert first[0].startswith("63I999: input gradient")
    # Shared machines are slow at times: these bounds catch a wrong order of growth, no more.
    assert state["loaded"] < 3000
    assert sorted(frames)[len(frames) // 2] < 300


def test_the_screenshot_has_the_pictures(tmp_path):
    picture = tmp_path / "report.png"
    run(page(), tmp_path, f"--screenshot={picture}")
    colours = set(pixels_of(picture.read_bytes()))
    for op in (Op.FORWARD, Op.BACKWARD):
        assert bytes.fromhex(palette.COLOURS[op][1:]) in colours


def pixels_of(png: bytes) -> list[bytes]:
    """The colours of an 8-bit PNG, read without a library."""
    data, at = b"", 8
    width = height = depth = 0
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        if kind == b"IHDR":
            width, height, _, kind_of_colour = struct.unpack(">IIBB", png[at + 8 : at + 18])
            depth = {2: 3, 6: 4}[kind_of_colour]
        if kind == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    raw, stride = zlib.decompress(data), width * depth
    before, colours = bytearray(stride), []
    for y in range(height):
        line = bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        unfilter(raw[y * (stride + 1)], line, before, depth)
        colours += {bytes(line[x : x + 3]) for x in range(0, stride, depth)}
        before = line
    return colours


def unfilter(method: int, line: bytearray, before: bytearray, depth: int) -> None:
    for x in range(len(line)):
        left = line[x - depth] if x >= depth else 0
        corner = before[x - depth] if x >= depth else 0
        near = sorted((left, before[x], corner), key=lambda v: abs(left + before[x] - corner - v))[
            0
        ]
        line[x] = (line[x] + (0, left, before[x], (left + before[x]) // 2, near)[method]) & 255
