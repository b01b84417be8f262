"""What an object looks like against its surroundings: two histograms of grey values, in and around a mask.

It knows no anatomy. It only tells where on the next slice the object's outline has gone, which of a few masks
holds more of the object, and when a mask no longer shows what was pointed at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

_BINS = 24
# Percentiles of the grey values in and around the object: between them the ranges tell these two apart.
_COVERED = (1, 99)
# Of the width between them: farther out lies what was seen neither in the object nor around it.
_UNSEEN = 0.1
# Pixels: noise of single pixels would fill the histograms' gap.
_SMOOTHING = 1.0
_SMOOTHED = 5  # pixels, farther than which smoothing reaches nothing
# How far around it the surroundings reach, of the root of the object's area; and at least, in pixels.
_SURROUNDINGS, _MIN_SURROUNDINGS = 0.5, 3
# No single pixel decides: a grey value that was never seen inside is no proof.
_MOST = 2.0
# Of the root of the box's area: farther than this an object does not move between slices.
_REACH = 0.25
# Mean log ratio that moving by the whole reach has to win.
_MOVING_COSTS = 0.15


@dataclass(frozen=True, eq=False)
class Appearance:
    """How much likelier a grey value is in the object than around it.

    Attributes:
        ratios: [24] float, log p(grey | object) − log p(grey | surroundings), −2 … 2.
        low, high: the grey values that the ratios' 24 equal ranges cover. A little beyond, the outermost
            ratio holds; farther out, where neither was seen, the least there can be.
    """

    ratios: NDArray[np.float64]
    low: float
    high: float

    @classmethod
    def of(cls, rgb: NDArray[np.uint8], mask: Mask) -> Appearance:
        """From a slice [H, W, 3] and the mask [H, W] of the object on it, which is not empty.

        Where the mask has no surroundings, all ratios are 0.
        """
        reach = max(_MIN_SURROUNDINGS, int(_SURROUNDINGS * np.sqrt(mask.sum())))
        rgb, mask = near(rgb, mask, reach)
        around = (ndimage.distance_transform_edt(~mask) <= reach) & ~mask
        if not around.any():
            return cls(np.zeros(_BINS), 0.0, 255.0)
        grey = _grey(rgb)
        low, high = (float(x) for x in np.percentile(grey[mask | around], _COVERED))
        high = max(high, low + 1)
        inside, outside = (_density(_bins(grey[part], low, high)) for part in (mask, around))
        return cls(np.log(inside / outside).clip(-_MOST, _MOST), low, high)

    def of_slice(self, rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
        """[H, W] float: how much more each pixel looks like the object than like its surroundings."""
        grey, beyond = _grey(rgb), _UNSEEN * (self.high - self.low)
        unseen = (grey < self.low - beyond) | (grey > self.high + beyond)
        return np.where(unseen, -_MOST, self.ratios[_bins(grey, self.low, self.high)])


def shift(likeness: NDArray[np.float64], mask: Mask) -> tuple[int, int]:
    """Where a mask fits best nearby.

    Args:
        likeness: [H, W] from `Appearance.of_slice`.
        mask: [H, W], not empty.

    Returns:
        (rows, columns) to move the mask by; (0, 0) where nothing is gained.
    """
    from scipy.signal import correlate  # slow to import, and a server starts without it

    ((rows, columns),) = ndimage.find_objects(mask.astype(np.uint8))
    cut = mask[rows, columns].astype(np.float64)
    reach = max(1, round(_REACH * float(np.sqrt(cut.size))))
    # Beyond the image's edge nothing speaks for the object or against it.
    wide = np.pad(likeness, reach)[
        rows.start : rows.stop + 2 * reach, columns.start : columns.stop + 2 * reach
    ]
    gain = correlate(wide, cut, mode="valid") / cut.sum()
    dy, dx = np.indices(gain.shape) - reach
    gain = gain - _MOVING_COSTS * (dx**2 + dy**2) / reach**2
    best = np.unravel_index(int(gain.argmax()), gain.shape)
    return int(dy[best]), int(dx[best])


def near(rgb: NDArray[np.uint8], mask: Mask, reach: int = 0) -> tuple[NDArray[np.uint8], Mask]:
    """A slice and a mask, cut so that looks within `reach` pixels of the mask's box are the whole slice's."""
    ((rows, columns),) = ndimage.find_objects(mask.astype(np.uint8))
    margin = reach + _SMOOTHED
    cut = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in (rows, columns))
    return rgb[cut], mask[cut]


def _grey(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    smooth: NDArray[np.float64] = ndimage.gaussian_filter(rgb.mean(axis=2, dtype=np.float64), _SMOOTHING)
    return smooth


def _bins(grey: NDArray[np.float64], low: float, high: float) -> NDArray[np.intp]:
    bins: NDArray[np.intp] = ((grey - low) * (_BINS / (high - low))).clip(0, _BINS - 1).astype(np.intp)
    return bins


def _density(bins: NDArray[np.intp]) -> NDArray[np.float64]:
    """[24] float, adds up to 1, nowhere 0."""
    counts = np.bincount(bins, minlength=_BINS).astype(np.float64)
    smooth = ndimage.gaussian_filter1d(counts, 1.0) + 0.5
    return np.asarray(smooth / smooth.sum())
