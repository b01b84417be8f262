"""Procedural phantoms: random anatomy-like label maps and random appearances, no patient involved.

A phantom is drawn in two steps, so that one map can be shown in several appearances: regions first (a
background of smooth fields, a body outline, organs, tubes, rings, lesions), then contrast, texture, blur,
bias field, noise, speckle, windowing, gamma and colour. Everything follows one `torch.Generator`.

Shapes are computed on a grid four times coarser than the image and enlarged before they are cut off, which
keeps outlines smooth and makes a phantom in a hundredth of a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor

COARSE = 4
"""Image pixels per cell of the grid on which shapes are computed."""


class PhantomClass(IntEnum):
    """What the auxiliary network tells apart; shapes, since contrast is random."""

    BACKGROUND = 0
    BODY = 1
    ORGAN = 2
    RING = 3
    TUBE = 4
    LESION = 5


@dataclass(frozen=True)
class LabelMap:
    """Regions of a phantom.

    Attributes:
        regions: [S, S] int64, a region id a pixel, 0 … R − 1.
        classes: [R] int64, the `PhantomClass` of each region.
        parents: [R] int64, the region that each is a part of, as a wall or a lesion is of its organ; its own
            id where it is no part.
    """

    regions: Tensor
    classes: Tensor
    parents: Tensor

    @property
    def semantic(self) -> Tensor:
        """[S, S] int64, the class of each pixel."""
        return self.classes[self.regions]

    @property
    def wholes(self) -> Tensor:
        """[S, S] int64, region ids with parts counted to what they are parts of."""
        return self.parents[self.regions]


def uniform(g: Generator, low: float, high: float) -> float:
    """One float in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=g))


def integer(g: Generator, low: int, high: int) -> int:
    """One int in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=g))


def smooth_field(g: Generator, count: int, cells: int, size: int, columns: int | None = None) -> Tensor:
    """[count, size, size] float, random grids of cells × columns, enlarged bicubically; unit variance."""
    grid = torch.randn(1, count, cells + 3, (columns or cells) + 3, generator=g)
    field = F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=True)[0]
    return field / field.std(dim=(1, 2), keepdim=True).clamp_min(1e-6)


def enlarged(field: Tensor) -> Tensor:
    """[h, w] float to [COARSE·h, COARSE·w]."""
    return F.interpolate(field[None, None], scale_factor=COARSE, mode="bilinear")[0, 0]


class Canvas:
    """A label map being painted; coordinates and lengths are in image pixels, fields on the coarse grid."""

    def __init__(self, g: Generator, size: int) -> None:
        self.g, self.size = g, size
        cells = integer(g, 2, 6)
        fields = smooth_field(g, integer(g, 1, 8), cells, size // COARSE)
        self.regions = torch.zeros(size, size, dtype=torch.int64)
        highest = enlarged(fields[0])
        # Ten times faster than argmax over the first dimension.
        for region, field in enumerate(fields[1:], start=1):
            field = enlarged(field)
            self.regions[field > highest] = region
            highest = torch.maximum(highest, field)
        self.classes = [PhantomClass.BACKGROUND] * len(fields)
        self.parents = list(range(len(fields)))

    def paint(self, mask: Tensor, kind: PhantomClass, parent: int | None = None) -> int | None:
        """Paints over what is there; the new region's id, or None where the mask [S, S] bool is too small."""
        if int(mask.sum()) < 12:
            return None
        region = len(self.classes)
        self.regions[mask] = region
        self.classes.append(kind)
        self.parents.append(region if parent is None else parent)
        return region

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """y and x of the coarse cells' centres, bent by a smooth field."""
        side = self.size // COARSE
        axis = (torch.arange(side, dtype=torch.float32) + 0.5) * COARSE
        shift = smooth_field(self.g, 2, integer(self.g, 3, 8), side) * uniform(self.g, 0.5, self.size / 40)
        return axis[:, None] + shift[0], axis[None, :] + shift[1]

    def result(self) -> LabelMap:
        """The map with ids that are all in use."""
        used = torch.bincount(self.regions.flatten(), minlength=len(self.classes)) > 0
        parents = torch.tensor(self.parents)
        # A part whose whole was painted over is a whole by itself.
        parents = torch.where(used[parents], parents, torch.arange(len(parents)))
        new = used.cumsum(0) - 1
        return LabelMap(new[self.regions], torch.tensor(self.classes)[used], new[parents[used]])


