"""A label map on the grid of its image, by where both lie in space."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from monailabel_dfqsam.segmentation.volume import Volume

_SAME = 1e-3  # millimetres, by which two grids may differ
_BESIDE = 1.0  # voxels, by which an image may reach out of its label map


def on_grid(label: Volume, image: Volume) -> NDArray[np.generic]:
    """A label map on the grid of an image, from the nearest voxel.

    Two NIfTIs lie where nibabel says, others where ITK does. Nobody knows where a flat picture lies: its size
    counts.

    Returns:
        [I, J, K] of the label's type; 0 where the label map does not reach.

    Raises:
        ValueError: when it has colour, or no place and another size.
    """
    if label.array.ndim != 3:
        raise ValueError("a label map holds one number a voxel")
    affines = _affines(label, image)
    if affines is None:
        if label.shape != image.shape:
            raise ValueError(f"the label's size is {list(label.shape)}, the image's {list(image.shape)}")
        return label.array
    from_, to = affines
    if label.shape == image.shape and np.abs(from_ - to).max() < _SAME:
        return label.array
    step = np.linalg.inv(from_) @ to
    found: NDArray[np.generic] = ndimage.affine_transform(
        label.array, step[:3, :3], step[:3, 3], image.shape, order=0, mode="grid-constant"
    )
    return found


def covers(label: Volume, image: Volume) -> bool:
    """Whether an image lies within a label map, up to one voxel of that; true where no place is known."""
    affines = _affines(label, image)
    if affines is None:
        return True
    corners = np.stack(np.meshgrid(*([0, n - 1] for n in image.shape), [1])).reshape(4, -1)
    found = (np.linalg.inv(affines[0]) @ affines[1] @ corners)[:3]
    last = np.array(label.shape)[:, None] - 1
    return bool(((found >= -_BESIDE) & (found <= last + _BESIDE)).all())


def _affines(label: Volume, image: Volume) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    if len(image.spacing) != 3 or len(label.spacing) != 3:
        return None
    if image.nifti is not None and label.nifti is not None:
        return label.affine, image.affine
    return label.itk_affine, image.itk_affine
