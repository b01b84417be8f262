"""A viewer's request to prompts on one slice.

Two frames occur. The viewer's: voxel indices (i, j, k) in the order of MONAI's LoadImaged, a voxel's centre
at a whole number. The slice's: (x, y) in pixels of the array [I, J] at k, with x along j and y along i, a
pixel's centre at +0.5; so x = j + 0.5 and y = i + 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monailabel_dfqsam.masks import tight_box
from monailabel_dfqsam.segmentation.segmenter import Prompts

_CENTRE = 0.5


class PromptError(ValueError):
    """A request that cannot be answered; the message is for the person who clicked."""


def read_prompts(request: Mapping[str, Any], shape: tuple[int, int, int]) -> tuple[int, Prompts]:
    """The slice that a request is about, and its prompts there.

    Args:
        request: as Slicer and OHIF send it, each entry may be absent, None or empty:
            foreground, background: [[i, j, k], …] voxel indices; [i, j] will do for a 2-D image.
            roi: [i0, i1, j0, j1, k0, k1] voxel indices, the voxels at both ends included, each pair in
                either order; the first four will do for a 2-D image.
            slice: k. Without it, that of the last foreground point counts, else of the last background
                point, else the ROI's middle. With a ROI, a slice that is none of the ROI's and has no point
                means the ROI's middle: Slicer then sends millimetres.
        shape: (I, J, K) of the image; K is 1 for a 2-D one.

    Returns:
        k, and the points on that slice with the ROI's rectangle, cut to the image, as the box.

    Raises:
        PromptError: when there is no prompt on the slice, one lies outside the image, or a type is wrong.
    """
    foreground = _points(request.get("foreground"), "foreground", shape)
    background = _points(request.get("background"), "background", shape)
    roi = _roi(request.get("roi"), shape)
    points = np.concatenate([foreground, background])
    if len(points) == 0 and roi is None:
        raise PromptError("there is nothing to segment: give at least one foreground point or a ROI")
    k = _slice(request.get("slice"), foreground if len(foreground) else background, roi, shape)
    here = np.rint(points[:, 2]) == k
    if roi is None and not here.any():
        raise PromptError(f"none of the {len(points)} points lies on slice {k}, which was asked for")
    labels = np.repeat([1, 0], [len(foreground), len(background)])
    xy = points[here][:, [1, 0]] + _CENTRE
    return k, Prompts(xy, labels[here], None if roi is None else _box(roi, shape))


@dataclass(frozen=True)
class VolumePrompts:
    """What a person pointed at in a volume.

    Attributes:
        by_slice: k -> the prompts on that slice; at least one has a foreground point or a box. The others
            hold background points alone: they say on their slice what the object is not.
        bounds: (k0, k1), the slices that a ROI allows, both included; None for all.
    """

    by_slice: dict[int, Prompts]
    bounds: tuple[int, int] | None


def read_volume_prompts(request: Mapping[str, Any], shape: tuple[int, int, int]) -> VolumePrompts:
    """The prompts of a request about an object on several slices.

    Args:
        request: `foreground`, `background` and `roi` as for `read_prompts`. The ROI's rectangle is the box
            of its middle slice; its first and last slice bound the object.
        shape: (I, J, K) of the image.

    Raises:
        PromptError: as `read_prompts`; and for a foreground point outside the ROI's slices.
    """
    foreground = _points(request.get("foreground"), "foreground", shape)
    background = _points(request.get("background"), "background", shape)
    roi = _roi(request.get("roi"), shape)
    if len(foreground) == 0 and roi is None:
        raise PromptError("there is nothing to segment: give at least one foreground point or a ROI")
    points = np.concatenate([foreground, background])
    labels = np.repeat([1, 0], [len(foreground), len(background)])
    slices = points[:, 2].astype(int)
    bounds = None if roi is None else _bounds(roi, shape[2])
    low, high = bounds or (0, shape[2] - 1)
    allowed = (low <= slices) & (slices <= high)
    if not allowed[labels == 1].all():
        raise PromptError(f"a foreground point lies outside the ROI, whose slices are {low} to {high}")
    boxes = {} if roi is None else {(low + high) // 2: _box(roi, shape)}
    by_slice = {}
    for k in sorted({int(k) for k in slices[allowed]} | set(boxes)):
        here = slices == k
        by_slice[k] = Prompts(points[here][:, [1, 0]] + _CENTRE, labels[here], boxes.get(k))
    return VolumePrompts(by_slice, bounds)


def points_at_nothing(request: Mapping[str, Any]) -> bool:
    """Whether a request holds neither a point nor a ROI."""
    return not any(request.get(key) for key in ("foreground", "background", "roi"))


def of_mask(mask: NDArray[np.bool_], slice_index: Any = None) -> tuple[int, Prompts]:
    """The slice and the box that an existing mask stands for when a person points at nothing.

    Args:
        mask: [I, J, K] bool.
        slice_index: k; None takes the slice where the mask is largest.

    Raises:
        PromptError: when the mask is empty there, or there is no such slice.
    """
    areas = mask.sum(axis=(0, 1))
    i, j, depth = mask.shape
    nowhere = np.zeros((0, 3))
    k = int(areas.argmax()) if slice_index is None else _slice(slice_index, nowhere, None, (i, j, depth))
    if not areas[k]:
        raise PromptError("there is nothing to segment: the mask is empty, and there is no point and no ROI")
    return k, Prompts(box=tight_box(mask[:, :, k]))


def _numbers(value: Any, what: str) -> list[float]:
    """A JSON array of finite numbers."""
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
        raise PromptError(f"{what} must be a list of numbers, not {value!r}")
    for item in value:
        if isinstance(item, (bool, np.bool_)) or not isinstance(item, Real) or not math.isfinite(item):
            raise PromptError(f"{what} must hold finite numbers, not {item!r}")
    return [float(item) for item in value]


def _points(value: Any, name: str, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """[N, 3] float (i, j, k), each inside the image."""
    if value is None:
        return np.zeros((0, 3))
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
        raise PromptError(f"'{name}' must be a list of points [i, j, k], not {value!r}")
    points = []
    for item in value:
        point = _numbers(item, f"a point of '{name}'")
        if len(point) == 2 and shape[2] == 1:
            point.append(0.0)
        if len(point) != 3:
            raise PromptError(f"a point of '{name}' must be [i, j, k], not {point}")
        if any(not -_CENTRE <= x <= size - _CENTRE for x, size in zip(point, shape, strict=True)):
            raise PromptError(f"the point {_plain(point)} of '{name}' is outside the image, {_size(shape)}")
        # The image's far edge rounds to one voxel too many, its near edge is voxel 0.
        point[2] = min(max(round(point[2]), 0), shape[2] - 1)
        points.append(point)
    return np.array(points).reshape(-1, 3)


def _roi(value: Any, shape: tuple[int, int, int]) -> NDArray[np.float64] | None:
    """[3, 2] float, (lowest, highest) index along each axis."""
    if value is None or len(numbers := _numbers(value, "'roi'")) == 0:
        return None
    if len(numbers) == 4 and shape[2] == 1:
        numbers += [0.0, 0.0]
    if len(numbers) != 6:
        raise PromptError(f"'roi' must be [i0, i1, j0, j1, k0, k1], not {_plain(numbers)}")
    roi: NDArray[np.float64] = np.sort(np.array(numbers).reshape(3, 2), axis=1)
    if any(high < 0 or low > size - 1 for (low, high), size in zip(roi, shape, strict=True)):
        raise PromptError(f"the ROI {_plain(numbers)} lies outside the image, {_size(shape)}")
    return roi


def _slice(
    value: Any, points: NDArray[np.float64], roi: NDArray[np.float64] | None, shape: tuple[int, int, int]
) -> int:
    """k, by the rules of `read_prompts`."""
    depth = shape[2]
    if value is not None:
        (number,) = _numbers([value], "'slice'")
        if number != round(number):
            raise PromptError(f"'slice' must be a whole number, not {value!r}")
        if 0 <= number < depth and (
            roi is None or roi[2, 0] <= number <= roi[2, 1] or (points[:, 2] == number).any()
        ):
            return int(number)
        if roi is None:
            raise PromptError(f"slice {value} is outside the image, {_size(shape)}")
    elif len(points):
        return int(points[-1, 2])
    assert roi is not None
    low, high = _bounds(roi, depth)
    return (low + high) // 2


def _bounds(roi: NDArray[np.float64], depth: int) -> tuple[int, int]:
    """First and last slice of a ROI, both inside the image."""
    low, high = np.clip(roi[2], 0, depth - 1)
    return math.floor(low), math.floor(high)


def _box(roi: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """[4] float (x0, y0, x1, y1), the outer edges of a ROI's voxels inside the image."""
    (i0, i1), (j0, j1) = roi[0], roi[1]
    edges = np.array([j0, i0, j1 + 1, i1 + 1])
    limit = np.array([shape[1], shape[0], shape[1], shape[0]], dtype=np.float64)
    return np.clip(edges, 0, limit)


def _plain(numbers: list[float]) -> str:
    return "[" + ", ".join(f"{x:g}" for x in numbers) + "]"


def _size(shape: tuple[int, int, int]) -> str:
    return f"which has {shape[0]}×{shape[1]}×{shape[2]} voxels (i, j, k)"