def _turned(g: Generator, y: Tensor, x: Tensor, cy: float, cx: float) -> tuple[Tensor, Tensor]:
    angle = uniform(g, 0, math.pi)
    dy, dx = y - cy, x - cx
    return math.cos(angle) * dx + math.sin(angle) * dy, math.cos(angle) * dy - math.sin(angle) * dx


def ellipse(g: Generator, y: Tensor, x: Tensor, cy: float, cx: float, a: float, b: float) -> Tensor:
    """Radius, 1 on a randomly turned ellipse with half axes a and b, less inside."""
    u, v = _turned(g, y, x, cy, cx)
    return ((u / a) ** 2 + (v / b) ** 2).sqrt()


def _bar(g: Generator, y: Tensor, x: Tensor, cy: float, cx: float, a: float, b: float) -> Tensor:
    """The same for a rectangle with rounded corners, as long bones and vertebrae are."""
    u, v = _turned(g, y, x, cy, cx)
    power = uniform(g, 2.5, 6)
    return ((u / a).abs() ** power + (v / (b * uniform(g, 0.3, 1))).abs() ** power) ** (1 / power)


def lobes(g: Generator, y: Tensor, x: Tensor, cy: float, cx: float, a: float, b: float) -> Tensor:
    """The same for two or three ellipses grown together."""
    parts = [ellipse(g, y, x, cy, cx, a * 0.8, b * 0.8)]
    for _ in range(integer(g, 1, 2)):
        away, angle = uniform(g, 0.4, 0.9) * b, uniform(g, 0, 2 * math.pi)
        share = uniform(g, 0.4, 0.75)
        parts.append(
            ellipse(g, y, x, cy + away * math.sin(angle), cx + away * math.cos(angle), a * share, b * share)
        )
    return torch.stack(parts).amin(0)


def _crescent(g: Generator, y: Tensor, x: Tensor, cy: float, cx: float, a: float, b: float) -> Tensor:
    """The same for an ellipse out of which another takes a bite."""
    angle, away = uniform(g, 0, 2 * math.pi), uniform(g, 0.7, 1.3) * b
    bite = ellipse(g, y, x, cy + away * math.sin(angle), cx + away * math.cos(angle), 0.8 * a, 0.8 * b)
    return torch.maximum(ellipse(g, y, x, cy, cx, a, b), 2 - bite)


_SHAPES: tuple[tuple[float, Callable[..., Tensor]], ...] = (
    (0.55, ellipse),
    (0.70, lobes),
    (0.85, _bar),
    (1.00, _crescent),
)
"""Shapes with the cumulative shares in which they occur."""


def _paint_tube(c: Canvas) -> None:
    """A bent tube through the image."""
    g, size = c.g, c.size
    y, x = c.coordinates()
    along, across = _turned(g, y, x, size / 2, size / 2)
    bend = uniform(g, 0, 0.15) * size * torch.sin(along / size * uniform(g, 2, 9) + uniform(g, 0, 6))
    start, length = uniform(g, -0.5, 0.2) * size, uniform(g, 0.3, 1.0) * size
    distance = enlarged((across - uniform(g, -0.3, 0.3) * size - bend).abs())
    position = enlarged(along)
    inside = distance < uniform(g, 0.008, 0.04) * size
    c.paint(inside & (position > start) & (position < start + length), PhantomClass.TUBE)


def _paint_body(c: Canvas) -> None:
    """A large outline, often with air around it, something uniform within, and a wall."""
    g, size = c.g, c.size
    y, x = c.coordinates()
    middle = [size / 2 + uniform(g, -0.1, 0.1) * size for _ in range(2)]
    axes = [uniform(g, 0.3, 0.55) * size for _ in range(2)]
    radius = enlarged(ellipse(g, y, x, *middle, *axes))
    if uniform(g, 0, 1) < 0.7:
        c.paint(radius >= 1, PhantomClass.BACKGROUND)
    body = c.paint(radius < 1, PhantomClass.BODY) if uniform(g, 0, 1) < 0.6 else None
    if uniform(g, 0, 1) < 0.4:
        c.paint((radius < 1) & (radius > uniform(g, 0.85, 0.96)), PhantomClass.RING, body)


