"""The renderers, as far as Python can judge them; test_html asks a browser about the report."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from adaptis.files import write_json
from adaptis.jobs import draw_report
from adaptis.notation import parse_compute
from adaptis.program import OPS, Compute, Kind, Op
from adaptis.report import chrome, html, palette, png, svg, text
from adaptis.report.pack import pack
from adaptis.report.raster import shares
from adaptis.report.scene import ROW, Boxes, Text, _width, make_scene
from adaptis.timeline import CAUSES, Timeline, Transfer, from_rows, timeline_to_json

F, B, B_INPUT, B_WEIGHT, R, S, T = OPS
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&"

ONE_F_ONE_B = """\
rank 0 | F0 F1 F2       B0 F3 B1    B2    B3
rank 1 |    F0 F1    B0 F2 B1 F3 B2    B3
rank 2 |       F0 B0 F1 B1 F2 B2 F3 B3"""

LONGER_BACKWARD = """\
rank 0 | F0 F1          B0---    B1---
rank 1 |    F0 B0--- F1 B1---"""

TWO_STAGES = """\
rank 0 | 0F0     2F0
rank 1 |     1F0"""


def grid(*lines: str, unit: float = 1.0, **changes: Any) -> Timeline:
    """A timeline from lines of `cell,instruction,cells`; stage s is on device s unless told."""
    rows = []
    for line in lines:
        row = []
        for word in line.split():
            at, name, cells = word.split(",")
            start = float(at) * unit
            row.append((parse_compute(name), start, start + float(cells) * unit))
        rows.append(row)
    everything = [entry for row in rows for entry in row]
    arguments: dict[str, Any] = {
        "name": "a schedule",
        "source": "simulated",
        "placement": tuple(range(len(rows))),
        "num_microbatches": max((c.microbatch for c, _, _ in everything), default=0) + 1,
        "step": max((end for _, _, end in everything), default=0.0),
    }
    return from_rows(rows, **(arguments | changes))


def one_f_one_b(**changes: Any) -> Timeline:
    return grid(
        "0,0F0,1 1,0F1,1 2,0F2,1 5,0B0,1 6,0F3,1 7,0B1,1 9,0B2,1 11,0B3,1",
        "1,1F0,1 2,1F1,1 4,1B0,1 5,1F2,1 6,1B1,1 7,1F3,1 8,1B2,1 10,1B3,1",
        "2,2F0,1 3,2B0,1 4,2F1,1 5,2B1,1 6,2F2,1 7,2B2,1 8,2F3,1 9,2B3,1",
        **changes,
    )


def halves(devices: int, microbatches: int) -> Timeline:
    """F, I and W of each micro-batch, back to back, each device a little later."""
    rows = [
        " ".join(
            f"{d + 3 * m + k},{d}{op}{m},1"
            for m in range(microbatches)
            for k, op in enumerate("FIW")
        )
        for d in range(devices)
    ]
    return grid(*rows, unit=1e-3)


def with_memory(timeline: Timeline) -> Timeline:
    curve = (np.array([0.0, timeline.makespan / 2]), np.array([1 << 30, 3 << 30], dtype=float))
    return dataclasses.replace(
        timeline,
        memory=(curve,) * timeline.num_devices,
        peak_bytes=(3 << 30,) * timeline.num_devices,
    )


# Text


@pytest.mark.parametrize("unit", [1.0, 0.25, 3e-4])
def test_the_drawing_of_1f1b_is_that_of_its_docstring(unit):
    assert text.drawing(one_f_one_b(unit=unit), unit) == ONE_F_ONE_B


def test_dashes_mark_the_cells_of_longer_instructions():
    timeline = grid("0,0F0,1 1,0F1,1 5,0B0,2 8,0B1,2", "1,1F0,1 2,1B0,2 4,1F1,1 5,1B1,2")
    assert text.drawing(timeline) == LONGER_BACKWARD


def test_a_drawing_names_stages_where_a_device_holds_many():
    timeline = grid("0,0F0,1 2,2F0,1", "1,1F0,1", placement=(0, 1, 0))
    assert text.drawing(timeline) == TWO_STAGES


@pytest.mark.parametrize("unit", [0.0, -1.0, 0.7, 2.0])
def test_a_drawing_that_would_lie_is_refused(unit):
    with pytest.raises(ValueError, match="give a unit"):
        text.drawing(one_f_one_b(), unit)


@given(width=st.integers(40, 200), microbatches=st.integers(1, 60), devices=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_a_chart_keeps_its_width_and_has_a_row_for_each_device(width, microbatches, devices):
    lines = text.draw(halves(devices, microbatches), width).splitlines()
    rows = [line for line in lines if line.startswith("device")]
    assert len(rows) == devices
    assert all(len(line) == width for line in rows)
    assert all(len(line) <= width for line in lines[: 1 + devices + 2])


def test_a_chart_is_to_scale():
    row = text.draw(grid("0,0F0,1 3,0B0,1"), 51).splitlines()[1]
    bar = row[row.index("│") + 1 : -1]
    assert [len(part) for part in re.findall(r"\S+|\s+", bar)] == [10, 20, 10]


def test_a_dense_chart_shows_operations_only():
    lines = text.draw(halves(2, 500), 60).splitlines()
    assert set(lines[1][len("device 0 │") : -1]) <= set("FIW ")


def test_charts_of_nothing_say_so():
    empty = grid("", "")
    assert "nothing ran" in text.draw(empty)
    assert text.drawing(empty) == "rank 0 |\nrank 1 |"
    assert ET.fromstring(svg.render([empty])).tag == SVG + "svg"
    assert ET.fromstring(svg.render([])).tag == SVG + "svg"
    assert "a schedule" in html.render([empty], "nothing")
    assert json.loads(chrome.render([empty]))["traceEvents"]


# The shared parts


def test_shares_are_the_time_spent_in_each_cell():
    timeline = grid("0,0F0,1 1,0B0,2 4,0F1,1")
    share = shares(timeline, 0, np.array([0.0, 2.0, 4.0, 5.0]))
    assert share[OPS.index(F)].tolist() == [0.5, 0.0, 1.0]
    assert share[OPS.index(B)].tolist() == [0.5, 0.5, 0.0]


def test_every_operation_has_a_colour_and_a_name():
    assert set(palette.COLOURS) == set(palette.NAMES) == set(Op)


def test_stages_of_a_device_have_different_colours_with_readable_labels():
    for colour in palette.COLOURS.values():
        fills = [palette.shade(colour, i, 4) for i in range(4)]
        assert len(set(fills)) == 4
        assert all(contrast(fill, palette.ink(fill)) > 3 for fill in fills)


def linear(colour: str) -> np.ndarray:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels])


# How linear red, green and blue look without one of the three kinds of cones: Machado, Oliveira
# and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009.
EYES = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
XYZ = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])


def cielab(colour: str, eyes: list[list[float]]) -> np.ndarray:
    x, y, z = XYZ @ np.clip(np.array(eyes) @ linear(colour), 0, 1) / XYZ.sum(axis=1)
    f = [np.cbrt(t) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize(
    "beside",
    [
        {**palette.COLOURS, "idle": ROW},
        {"busy": palette.BUSY, **palette.CAUSE_COLOURS},
    ],
    ids=["operations", "times"],
)
def test_colours_that_stand_side_by_side_are_told_apart_without_all_cones(beside, eyes):
    places = {name: cielab(colour, EYES[eyes]) for name, colour in beside.items()}
    for one, other in combinations(places, 2):
        assert np.linalg.norm(places[one] - places[other]) >= 25, f"{one} and {other}"


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        return float(np.dot((0.2126, 0.7152, 0.0722), linear(colour)))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.00 s"),
        (1.5, "1.50 s"),
        (0.0123, "12.3 ms"),
        (0.99999e-3, "1.00 ms"),
        (2e-6, "2.00 µs"),
    ],
)
def test_durations_have_the_unit_that_fits(seconds, expected):
    assert palette.duration(seconds) == expected


@given(length=st.floats(1e-6, 1e6), most=st.integers(2, 20))
def test_axis_steps_are_round_and_not_too_many(length, most):
    step = palette.nice_step(length, most)
    assert length / step <= most
    assert length / step > most / 5
    assert f"{step:.6e}"[0] in "125"


# SVG


def test_svg_is_xml_with_a_row_for_each_device_and_the_figures():
    timeline = with_memory(one_f_one_b(unit=1e-3))
    root = ET.fromstring(svg.render([timeline], "Title"))
    words = [element.text or "" for element in root.iter(SVG + "text")]
    assert [w for w in words if w in {"device 0", "device 1", "device 2"}][:3] == [
        f"device {d}" for d in range(3)
    ]
    assert "Title" in words
    assert any("step 12.0 ms" in w and "bubble 33.3 %" in w for w in words)
    assert "F0" in words
    assert "3.0 GiB" in words


def test_svg_compares_with_the_first_timeline():
    assert "50.0 % more time" in svg.render([one_f_one_b(), one_f_one_b(unit=1.5)])
    assert "50.0 % less time" in svg.render([one_f_one_b(), one_f_one_b(unit=0.5)])


@pytest.mark.parametrize(("devices", "microbatches"), [(3, 4), (16, 40), (64, 300)])
def test_svg_stays_within_its_frame_and_small(devices, microbatches):
    picture = svg.render([with_memory(halves(devices, microbatches))], "x" * 300)
    root = ET.fromstring(picture)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter(SVG + "text"):
        assert 0 <= float(element.attrib["x"]) <= width
        assert 0 <= float(element.attrib["y"]) <= height
    for path in root.iter(SVG + "path"):
        for x, y in re.findall(r"M([\d.]+) ([\d.]+)", path.attrib["d"]):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height
    assert len(picture) < 500_000


def test_svg_escapes_names():
    root = ET.fromstring(svg.render([one_f_one_b(name=HOSTILE)], HOSTILE))
    assert not list(root.iter(SVG + "script"))
    assert not list(root.iter(SVG + "img"))


# PNG


def sharded_head() -> Timeline:
    """A forward, the head on both devices, a backward; device 1 ends its pass later."""
    timeline = grid(
        "0,0F0,1 1,0F1,1 4,2S0,1 6,2T0,1 12,0B0,1",
        "2,1F0,1 4,2S0,2 6,2T0,3 10,1B0,1",
        placement=(0, 1),
        unit=1e-3,
    )
    return dataclasses.replace(timeline, reductions=2)


def pixels(picture: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(picture))
    assert image.format == "PNG"
    return image.convert("RGB")


def test_the_png_is_the_scene_of_the_svg_at_twice_the_size():
    scene = make_scene([one_f_one_b()])
    image = pixels(png.render([one_f_one_b()]))
    assert image.size == (2 * scene.width, 2 * scene.height)
    seen = 0
    for shape in scene.shapes:
        if isinstance(shape, Boxes) and shape.fill in palette.COLOURS.values() and not shape.radius:
            for x, y, width, _ in shape.boxes:
                middle = (round(2 * (x + width / 4)), round(2 * y + 8))
                assert image.getpixel(middle) == ImageColor.getrgb(shape.fill)
                seen += 1
    assert seen == 8 + 8 + 8


def test_the_text_of_a_png_has_the_room_that_the_scene_gave_it():
    scene = make_scene([with_memory(one_f_one_b(unit=1e-3)), sharded_head()], "Title µ − ×")
    for shape in scene.shapes:
        if isinstance(shape, Text):
            width = png._font(shape.size).getlength(png._spelled(shape.text)) / png.SCALE
            assert width <= _width(shape.text, shape.size) + 1, shape.text


def test_a_png_spells_what_its_font_lacks():
    assert png._spelled("12 µs − é × 中 · …") == "12 us - e x ? · …"


@pytest.mark.parametrize("timelines", [[], [grid("", "")], [halves(64, 300)]])
def test_a_png_of_nothing_and_of_much_is_a_picture(timelines):
    assert pixels(png.render(timelines, "x" * 300)).width == 1920


def test_every_renderer_draws_a_sharded_head():
    timeline = sharded_head()
    assert "head scores" in text.draw(timeline)
    words = [e.text for e in ET.fromstring(svg.render([timeline])).iter(SVG + "text")]
    assert words.count("S0") == words.count("T0") == 2
    colours = {colour for _, colour in pixels(png.render([timeline])).getcolors(1 << 20) or []}
    assert {ImageColor.getrgb(palette.COLOURS[op]) for op in (S, T)} <= colours
    assert "head scores (S)" in html.render([timeline])
    assert [e["name"] for e in events_of([timeline]) if e["ph"] == "X"].count("2S0") == 2


def test_a_long_legend_goes_on_below():
    timeline = dataclasses.replace(sharded_head(), placement=(0, 0), step=1.0)
    scene = make_scene([timeline, halves(2, 2)])
    assert all(
        s.x + _width(s.text, s.size) <= scene.width
        for s in scene.shapes
        if isinstance(s, Text) and s.anchor == "start"
    )
    line = {s.text: s.y for s in scene.shapes if isinstance(s, Text)}
    assert line["shades: the stages of a device"] == line["forward (F)"] + 20


def test_every_cause_of_idle_time_has_a_colour_and_a_column():
    assert tuple(palette.CAUSE_COLOURS) == CAUSES
    page = html.render([one_f_one_b()])
    for cause in CAUSES:
        assert f'<th scope="col">{cause}</th>' in page
        assert f".time-{cause}{{" in page


def test_a_name_that_ends_in_png_gets_a_png(tmp_path):
    file, picture = tmp_path / "timeline.json", tmp_path / "timeline.png"
    write_json(file, timeline_to_json(one_f_one_b()))
    draw_report([file], picture, "Title")
    assert picture.read_bytes() == png.render([one_f_one_b()], "Title")


# Trace events


def events_of(timelines: list[Timeline]) -> list[dict]:
    return json.loads(chrome.render(timelines))["traceEvents"]


def with_transfers() -> Timeline:
    """Two values for device 1 and one for device 2 leave device 0 at once."""
    timeline = grid("0,0F0,1 1,0F1,1", "4,1F0,1 5,1F1,1", "9,2F0,1")
    transfers = (
        Transfer(Kind.OUTPUT, 0, 0, 0, 1, 1.0, 4.0),
        Transfer(Kind.OUTPUT, 0, 1, 0, 1, 2.0, 5.0),
        Transfer(Kind.OUTPUT, 1, 0, 1, 2, 5.0, 9.0),
    )
    return dataclasses.replace(timeline, transfers=transfers)


def test_a_trace_is_sorted_and_nothing_overlaps_on_a_track():
    events = events_of([with_transfers(), with_memory(one_f_one_b(unit=1e-3 / 3))])
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            spans = tracks.setdefault((event["pid"], event["tid"]), [])
            spans.append((event["ts"], event["ts"] + event["dur"]))
    assert (
        len(tracks) == 6 + 2 + 1 + 2 + 1
    )  # computes; sends of 0 in two lanes, of 1; receives alike
    for spans in tracks.values():
        assert all(one[1] <= other[0] + 1e-6 for one, other in pairwise(spans))


def test_a_trace_has_microseconds_names_and_its_own_processes():
    events = events_of([one_f_one_b(unit=1e-3), one_f_one_b(unit=2e-3, source="measured")])
    spans = {(e["pid"], e["name"]): e for e in events if e["ph"] == "X"}
    assert (spans[0, "0F1"]["ts"], spans[0, "0F1"]["dur"]) == (1000.0, 1000.0)
    assert (spans[3, "0F1"]["ts"], spans[3, "0F1"]["dur"]) == (2000.0, 2000.0)
    assert spans[0, "0F1"]["args"] == {"stage": 0, "microbatch": 1}
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names[0] == "a schedule (simulated): device 0"
    assert names[5] == "a schedule (measured): device 2"
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"
    }
    assert threads[0, 0] == "compute"


def test_a_trace_ties_transfers_to_what_wrote_and_reads_them():
    events = events_of([with_transfers()])
    slices = [e for e in events if e["ph"] == "X" and e["tid"] == chrome.COMPUTE]
    flows = [
        (s, f)
        for s in events
        if s["ph"] == "s"
        for f in events
        if f["ph"] == "f" and f["id"] == s["id"]
    ]

    def around(event: dict) -> str:
        return next(
            e["name"]
            for e in slices
            if e["pid"] == event["pid"] and e["ts"] <= event["ts"] < e["ts"] + e["dur"]
        )

    assert [(around(s), around(f)) for s, f in flows] == [
        ("0F0", "1F0"),
        ("0F1", "1F1"),
        ("1F0", "2F0"),
    ]


def test_a_trace_ties_the_sharded_head_to_the_devices_it_goes_between():
    transfers = (
        Transfer(Kind.OUTPUT, 1, 0, 1, 0, 3e-3, 4e-3),
        Transfer(Kind.INPUT_GRAD, 2, 0, 0, 1, 7e-3, 10e-3),
        Transfer(Kind.SAVED, 1, 0, 1, 1, 5e-3, 6e-3),
    )
    events = events_of([dataclasses.replace(sharded_head(), transfers=transfers)])
    flows = [(e["ph"], e["pid"], e["ts"]) for e in events if e["ph"] in "sf"]
    assert flows == [("s", 1, 2999.999), ("f", 0, 4000), ("s", 0, 6999.999), ("f", 1, 10000)]
    assert "1send saved0" in {e["name"] for e in events}


def test_a_trace_counts_memory():
    counters = [e for e in events_of([with_memory(one_f_one_b())]) if e["ph"] == "C"]
    assert [e["args"]["bytes"] for e in counters if e["pid"] == 0] == [1 << 30, 3 << 30]


# HTML


def unpack(packed: dict) -> list[list[tuple[Compute, float, float]]]:
    """What timeline.js does."""
    rows = []
    for device in packed["devices"]:
        last, length = [-1] * len(device["kinds"]), [0] * len(device["kinds"])
        clock, row = 0, []
        columns = (device["kind"], device["microbatch"], device["gap"], device["length"])
        for kind, microbatch, gap, longer in zip(*columns, strict=True):
            last[kind] += microbatch + 1
            length[kind] += longer
            stage, op = divmod(device["kinds"][kind], len(OPS))
            start = clock + gap
            clock = start + length[kind]
            compute = Compute(OPS[op], stage, last[kind])
            row.append((compute, start * packed["tick"], clock * packed["tick"]))
        rows.append(row)
    return rows


def data_of(page: str) -> dict:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert match
    return json.loads(match[1])


@given(
    spans=st.lists(
        st.tuples(st.sampled_from(OPS), st.integers(0, 3), st.floats(0, 1e3), st.floats(0, 1e3)),
        max_size=30,
    ),
    unit=st.sampled_from([1.0, 1e-3, 1e-6]),
)
@settings(deadline=None)
def test_the_data_of_the_report_is_the_timeline(spans, unit):
    clock, row = 0.0, []
    for microbatch, (op, stage, gap, length) in enumerate(spans):
        start = clock + gap * unit
        clock = start + length * unit
        row.append((Compute(op, stage, microbatch), start, clock))
    timeline = from_rows(
        [row],
        name="x",
        source="measured",
        placement=(0,) * 4,
        num_microbatches=len(row) + 1,
        step=clock,
    )
    (found,) = unpack(data_of(html.render([timeline]))["timelines"][0])
    assert [compute for compute, _, _ in found] == [compute for compute, _, _ in row]
    for (_, *times), (_, *expected) in zip(found, row, strict=True):
        assert times == pytest.approx(expected, abs=1e-8 * clock)


def test_the_report_knows_what_instructions_read_from_program_alone():
    code = {op: OPS.index(op) for op in OPS}
    table = pack([one_f_one_b()])["timelines"][0]["reads"]
    assert table[code[F]] == [(code[F], -1)]
    after = [(code[F], 0), (code[B], 1), (code[B_INPUT], 1), (code[R], 0)]
    assert table[code[B]] == table[code[B_INPUT]] == after
    assert table[code[B_WEIGHT]] == [(code[B_INPUT], 0)]
    assert table[code[R]] == [(code[F], 0)]
    assert table[code[S]] == table[code[T]] == []


@pytest.mark.parametrize(("reductions", "before_backward"), [(1, S), (2, T)])
def test_the_report_knows_what_the_collectives_of_a_sharded_head_wait_for(
    reductions, before_backward
):
    code = {op: OPS.index(op) for op in OPS}
    timeline = dataclasses.replace(one_f_one_b(), reductions=reductions)
    table = pack([timeline])["timelines"][0]["reads"]
    assert table[code[S]] == [(code[F], -1)]
    assert table[code[T]] == [(code[S], 0)]
    assert (code[before_backward], 1) in table[code[B]]
    assert len([1 for op, _ in table[code[B]] if op in (code[S], code[T])]) == 1


def test_long_memory_curves_keep_their_peak():
    times = np.linspace(0, 12, 50_001)
    amounts = np.full(len(times), 1e9)
    amounts[31_234] = 5e9
    timeline = dataclasses.replace(one_f_one_b(), memory=((times, amounts),) * 3)
    curve = pack([timeline])["timelines"][0]["memory"][0]
    values = np.cumsum(curve["bytes"])
    assert len(values) <= 1000
    assert values.max() == 5e9
    assert sorted(set(values.tolist())) == [1e9, 5e9]


def test_the_report_asks_for_nothing_and_states_its_policy():
    page = html.render(
        [one_f_one_b()], "Title", {"notes": ["a note"], "commands": ["adaptis plan"]}
    )
    assert not re.search(
        r"https?:|//[a-z]+\.|@import|url\(|\bsrc=|fetch\(|XMLHttpRequest|import\(", page
    )
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]
    assert "default-src 'none'" in page
    assert "unsafe-inline" not in page


def test_hostile_names_stay_text():
    facts = {
        "tables": [{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE], [None], [1.5]]}],
        "notes": [HOSTILE],
        "commands": [HOSTILE],
        "layers": [HOSTILE] * 3,
    }
    pair = one_f_one_b(name=HOSTILE, source=HOSTILE, notes={"pair": HOSTILE})
    page = html.render(
        [one_f_one_b(name=HOSTILE, notes={"layers": [HOSTILE]}), pair], HOSTILE, facts
    )
    assert len(re.findall(r"<script", page)) == 2
    assert len(re.findall(r"</script", page)) == 2
    assert "<img" not in page
    assert "<!--" not in page
    assert not re.search(r"=\s*\"[^\"]*<", page.split("<script")[0])
    assert data_of(page)["timelines"][0]["name"] == HOSTILE
    assert data_of(page)["timelines"][1]["layers"] == [HOSTILE] * 3


def test_pairs_share_a_section_with_the_error_in_its_heading():
    measured = one_f_one_b(unit=1.25, source="measured", notes={"pair": "1f1b"})
    other = one_f_one_b(name="other")
    simulated = one_f_one_b(notes={"pair": "1f1b"})
    assert html.sections([measured, other, simulated]) == [[2, 0], [1]]
    page = html.render([measured, other, simulated])
    assert "error −20.0 %" in page
    assert [t["pair"] for t in data_of(page)["timelines"]] == ["1f1b", None, "1f1b"]
    assert (
        page.index('data-timeline="2"')
        < page.index('data-timeline="0"')
        < page.index('data-timeline="1"')
    )


def test_a_prediction_and_a_measurement_of_one_name_are_a_pair():
    simulated, measured = one_f_one_b(), one_f_one_b(source="measured")
    assert html.sections([measured, simulated]) == [[1, 0]]
    assert html.sections([simulated, simulated]) == [[0], [1]]
    assert html.sections([simulated, measured, measured]) == [[0], [1], [2]]


def test_the_tables_stand_without_the_script():
    timeline = with_memory(one_f_one_b(unit=1e-3))
    facts = {"tables": [{"title": "Stages", "columns": ["stage", "ms"], "rows": [[0, 1234.5]]}]}
    page = html.render([timeline], "Title", facts).split("<script")[0]
    for words in ("warm-up", "cool-down", "3.0 GiB", "33.3 %", "Stages", "1,234.5", "forward (F)"):
        assert words in page
    assert page.count('<svg class="bar"') == 3
