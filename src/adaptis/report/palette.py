"""The colours, names and number forms that all renderers share.

The colours of operations, and those of what a device's time goes to, stay apart under the three
common forms of colour-blindness (differences in CIELAB of 25 and more). Several stages of one
device differ in shade: the earliest is the darkest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptis.program import HEAD_OPS, Op
from adaptis.timeline import CAUSES

if TYPE_CHECKING:
    from adaptis.program import Compute
    from adaptis.timeline import Timeline

COLOURS = {
    Op.FORWARD: "#2a66d9",
    Op.BACKWARD: "#d8511d",
    Op.BACKWARD_INPUT: "#f6bd48",
    Op.BACKWARD_WEIGHT: "#22b08c",
    Op.RECOMPUTE: "#b8a1e3",
    Op.SCORES: "#483060",
    Op.SCORES_GRADIENT: "#600000",
}
NAMES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "input gradient",
    Op.BACKWARD_WEIGHT: "weight gradient",
    Op.RECOMPUTE: "recompute",
    Op.SCORES: "head scores",
    Op.SCORES_GRADIENT: "head gradient",
}
CAUSE_COLOURS = dict(
    zip(CAUSES, ("#7d8aa8", "#de1f38", "#8f3fd0", "#303a52", "#d3d8de"), strict=True)
)
BUSY = "#46c07c"
DARKEST, LIGHTEST = 0.22, 0.45  # how far shades go towards black and towards white


def shade(colour: str, index: int, count: int) -> str:
    """`colour` for the `index`-th of the `count` stages on a device."""
    if count <= 1:
        return colour
    t = -DARKEST + (DARKEST + LIGHTEST) * index / (count - 1)
    goal = 255 if t > 0 else 0
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (goal - c) * abs(t)):02x}" for c in channels)


def ink(fill: str) -> str:
    """Black or white, whichever reads better on `fill`."""
    red, green, blue = (int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5))
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return "#ffffff" if luminance < 0.3 else "#14181f"


def positions(placement: tuple[int, ...]) -> list[tuple[int, int]]:
    """For each stage: which of its device's stages it is, and how many that device holds.

    The last entry is for a sharded head, which has the number after the last stage.
    """
    seen: dict[int, int] = {}
    index = []
    for device in placement:
        index.append(seen.get(device, 0))
        seen[device] = index[-1] + 1
    return [*((i, seen[device]) for i, device in zip(index, placement, strict=True)), (0, 1)]


def fill(compute: Compute, place: list[tuple[int, int]]) -> str:
    """The colour of a computation; `place` is what `positions` returned."""
    return shade(COLOURS[compute.op], *place[compute.stage])


def has_many_stages(timeline: Timeline) -> bool:
    """Whether a label has to name the stage for want of the device naming it."""
    return len(set(timeline.placement)) < len(timeline.placement)


def label(compute: Compute, many: bool) -> str:
    """`F0`, or `2F0` where a device holds many stages; a sharded head is one for all devices."""
    named = many and compute.op not in HEAD_OPS
    return str(compute) if named else f"{compute.op}{compute.microbatch}"


def used_ops(timelines: list[Timeline]) -> list[Op]:
    """The operations that occur, for the legend."""
    codes = {int(code) for timeline in timelines for code in set(timeline.op.tolist())}
    return [op for code, op in enumerate(Op) if code in codes]


def unit_of(seconds: float) -> tuple[float, str]:
    """The unit in which `seconds` has one to three digits before the point, and its name."""
    for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= 0.9995 * size:  # what would be rounded up to this unit is shown in it
            return size, name
    return (1e-9, "ns") if seconds else (1.0, "s")


def duration(seconds: float) -> str:
    """`12.3 ms`: three or four digits."""
    size, name = unit_of(seconds)
    value = seconds / size
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:.{digits}f} {name}"


def size(count: float) -> str:
    """`12.3 GiB`."""
    for factor, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= factor:
            return f"{count / factor:.1f} {name}"
    return f"{count:.0f} B"


def percent(fraction: float) -> str:
    """`12.3 %`, for 0.123."""
    return f"{100 * fraction:.1f} %"


def nice_step(length: float, most: int) -> float:
    """The least of 1, 2, 5 times a power of ten that cuts `length` into at most `most` parts."""
    if not length > 0:
        return 1.0
    power = 10.0 ** (len(f"{length / most:.0f}") - 2 if length >= most else -12)
    while True:
        for factor in (1, 2, 5):
            if length / (factor * power) <= most:
                return factor * power
        power *= 10
