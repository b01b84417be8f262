"""Pictures of nothing, to calibrate on beside phantoms: scattered shapes, and clouds.

Ranges and rounding that fit one kind of picture fit others less well, so several kinds are drawn, and each
picture differs in all that images differ in: sizes, contrast, texture, sharpness, black surroundings, and
sides. Scattered shapes have radii r with a density of r⁻³, as objects in photographs do, so that they look
alike at every scale (Lee, Mumford and Huang, 2001); clouds have a spectrum of f⁻ᵅ.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor

from monailabel_dfqsam.pretraining.phantoms import eight_bit, integer, label_map, render, uniform

Rgb = NDArray[np.uint8]


def drawing(index: int, seed: int, size: int = 256) -> Rgb:
    """Picture `index` of a seed, [H, W, 3] uint8: phantoms, scattered shapes and clouds in turn.

    The longer side is `size` pixels.
    """
    g = Generator().manual_seed((seed << 20) + index)
    kind = index % 5  # two phantoms, two of shapes, one of clouds
    if kind in (0, 2):
        return eight_bit(render(g, label_map(g, size)))
    grey = _shapes(g, size) if kind in (1, 3) else _clouds(g, size)
    return eight_bit(_appearance(g, grey).expand(3, -1, -1))


def _shapes(g: Generator, size: int) -> Tensor:
    """[size, size] float: ellipses and rounded boxes over one another, some striped."""
    row, column = _grid(size)
    image = torch.full((size, size), uniform(g, 0, 1))
    smallest, largest = uniform(g, size / 128, size / 40), uniform(g, size / 6, size / 2)
    for _ in range(integer(g, 30, 300)):
        share = uniform(g, 0, 1)
        radius = (smallest**-2 + share * (largest**-2 - smallest**-2)) ** -0.5
        dy, dx = (axis - uniform(g, -0.1, 1.1) * size for axis in (row, column))
        angle, power = uniform(g, 0, math.pi), 2 if uniform(g, 0, 1) < 0.7 else 8
        along = dx * math.cos(angle) + dy * math.sin(angle)
        across = (dy * math.cos(angle) - dx * math.sin(angle)) / uniform(g, 0.4, 1)
        inside = along.abs() ** power + across.abs() ** power < radius**power
        image[inside] = uniform(g, 0, 1)
        if uniform(g, 0, 1) < 0.3:
            stripes = torch.sin(along[inside] * uniform(g, 0.1, 1.5)) * uniform(g, 0, 0.3)
            image[inside] += stripes
    return image + uniform(g, 0, 0.15) * _noise(g, size, uniform(g, 0, 1.8))


def _clouds(g: Generator, size: int) -> Tensor:
    """[size, size] float: noise at all scales."""
    image = _noise(g, size, uniform(g, 1, 2)) + uniform(g, 0, 0.5) * _noise(g, size, uniform(g, 0.5, 1.2))
    return image.abs() if uniform(g, 0, 1) < 0.4 else image


def _noise(g: Generator, size: int, exponent: float) -> Tensor:
    """[size, size] float of mean 0 and variance 1, with a spectrum of frequency^−exponent."""
    frequency = (torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size) ** 2).sqrt()
    frequency[0, 0] = torch.inf
    waves = torch.view_as_complex(torch.randn(*frequency.shape, 2, generator=g)) * frequency**-exponent
    image = torch.fft.irfft2(waves, s=(size, size))
    normal: Tensor = (image - image.mean()) / image.std()
    return normal


def _appearance(g: Generator, image: Tensor) -> Tensor:
    """A grey picture [S, S] as it might be seen, [H, W] within 0 … 1."""
    size = len(image)
    sigma = uniform(g, 0, size / 170)
    taps = torch.exp(-0.5 * (torch.arange(-8, 9) / max(sigma, 0.1)) ** 2)
    taps = taps / taps.sum()
    padded = F.pad(image[None, None], (8, 8, 8, 8), mode="reflect")
    image = F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))[0, 0]
    low, high = (torch.quantile(image, uniform(g, *ends)) for ends in ((0, 0.1), (0.9, 1)))
    image = ((image - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) ** math.exp(uniform(g, -0.7, 0.7))
    if uniform(g, 0, 1) < 0.5:  # a round field of view
        distances = (
            (axis / size * 2 - 1 - uniform(g, -0.15, 0.15)) / uniform(g, 0.6, 1.1) for axis in _grid(size)
        )
        image = image * (sum(distance**2 for distance in distances) < 1)
    if uniform(g, 0, 1) < 0.5:
        image = image[: int(uniform(g, 0.6, 1) * size)]
    return image.T if uniform(g, 0, 1) < 0.5 else image


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Rows [S, 1] and columns [1, S] of pixels."""
    places = torch.arange(size, dtype=torch.float32)
    return places[:, None], places[None]
