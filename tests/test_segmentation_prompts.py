"""A viewer's request to a slice's prompts: MONAI Label's infer task, as Slicer and OHIF really send it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from monailabel_dfqsam.masks import tight_box
from monailabel_dfqsam.segmentation.prompts import (
    PromptError,
    of_mask,
    read_prompts,
    read_volume_prompts,
)
from monailabel_dfqsam.segmentation.volume import Volume, slice_rgb

SHAPE = (12, 20, 7)
EYE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

# A busy machine is no reason to fail.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))


@st.composite
def shape_and_voxel(draw: st.DrawFn) -> tuple[tuple[int, int, int], list[int]]:
    shape = draw(shapes)
    return shape, [draw(st.integers(0, n - 1)) for n in shape]


@st.composite
def shape_and_roi(draw: st.DrawFn) -> tuple[tuple[int, int, int], list[int]]:
    """ROIs that may reach beyond the image."""
    shape = draw(shapes)
    return shape, [draw(st.integers(-5, n + 4)) for n in shape for _ in range(2)]


@relaxed
@given(shape_and_voxel())
def test_a_clicked_voxel_is_where_the_point_lies_on_the_slice(
    case: tuple[tuple[int, int, int], list[int]],
) -> None:
    shape, (i, j, k) = case
    array = np.zeros(shape, dtype=np.uint8)
    array[i, j, k] = 255
    volume = Volume(array, (0.0,) * 3, (1.0,) * 3, EYE, None, None)
    found, prompts = read_prompts({"foreground": [[i, j, k]]}, shape)
    (x, y) = prompts.points[0]
    rgb = slice_rgb(volume, found)
    assert rgb.shape[:2] == shape[:2]
    assert rgb[int(y), int(x)].tolist() == [255, 255, 255]
    assert (x % 1, y % 1) == (0.5, 0.5)
    assert [int(y), int(x), found] == [i, j, k]


@relaxed
@given(shape_and_roi())
def test_a_roi_is_the_same_in_all_orders_and_its_box_holds_its_voxels(
    case: tuple[tuple[int, int, int], list[int]],
) -> None:
    shape, roi = case
    pairs = [sorted(roi[a : a + 2]) for a in (0, 2, 4)]
    voxels = [
        [v for v in range(low, high + 1) if 0 <= v < n] for (low, high), n in zip(pairs, shape, strict=True)
    ]
    assume(all(voxels))
    answers = []
    for order in itertools.product((False, True), repeat=3):
        given_roi = [v for pair, flip in zip(pairs, order, strict=True) for v in sorted(pair, reverse=flip)]
        k, prompts = read_prompts({"roi": given_roi}, shape)
        assert prompts.box is not None
        answers.append((k, *prompts.box))
    assert len(set(answers)) == 1
    k, x0, y0, x1, y1 = answers[0]
    assert list(range(int(x0), int(x1))) == voxels[1]
    assert list(range(int(y0), int(y1))) == voxels[0]
    assert k in voxels[2]
    assert abs(k - (voxels[2][0] + voxels[2][-1]) / 2) <= 0.5


scalars = st.none() | st.booleans() | st.integers(-3, 30) | st.floats() | st.sampled_from(["", "3", "[1]"])
coordinates = st.integers(-1, 20) | st.floats(-1, 20)
values = scalars | st.lists(scalars | st.lists(coordinates, min_size=2, max_size=4), max_size=6)
requests = st.fixed_dictionaries(
    {},
    optional={
        "foreground": values | st.lists(st.lists(coordinates, min_size=3, max_size=3), max_size=3),
        "background": values,
        "roi": values | st.lists(coordinates, min_size=6, max_size=6),
        "slice": scalars,
    },
)


@relaxed
@given(requests)
def test_any_request_gives_prompts_inside_the_image_or_a_prompt_error(request: dict[str, Any]) -> None:
    try:
        k, prompts = read_prompts(request, SHAPE)
    except PromptError:
        return
    assert 0 <= k < SHAPE[2]
    assert len(prompts.points) == len(prompts.labels)
    assert len(prompts.points) or prompts.box is not None
    limit = [SHAPE[1], SHAPE[0]]
    assert ((prompts.points >= 0) & (prompts.points <= limit)).all()
    if prompts.box is not None:
        assert (prompts.box[:2] < prompts.box[2:]).all()
        assert (prompts.box >= 0).all()
        assert (prompts.box <= [*limit, *limit]).all()


def test_slicer_sends_both_kinds_of_points_and_the_slice() -> None:
    request = {"foreground": [[1, 2, 3], [4, 5, 6]], "background": [[7, 8, 3]], "slice": 3, "roi": []}
    k, prompts = read_prompts(request, SHAPE)
    assert k == 3
    assert prompts.points.tolist() == [[2.5, 1.5], [8.5, 7.5]]
    assert prompts.labels.tolist() == [1, 0]
    assert prompts.box is None


@pytest.mark.parametrize(
    ("request_", "k"),
    [
        ({"foreground": [[1, 2, 3], [1, 2, 5]], "background": [[1, 2, 0]]}, 5),  # OHIF: no slice
        ({"background": [[1, 2, 0], [1, 2, 4]]}, 4),
        ({"foreground": [[1, 2, 3]], "slice": None}, 3),
        ({"roi": [2, 5, 3, 8, 2, 4]}, 3),
        ({"roi": [2, 5, 3, 8, 6, 2], "slice": 57}, 4),  # Slicer: millimetres
        ({"roi": [2, 5, 3, 8, 6, 2], "slice": -57}, 4),
        ({"roi": [2, 5, 3, 8, 6, 2], "slice": 5}, 5),
        ({"roi": [2, 5, 3, 8, 6, 4], "slice": 1}, 5),  # millimetres that could be an index
        ({"foreground": [[1, 2, 3]], "roi": [2, 5, 3, 8, 6, 4], "slice": 1}, 5),
        ({"foreground": [[1, 2, 1]], "roi": [2, 5, 3, 8, 6, 4], "slice": 1}, 1),
        ({"roi": [2, 5, 3, 8, -40, 2], "slice": 99}, 1),  # its middle within the image
        ({"foreground": [[1, 2, 6]], "roi": [2, 5, 3, 8, 2, 4]}, 6),
    ],
)
def test_which_slice_is_meant(request_: dict[str, Any], k: int) -> None:
    assert read_prompts(request_, SHAPE)[0] == k


def test_points_of_other_slices_are_left_out_beside_a_roi() -> None:
    k, prompts = read_prompts({"foreground": [[1, 2, 0]], "roi": [2, 5, 3, 8, 2, 4], "slice": 3}, SHAPE)
    assert k == 3
    assert len(prompts.points) == 0
    assert prompts.box is not None
    assert prompts.box.tolist() == [3, 2, 9, 6]


@pytest.mark.parametrize("point", [[4, 9], [4, 9, 0]])
def test_a_picture_takes_points_of_two_or_three_coordinates(point: list[int]) -> None:
    k, prompts = read_prompts({"foreground": [point]}, (12, 20, 1))
    assert k == 0
    assert prompts.points.tolist() == [[9.5, 4.5]]
    assert read_prompts({"roi": [2, 3, 5, 4]}, (12, 20, 1))[1].box.tolist() == [4, 2, 6, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({}, "nothing to segment"),
        ({"foreground": [], "background": None, "roi": []}, "nothing to segment"),
        ({"foreground": [[12, 2, 3]]}, r"outside the image, which has 12×20×7 voxels"),
        ({"foreground": [[1, -1, 3]]}, "outside the image"),
        ({"foreground": [[1, 1, 7]]}, "outside the image"),
        ({"background": [[1, 1, 1e300]]}, "outside the image"),
        ({"foreground": [[1, 1, 3]], "slice": 7}, "slice 7 is outside the image"),
        ({"foreground": [[1, 1, 3]], "slice": 2}, "none of the 1 points lies on slice 2"),
        ({"foreground": [[1, 1, 3]], "slice": "3"}, "finite numbers, not '3'"),
        ({"foreground": [[1, 1, 3]], "slice": 2.5}, "whole number"),
        ({"foreground": [[1, 1]]}, r"must be \[i, j, k\]"),
        ({"foreground": [1, 1, 3]}, "list of numbers"),
        ({"foreground": "1,1,3"}, "list of points"),
        ({"foreground": {"i": 1}}, "list of points"),
        ({"foreground": [["1", 1, 3]]}, "finite numbers"),
        ({"foreground": [[True, 1, 3]]}, "finite numbers"),
        ({"foreground": [[float("nan"), 1, 3]]}, "finite numbers"),
        ({"roi": [1, 2, 3, 4, 5]}, "'roi' must be"),
        ({"roi": [1, 2, 3, 4, 5, float("inf")]}, "finite numbers"),
        ({"roi": [20, 30, 3, 4, 5, 6]}, "ROI .* lies outside the image"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_sentence(request_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PromptError, match=sentence):
        read_prompts(request_, SHAPE)


def test_a_volumes_points_belong_to_their_slices() -> None:
    request = {"foreground": [[1, 2, 3], [4, 5, 3], [1, 1, 5]], "background": [[6, 7, 3], [8, 9, 6]]}
    found = read_volume_prompts(request, SHAPE)
    assert found.bounds is None
    assert list(found.by_slice) == [3, 5, 6]
    assert found.by_slice[3].points.tolist() == [[2.5, 1.5], [5.5, 4.5], [7.5, 6.5]]
    assert found.by_slice[3].labels.tolist() == [1, 1, 0]
    assert found.by_slice[6].labels.tolist() == [0]
    assert all(prompts.box is None for prompts in found.by_slice.values())


@relaxed
@given(shape_and_roi())
def test_a_volumes_roi_is_the_tight_box_its_middle_slice_and_a_bound(
    case: tuple[tuple[int, int, int], list[int]],
) -> None:
    shape, roi = case
    try:
        k, one = read_prompts({"roi": roi}, shape)
    except PromptError:
        with pytest.raises(PromptError):
            read_volume_prompts({"roi": roi}, shape)
        return
    found = read_volume_prompts({"roi": roi}, shape)
    assert list(found.by_slice) == [k]
    assert found.by_slice[k].box is not None
    assert found.by_slice[k].box.tolist() == one.box.tolist()  # type: ignore[union-attr]
    inside = [n for n in range(shape[2]) if min(roi[4:]) <= n <= max(roi[4:])]
    assert found.bounds == (inside[0], inside[-1])


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ({}, "nothing"),
        ({"background": [[1, 1, 1]]}, "nothing"),
        ({"foreground": [[1, 1, 6]], "roi": [0, 5, 0, 5, 1, 3]}, "outside the ROI"),
    ],
)
def test_a_volumes_bad_prompts(request_: dict[str, Any], word: str) -> None:
    with pytest.raises(PromptError, match=word):
        read_volume_prompts(request_, SHAPE)


def test_a_mask_alone_means_its_box_where_it_is_largest() -> None:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[2:5, 7:9, 4] = True
    mask[3, 8, 2] = True
    k, prompts = of_mask(mask)
    assert (k, prompts.box.tolist()) == (4, [7, 2, 9, 5])  # type: ignore[union-attr]
    k, prompts = of_mask(mask, 2)
    assert (k, prompts.box.tolist()) == (2, [8, 3, 9, 4])  # type: ignore[union-attr]
    for other, word in ((0, "empty"), (99, "outside")):
        with pytest.raises(PromptError, match=word):
            of_mask(mask, other)
    assert tight_box(mask[:, :, 4]).tolist() == [7, 2, 9, 5]
