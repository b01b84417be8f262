"""What every reader of image files answers, and how large an image may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from monailabel_dfqsam.memory import require

Modality = str | None

MAX_VOXELS = 1 << 31
"""1024×1024×2048, more than any scanner in hospitals makes."""
_DICOM, _WHITE = "DICOM", "MONOCHROME1"
# The file's own, and one while values are converted.
_COPIES = 2


class ImageError(ValueError):
    """An image that cannot be used; the message says why and names no folder."""


def damaged(name: str) -> ImageError:
    """The error for a file of which no more is known than that its reader gave up."""
    return ImageError(f"'{name}' cannot be read: it is damaged, or of a rare kind")


@dataclass(frozen=True, eq=False)
class Image:
    """An image as its file has it.

    Attributes:
        array: [I, J, K] of a number type, or [I, J, K, 3] uint8 for colour; i mostly runs fastest in memory.
        origin, spacing, direction: ITK's, millimetres, LPS; of 3 axes, or of 2 for a flat picture.
        modality: DICOM's name, where the file says it.
        inverted: whether low values are shown white (DICOM's MONOCHROME1).
        nifti: the header of a NIfTI, which places it by two transforms where ITK knows one.
    """

    array: NDArray[np.generic]
    origin: tuple[float, ...]
    spacing: tuple[float, ...]
    direction: tuple[float, ...]
    modality: Modality = None
    inverted: bool = False
    nifti: nibabel.Nifti1Header | None = None

    def to_itk(self) -> sitk.Image:
        """A copy as ITK's image, of 2 dimensions for a flat picture.

        What DICOM says and a NIfTI has no field for becomes its description, 'DICOM CR MONOCHROME1'.
        """
        array: NDArray[Any] = self.array[:, :, 0] if len(self.spacing) == 2 else self.array
        spatial = len(self.spacing)
        turned = array.transpose(*range(spatial - 1, -1, -1), *range(spatial, array.ndim))
        image = sitk.GetImageFromArray(np.ascontiguousarray(turned), isVector=array.ndim > spatial)
        image.SetOrigin(self.origin)
        image.SetSpacing(self.spacing)
        image.SetDirection(self.direction)
        if told := [*filter(None, (self.modality, _WHITE if self.inverted else None))]:
            image.SetMetaData("ITK_FileNotes", " ".join([_DICOM, *told]))
        return image


def check_size(shape: Sequence[int], value_bytes: int, name: str) -> None:
    """Refuses an image that is too large for any use, or for this machine's free memory.

    Args:
        shape: voxels along each axis.
        value_bytes: bytes of one voxel.

    Raises:
        ImageError: for more than `MAX_VOXELS`, and for none.
        MemoryShortage: saying what it needs and what there is.
    """
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS:
        raise ImageError(f"'{name}' has {voxels} voxels; at most {MAX_VOXELS} are read")
    if min(shape) <= 0:
        raise ImageError(f"'{name}' is empty: its size is {'×'.join(map(str, shape))}")
    require(voxels * value_bytes * _COPIES, f"reading '{name}'")


def was_told(description: str) -> tuple[Modality, bool]:
    """Modality and `inverted` by the description that `Image.to_itk` writes; of any other, nothing."""
    first, *words = description.split() or [""]
    if first != _DICOM:
        return None, False
    return next((word for word in words if word != _WHITE), None), _WHITE in words
