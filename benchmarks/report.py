"""How fluid the HTML report is in a real browser: load time, and frames while zooming and panning.

    python benchmarks/report.py [--devices 64] [--microbatches 1000]

Headless Chromium opens the report of a 1F1B step and gets the wheel and the drags of a person
through its debugging pipe. A frame is the time between two refreshes, drawing is the part of it
that the page takes. Prints a table and writes `benchmarks/results/report-DATE.json`; without a
browser it says so and does nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptis.cluster import uniform
from adaptis.files import write_json
from adaptis.plan import named_plan
from adaptis.profile import LayerCost, Profile
from adaptis.report import html
from adaptis.schedules import SCHEDULES
from adaptis.schedules.shape import Shape
from adaptis.simulate import simulate_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adaptis.timeline import Timeline

HERE = Path(__file__).parent
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
SIZE = "1200,900"
RECORD = """
(() => {
  const mine = window.found = { frames: [], on: true };
  (function next(now) {
    mine.frames.push([now, adaptis.state().drawn]);
    if (mine.on) requestAnimationFrame(next);
  })(performance.now());
})()
"""
LOADED = 'performance.getEntriesByType("navigation")[0].loadEventEnd'
RESULT = "found.on = false; found.frames.slice(1)"


class Browser:
    """A page in Chromium, asked through two pipes in its DevTools protocol."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
        self._numbers, self._rest, self._session = itertools.count(1), b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        self.call("Page.enable")

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": values, **self._session}
        self._writer.write(json.dumps(message).encode() + b"\0")
        self._writer.flush()
        while (answer := self._next()).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait_for(self, event: str) -> None:
        while self._next().get("method") != event:
            pass

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._reader.read1(1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **values: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **values)


@contextmanager
def opened(folder: Path) -> Iterator[Browser]:
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # The browser reads from the descriptor 3 and writes to 4.
    command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    flags = [*FLAGS.split(), f"--window-size={SIZE}", f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        ["bash", "-c", command, str(BROWSER), *flags, "--remote-debugging-pipe"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    browser = Browser(ours_in, ours_out)
    try:
        yield browser
    finally:
        browser.call("Browser.close")
        process.wait(timeout=30)


def step_of(devices: int, microbatches: int) -> Timeline:
    """A 1F1B step, layer times a little apart, with memory curves."""
    layers = tuple(
        LayerCost(
            name=str(i),
            kind="mlp",
            forward=1e-3 * (1 + 0.1 * (i % 3)),
            backward_input=1e-3,
            backward_weight=1e-3,
            backward=2e-3,
            saved_bytes=1 << 24,
            output_bytes=1 << 20,
        )
        for i in range(devices)
    )
    profile = Profile(model="even", tokens_per_microbatch=1, layers=layers)
    shape = Shape(devices, microbatches, 1, 1)
    plan = named_plan(SCHEDULES["1f1b"], shape, range(1, devices + 1))
    return simulate_plan(plan, profile, uniform(devices))


def zoom(browser: Browser, count: int = 60) -> None:
    for i in range(count):
        browser.mouse("mouseWheel", 700, 400, deltaX=0, deltaY=-90 if i < count / 2 else 90)


def pan(browser: Browser, count: int = 60) -> None:
    for _ in range(5):
        browser.mouse("mouseWheel", 700, 400, deltaX=0, deltaY=-90)
    browser.mouse("mousePressed", 900, 400, button="left", buttons=1, clickCount=1)
    for i in range(count):
        browser.mouse("mouseMoved", 900 - 10 * i, 400, button="left", buttons=1)
    browser.mouse("mouseReleased", 300, 400, button="left", clickCount=1)


def point(browser: Browser, count: int = 60) -> None:
    for i in range(count):
        browser.mouse("mouseMoved", 200 + 10 * i, 200 + 8 * i)


def frames(browser: Browser, act: Callable[[Browser], None]) -> dict[str, float]:
    browser.evaluate("adaptis.double(0); 0")
    browser.evaluate(RECORD)
    act(browser)
    found = np.array(browser.evaluate(RESULT))
    between, drawn = np.diff(found[:, 0]), found[1:, 1]
    return {
        "frames": len(between),
        "frame_ms_median": float(np.median(between)),
        "frame_ms_p95": float(np.percentile(between, 95)),
        "draw_ms_median": float(np.median(drawn)),
        "draw_ms_p95": float(np.percentile(drawn, 95)),
    }


def study(devices: int, microbatches: int) -> dict[str, Any]:
    timeline = step_of(devices, microbatches)
    began = time.perf_counter()
    page = html.render([timeline], f"1F1B, {devices} devices, {microbatches} micro-batches")
    rendered = time.perf_counter() - began
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "report.html"
        file.write_text(page, encoding="utf-8")
        with opened(Path(folder) / "profile") as browser:
            browser.call("Page.navigate", url=file.as_uri())
            browser.wait_for("Page.loadEventFired")
            time.sleep(0.5)
            result: dict[str, Any] = {
                "instructions": len(timeline.op),
                "page_bytes": file.stat().st_size,
                "render_seconds": rendered,
                "load_seconds": browser.evaluate(LOADED) / 1e3,
                "version": browser.call("Browser.getVersion")["product"],
            }
            for act in (zoom, pan, point):
                result[act.__name__] = frames(browser, act)
            for key in ("draw_ms_median", "draw_ms_p95"):
                del result["point"][key]  # pointing draws nothing anew
    return {"devices": devices, "microbatches": microbatches, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--microbatches", type=int, default=1000)
    arguments = parser.parse_args()
    if BROWSER is None:
        print(f"skipped: there is no browser here (looked for {', '.join(NAMES)})")
        return
    row = study(arguments.devices, arguments.microbatches)
    print(f"{row['devices']} devices x {row['microbatches']} micro-batches in {row['version']}")
    print(
        f"{row['instructions']} instructions, {row['page_bytes'] / 2**20:.1f} MiB, written in "
        f"{row['render_seconds']:.2f} s, loaded and drawn in {row['load_seconds']:.2f} s"
    )
    print(
        f"{'':8} {'frames':>7} {'frame median':>13} {'95 %':>9} {'drawing median':>14} {'95 %':>9}"
    )
    for name in ("zoom", "pan", "point"):
        f = row[name]
        drawing = (
            f"{f['draw_ms_median']:>12.1f} ms {f['draw_ms_p95']:>6.1f} ms"
            if "draw_ms_p95" in f
            else ""
        )
        print(
            f"{name:8} {f['frames']:>7} {f['frame_ms_median']:>10.1f} ms {f['frame_ms_p95']:>6.1f} "
            f"ms {drawing}"
        )
    output = HERE / "results" / f"report-{time.strftime('%Y-%m-%d')}.json"
    write_json(output, {"cores": os.cpu_count(), "rows": [row]})
    print(f"written to {output}")


if __name__ == "__main__":
    main()
