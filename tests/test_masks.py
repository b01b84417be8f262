"""A mask's box and its deepest pixel, against all distances written out."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis.extra import numpy as hnp

from monailabel_dfqsam.masks import depth, interior_pixel, tight_box


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(hnp.arrays(bool, (7, 9)).filter(np.any))
def test_the_interior_pixel_is_farthest_from_all_that_is_outside(mask: np.ndarray) -> None:
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    depths = {(r, c): ((outside - (r, c)) ** 2).sum(1).min() for r, c in np.argwhere(mask).tolist()}
    # Dictionaries keep row-major order, max takes the first.
    assert interior_pixel(mask) == max(depths, key=lambda pixel: depths[pixel])
    x0, y0, x1, y1 = tight_box(mask).astype(int)
    assert mask[y0:y1, x0:x1].sum() == mask.sum()
    assert all(edge.any() for edge in (mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1]))


def test_the_deepest_pixel_of_several_masks_is_the_deepest_of_any() -> None:
    wide, narrow = np.zeros((2, 20, 20), dtype=bool)
    wide[10:17, 10:17] = True
    narrow[0:3, 0:20] = True
    assert interior_pixel(narrow, wide) == (13, 13)
    # Together they would be deepest elsewhere, had they touched: each is measured alone.
    assert depth(narrow).max() == 2
