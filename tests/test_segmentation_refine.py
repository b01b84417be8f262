"""The clean-up of masks, against drawings and a flood fill written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from monailabel_dfqsam.segmentation.refine import fill_holes, largest_component


def drawn(*rows: str) -> NDArray[np.bool_]:
    return np.array([[c == "#" for c in row] for row in rows])


TWO = drawn(
    "##...#",
    "##...#",
    "##....",
)


def test_the_largest_part_is_kept() -> None:
    assert np.array_equal(largest_component(TWO), drawn("##....", "##....", "##...."))


def test_the_part_that_was_pointed_at_is_kept_though_it_is_smaller() -> None:
    assert np.array_equal(largest_component(TWO, [(1, 5)]), drawn(".....#", ".....#", "......"))


def test_a_point_beside_every_part_decides_nothing() -> None:
    assert np.array_equal(largest_component(TWO, [(2, 3)]), largest_component(TWO))


def test_of_two_pointed_at_the_larger() -> None:
    assert np.array_equal(largest_component(TWO, [(1, 5), (0, 0)]), largest_component(TWO))


def flooded(mask: NDArray[np.bool_], start: tuple[int, ...]) -> set[tuple[int, ...]]:
    found, todo = set(), [start]
    while todo:
        place = todo.pop()
        if place in found or any(not 0 <= x < n for x, n in zip(place, mask.shape, strict=True)):
            continue
        if mask[place]:
            found.add(place)
            for axis in range(mask.ndim):
                before, after = place[:axis], place[axis + 1 :]
                todo += [(*before, place[axis] + step, *after) for step in (-1, 1)]
    return found


@given(arrays(bool, (4, 3, 3)))
def test_against_a_flood_fill(mask: NDArray[np.bool_]) -> None:
    kept = largest_component(mask)
    parts = [flooded(mask, tuple(int(x) for x in p)) for p in np.argwhere(mask)]
    largest = max((len(part) for part in parts), default=0)
    places = {tuple(int(x) for x in p) for p in np.argwhere(kept)}
    assert len(places) == largest
    assert not places or places in parts


RING = drawn(
    "#####.",
    "#...#.",
    "#.#.#.",
    "#####.",
)


def test_holes_are_filled() -> None:
    assert np.array_equal(fill_holes(RING), drawn("#####.", "#####.", "#####.", "#####."))


def test_a_volume_is_filled_slice_by_slice() -> None:
    """In space the ring is open at both ends."""
    volume = np.stack([np.zeros_like(RING), RING, RING], axis=2)
    filled = fill_holes(volume)
    assert not filled[:, :, 0].any()
    assert np.array_equal(filled[:, :, 1], fill_holes(RING))


@pytest.mark.parametrize("function", [largest_component, fill_holes])
def test_nothing_stays_nothing(function: object) -> None:
    assert not function(np.zeros((3, 4), dtype=bool)).any()  # type: ignore[operator]


@given(arrays(bool, (5, 6), elements=st.booleans()))
def test_filling_only_adds(mask: NDArray[np.bool_]) -> None:
    assert (fill_holes(mask) >= mask).all()
