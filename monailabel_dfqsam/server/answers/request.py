"""A viewer's request, apart from its prompts: options, the window shown, and the kind of file asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from monailabel_dfqsam.segmentation.grids import covers, on_grid
from monailabel_dfqsam.segmentation.volume import Volume, Window, load_labels
from monailabel_dfqsam.server.gate.options import Number, OptionError, Options

MASK = "mask"
"""Entry by which the server passes on where it put an uploaded mask; a client cannot set it."""

MASK_PART = "label"
"""The part of the form that holds it, by which messages call it."""

FILE_NAME = "file_name"
"""Entry by which the server tells what a client calls an image it sent along; a client cannot set it."""

STORED = "stored"
"""Entry by which the server tells that the image is one of its datastore; a client cannot set it."""

SLICER_ORDER, FILE_ORDER = "as 3D Slicer shows them", "as in the file"

FULL_RANGE = "full range"
WINDOWS: dict[str, Window | None] = {
    "auto": None,
    "ct soft tissue": Window(-160, 240),
    "ct lung": Window.of_level(-600, 1500),
    "ct bone": Window.of_level(400, 1800),
    "ct brain": Window.of_level(40, 80),
    FULL_RANGE: None,
}
"""Names that a viewer offers; 'auto' is the image's own window, 'full range' its least to greatest value."""

_PIXEL_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32")


class View(Options):
    """What a viewer wants beside its prompts; anything else in its request is not looked at.

    Attributes:
        multimask: as `Segmenter.predict` says.
        largest_cc, fill_holes: what is left of the mask, and added to it.
        slices: how the request counts slices, see `in_file_order`.
        window: a name out of `WINDOWS`.
        window_center, window_width: the values to show, instead of `window`; of several, the first.
        label: the object's name; None for the server's first.
        result_extension, result_dtype: the mask file's kind and the type of its voxels.
        result_compress: whether an .nrrd is compressed; a NIfTI's name says it.
    """

    model_config = ConfigDict(extra="ignore")

    multimask: bool = True
    largest_cc: bool = False
    fill_holes: bool = False
    slices: Literal[SLICER_ORDER, FILE_ORDER] = FILE_ORDER  # type: ignore[valid-type]
    window: Literal[tuple(WINDOWS)] = "auto"  # type: ignore[valid-type]
    window_center: Number | None = None
    window_width: Number | None = None
    label: str | None = None
    result_extension: Literal[".nrrd", ".nii.gz", ".nii"] = ".nii.gz"
    result_dtype: Literal[_PIXEL_TYPES] = "uint8"  # type: ignore[valid-type]
    result_compress: bool = True

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's of `result_dtype`."""
        return np.dtype(self.result_dtype)


def read_window(view: View, volume: Volume) -> Window | None:
    """The values to show: a viewer's own, or those of a name.

    A preset is made for Hounsfield units: one that leaves a single colour of the image gives way to the
    image's own window. A viewer's own is what the person sees, and stays.

    Returns:
        None for the image's own window.

    Raises:
        ValueError: for a centre and a width that are no window.
    """
    if view.window_center is not None or view.window_width is not None:
        if view.window_center is None or view.window_width is None:
            raise OptionError("window_center and window_width go together: give both or neither")
        return Window.of_level(view.window_center, view.window_width)
    if volume.array.ndim != 3:
        return None
    if view.window == FULL_RANGE:
        low, high = volume.extent
        return Window(low, high if high > low else low + 1)
    preset = WINDOWS[view.window]
    return preset if preset and volume.is_shown_by(preset) else None


def read_mask(request: Mapping[str, Any], volume: Volume) -> NDArray[np.bool_] | None:
    """An existing mask that came with the request, [I, J, K] bool: what is not 0 in its file.

    It may lie on another grid, as one with reversed axes does: the nearest voxel in space counts.

    Raises:
        ValueError: when it is no image, or does not cover the volume.
    """
    path = request.get(MASK)
    if path is None:
        return None
    mask = load_labels(path, MASK_PART)
    if not covers(mask, volume):
        raise ValueError(
            f"'{MASK_PART}' does not lie on the image: its {list(mask.shape)} voxels (i, j, k) leave part of "
            f"the image's {list(volume.shape)} uncovered in space"
        )
    found: NDArray[np.bool_] = on_grid(mask, volume) != 0
    return found


def in_file_order(
    request: Mapping[str, Any], slices: str, volume: Volume, labels: Sequence[str] = ()
) -> tuple[dict[str, Any], Callable[[int], int]]:
    """The request with slices counted as in the image's file, and the viewer's number of a slice there.

    From version 5.8 on 3D Slicer reverses the slices of a left-handed image that it loads from a file, and
    counts them in that order in what it sends. Its requests carry every entry of a model's config, `slices`
    among them, unlike a script's, which counts as in the file. An image that Slicer uploads is written as
    Slicer has it.

    Args:
        request: with its prompts.
        slices: how it counts them, as in `View`.
        labels: names under which points may stand, beside 'foreground' and 'background'.
    """
    axes = np.array(volume.direction).reshape(len(volume.spacing), -1)
    if slices == FILE_ORDER or not request.get(STORED) or len(axes) < 3 or np.linalg.det(axes) > 0:
        return dict(request), lambda k: k
    last = volume.shape[2] - 1

    def turned(k: Any) -> Any:
        return last - k if isinstance(k, int | float) and not isinstance(k, bool) else k

    found = dict(request)
    for name in ("foreground", "background", *labels):
        if isinstance(points := found.get(name), list):
            found[name] = [
                [*p[:2], turned(p[2])] if isinstance(p, list) and len(p) == 3 else p for p in points
            ]
    if isinstance(roi := found.get("roi"), list) and len(roi) == 6:
        found["roi"] = [*roi[:4], turned(roi[4]), turned(roi[5])]
    k = found.get("slice")
    # Millimetres, which Slicer sends beside a ROI, stay what they are.
    if isinstance(k, int | float) and 0 <= k <= last:
        found["slice"] = turned(k)
    return found, lambda k: last - k
