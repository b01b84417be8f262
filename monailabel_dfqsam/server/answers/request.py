"""A viewer's request, apart from its prompts: options, the window shown, and the kind of file asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monailabel_dfqsam.segmentation.grids import covers, on_grid
from monailabel_dfqsam.segmentation.volume import Volume, Window, load_volume

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

EXTENSIONS = (".nrrd", ".nii.gz", ".nii")
_PIXEL_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32")


@dataclass(frozen=True)
class ResultFormat:
    """The mask file that a viewer wants.

    Attributes:
        extension: one of `EXTENSIONS`.
        dtype: of its voxels.
        compress: for .nrrd; a NIfTI's name says it.
    """

    extension: str
    dtype: np.dtype[Any]
    compress: bool


def with_defaults(config: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """The request with the config entries it lacks; Slicer sends a choice as a list, chosen first."""
    merged = {**config, **request}
    for key in config:
        value = merged[key]
        merged[key] = value[0] if isinstance(value, list) and value else value
    return merged


def read_flag(request: Mapping[str, Any], key: str) -> bool:
    """A truth value, which may be text.

    Raises:
        ValueError: for anything else.
    """
    value = request[key]
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {value!r}")
    return value


def read_label(request: Mapping[str, Any], default: str) -> str:
    """The name of the object; raises ValueError for what is no text."""
    label = request.get("label") or default
    if not isinstance(label, str):
        raise ValueError(f"label must be a name, not {label!r}")
    return label


def read_window(request: Mapping[str, Any], volume: Volume) -> Window | None:
    """The values to show: a viewer's own, sent as `window_center` and `window_width`, or those of a name.

    A preset is made for Hounsfield units: one that leaves a single colour of the image gives way to the image's
    own window. A viewer's own is what the person sees, and stays.

    Returns:
        None for the image's own window.

    Raises:
        ValueError: for an unknown name, and for a centre and a width that are no window.
    """
    center, width = request.get("window_center"), request.get("window_width")
    if center is not None or width is not None:
        return Window.of_level(_number(center, "window_center"), _number(width, "window_width"))
    name = request["window"]
    if not isinstance(name, str) or name not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}, not {name!r}")
    if volume.array.ndim != 3:
        return None
    if name == FULL_RANGE:
        low, high = volume.extent
        return Window(low, high if high > low else low + 1)
    preset = WINDOWS[name]
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
    mask = load_volume(path, MASK_PART)
    if mask.array.ndim != 3:
        raise ValueError(f"'{MASK_PART}' must hold one number a voxel, not colour")
    if not covers(mask, volume):
        raise ValueError(
            f"'{MASK_PART}' does not lie on the image: its {list(mask.shape)} voxels (i, j, k) leave part of "
            f"the image's {list(volume.shape)} uncovered in space"
        )
    found: NDArray[np.bool_] = on_grid(mask, volume) != 0
    return found


def in_file_order(
    request: Mapping[str, Any], volume: Volume, labels: Sequence[str] = ()
) -> tuple[dict[str, Any], Callable[[int], int]]:
    """The request with slices counted as in the image's file, and the viewer's number of a slice there.

    From version 5.8 on 3D Slicer reverses the slices of a left-handed image that it loads from a file, and
    counts them in that order in what it sends. Its requests carry every entry of a model's config, `slices`
    among them, unlike a script's, which counts as in the file. An image that Slicer uploads is written as
    Slicer has it.

    Args:
        request: `slices`, and the prompts.
        labels: names under which points may stand, beside 'foreground' and 'background'.

    Raises:
        ValueError: for an unknown order.
    """
    order = request["slices"]
    if order not in (SLICER_ORDER, FILE_ORDER):
        raise ValueError(f"slices must be '{SLICER_ORDER}' or '{FILE_ORDER}', not {order!r}")
    axes = np.array(volume.direction).reshape(len(volume.spacing), -1)
    if order == FILE_ORDER or not request.get(STORED) or len(axes) < 3 or np.linalg.det(axes) > 0:
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


def read_format(request: Mapping[str, Any]) -> ResultFormat:
    """What kind of file to answer with; compressed unless that is refused, as OHIF does.

    Raises:
        ValueError: for an unknown kind.
    """
    extension = request.get("result_extension") or EXTENSIONS[1]
    if extension not in EXTENSIONS:
        raise ValueError(f"result_extension must be one of {', '.join(EXTENSIONS)}, not {extension!r}")
    name = request.get("result_dtype") or "uint8"
    if not isinstance(name, str) or name not in _PIXEL_TYPES:
        raise ValueError(f"result_dtype must be one of {', '.join(_PIXEL_TYPES)}, not {name!r}")
    compress = request.get("result_compress")
    if compress in (None, ""):
        compress = True
    return ResultFormat(
        extension, np.dtype(name), read_flag({"result_compress": compress}, "result_compress")
    )


def _number(value: Any, key: str) -> float:
    """A number, a text of one, or the first of several, as DICOM allows for windows."""
    first = value[0] if isinstance(value, list) and value else value
    try:
        if isinstance(first, bool):
            raise TypeError
        return float(first)
    except (TypeError, ValueError):
        raise ValueError(f"{key} must be a number beside its partner, not {value!r}") from None
