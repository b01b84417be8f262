"""Follows an object from its mask on one slice to its mask on the next, or says why it ends there.

move     the last mask is shifted to where the next slice looks most like the object
prompt   the model answers the shifted mask's box, a larger box and a smaller one
choose   the answer wins that scores best by the model's own estimate and by how the object looks
object   the winner is refused if it changed too much from the last mask
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from monailabel_dfqsam.segmentation.appearance import Appearance, near, shift
from monailabel_dfqsam.segmentation.segmenter import Embedding, Prediction, Prompts

Mask = NDArray[np.bool_]
Predict = Callable[[Embedding, Prompts], Prediction]
"""`Segmenter.predict` of the model that made the embedding."""

# These numbers were chosen on the phantoms of docs/accuracy/volumes_phantoms.py.
# How much wider or narrower the other boxes are on each side, of the box's own side; at least one pixel.
_LARGER = 0.05
# The weight of the model's own IoU estimate; the weight of the mean log ratio of the looks is 1.
_SCORE_COUNTS = 3.0
# The largest and smallest factor between areas of neighbouring slices, and the pixels allowed beyond them.
_GROWS, _SHRINKS, _SLACK = 2.0, 0.35, 12
# The least score and likeness on a slice, as fractions of the source slice's.
_LEAST_SCORE, _LEAST_LIKENESS = 0.6, 0.4


class Stop(str, Enum):
    """Why propagation went no farther in a direction."""

    END = "end of the image"
    ROI = "end of the ROI"
    MET = "met what comes from another prompted slice"
    EMPTY = "no mask"
    AREA = "the area changed too fast"
    SCORE = "the model is unsure"
    APPEARANCE = "it looks different"
    BACKGROUND = "a background point stayed inside"


@dataclass(frozen=True, eq=False)
class Source:
    """How the object is on its prompted slice; the slices that follow are compared with it.

    Attributes:
        looks: the object's appearance.
        likeness: the mean log ratio of `looks` within the mask.
        score: the model's estimate of the mask's IoU.
    """

    looks: Appearance
    likeness: float
    score: float

    @classmethod
    def of(cls, rgb: NDArray[np.uint8], mask: Mask, score: float) -> Source:
        """From the slice [H, W, 3] and the object's mask [H, W] on it, which is not empty."""
        looks = Appearance.of(rgb, mask)
        rgb, mask = near(rgb, mask)
        return cls(looks, float(looks.of_slice(rgb)[mask].mean()), score)


def follow(
    predict: Predict,
    embedding: Embedding,
    rgb: NDArray[np.uint8],
    last: Mask,
    source: Source,
    background: NDArray[np.float64],
) -> tuple[Mask, float] | Stop:
    """The object on the next slice.

    Args:
        embedding, rgb: of the next slice; rgb is [H, W, 3] uint8.
        last: [H, W] bool, the object on this slice, not empty.
        background: [N, 2] float (x, y), points on the next slice that the object does not hold.

    Returns:
        The mask [H, W] bool with the model's estimate of its IoU, or why there is none.
    """
    likeness = source.looks.of_slice(rgb)
    expected = _moved(last, *shift(likeness, last))
    if not expected.any():
        return Stop.EMPTY
    best, worth = None, -np.inf
    for box in _boxes(expected):
        found = predict(embedding, Prompts(background, np.zeros(len(background), dtype=np.int64), box))
        mask = _parts_touching(found.mask, expected)
        value = float(likeness[mask].sum()) / int(last.sum()) + _SCORE_COUNTS * found.score
        if mask.any() and value > worth:
            best, worth = (mask, found.score), value
    if best is None:
        return Stop.EMPTY
    mask, score = best
    return _objection(mask, score, float(likeness[mask].mean()), last, source, background) or best


def _objection(
    mask: Mask, score: float, likeness: float, last: Mask, source: Source, background: NDArray[np.float64]
) -> Stop | None:
    """Why a mask is not the object that `last` shows on the slice before; None where it may be."""
    area, before = int(mask.sum()), int(last.sum())
    if not _SHRINKS * before - _SLACK <= area <= _GROWS * before + _SLACK:
        return Stop.AREA
    if score < _LEAST_SCORE * source.score:
        return Stop.SCORE
    if likeness < _LEAST_LIKENESS * source.likeness:
        return Stop.APPEARANCE
    columns, rows = np.floor(background).astype(np.intp).T
    if mask[rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)].any():
        return Stop.BACKGROUND
    return None


def _moved(mask: Mask, rows: int, columns: int) -> Mask:
    moved: Mask = ndimage.shift(mask.astype(np.uint8), (rows, columns), order=0) > 0
    return moved


def _boxes(mask: Mask) -> Iterator[NDArray[np.float64]]:
    """The mask's box, a larger one and, where there is room, a smaller one: [4] float (x0, y0, x1, y1)."""
    ((rows, columns),) = ndimage.find_objects(mask.astype(np.uint8))
    tight = np.array([columns.start, rows.start, columns.stop, rows.stop], dtype=np.float64)
    width, height = tight[2:] - tight[:2]
    margin = np.maximum(1.0, _LARGER * np.array([width, height]))
    size = np.array([mask.shape[1], mask.shape[0]], dtype=np.float64)
    yield tight
    yield np.concatenate([(tight[:2] - margin).clip(0, None), np.minimum(tight[2:] + margin, size)])
    if (2 * margin < (width, height)).all():
        yield np.concatenate([tight[:2] + margin, tight[2:] - margin])


def _parts_touching(mask: Mask, expected: Mask) -> Mask:
    """The connected parts of a mask that overlap the expected mask; other parts are other objects."""
    parts, _ = ndimage.label(mask)
    kept = np.unique(parts[mask & expected])
    touching: Mask = np.isin(parts, kept) & mask
    return touching
