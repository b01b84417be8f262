"""Phantoms of what `phantoms` does not draw: layers, vessel trees, crowds of cells, the inside of a body,
limbs and chests; and appearances: colour, depth that shows, and what lies over an object in a projection.

For training alone. Fidelity and calibration stay on the phantoms of `phantoms`, so that figures of models can
be compared whatever a model has learned on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Generator, Tensor

from monailabel_dfqsam.pretraining.phantoms import (
    Canvas,
    LabelMap,
    PhantomClass,
    blurred,
    ellipse,
    enlarged,
    integer,
    label_map,
    lobes,
    render,
    smooth_field,
    uniform,
)

_LINES = 2
"""Pixels of a drawing of vessels for each of the image's, along one side."""


def scene(g: Generator, size: int = 256) -> tuple[LabelMap, Tensor]:
    """A label map and its image [3, S, S] float32 in [0, 1]: a third is not of `phantoms`."""
    drawn = uniform(g, 0, 1)
    draw, colourful = next((draw, often) for share, draw, often in _SCENES if drawn < share)
    labels = draw(g, size)
    image = render(g, labels, 1.0 if uniform(g, 0, 1) < 0.4 else uniform(g, 0, 0.6))
    if uniform(g, 0, 1) < 0.4:
        image = _shaded(g, image, labels)
    if uniform(g, 0, 1) < 0.2:
        image = _overlaid(g, image)
    return labels, _coloured(g, image, labels, colourful)


