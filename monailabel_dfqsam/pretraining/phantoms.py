"""Procedural phantoms: random anatomy-like label maps and random appearances, no patient involved.

A phantom is drawn in two steps, so that one map can be shown in several appearances: regions first (a
background of smooth fields, a body outline, organs, tubes, rings, lesions), then contrast, texture, blur,
bias field, noise, speckle, windowing, gamma and colour. Everything follows one `torch.Generator`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


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
    """

    regions: Tensor
    classes: Tensor

    @property
    def semantic(self) -> Tensor:
        """[S, S] int64, the class of each pixel."""
        return self.classes[self.regions]


def uniform(g: Generator, low: float, high: float) -> float:
    """One float in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=g))


def integer(g: Generator, low: int, high: int) -> int:
    """One int in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=g))


def smooth_field(g: Generator, count: int, cells: int, size: int) -> Tensor:
    """[count, size, size] float, random grids of `cells` per side, enlarged bicubically; unit variance."""
    grid = torch.randn(1, count, cells + 3, cells + 3, generator=g)
    field = F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=True)[0]
    return field / field.std(dim=(1, 2), keepdim=True).clamp_min(1e-6)


def _warped_coordinates(g: Generator, size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, dtype=torch.float32)
    shift = smooth_field(g, 2, integer(g, 3, 8), size) * uniform(g, 0.5, size / 40)
    return axis[:, None] + shift[0], axis[None, :] + shift[1]


def _ellipse_radius(g: Generator, y: Tensor, x: Tensor, cy: float, cx: float, a: float, b: float) -> Tensor:
    """[S, S] float, 1 on a randomly turned ellipse with half axes a and b, less inside."""
    angle = uniform(g, 0, math.pi)
    dy, dx = y - cy, x - cx
    u = math.cos(angle) * dx + math.sin(angle) * dy
    v = -math.sin(angle) * dx + math.cos(angle) * dy
    return ((u / a) ** 2 + (v / b) ** 2).sqrt()


def _tube(g: Generator, y: Tensor, x: Tensor, size: int) -> Tensor:
    """[S, S] bool, a bent tube through the image."""
    angle, offset = uniform(g, 0, math.pi), uniform(g, -0.3, 0.3) * size
    along = math.cos(angle) * (x - size / 2) + math.sin(angle) * (y - size / 2)
    across = -math.sin(angle) * (x - size / 2) + math.cos(angle) * (y - size / 2)
    bend = uniform(g, 0, 0.15) * size * torch.sin(along / size * uniform(g, 2, 9) + uniform(g, 0, 6))
    start = uniform(g, -0.5, 0.2) * size
    inside = (across - offset - bend).abs() < uniform(g, 0.008, 0.04) * size
    return inside & (along > start) & (along < start + uniform(g, 0.3, 1.0) * size)


