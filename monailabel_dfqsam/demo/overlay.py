"""Pictures of an image slice with the outlines of several masks on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Colour = tuple[int, int, int]

# After Okabe and Ito, told apart with any colour vision; the widest lies lowest, so that outlines on the
# same place are all seen.
TRUTH: Colour = (240, 228, 66)
FULL_PRECISION: Colour = (86, 180, 233)
QUANTIZED: Colour = (255, 96, 16)
PROMPT: Colour = (255, 255, 255)

_PANEL = 520  # pixels of a panel's longer side
_MARGIN = 14
_PAPER: Colour = (24, 28, 33)
_INK: Colour = (232, 236, 240)


@dataclass(frozen=True, eq=False)
class Outline:
    """A mask to outline: [H, W] bool, its colour, and the width of the line in pixels of the picture."""

    mask: NDArray[np.bool_]
    colour: Colour
    width: int


@dataclass(frozen=True, eq=False)
class Panel:
    """One slice with outlines and the prompt.

    Attributes:
        title: a line above it.
        rgb: [H, W, 3] uint8.
        outlines: drawn in this order.
        point: (row, column) of a click, or None.
        box: (row 0, row 1, column 0, column 1), pixels at both ends included, or None.
    """

    title: str
    rgb: NDArray[np.uint8]
    outlines: Sequence[Outline]
    point: tuple[int, int] | None = None
    box: tuple[int, int, int, int] | None = None


def write_overlay(panels: Sequence[Panel], legend: Sequence[tuple[str, Colour]], path: Path) -> None:
    """Writes panels side by side over a legend, as PNG."""
    drawn = [_draw(panel) for panel in panels]
    font = ImageFont.load_default(size=16)
    line = 26
    width = sum(p.width for p in drawn) + _MARGIN * (len(drawn) + 1)
    height = max(p.height for p in drawn)
    # Entries flow into as many lines as they need.
    places, x, y = [], _MARGIN, height + line + 2 * _MARGIN
    for text, colour in legend:
        length = 34 + int(font.getlength(text)) + 22
        if x > _MARGIN and x + length > width:
            x, y = _MARGIN, y + line
        places.append((x, y, text, colour))
        x += length
    picture = Image.new("RGB", (width, y + line + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(picture)
    x = _MARGIN
    for panel, image in zip(panels, drawn, strict=True):
        pen.text((x, _MARGIN - 2), panel.title, fill=_INK, font=font)
        picture.paste(image, (x, _MARGIN + line))
        x += image.width + _MARGIN
    for x, y, text, colour in places:
        pen.line((x, y + 10, x + 24, y + 10), fill=colour, width=4)
        pen.text((x + 34, y), text, fill=_INK, font=font)
    picture.save(path, "PNG")


def _draw(panel: Panel) -> Image.Image:
    rows, columns = panel.rgb.shape[:2]
    scale = _PANEL / max(rows, columns)
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    pixels = np.array(Image.fromarray(panel.rgb).resize(size, Image.Resampling.BICUBIC))
    for outline in panel.outlines:
        pixels[_line(outline, size)] = outline.colour
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    if panel.box is not None:
        r0, r1, c0, c1 = panel.box
        pen.rectangle((c0 * scale, r0 * scale, (c1 + 1) * scale, (r1 + 1) * scale), outline=PROMPT, width=1)
    if panel.point is not None:
        y, x = (panel.point[0] + 0.5) * scale, (panel.point[1] + 0.5) * scale
        for radius, colour in ((6, (0, 0, 0)), (4, PROMPT)):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


def _line(outline: Outline, size: tuple[int, int]) -> NDArray[np.bool_]:
    """[height, width] bool, the band of `width` pixels around the enlarged mask's edge."""
    mask = Image.fromarray(outline.mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    inside = np.array(mask) > 127
    out = ndimage.distance_transform_edt(~inside) if not inside.all() else np.zeros(inside.shape)
    within = ndimage.distance_transform_edt(inside) if inside.any() else np.zeros(inside.shape)
    half = outline.width / 2
    band: NDArray[np.bool_] = np.where(inside, within <= half, (out <= half) & inside.any())
    return band
