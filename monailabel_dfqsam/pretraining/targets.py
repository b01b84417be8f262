"""Training examples: a phantom, objects on it, and the prompts a person would give for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Generator, Tensor
from torch.utils.data import Dataset

from monailabel_dfqsam.pretraining.phantoms import LabelMap, PhantomClass, integer, label_map, render, uniform

MASKS_PER_IMAGE = 6
MIN_AREA = 24
MAX_POINTS = 5


@dataclass(frozen=True)
class Example:
    """One phantom with objects to segment.

    Attributes:
        image: [3, S, S] float32 in [0, 1].
        regions: [S/4, S/4] int64, region ids.
        semantic: [S, S] int64, `PhantomClass` a pixel.
        masks: [M, S, S] uint8, 0 or 1.
        boxes: [M, 4] float32, jittered (x0, y0, x1, y1) in pixels.
        points: [M, P, 2] float32, (x, y) in pixels; the first lies inside the object.
        labels: [M, P] int64, 1 foreground, 0 background.
    """

    image: Tensor
    regions: Tensor
    semantic: Tensor
    masks: Tensor
    boxes: Tensor
    points: Tensor
    labels: Tensor


def _objects(g: Generator, labels: LabelMap) -> NDArray[Any]:
    """[M, S, S] bool: connected components of random regions, painted objects before background fields."""
    regions = labels.regions.numpy()
    weight = torch.where(labels.classes == PhantomClass.BACKGROUND, 1.0, 3.0)
    masks: list[NDArray[Any]] = []
    for _ in range(4 * MASKS_PER_IMAGE):
        region = int(torch.multinomial(weight, 1, generator=g))
        components, count = ndimage.label(regions == region)
        component = components == integer(g, 1, count)
        if component.sum() >= MIN_AREA:
            masks.append(component)
        if len(masks) == MASKS_PER_IMAGE:
            break
    if not masks:
        masks.append(regions == np.bincount(regions.ravel()).argmax())
    return np.stack([masks[i % len(masks)] for i in range(MASKS_PER_IMAGE)])


def _box(g: Generator, mask: NDArray[Any], jitter: float = 0.05) -> list[float]:
    ys, xs = np.nonzero(mask)
    x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    w, h, size = x1 - x0, y1 - y0, mask.shape[0]
    noise = [uniform(g, -jitter, jitter) for _ in range(4)]
    box = [x0 + noise[0] * w, y0 + noise[1] * h, x1 + noise[2] * w, y1 + noise[3] * h]
    return [min(max(float(v), 0.0), float(size)) for v in box]


def _points(g: Generator, mask: NDArray[Any]) -> tuple[list[list[float]], list[int]]:
    """Foreground first, then either kind; background from the object's surroundings."""
    inside = np.argwhere(ndimage.binary_erosion(mask, iterations=2))
    inside = inside if len(inside) else np.argwhere(mask)
    ys, xs = np.nonzero(mask)
    margin = 20
    near = np.zeros_like(mask)
    near[max(ys.min() - margin, 0) : ys.max() + margin, max(xs.min() - margin, 0) : xs.max() + margin] = True
    outside = np.argwhere(near & ~mask)
    points, labels = [], []
    for index in range(MAX_POINTS):
        foreground = index == 0 or len(outside) == 0 or uniform(g, 0, 1) < 0.5
        pool = inside if foreground else outside
        y, x = pool[integer(g, 0, len(pool) - 1)]
        points.append([float(x) + 0.5, float(y) + 0.5])
        labels.append(int(foreground))
    return points, labels


def make_example(g: Generator, size: int = 256) -> Example:
    """One random example; the same generator state gives the same example."""
    labels = label_map(g, size)
    image = render(g, labels)
    masks = _objects(g, labels)
    prompts = [_points(g, m) for m in masks]
    return Example(
        image=image,
        regions=labels.regions[2::4, 2::4].contiguous(),
        semantic=labels.semantic,
        masks=torch.from_numpy(masks.astype(np.uint8)),
        boxes=torch.tensor([_box(g, m) for m in masks]),
        points=torch.tensor([p for p, _ in prompts]),
        labels=torch.tensor([label for _, label in prompts]),
    )


class PhantomDataset(Dataset[dict[str, Tensor]]):
    """An endless map of index to example; example `i` of a seed is the same on every run."""

    def __init__(self, seed: int, start: int, count: int, size: int = 256) -> None:
        self.seed, self.start, self.count, self.size = seed, start, count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + self.start + index)
        return vars(make_example(g, self.size))
