"""What a tight box says by itself: answers that need no model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from monailabel_dfqsam.evaluation.items import Item
from monailabel_dfqsam.masks import Mask, tight_box


def box_baseline(item: Item) -> Mask:
    """The tight box, filled."""
    x0, y0, x1, y1 = tight_box(item.mask).astype(int)
    filled = np.zeros_like(item.mask)
    filled[y0:y1, x0:x1] = True
    return filled


def ellipse_baseline(item: Item) -> Mask:
    """The ellipse inscribed in the tight box."""
    x0, y0, x1, y1 = tight_box(item.mask)
    y, x = (np.indices(item.mask.shape) + 0.5)[:]
    inside: Mask = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
    return inside


def otsu_baseline(item: Item) -> Mask:
    """Otsu's threshold on the grey values in the tight box; of both sides the one that fills its middle."""
    from skimage.filters import threshold_otsu

    x0, y0, x1, y1 = tight_box(item.mask).astype(int)
    crop = _grey(item.rgb[y0:y1, x0:x1])
    bright = crop > (threshold_otsu(crop) if crop.min() < crop.max() else crop.min() - 1)
    height, width = crop.shape
    middle = bright[height // 4 : height - height // 4, width // 4 : width - width // 4]
    result = np.zeros_like(item.mask)
    result[y0:y1, x0:x1] = bright if 2 * middle.sum() >= middle.size else ~bright
    return result


BASELINES: dict[str, Callable[[Item], Mask]] = {
    "baseline_box": box_baseline,
    "baseline_ellipse": ellipse_baseline,
    "baseline_otsu": otsu_baseline,
}


def _grey(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[H, W, 3] to [H, W], luma of ITU-R BT.601 in whole numbers, 0 … 255."""
    grey: NDArray[np.float64] = np.rint(rgb @ np.array([0.299, 0.587, 0.114]))
    return grey
