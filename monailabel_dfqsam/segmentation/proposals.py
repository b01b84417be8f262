"""Objects of one slice without any prompt: a point on each cell of a grid, and the surest masks of these.

Every model judges its own masks on a scale of its own: a large one calls a good mask 0.9, a small one 0.3.
What is kept is therefore measured against the best mask of the same image, while the confidence told is the
model's own number, so that images can be compared under one model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from monailabel_dfqsam.sam.preprocess import Frame, to_image
from monailabel_dfqsam.segmentation.segmenter import Embedding, Segmenter

MOST = 20
"""Objects of one slice at most."""

_SIDE = 16  # points along each side
_BACKGROUND = 10  # of 255: cells no brighter than this above the darkest pixel hold nothing to segment
_STABILITY_STEP = 1.0  # logits by which the threshold is moved either way, as segment-anything does
_LEAST_OF_BEST = 0.7
_SAME_OBJECT = 0.5  # IoU of two masks
_SHARES = (0.001, 0.8)  # of the image: less is noise, more is the background


@dataclass(frozen=True, eq=False)
class Proposals:
    """What a model takes for objects in one image.

    Attributes:
        labels: [H, W] uint8, 0 where there is none, else 1 … N; 1 is the one that shows most pixels.
        confidences: of objects 1 … N, the model's estimate of the mask's IoU, 0 … 1.
    """

    labels: NDArray[np.uint8]
    confidences: tuple[float, ...]

    @property
    def confidence(self) -> float:
        """The mean of all, 0 where nothing is proposed."""
        return float(np.mean(self.confidences)) if self.confidences else 0.0


def propose(segmenter: Segmenter, embedding: Embedding, rgb: NDArray[np.uint8]) -> Proposals:
    """The objects of an image, at most `MOST`; smaller ones lie on larger ones.

    Args:
        segmenter: the model.
        embedding: of `rgb`, by the same model.
        rgb: [H, W, 3] uint8.
    """
    points = grid_points(rgb)
    logits, scores = segmenter.predict_points(embedding, points)
    chosen = surest(logits, scores, embedding.frame)
    masks = [to_image(logits[n : n + 1], embedding.frame)[0, 0].numpy() > 0 for n in chosen]
    return arrange(masks, [float(scores[n]) for n in chosen], rgb.shape[:2])


def grid_points(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[N, 2] float (x, y) in pixels, the middles of a grid's cells that are not all as dark as it gets."""
    grey = rgb.max(axis=2)
    (height, width), darkest = grey.shape, int(grey.min())
    points = []
    for row in range(_SIDE):
        for column in range(_SIDE):
            cell = grey[_part(row, height), _part(column, width)]
            if int(cell.max()) > darkest + _BACKGROUND:
                points.append(((column + 0.5) * width / _SIDE, (row + 0.5) * height / _SIDE))
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def surest(logits: Tensor, scores: Tensor, frame: Frame) -> list[int]:
    """Which masks to keep, the surest first, one of each object.

    A mask's quality is its predicted IoU times its stability, the IoU of the mask with a stricter and with a
    laxer threshold.

    Args:
        logits: [N, 1, M, M] float.
        scores: [N] float, predicted IoU.
        frame: where the image lies in the model's input; what is beyond does not count.
    """
    rows, columns = (-(-side // frame.mask_cell) for side in (frame.resized_height, frame.resized_width))
    flat = logits[:, 0, :rows, :columns].flatten(1)
    if flat.numel() == 0:
        return []
    strict, lax = (flat > _STABILITY_STEP).sum(1), (flat > -_STABILITY_STEP).sum(1)
    masks = (flat > 0).float()
    areas = masks.sum(1)
    quality = scores.clamp(0, 1) * strict / lax.clamp_min(1)
    low, high = (share * flat.shape[1] for share in _SHARES)
    quality = quality.masked_fill((areas < low) | (areas > high), 0.0)
    common = masks @ masks.T
    overlap = common / (areas[:, None] + areas - common).clamp_min(1)
    kept: list[int] = []
    for n in quality.argsort(descending=True, stable=True).tolist():
        if len(kept) == MOST or quality[n] <= 0 or quality[n] < _LEAST_OF_BEST * quality.max():
            break
        if not kept or float(overlap[n, kept].max()) <= _SAME_OBJECT:
            kept.append(n)
    return kept


def arrange(masks: list[NDArray[np.bool_]], confidences: list[float], shape: tuple[int, ...]) -> Proposals:
    """Masks as one label map: smaller ones on larger ones, numbered by the pixels they show.

    Args:
        masks: [H, W] bool each, at most 255.
        confidences: of each.
        shape: (H, W).
    """
    # Of a slice of 12000×9000 every map takes 100 MB, with a byte a pixel.
    shown = np.zeros(shape, dtype=np.uint8)
    for n in sorted(range(len(masks)), key=lambda n: -int(masks[n].sum())):
        shown[masks[n]] = n + 1
    pixels = np.array([np.count_nonzero(shown == n + 1) for n in range(len(masks))])
    order = [n for n in np.argsort(-pixels, kind="stable").tolist() if pixels[n]]
    values = np.zeros(256, dtype=np.uint8)
    values[[n + 1 for n in order]] = np.arange(1, len(order) + 1)
    return Proposals(values[shown], tuple(min(max(confidences[n], 0.0), 1.0) for n in order))


def _part(n: int, length: int) -> slice:
    """The n-th of `_SIDE` parts of an axis, of at least one pixel."""
    return slice(n * length // _SIDE, -(-(n + 1) * length // _SIDE))
