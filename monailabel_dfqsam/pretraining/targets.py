"""Training examples: a phantom, objects on it, and the prompts a person would give for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Generator, Tensor
from torch.utils.data import IterableDataset

from monailabel_dfqsam.pretraining.phantoms import LabelMap, PhantomClass, integer, label_map, render, uniform

MASKS_PER_IMAGE = 6
MIN_AREA = 24
_BOX_OFF = ((0.5, (0.0, 0.0)), (0.7, (-0.05, 0.05)), (0.85, (-0.08, 0.2)), (1.0, (0.0, 0.0)))
"""Cumulative shares of boxes, and how far outwards their sides are drawn, in shares of the object's. The last
are moved as a whole, by at most `_MOST_MOVED` pixels and half of the shorter side."""
_MOST_MOVED = 5
GROUP = 24
"""Phantoms that are drawn together and shown `SHOWN` times each, in random order."""
SHOWN = 4
"""Views of a phantom; drawing one takes about as long as a training step on it."""


@dataclass(frozen=True)
class Example:
    """One phantom with objects to segment.

    Attributes:
        image: [3, S, S] float32 in [0, 1].
        regions: [S/4, S/4] int64, region ids.
        semantic: [S, S] int64, `PhantomClass` a pixel.
        masks: [M, S, S] uint8, 0 or 1.
        boxes: [M, 4] float32, jittered (x0, y0, x1, y1) in pixels.
        points: [M, 2] float32, (x, y) in pixels, inside the object.
    """

    image: Tensor
    regions: Tensor
    semantic: Tensor
    masks: Tensor
    boxes: Tensor
    points: Tensor


def _objects(g: Generator, labels: LabelMap) -> NDArray[Any]:
    """[M, S, S] bool: connected components of random regions, painted objects before background fields.

    Most of them are wholes, with their parts and without holes, as people outline organs.
    """
    regions, wholes = labels.regions.numpy(), labels.wholes.numpy()
    kinds = labels.classes
    weight = torch.where(
        kinds == PhantomClass.BACKGROUND, 0.5, torch.where(kinds == PhantomClass.TUBE, 1.0, 3.0)
    )
    masks: list[NDArray[Any]] = []
    for _ in range(3 * MASKS_PER_IMAGE):
        region = int(torch.multinomial(weight, 1, generator=g))
        whole = uniform(g, 0, 1) < 0.75
        candidates = wholes == int(labels.parents[region]) if whole else regions == region
        components, count = ndimage.label(candidates)
        chosen = 1 + int(np.bincount(components.ravel())[1:].argmax())
        component = components == (chosen if uniform(g, 0, 1) < 0.7 else integer(g, 1, count))
        if whole:
            rows, columns = ndimage.find_objects(component.astype(np.uint8))[0]
            component[rows, columns] = ndimage.binary_fill_holes(component[rows, columns])
            if uniform(g, 0, 1) < 0.4:
                component = _outlined(g, component)
        if MIN_AREA <= component.sum() <= 0.6 * component.size:
            masks.append(component)
        if len(masks) == MASKS_PER_IMAGE:
            break
    if not masks:
        masks.append(regions == np.bincount(regions.ravel()).argmax())
    return np.stack([masks[i % len(masks)] for i in range(MASKS_PER_IMAGE)])


def _outlined(g: Generator, mask: NDArray[Any]) -> NDArray[Any]:
    """A mask [S, S] bool as a person may draw it: smoother, beyond the visible edge more often than within.

    Where it ends is then said by a box and not by the image.
    """
    sigma = uniform(g, 0.01, 0.08) * float(np.sqrt(mask.sum()))
    reach = int(4 * sigma) + 1
    rows, columns = (
        slice(max(side.start - reach, 0), side.stop + reach)
        for side in ndimage.find_objects(mask.astype(np.uint8))[0]
    )
    soft = ndimage.gaussian_filter(mask[rows, columns].astype(np.float32), sigma, truncate=3)
    drawn = np.zeros_like(mask)
    drawn[rows, columns] = soft > uniform(g, 0.05, 0.65)
    return drawn


def _box(g: Generator, mask: NDArray[Any]) -> list[float]:
    """Tight, a few percent off at each side, loose as people draw boxes in a hurry, or moved."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, x1, y0, y1 = xs[0], xs[-1] + 1, ys[0], ys[-1] + 1
    w, h, size = x1 - x0, y1 - y0, mask.shape[0]
    drawn = uniform(g, 0, 1)
    low, high = next(off for share, off in _BOX_OFF if drawn < share)
    out = [uniform(g, low, high) for _ in range(4)]
    most = min(_MOST_MOVED, min(w, h) / 2) if drawn >= _BOX_OFF[-2][0] else 0
    dx, dy = uniform(g, -most, most), uniform(g, -most, most)
    box = [x0 - out[0] * w + dx, y0 - out[1] * h + dy, x1 + out[2] * w + dx, y1 + out[3] * h + dy]
    return [min(max(float(v), 0.0), float(size)) for v in box]


