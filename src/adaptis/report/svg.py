"""Timelines as one static picture for documents, on its own background."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from adaptis.report.scene import Area, Boxes, Scene, Shape, Text, make_scene

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adaptis.timeline import Timeline

FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


def render(timelines: Iterable[Timeline], title: str = "") -> str:
    """One SVG document; the first timeline is what the others are compared with."""
    return paint(make_scene(timelines, title))


def paint(scene: Scene) -> str:
    """Any scene as one SVG document."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{scene.width}" height="{scene.height}" '
        f'viewBox="0 0 {scene.width} {scene.height}" role="img" font-family="{FONT}">'
    )
    described = f"<title>{escape(scene.title)}</title><desc>{escape(scene.description)}</desc>"
    return "\n".join([head, described, *map(_shape, scene.shapes), "</svg>"]) + "\n"


def _shape(shape: Shape) -> str:
    match shape:
        case Boxes():
            return _boxes(shape)
        case Area(fill, stroke, points):
            line = "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
            return f'<path fill="{fill}" stroke="{stroke}" d="M{line}z"/>'
        case Text():
            return _text(shape)


def _boxes(shape: Boxes) -> str:
    look = f'fill="{shape.fill}"'
    look += f' stroke="{shape.stroke}"' if shape.stroke else ""
    look += f' opacity="{shape.opacity}"' if shape.opacity < 1 else ""
    boxes = [tuple(map(_number, box)) for box in shape.boxes]
    if shape.radius:
        rounded = f'rx="{shape.radius}" {look}'
        parts = (
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" {rounded}/>' for x, y, w, h in boxes
        )
        return "".join(parts)
    return f'<path {look} d="{"".join(f"M{x} {y}h{w}v{h}h-{w}z" for x, y, w, h in boxes)}"/>'


def _text(shape: Text) -> str:
    look = f'font-size="{shape.size}" fill="{shape.fill}"'
    look += "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
    look += ' font-weight="600"' if shape.bold else ""
    place = f'x="{_number(shape.x)}" y="{_number(shape.y)}"'
    return f"<text {place} {look}>{escape(shape.text)}</text>"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