def _paint_object(c: Canvas) -> None:
    """One organ or lesion, some with a wall or an inner part; or a ring with what was there inside it."""
    g, size = c.g, c.size
    y, x = c.coordinates()
    scale = math.exp(uniform(g, math.log(0.025), math.log(0.42))) * size
    axes = scale, scale * uniform(g, 0.45, 1.0)
    cy, cx = uniform(g, 0.08, 0.92) * size, uniform(g, 0.08, 0.92) * size
    kind = uniform(g, 0, 1)
    if kind < 0.06:
        radius = enlarged(ellipse(g, y, x, cy, cx, *axes))
        c.paint((radius < 1) & (radius > uniform(g, 0.55, 0.85)), PhantomClass.RING)
        return
    drawn = uniform(g, 0, 1)
    shape = next(shape for share, shape in _SHAPES if drawn < share)
    radius = enlarged(shape(g, y, x, cy, cx, *axes))
    inside = radius < 1
    organ = c.paint(inside, PhantomClass.LESION if scale < 0.04 * size else PhantomClass.ORGAN)
    if organ is None or scale < 0.06 * size:
        return
    if uniform(g, 0, 1) < 0.2:
        c.paint(inside & (radius > uniform(g, 0.75, 0.93)), PhantomClass.RING, organ)
    for _ in range(integer(g, 1, 3) if uniform(g, 0, 1) < 0.3 else 0):
        reach, away = uniform(g, 0.08, 0.45) * axes[1], uniform(g, 0, 0.6) * axes[1]
        angle = uniform(g, 0, 2 * math.pi)
        inner = ellipse(g, y, x, cy + away * math.sin(angle), cx + away * math.cos(angle), reach, reach)
        c.paint((enlarged(inner) < 1) & (radius < 0.9), PhantomClass.LESION, organ)


def label_map(g: Generator, size: int = 256) -> LabelMap:
    """One random label map of `size`² pixels; `size` is a multiple of 4."""
    canvas = Canvas(g, size)
    if uniform(g, 0, 1) < 0.6:
        _paint_body(canvas)
    for _ in range(integer(g, 2, 12)):
        if uniform(g, 0, 1) < 0.08:
            _paint_tube(canvas)
        else:
            _paint_object(canvas)
    return canvas.result()