def _point(g: Generator, mask: NDArray[Any]) -> list[float]:
    """The middle of a random pixel of the object; the deeper inside, the likelier."""
    rows, columns = ndimage.find_objects(mask.astype(np.uint8))[0]
    depth = ndimage.distance_transform_cdt(np.pad(mask[rows, columns], 1))[1:-1, 1:-1]
    at = np.argwhere(depth >= max(1.0, min(uniform(g, 0.1, 1.3), 1.0) * depth.max()))
    y, x = at[integer(g, 0, len(at) - 1)]
    return [float(x + columns.start) + 0.5, float(y + rows.start) + 0.5]


def make_example(g: Generator, size: int = 256) -> Example:
    """One random example; the same generator state gives the same example."""
    labels = label_map(g, size)
    return example_of(g, labels, render(g, labels))


def example_of(g: Generator, labels: LabelMap, image: Tensor) -> Example:
    """One of a label map and its image [3, S, S] float32 in [0, 1]."""
    regions = labels.regions[2::4, 2::4].contiguous()
    return prompted(g, image, regions, labels.semantic, _objects(g, labels))


def prompted(g: Generator, image: Tensor, regions: Tensor, semantic: Tensor, masks: NDArray[Any]) -> Example:
    return Example(
        image=image,
        regions=regions,
        semantic=semantic,
        masks=torch.from_numpy(masks.astype(np.uint8)),
        boxes=torch.tensor([_box(g, m) for m in masks]),
        points=torch.tensor([_point(g, m) for m in masks]),
    )


def turned(g: Generator, example: Example) -> Example:
    """The same phantom flipped and turned at random, a little brighter or darker, with new prompts."""
    flip, turns = integer(g, 0, 1), integer(g, 0, 3)

    def move(x: Tensor) -> Tensor:
        x = x.flip(-1) if flip else x
        return torch.rot90(x, turns, (-2, -1)).contiguous()

    image = move(example.image) ** uniform(g, 0.8, 1.25)
    masks = move(example.masks).numpy().astype(bool)
    return prompted(g, image, move(example.regions), move(example.semantic), masks)


class PhantomDataset(IterableDataset[dict[str, Tensor]]):
    """An endless stream of examples as dicts, the same for the same seed, from example `start` on."""

    def __init__(self, seed: int, start: int = 0, size: int = 256) -> None:
        self.seed, self.start, self.size = seed, start, size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        group, passed = divmod(self.start, GROUP * SHOWN)
        while True:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + group)
            drawn = [make_example(g, self.size) for _ in range(GROUP)]
            order = torch.cat([torch.randperm(GROUP, generator=g) for _ in range(SHOWN)])
            for position, index in enumerate(order.tolist()):
                view = turned(g, drawn[index])
                if position >= passed:
                    yield vars(view)
            group, passed = group + 1, 0