def label_map(g: Generator, size: int = 256) -> LabelMap:
    """One random label map of `size`² pixels."""
    regions = smooth_field(g, integer(g, 3, 8), integer(g, 2, 6), size).argmax(0)
    regions = torch.unique(regions, return_inverse=True)[1]
    classes = [PhantomClass.BACKGROUND] * (int(regions.max()) + 1)

    def paint(mask: Tensor, kind: PhantomClass) -> None:
        if int(mask.sum()) >= 12:
            regions[mask] = len(classes)
            classes.append(kind)

    y, x = _warped_coordinates(g, size)
    half = size / 2
    if uniform(g, 0, 1) < 0.6:
        body = _ellipse_radius(
            g, y, x, half + uniform(g, -0.1, 0.1) * size, half + uniform(g, -0.1, 0.1) * size,
            uniform(g, 0.3, 0.55) * size, uniform(g, 0.3, 0.55) * size,
        )  # fmt: skip
        outside = body >= 1
        if uniform(g, 0, 1) < 0.7:
            # Air around a body is one region, most often dark.
            paint(outside, PhantomClass.BACKGROUND)
        if uniform(g, 0, 1) < 0.6:
            paint(~outside, PhantomClass.BODY)
        if uniform(g, 0, 1) < 0.4:
            paint((body < 1) & (body > uniform(g, 0.85, 0.96)), PhantomClass.RING)
    for _ in range(integer(g, 2, 13)):
        y, x = _warped_coordinates(g, size)
        scale = math.exp(uniform(g, math.log(0.02), math.log(0.28))) * size
        aspect = uniform(g, 0.5, 1.0)
        cy, cx = uniform(g, 0.08, 0.92) * size, uniform(g, 0.08, 0.92) * size
        kind = uniform(g, 0, 1)
        if kind < 0.12:
            paint(_tube(g, y, x, size), PhantomClass.TUBE)
            continue
        radius = _ellipse_radius(g, y, x, cy, cx, scale, scale * aspect)
        if kind < 0.27:
            paint((radius < 1) & (radius > uniform(g, 0.55, 0.85)), PhantomClass.RING)
            continue
        paint(radius < 1, PhantomClass.LESION if scale < 0.04 * size else PhantomClass.ORGAN)
        if scale > 0.08 * size and uniform(g, 0, 1) < 0.3:
            reach = uniform(g, 0.15, 0.45)
            off = uniform(g, -0.4, 0.4) * scale * aspect
            inner = _ellipse_radius(g, y, x, cy + off, cx + off, scale * reach, scale * reach)
            paint((inner < 1) & (radius < 1), PhantomClass.LESION)
    present, regions = torch.unique(regions, return_inverse=True)
    return LabelMap(regions, torch.tensor(classes)[present])


def _blur(image: Tensor, sigma: float) -> Tensor:
    if sigma < 0.3:
        return image
    reach = max(1, math.ceil(2.5 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(image.shape[0], 1, 1, -1)
    x = F.pad(image[None], (reach, reach, reach, reach), mode="replicate")
    x = F.conv2d(x, kernel, groups=image.shape[0])
    return F.conv2d(x, kernel.transpose(2, 3), groups=image.shape[0])[0]


def render(g: Generator, labels: LabelMap) -> Tensor:
    """One appearance of a label map: [3, S, S] float32 in [0, 1]."""
    size = labels.regions.shape[0]
    count = len(labels.classes)
    contrast = uniform(g, 0.35, 1.0)
    mean = 0.5 + contrast * (torch.rand(count, generator=g) - 0.5)
    if uniform(g, 0, 1) < 0.6:
        corner = labels.regions[0, 0]
        mean[corner] = uniform(g, 0, 0.05)
    amount = torch.rand(count, generator=g) * uniform(g, 0, 0.12)
    fine = smooth_field(g, 2, integer(g, 16, 96), size)
    image = mean[labels.regions] + amount[labels.regions] * fine[0]
    image = _blur(image[None], uniform(g, 0, 1.6))[0]
    if uniform(g, 0, 1) < 0.5:
        image = image * torch.exp(uniform(g, 0, 0.35) * smooth_field(g, 1, 2, size)[0])
    if uniform(g, 0, 1) < 0.2:
        grain = 1 + uniform(g, 0.1, 0.5) * torch.randn(size, size, generator=g)
        image = image * _blur(grain[None], uniform(g, 0, 1.5))[0]
    image = image + uniform(g, 0, 0.07) * torch.randn(size, size, generator=g)
    sample = image.flatten()[:: max(1, image.numel() // 4096)].sort().values
    low = sample[int(uniform(g, 0, 0.05) * len(sample))]
    high = sample[int(uniform(g, 0.95, 0.9999) * len(sample))]
    image = ((image - low) / (high - low).clamp_min(1e-3)).clamp(0, 1) ** uniform(g, 0.6, 1.6)
    if uniform(g, 0, 1) < 0.15:
        image = 1 - image
    rgb = image.expand(3, size, size)
    if uniform(g, 0, 1) < 0.25:
        tint = 1 + 0.4 * (torch.rand(count, 3, generator=g) - 0.5)
        rgb = (rgb * tint[labels.regions].permute(2, 0, 1)).clamp(0, 1)
    return rgb.contiguous()
