"""A viewer's request, apart from its prompts: options, the window shown, and the kind of file asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from pydantic import ConfigDict

from monailabel_dfqsam.segmentation.volume import Volume, Window, load_volume
from monailabel_dfqsam.server.gate.options import Number, OptionError, Options

MASK = "mask"
"""Entry by which the server passes on where it put an uploaded mask; a client cannot set it."""

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

_PIXEL_TYPES = {
    "uint8": sitk.sitkUInt8, "int8": sitk.sitkInt8, "uint16": sitk.sitkUInt16, "int16": sitk.sitkInt16,
    "uint32": sitk.sitkUInt32, "int32": sitk.sitkInt32, "float32": sitk.sitkFloat32,
}  # fmt: skip


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
    result_dtype: Literal[tuple(_PIXEL_TYPES)] = "uint8"  # type: ignore[valid-type]
    result_compress: bool = True

    @property
    def pixel_type(self) -> int:
        """ITK's number of `result_dtype`."""
        return int(_PIXEL_TYPES[self.result_dtype])


def read_window(view: View, volume: Volume) -> Window | None:
    """The values to show: a viewer's own, or those of a name.

    Returns:
        None for the image's own window.

    Raises:
        ValueError: for a centre and a width that are no window.
    """
    if view.window_center is not None or view.window_width is not None:
        if view.window_center is None or view.window_width is None:
            raise OptionError("window_center and window_width go together: give both or neither")
        return Window.of_level(view.window_center, view.window_width)
    if view.window == FULL_RANGE and volume.array.ndim == 3:
        low, high = float(volume.array.min()), float(volume.array.max())
        return Window(low, high if high > low else low + 1)
    return WINDOWS[view.window]


def read_mask(request: Mapping[str, Any], volume: Volume) -> NDArray[np.bool_] | None:
    """An existing mask that came with the request, [I, J, K] bool: what is not 0 in its file.

    Raises:
        ValueError: when it is no image on the volume's grid.
    """
    path = request.get(MASK)
    if path is None:
        return None
    mask = load_volume(path).array
    if mask.shape != volume.array.shape[:3]:
        raise ValueError(
            f"the mask must have the image's {list(volume.shape)} voxels (i, j, k), not {list(mask.shape)}"
        )
    found: NDArray[np.bool_] = mask != 0
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