def blurred(image: Tensor, sigma: float) -> Tensor:
    if sigma < 0.3:
        return image
    reach = max(1, math.ceil(2.5 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(image.shape[0], 1, 1, -1)
    x = F.pad(image[None], (reach, reach, reach, reach), mode="replicate")
    x = F.conv2d(x, kernel, groups=image.shape[0])
    return F.conv2d(x, kernel.transpose(2, 3), groups=image.shape[0])[0]


def _tissue(g: Generator, labels: LabelMap, grain: float) -> Tensor:
    """[S, S] float, mean and texture of each region, rims along some outlines; about 0 … 1."""
    regions, count = labels.regions, len(labels.classes)
    size = regions.shape[0]
    contrast = uniform(g, 0.2, 1.0)
    mean = 0.5 + contrast * (torch.rand(count, generator=g) - 0.5)
    if uniform(g, 0, 1) < 0.35:
        # CT's: soft tissues hardly differ, air and bone lie far away.
        mean = uniform(g, 0.35, 0.65) + uniform(g, 0.1, 0.3) * (torch.rand(count, generator=g) - 0.5)
        far = torch.rand(count, generator=g)
        mean = torch.where(far < 0.1, 0.05, torch.where(far > 0.9, 0.95, mean))
    if uniform(g, 0, 1) < 0.3:
        # Parts nearly like what they belong to: an organ's vessels, a tumour's core.
        near = torch.rand(count, generator=g) * 0.6
        mean = mean[labels.parents] + near * (mean - mean[labels.parents])
    if uniform(g, 0, 1) < 0.6:
        mean[regions[0, 0]] = uniform(g, 0, 0.05)
    fine, rough = integer(g, 16, 96), integer(g, 6, 24)
    texture = torch.cat([smooth_field(g, 1, fine, size), smooth_field(g, 1, rough, size, integer(g, 6, 60))])
    amount = torch.rand(2, count, generator=g) ** 2 * uniform(g, 0, 0.25 if uniform(g, 0, 1) < 0.4 else 0.1)
    image = mean[regions] + grain * (amount[:, regions] * texture).sum(0)
    if uniform(g, 0, 1) < 0.25:
        edge = torch.zeros(size, size)
        edge[1:] += regions[1:] != regions[:-1]
        edge[:, 1:] += regions[:, 1:] != regions[:, :-1]
        strength = torch.rand(count, generator=g) * uniform(g, -1.0, 1.5)
        image = image + blurred(edge[None], uniform(g, 0.7, 2.5))[0] * strength[regions]
    return image


def _acoustics(g: Generator, image: Tensor, grain: float) -> Tensor:
    """Ultrasound's own: speckle stretched sideways, attenuation downwards, shadows."""
    size = image.shape[0]
    speckle = torch.randn(size, max(8, int(size * uniform(g, 0.3, 1))), generator=g)
    speckle = F.interpolate(speckle[None, None], size=(size, size), mode="bilinear")[0]
    image = image * (1 + grain * uniform(g, 0.2, 0.7) * blurred(speckle, uniform(g, 0, 1.5))[0])
    depth = torch.linspace(0, 1, size)[:, None]
    image = image * torch.exp(-uniform(g, 0, 1.2) * depth)
    if uniform(g, 0, 1) < 0.5:
        shadow = smooth_field(g, 1, 1, size, integer(g, 4, 16))[0]
        image = image * (1 - uniform(g, 0.2, 0.8) * (shadow > 1) * depth)
    return image


def render(g: Generator, labels: LabelMap, grain: float = 1.0) -> Tensor:
    """One appearance of a label map: [3, S, S] float32 in [0, 1].

    Args:
        grain: how much of texture, speckle and noise there is, 0 … 1.
    """
    size = labels.regions.shape[0]
    image = _tissue(g, labels, grain)
    # Projections, as X-rays are, have soft outlines.
    image = blurred(image[None], uniform(g, 0, 1.6) if uniform(g, 0, 1) < 0.9 else uniform(g, 1.6, 4))[0]
    if uniform(g, 0, 1) < 0.5:
        image = image * torch.exp(uniform(g, 0, 0.35) * smooth_field(g, 1, 2, size)[0])
    if uniform(g, 0, 1) < 0.3:
        image = _acoustics(g, image, grain)
    noise = torch.randn(size, size, generator=g)
    image = image + grain * uniform(g, 0, 0.26) ** 2 * (
        noise if uniform(g, 0, 1) < 0.7 else blurred(noise[None], 1.0)[0] * 3
    )
    sample = image.flatten()[:: max(1, image.numel() // 4096)].sort().values
    low = sample[int(uniform(g, 0, 0.05) * len(sample))]
    high = sample[int(uniform(g, 0.95, 0.9999) * len(sample))]
    image = ((image - low) / (high - low).clamp_min(1e-3)).clamp(0, 1) ** uniform(g, 0.6, 1.6)
    if uniform(g, 0, 1) < 0.15:
        image = 1 - image
    rgb = image.expand(3, size, size)
    if uniform(g, 0, 1) < 0.1:
        tint = 1 + 0.4 * (torch.rand(len(labels.classes), 3, generator=g) - 0.5)
        rgb = (rgb * tint[labels.regions].permute(2, 0, 1)).clamp(0, 1)
    return rgb.contiguous()


def eight_bit(image: Tensor) -> NDArray[np.uint8]:
    """[3, H, W] of 0 … 1 as [H, W, 3] uint8."""
    rgb: NDArray[np.uint8] = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return rgb
