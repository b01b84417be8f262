"""A finished label map: whether a file is one, and lies on the grid of its image.

The grids are the same when every voxel lies within `TOLERANCE` of one of the other's, and none is left over:
axes may run the other way or be exchanged, and the label's voxels are then put in the image's order.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from monailabel_dfqsam.segmentation.reading import read_itk
from monailabel_dfqsam.segmentation.volume import ImageError, Volume

TOLERANCE = 0.1  # voxels

Shape = tuple[int, int, int]

_HEADERS = {".nrrd": "NrrdImageIO", ".nii": "NiftiImageIO", ".gz": "NiftiImageIO"}


def fit_label(path: Path, volume: Volume | None) -> bool:
    """Puts a label file on its image's grid, if it does not lie there already; whether it marks anything.

    Args:
        path: .nrrd, .nii or .nii.gz; written anew when its voxels run another way than the image's.
        volume: the image; None leaves the grid unchecked.

    Raises:
        ImageError: for a file that is no map of whole numbers from 0, or of another grid.
        MemoryShortage: when it does not fit in memory.
    """
    if (layers := _layers(path)) > 1:
        raise ImageError(
            f"'{path.name}' holds {layers} layers; a label is one layer, in which no two segments overlap"
        )
    image, _ = read_itk(path)
    values = sitk.GetArrayViewFromImage(image)
    if values.ndim > image.GetDimension():
        raise ImageError(f"'{path.name}' is a picture in colour; a label holds one number a voxel")
    if not _are_labels(values):
        raise ImageError(
            f"'{path.name}' holds other values than whole numbers from 0; a label holds only these"
        )
    if volume is not None and _is_turned(image, volume, path.name):
        on_grid = sitk.Resample(
            image, volume.shape, sitk.Transform(), sitk.sitkNearestNeighbor,
            volume.origin, volume.spacing, volume.direction, 0, image.GetPixelID(),
        )  # fmt: skip
        sitk.WriteImage(on_grid, str(path), useCompression=True)
    return bool(values.any())


def _layers(path: Path) -> int:
    """Volumes in a file by its header; 1 where that cannot be read."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_HEADERS[path.suffix.lower()])
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return 1
    return int(reader.GetNumberOfComponents() * math.prod(reader.GetSize()[3:]))


def _are_labels(values: NDArray[Any]) -> bool:
    if np.issubdtype(values.dtype, np.floating) and not np.array_equal(values, np.rint(values)):
        return False  # NaN equals nothing
    return bool(values.min() >= 0 and np.isfinite(values.max()))


def _is_turned(image: sitk.Image, volume: Volume, name: str) -> bool:
    """Whether a label's voxels are its image's in another order; raises ImageError when they are others."""
    i, j, k = (*image.GetSize(), 1)[:3]
    shape = i, j, k
    if len(volume.spacing) == 3 == image.GetDimension():
        step = np.linalg.inv(volume.affine) @ _affine(image)
        for axis in range(3):
            if shape[axis] == 1:  # then its length is the distance to a voxel that is not there
                step[:3, axis] /= np.abs(step[:3, axis]).max()
        turn = _turn(step, shape, volume.shape)
        if turn is not None and _apart(step, turn, shape) < TOLERANCE:
            return not np.array_equal(turn, np.eye(4))
        if shape == volume.shape:
            far = _apart(step, np.eye(4), shape)
            raise ImageError(f"'{name}' lies elsewhere than its image, up to {far:.1f} voxels away")
    if shape != volume.shape:
        raise ImageError(
            f"'{name}' has {_times(shape)} voxels and its image {_times(volume.shape)}: they must be the same"
        )
    return False


def _turn(step: NDArray[np.float64], shape: Shape, target: Shape) -> NDArray[np.float64] | None:
    """The exact map [4, 4] between two orders of the same voxels that is next to `step`; None without one."""
    axes = np.rint(step[:3, :3])
    one_each = all(np.array_equal(np.abs(axes).sum(axis=n), np.ones(3)) for n in (0, 1))
    if not (one_each and tuple(np.abs(axes) @ shape) == target):
        return None
    turn = np.eye(4)
    turn[:3, :3] = axes
    turn[:3, 3] = np.where(axes.sum(axis=1) < 0, np.array(target) - 1, 0)
    return turn


def _apart(one: NDArray[np.float64], other: NDArray[np.float64], shape: Shape) -> float:
    """The farthest that two maps [4, 4] put a corner of a grid from each other, in voxels along an axis."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape))])
    return float(np.abs((one - other) @ corners.T).max())


def _affine(image: sitk.Image) -> NDArray[np.float64]:
    """[4, 4], indices to millimetres in RAS."""
    on_no_voxels = np.empty((0, 0, 0))
    grid = image.GetOrigin(), image.GetSpacing(), image.GetDirection()
    return Volume(on_no_voxels, *grid, None, None).affine


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
