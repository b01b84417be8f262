"""Clean-up of a mask, for slices and volumes alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def largest_component(mask: NDArray[np.bool_], inside: Sequence[Sequence[int]] = ()) -> NDArray[np.bool_]:
    """One connected part of a mask; parts that touch only at an edge or a corner are apart.

    Args:
        mask: bool of 2 or 3 axes.
        inside: indices that a person pointed at as lying in the object, one number an axis.

    Returns:
        Of the parts that hold one of `inside` the largest, or of all parts where none does.
    """
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    pointed_at = {int(parts[tuple(index)]) for index in inside} - {0}
    candidates = pointed_at or set(range(1, count + 1))
    largest: NDArray[np.bool_] = parts == max(candidates, key=lambda part: (sizes[part], -part))
    return largest


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask with what its slices enclose: [H, W], or [I, J, K] slice by slice along k."""
    if mask.ndim == 2:
        filled: NDArray[np.bool_] = ndimage.binary_fill_holes(mask)
        return filled
    result = mask.copy()
    for k in np.flatnonzero(mask.any(axis=(0, 1))):
        result[:, :, k] = ndimage.binary_fill_holes(mask[:, :, k])
    return result
