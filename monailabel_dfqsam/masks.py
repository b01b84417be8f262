"""Where a mask lies, and where a person would click it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


def tight_box(mask: Mask) -> NDArray[np.float64]:
    """[4] float (x0, y0, x1, y1), the outer edges of a mask [H, W] bool that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def depth(mask: Mask) -> NDArray[np.float64]:
    """[H, W] float, how far each pixel of a mask [H, W] bool is from what is outside; 0 outside.

    The image's edge is a border too.
    """
    inner: NDArray[np.float64] = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return inner


def interior_pixel(*masks: Mask) -> tuple[int, int]:
    """(row, column) of the pixel that is deepest in any of the masks [H, W] bool, where a person would click.

    Of equally deep ones it is the first in row-major order.
    """
    deepest = int(np.maximum.reduce([depth(mask) for mask in masks]).argmax())
    row, column = np.unravel_index(deepest, masks[0].shape)
    return int(row), int(column)
