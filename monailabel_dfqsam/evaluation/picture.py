"""A scored answer as a small picture: the image around the object, and outlines to draw over it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from monailabel_dfqsam.evaluation.scoring import Scored
from monailabel_dfqsam.masks import Mask

SIDE = 224
"""The longer side of a picture's frame, and the pixels on it at most."""

_MARGIN = 0.15  # of the longer side of what is outlined
_LEAST = 48  # pixels of the image that a picture shows at least, where there are so many
_QUALITY = 78
_TOLERANCE = 0.5  # of the frame, by which an outline may leave out corners
_LONGEST_PATH = 5000  # characters


@dataclass(frozen=True)
class Outline:
    """One mask's outline: whose it is, 'truth', 'full' or 'model', and SVG path data."""

    whose: str
    path: str


@dataclass(frozen=True)
class Picture:
    """What a page shows of one answer. Everything lies in the frame of `width` × `height`, y downwards.

    Attributes:
        src: a JPEG as a data URI.
        outlines: in the order in which they are drawn.
        box: (x, y, width, height) of the box prompt, or None.
        points: (x, y, whether inside the object) of each click.
        number, modality: of the image.
        iou, full_iou, agreement: 0 … 1; full_iou is the full-precision model's.
    """

    src: str
    width: float
    height: float
    outlines: Sequence[Outline]
    box: tuple[float, float, float, float] | None
    points: Sequence[tuple[float, float, bool]]
    number: int
    modality: str
    iou: float
    full_iou: float
    agreement: float


def draw(scored: Scored) -> Picture:
    """The picture of one answer; where the model is the full-precision one, it is outlined once."""
    mask, truth = scored.answer.mask, scored.item.mask
    x0, y0, x1, y1 = _view(mask | truth | scored.expected)
    scale = SIDE / max(x1 - x0, y1 - y0)
    frame = (x1 - x0) * scale, (y1 - y0) * scale
    masks = {"truth": truth, "full": scored.expected, "model": mask}
    if mask is scored.expected:
        del masks["model"]
    prompts = scored.answer.prompts
    box = None
    if prompts.box is not None:
        left, top, right, bottom = ((prompts.box - [x0, y0, x0, y0]) * scale).round(1).tolist()
        box = (left, top, right - left, bottom - top)
    points = ((np.asarray(prompts.points) - [x0, y0]) * scale).round(1).tolist()
    return Picture(
        _jpeg(scored.item.rgb[y0:y1, x0:x1]),
        round(frame[0], 1),
        round(frame[1], 1),
        [Outline(whose, _path(one[y0:y1, x0:x1], frame)) for whose, one in masks.items()],
        box,
        [(x, y, bool(label)) for (x, y), label in zip(points, prompts.labels, strict=True)],
        scored.number,
        scored.item.modality,
        scored.scores["iou"],
        scored.scores["iou"] + scored.scores["drop"],
        scored.scores["agreement"],
    )


def _view(outlined: Mask) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1): a square around all that is outlined, cut to the image."""
    spans = [np.flatnonzero(outlined.any(axis=axis)) for axis in (0, 1)]
    longest = max(int(span[-1] - span[0]) + 1 for span in spans)
    side = max(_LEAST, round(longest * (1 + 2 * _MARGIN)))
    edges = []
    for span, limit in zip(spans, outlined.shape[::-1], strict=True):
        first = min(max(0, int(span[0] + span[-1] + 1 - side) // 2), max(0, limit - side))
        edges.append((first, min(limit, first + side)))
    (x0, x1), (y0, y1) = edges
    return x0, y0, x1, y1


def _jpeg(rgb: NDArray[np.uint8]) -> str:
    image = Image.fromarray(rgb)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if (rgb == rgb[..., :1]).all():
        image = image.convert("L")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _path(mask: Mask, frame: tuple[float, float]) -> str:
    """SVG path data of a mask's outlines in a frame (width, height); fewer corners where there are many."""
    from skimage.measure import approximate_polygon, find_contours

    image = Image.fromarray(mask)
    image.thumbnail((SIDE, SIDE), Image.Resampling.NEAREST)
    scale = np.array(frame[::-1]) / image.size[::-1]
    # Padded, so that outlines close at the picture's edge; a pixel's centre is at +0.5.
    lines = find_contours(np.pad(np.array(image), 1).astype(np.float32), 0.5)
    lines = [(line - 0.5) * scale for line in lines]
    tolerance = _TOLERANCE
    while True:
        corners = [approximate_polygon(line, tolerance) for line in lines]
        path = "".join(
            "M" + "L".join(f"{x:.1f} {y:.1f}" for y, x in line[:-1]) + "Z"
            for line in corners
            if len(line) > 3
        )
        if len(path) <= _LONGEST_PATH:
            return path
        tolerance *= 3
