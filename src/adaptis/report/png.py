"""Timelines as the picture of `svg` in pixels, for where vectors cannot go."""

from __future__ import annotations

import io
import unicodedata
from functools import cache
from typing import TYPE_CHECKING

from PIL import Image, ImageColor, ImageDraw, ImageFont

from adaptis.report.scene import CARD, Area, Boxes, Scene, Text, make_scene

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adaptis.timeline import Timeline

SCALE = 2  # pixels for each unit of the scene: sharp on dense screens and in print
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
# The font that comes with Pillow makes the picture the same everywhere; it has few signs beyond
# ASCII and these.
SIGNS = "·…“”’"
SPELLED = str.maketrans({"−": "-", "–": "-", "—": "-", "×": "x", "µ": "u", "μ": "u"})


def render(timelines: Iterable[Timeline], title: str = "") -> bytes:
    """One PNG file; the first timeline is what the others are compared with."""
    return paint(make_scene(timelines, title))


def paint(scene: Scene) -> bytes:
    """Any scene as one PNG file."""
    picture = Image.new("RGB", (scene.width * SCALE, scene.height * SCALE), CARD)
    brush = ImageDraw.Draw(picture, "RGBA")
    for shape in scene.shapes:
        match shape:
            case Boxes():
                _boxes(brush, shape)
            case Area(fill, stroke, points):
                scaled = [(x * SCALE, y * SCALE) for x, y in points]
                brush.polygon(scaled, fill)
                brush.line([*scaled, scaled[0]], stroke, SCALE)
            case Text():
                _text(brush, shape)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _boxes(brush: ImageDraw.ImageDraw, shape: Boxes) -> None:
    fill = (*ImageColor.getrgb(shape.fill)[:3], round(255 * shape.opacity))
    for x, y, width, height in shape.boxes:
        left, top = round(x * SCALE), round(y * SCALE)
        # Pillow's corners are both inside; what is there is seen, however small.
        right = max(round((x + width) * SCALE) - 1, left)
        bottom = max(round((y + height) * SCALE) - 1, top)
        corners = (left, top, right, bottom)
        if shape.radius:
            radius = shape.radius * SCALE
            brush.rounded_rectangle(corners, radius, fill, shape.stroke or None, width=SCALE)
        else:
            brush.rectangle(corners, fill)


def _text(brush: ImageDraw.ImageDraw, shape: Text) -> None:
    brush.text(
        (shape.x * SCALE, shape.y * SCALE),
        _spelled(shape.text),
        shape.fill,
        _font(shape.size),
        ANCHORS[shape.anchor],
        stroke_width=0.5 if shape.bold else 0,
    )


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


def _spelled(text: str) -> str:
    """`text` in the signs of the font: accents are left out, what it lacks is a question mark."""
    plain = unicodedata.normalize("NFD", text.translate(SPELLED))
    letters = (c for c in plain if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" or c in SIGNS else "?" for c in letters)