def _layers(g: Generator, size: int) -> LabelMap:
    """Thin layers over one another across the image, as OCT shows a retina."""
    canvas = Canvas(g, size)
    rows = torch.arange(size, dtype=torch.float32)[:, None]
    columns = torch.arange(size, dtype=torch.float32)
    tilt, bend = uniform(g, -0.25, 0.25), uniform(g, -0.4, 0.4) / size
    top = uniform(g, 0.2, 0.5) * size + tilt * (columns - size / 2) + bend * (columns - size / 2) ** 2
    top = top + _wave(g, size, integer(g, 2, 6), uniform(g, 0, 0.03) * size)
    canvas.paint(rows < top, PhantomClass.BACKGROUND)
    for _ in range(integer(g, 3, 9)):
        mean = math.exp(uniform(g, math.log(0.012), math.log(0.08))) * size
        bottom = top + (mean * (1 + _wave(g, size, integer(g, 1, 5), 0.35))).clamp_min(1)
        canvas.paint((rows >= top) & (rows < bottom), PhantomClass.ORGAN)
        if uniform(g, 0, 1) < 0.15:  # fluid within a layer
            y, x = float(((top + bottom) / 2)[size // 2]), uniform(g, 0.1, 0.9) * size
            inside = _round(canvas, y, x, uniform(g, 0.02, 0.1) * size, uniform(g, 0.3, 0.9))
            canvas.paint(inside, PhantomClass.LESION)
        top = bottom
    canvas.paint(rows >= top, PhantomClass.BACKGROUND)
    return canvas.result()


def _vessels(g: Generator, size: int) -> LabelMap:
    """A tree of vessels, with the disc that they come from or without, in a round field or not."""
    canvas = Canvas(g, size)
    y, x = uniform(g, 0.15, 0.85) * size, uniform(g, 0.15, 0.85) * size
    if uniform(g, 0, 1) < 0.6:
        disc = canvas.paint(_round(canvas, y, x, uniform(g, 0.04, 0.12) * size, 0.9), PhantomClass.ORGAN)
        if disc is not None and uniform(g, 0, 1) < 0.7:
            canvas.paint(_round(canvas, y, x, uniform(g, 0.02, 0.05) * size, 0.9), PhantomClass.LESION, disc)
    drawing = Image.new("1", (_LINES * size, _LINES * size))
    pen = ImageDraw.Draw(drawing)
    width = uniform(g, 0.008, 0.025) * size
    for _ in range(integer(g, 2, 6)):
        _branch(g, pen, (x, y), uniform(g, 0, 2 * math.pi), width, size)
    lines = torch.from_numpy(np.array(drawing, dtype=np.float32))
    canvas.paint(F.avg_pool2d(lines[None], _LINES)[0] >= 0.5, PhantomClass.TUBE)
    if uniform(g, 0, 1) < 0.5:
        field = _round(canvas, size / 2, size / 2, uniform(g, 0.42, 0.6) * size, 1.0)
        canvas.paint(~field, PhantomClass.BACKGROUND)
    return canvas.result()


def _branch(
    g: Generator, pen: ImageDraw.ImageDraw, at: tuple[float, float], angle: float, width: float, size: int
) -> None:
    """A vessel from a place on, and what branches off it until it is thinner than a pixel."""
    x, y = at
    length, curve = uniform(g, 0.2, 0.6) * size, uniform(g, -0.04, 0.04)
    step = 4.0
    for _ in range(int(length / step)):
        angle += curve + uniform(g, -0.15, 0.15)
        further = x + step * math.cos(angle), y + step * math.sin(angle)
        line = [_LINES * number for number in (x, y, *further)]
        pen.line(line, fill=1, width=max(1, round(_LINES * width)))
        x, y = further
        if not (0 <= x < size and 0 <= y < size):
            return
        if width > 2 and uniform(g, 0, 1) < 0.04:
            side = 1 if integer(g, 0, 1) else -1
            _branch(g, pen, (x, y), angle + side * uniform(g, 0.4, 1.1), width * uniform(g, 0.5, 0.8), size)
    if width > 1.2:
        for side in (-1, 1):
            _branch(g, pen, (x, y), angle + side * uniform(g, 0.2, 0.7), width * uniform(g, 0.6, 0.85), size)


def _cells(g: Generator, size: int) -> LabelMap:
    """Many alike that lie close together, some with a nucleus, and a few of another kind."""
    canvas = Canvas(g, size)
    radius = math.exp(uniform(g, math.log(0.02), math.log(0.1))) * size
    slender, with_nucleus = uniform(g, 0.4, 1), uniform(g, 0, 1) < 0.4
    free = torch.ones(size, size, dtype=torch.bool)
    for _ in range(integer(g, 12, 90)):
        y, x = uniform(g, 0, 1) * size, uniform(g, 0, 1) * size
        own = radius * uniform(g, 0.6, 1.4) * (2 if uniform(g, 0, 1) < 0.05 else 1)
        inside = _round(canvas, y, x, own, slender * uniform(g, 0.8, 1.2)) & free
        kind = PhantomClass.LESION if own < 0.04 * size else PhantomClass.ORGAN
        cell = canvas.paint(inside, kind)
        if cell is None:
            continue
        grown = F.max_pool2d(inside[None].float(), 3, stride=1, padding=1)[0] > 0
        free &= ~grown
        if with_nucleus:
            nucleus = _round(canvas, y, x, 0.45 * own, 0.9) & inside
            canvas.paint(nucleus, PhantomClass.LESION, cell)
    return canvas.result()


def _cavity(g: Generator, size: int) -> LabelMap:
    """Folds around a dark middle, and what grows out of the wall, as an endoscope sees them."""
    canvas = Canvas(g, size)
    y, x = uniform(g, 0.2, 0.8) * size, uniform(g, 0.2, 0.8) * size
    reach = uniform(g, 0.5, 0.9) * size
    for share in sorted((uniform(g, 0.1, 1) for _ in range(integer(g, 1, 5))), reverse=True):
        canvas.paint(_round(canvas, y, x, share * reach, uniform(g, 0.7, 1)), PhantomClass.BACKGROUND)
    for _ in range(integer(g, 1, 4)):
        own = math.exp(uniform(g, math.log(0.05), math.log(0.3))) * size
        dy, dx = uniform(g, 0.1, 0.9) * size, uniform(g, 0.1, 0.9) * size
        rows, columns = canvas.coordinates()
        radius = lobes(g, rows, columns, dy, dx, own, own * uniform(g, 0.6, 1))
        canvas.paint(enlarged(radius) < 1, PhantomClass.ORGAN)
    if uniform(g, 0, 1) < 0.3:  # an instrument
        rows_, columns_ = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        angle, offset = uniform(g, 0, 2 * math.pi), uniform(g, -0.3, 0.3) * size
        along = (columns_ - size / 2) * math.cos(angle) + (rows_ - size / 2) * math.sin(angle)
        across = (rows_ - size / 2) * math.cos(angle) - (columns_ - size / 2) * math.sin(angle) - offset
        wide = uniform(g, 0.02, 0.08) * size
        canvas.paint((across.abs() < wide) & (along > uniform(g, -0.2, 0.2) * size), PhantomClass.TUBE)
    return canvas.result()


def _limb(g: Generator, size: int) -> LabelMap:
    """One or two long bones in the flesh around them, each with a head at its end or none."""
    canvas = Canvas(g, size)
    y, x = canvas.coordinates()
    angle, cy, cx = uniform(g, 0, 2 * math.pi), uniform(g, 0.3, 0.7) * size, uniform(g, 0.3, 0.7) * size
    dy, dx = y - cy, x - cx
    along = math.cos(angle) * dx + math.sin(angle) * dy
    across = math.cos(angle) * dy - math.sin(angle) * dx
    flesh = uniform(g, 0.15, 0.6) * size
    beyond = enlarged(across.abs() / flesh)
    canvas.paint(beyond >= 1, PhantomClass.BACKGROUND)
    canvas.paint(beyond < 1, PhantomClass.BODY)
    if uniform(g, 0, 1) < 0.5:  # what the bone is joined to
        other = lobes(g, y, x, cy, cx, uniform(g, 0.1, 0.3) * size, uniform(g, 0.08, 0.2) * size)
        canvas.paint(enlarged(other) < 1, PhantomClass.ORGAN)
    width, end = uniform(g, 0.03, 0.11) * size, uniform(g, -0.3, 0.3) * size
    for offset in [0.0] if uniform(g, 0, 1) < 0.6 else [-0.5, 0.5]:
        beside = across - offset * flesh
        wider = 1 + uniform(g, 0, 0.6) * ((along - end) / size) ** 2
        radius = torch.maximum(beside.abs() / (width * wider), (along - end) / width)
        for _ in range(integer(g, 0, 3)):
            reach = uniform(g, 0.8, 2.2) * width
            aside = uniform(g, -1.5, 1.5) * width
            knob = torch.hypot(along - end - uniform(g, -1, 1.5) * width, beside - aside) / reach
            radius = torch.minimum(radius, knob)
        canvas.paint(enlarged(radius) < 1, PhantomClass.ORGAN)
    return canvas.result()


def _chest(g: Generator, size: int) -> LabelMap:
    """Two lungs above a diaphragm with a heart between them, seen from the front."""
    canvas = Canvas(g, size)
    y, x = (axis / size for axis in canvas.coordinates())
    body = torch.hypot((x - 0.5) / uniform(g, 0.4, 0.6), (y - 0.55) / uniform(g, 0.5, 0.8))
    canvas.paint(enlarged(body) < 1, PhantomClass.BODY)
    half, tall, floor = uniform(g, 0.1, 0.17), uniform(g, 0.25, 0.42), uniform(g, 0.65, 0.85)
    for side in (-1, 1):
        middle = 0.5 + side * (half + uniform(g, 0.02, 0.08))
        tilt = side * uniform(g, 0, 0.25) * (y - 0.5)
        power = uniform(g, 2, 3.5)
        u, v = ((x - middle - tilt) / half).abs(), ((y - 0.45) / tall).abs()
        dome = (y - floor - uniform(g, -0.5, 2.5) * (x - middle) ** 2) / 0.05 + 1
        radius = torch.maximum((u**power + v**power) ** (1 / power), dome)
        inside = enlarged(radius) < 1
        lung = canvas.paint(inside, PhantomClass.ORGAN)
        if lung is not None and uniform(g, 0, 1) < 0.4:
            reach = uniform(g, 0.03, 0.12)
            spot = lobes(g, y, x, uniform(g, 0.3, 0.6), middle, reach, 0.7 * reach)
            canvas.paint((enlarged(spot) < 1) & inside, PhantomClass.LESION, lung)
    if uniform(g, 0, 1) < 0.8:
        cy, cx = uniform(g, 0.55, 0.7), uniform(g, 0.45, 0.6)
        heart = lobes(g, y, x, cy, cx, uniform(g, 0.1, 0.18), uniform(g, 0.08, 0.14))
        canvas.paint(enlarged(heart) < 1, PhantomClass.ORGAN)
    return canvas.result()


# Cumulative shares, and how often such a scene is in colour.
_SCENES: tuple[tuple[float, Callable[[Generator, int], LabelMap], float], ...] = (
    (0.06, _layers, 0.0),
    (0.12, _vessels, 0.6),
    (0.20, _cells, 0.5),
    (0.28, _cavity, 0.9),
    (0.36, _limb, 0.0),
    (0.44, _chest, 0.0),
    (1.00, label_map, 0.1),
)


def _coloured(g: Generator, image: Tensor, labels: LabelMap, often: float) -> Tensor:
    """An image [3, S, S] in one hue that each region leans away from a little, some of it shining."""
    if uniform(g, 0, 1) >= often:
        return image
    size = image.shape[1]
    hue = 1 - torch.rand(3, generator=g) * uniform(g, 0.1, 0.7)
    if uniform(g, 0, 1) < 0.6:  # flesh: red most, blue least
        hue = hue.sort(descending=True).values
    own = uniform(g, 0.02, 0.3) * (torch.rand(len(labels.classes), 3, generator=g) - 0.5)
    fields = uniform(g, 0, 0.1) * smooth_field(g, 3, integer(g, 2, 6), size)
    tint = hue[:, None, None] + own[labels.regions].permute(2, 0, 1) + fields
    if uniform(g, 0, 1) < 0.3:  # a bright ground, as stained tissue has
        image = 1 - image
        seen = 1 - image * (1.2 - tint)
    else:
        seen = image * tint
    if uniform(g, 0, 1) < 0.5:
        spots = smooth_field(g, 1, integer(g, 10, 40), size)[0]
        shine = ((spots - uniform(g, 1.8, 2.6)) * 3).clamp(0, 1) * uniform(g, 0.5, 1)
        seen = seen + blurred(shine[None], 0.8)[0] * (1 - seen)
    return seen.clamp(0, 1).contiguous()


def _shaded(g: Generator, image: Tensor, labels: LabelMap) -> Tensor:
    """An image [3, S, S] whose regions are brighter or darker in their depth and, as bones, at their rims."""
    wholes = labels.wholes
    edge = torch.zeros_like(wholes, dtype=torch.bool)
    edge[1:] |= wholes[1:] != wholes[:-1]
    edge[:, 1:] |= wholes[:, 1:] != wholes[:, :-1]
    depth = torch.from_numpy(ndimage.distance_transform_edt(~edge.numpy())).float()
    count = len(labels.classes)
    deepest = torch.zeros(count).scatter_reduce(0, wholes.flatten(), depth.flatten(), "amax").clamp_min(1)
    inner = (depth / deepest[wholes]) ** uniform(g, 0.4, 1.5)
    rim = torch.exp(-depth / uniform(g, 1, 6))
    core = uniform(g, 0, 0.5) * (torch.rand(count, generator=g) - 0.5)
    bright = uniform(g, 0, 0.5) * (torch.rand(count, generator=g) - 0.3)
    return (image + core[wholes] * inner + bright[wholes] * rim).clamp(0, 1)


def _overlaid(g: Generator, image: Tensor) -> Tensor:
    """An image [3, S, S] with soft bands over it, as ribs lie over a lung; its objects go on beneath them."""
    size = image.shape[1]
    axis = torch.arange(size, dtype=torch.float32)
    for _ in range(integer(g, 1, 3)):
        angle, bend = uniform(g, 0, math.pi), uniform(g, 0, 0.06) * size
        across = axis[:, None] * math.cos(angle) + axis * math.sin(angle)
        across = across + bend * smooth_field(g, 1, integer(g, 1, 3), size)[0]
        spacing = math.exp(uniform(g, math.log(0.06), math.log(0.8))) * size
        width = uniform(g, 0.1, 0.3) * spacing
        away = ((across / spacing + uniform(g, 0, 1)) % 1 - 0.5).abs() * spacing
        band = ((width - away) / (uniform(g, 0.1, 0.8) * width)).clamp(0, 1)
        # Some begin and end within the image.
        band = band * (smooth_field(g, 1, 2, size)[0] * 4 + uniform(g, 0, 4)).clamp(0, 1)
        image = image + uniform(g, -0.15, 0.3) * band
    return image.clamp(0, 1)


def _wave(g: Generator, size: int, cells: int, height: float) -> Tensor:
    """[size] float, smooth, of standard deviation `height`."""
    return smooth_field(g, 1, cells, size)[0, size // 2] * height


def _round(canvas: Canvas, y: float, x: float, radius: float, slender: float) -> Tensor:
    """[S, S] bool, inside an ellipse that is bent a little and turned at random."""
    rows, columns = canvas.coordinates()
    radii = ellipse(canvas.g, rows, columns, y, x, radius, radius * min(slender, 1.0))
    return enlarged(radii) < 1
