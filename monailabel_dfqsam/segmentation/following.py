"""One step from slice to slice: from an object's mask on one to its mask on the next, or the reason to stop.

The last mask is moved to where the object looks to have gone, and its box, a smaller and a larger one prompt
the model; of the answers the one counts that the model's own estimate and the object's looks speak for.
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

# All of these were decided on the phantoms of docs/accuracy/volumes_phantoms.py.
# Of the box's sides, but at least a pixel: a model follows its box, so it has to be offered others.
_LARGER = 0.05
# What the model's own estimate of IoU counts beside the mean log ratio of the looks.
_SCORE_COUNTS = 3.0
# Factors between neighbouring slices; and pixels that a small mask may gain or lose beyond them.
_GROWS, _SHRINKS, _SLACK = 2.0, 0.35, 12
# Of the source's own figure.
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
    """What was found on a prompted slice, which the slices that follow are compared with.

    Attributes:
        looks: the object's appearance there.
        likeness: the mean of it within the mask.
        score: the model's estimate of the mask's IoU.
    """

    looks: Appearance
    likeness: float
    score: float

    @classmethod
    def of(cls, rgb: NDArray[np.uint8], mask: Mask, score: float) -> Source:
        """From the slice [H, W, 3] and its mask [H, W], which is not empty."""
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
    """[4] float (x0, y0, x1, y1) each, inside the image: the tight box, a smaller and a larger one."""
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
    """Those connected parts of a mask that overlap the expected one: others are other objects."""
    parts, _ = ndimage.label(mask)
    kept = np.unique(parts[mask & expected])
    touching: Mask = np.isin(parts, kept) & mask
    return touching
