"""Images from files, their slices as the models take them, and masks back on the same grid.

Arrays are [I, J, K] in the order of MONAI's LoadImaged, which is ITK's index order: i runs fastest in the
file. A 2-D image has K = 1; colour adds a last axis of 3. A slice for the model is [H, W] = [I, J].
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from monailabel_dfqsam.memory import MemoryShortage, shortage_told
from monailabel_dfqsam.segmentation.reading import ImageError, Modality, read_itk

__all__ = [
    "ImageError", "Volume", "VolumeTooLarge", "Window", "load_volume", "slice_rgb", "write_mask",
]  # fmt: skip

# Hounsfield units: below every tissue but lung and fat, so that only CT has such values.
_CT_BELOW = -200
_CT_RANGE = (-10_000, 32_767)
_PERCENTILES = (0.5, 99.5)
# Cosine between two axes up to which ITK takes them as orthogonal.
_ORTHOGONAL = 1e-4
# Enough for a percentile, and few enough to sort in a tenth of a second.
_SAMPLE = 1_000_000


class VolumeTooLarge(MemoryShortage):
    """A volume that does not fit in memory."""


@dataclass(frozen=True)
class Window:
    """Which values are shown: `low` black, `high` white.

    Raises:
        ValueError: unless both are finite and low < high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a window needs finite low < high, not {self.low} and {self.high}")

    @classmethod
    def of_level(cls, level: float, width: float) -> Window:
        """A window as viewers name it, by its middle and its width."""
        return cls(level - width / 2, level + width / 2)


SOFT_TISSUE = Window(-160, 240)
"""The default of CT, in Hounsfield units."""


@dataclass(frozen=True, eq=False)
class Volume:
    """An image and the grid it lies on.

    Attributes:
        array: [I, J, K] of a number type, finite; or [I, J, K, 3] uint8 for colour. In memory i mostly runs
            fastest, so that a slice's voxels lie together; not to be written to.
        origin, spacing, direction: ITK's, millimetres, LPS; of 3 axes, or of 2 for a 2-D file.
        modality: DICOM's name ('CT', 'MR', 'US' …); guessed 'CT' by the values, else None.
        window: what `slice_rgb` shows unless told otherwise; None for images shown as they are.
        key: tells its content from any other's; None where `VolumeLoader` did not read it.
    """

    array: NDArray[np.generic]
    origin: tuple[float, ...]
    spacing: tuple[float, ...]
    direction: tuple[float, ...]
    modality: Modality
    window: Window | None
    key: Hashable = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(I, J, K)."""
        i, j, k = self.array.shape[:3]
        return i, j, k

    @property
    def nbytes(self) -> int:
        """Bytes of memory it holds."""
        return self.array.nbytes

    @property
    def affine(self) -> NDArray[np.float64]:
        """[4, 4] float64, voxel indices (i, j, k, 1) to millimetres in RAS, nibabel's convention."""
        n = len(self.spacing)
        lps = np.eye(4)
        lps[:n, :n] = np.array(self.direction).reshape(n, n) * np.array(self.spacing)
        lps[:n, 3] = self.origin
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def load_volume(path: str | Path) -> Volume:
    """Reads an image file, or a folder with one DICOM series.

    Values are as stored after the file's own slope and intercept; NaN and infinities become the least finite
    value.

    Args:
        path: .nii, .nii.gz, .nrrd, .mha, .png, .jpg, DICOM, or a folder of DICOM.

    Raises:
        ImageError: when it is missing, unreadable, empty, of more than three dimensions or of another kind.
        VolumeTooLarge: when it does not fit in memory, by its header before its voxels are read.
    """
    path = Path(path)
    try:
        with shortage_told(f"reading '{path.name}'"):
            return _load(path)
    except MemoryShortage as error:
        raise VolumeTooLarge(str(error)) from None


def _load(path: Path) -> Volume:
    image, modality = read_itk(path)
    stored = sitk.GetArrayViewFromImage(image)
    spatial = image.GetDimension()
    # ITK's arrays run [k, j, i], colour last.
    order = (*range(spatial - 1, -1, -1), *range(spatial, stored.ndim))
    array = stored.transpose(order)
    if spatial == 2:
        array = np.expand_dims(array, 2)
    array = _finite(_held(array, image), path.name)
    modality = modality or _guess(array)
    return Volume(
        array, image.GetOrigin(), image.GetSpacing(), image.GetDirection(), modality, _window(array, modality)
    )


def slice_rgb(volume: Volume, k: int, window: Window | None = None) -> NDArray[np.uint8]:
    """A slice as the models take it.

    Args:
        k: 0 … K − 1.
        window: the values to show; None takes the volume's own. Colour is shown as it is.

    Returns:
        [H, W, 3] uint8, H along i and W along j.

    Raises:
        ValueError: when there is no such slice.
    """
    if not 0 <= k < volume.shape[2]:
        raise ValueError(f"there is no slice {k} in an image of {volume.shape[2]}")
    plane = volume.array[:, :, k]
    shown = window or volume.window
    if plane.ndim == 3:
        return np.ascontiguousarray(plane, dtype=np.uint8)
    if shown is not None:
        scaled = (plane.astype(np.float32) - shown.low) * (255 / (shown.high - shown.low))
        plane = np.rint(scaled.clip(0, 255))
    return np.repeat(plane.astype(np.uint8)[:, :, None], 3, axis=2)


def write_mask(mask: NDArray[np.uint8], volume: Volume, path: str | Path, compress: bool = True) -> None:
    """Writes a label map on exactly the grid of the image it belongs to.

    Args:
        mask: [I, J, K] uint8, the shape of `volume`.
        path: .nrrd, .nii or .nii.gz.
        compress: for .nrrd; a NIfTI's name says it.

    Raises:
        ValueError: for another shape, type or file name.
    """
    path = Path(path)
    if not path.name.endswith((".nrrd", ".nii", ".nii.gz")):
        raise ValueError(f"a mask is written as .nrrd, .nii or .nii.gz, not '{path.name}'")
    if mask.shape != volume.shape or mask.dtype != np.uint8:
        raise ValueError(f"the mask must be {list(volume.shape)} uint8, not {list(mask.shape)} {mask.dtype}")
    if path.name.endswith((".nii", ".nii.gz")) and not _at_right_angles(volume):
        # ITK would bend the grid; nibabel's sform holds any.
        nibabel.save(nibabel.Nifti1Image(mask, volume.affine), path)
        return
    flat = mask[:, :, 0] if len(volume.spacing) == 2 else mask
    image = sitk.GetImageFromArray(np.ascontiguousarray(flat.T))
    image.SetOrigin(volume.origin)
    image.SetSpacing(volume.spacing)
    image.SetDirection(volume.direction)
    sitk.WriteImage(image, str(path), useCompression=compress)


def _at_right_angles(volume: Volume) -> bool:
    n = len(volume.spacing)
    axes = np.array(volume.direction).reshape(n, n)
    return bool(np.abs(axes.T @ axes - np.eye(n)).max() < _ORTHOGONAL)


class _Held:
    """An array within an image's memory, which stays as long as the array does: a copy would cost as much."""

    def __init__(self, array: NDArray[np.generic], image: sitk.Image) -> None:
        self.__array_interface__ = array.__array_interface__
        self._image = image


def _held(array: NDArray[np.generic], image: sitk.Image) -> NDArray[np.generic]:
    return np.asarray(_Held(array, image))


def _finite(array: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    if not np.issubdtype(array.dtype, np.floating):
        return array
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    # Both are NaN where any value is.
    if np.isfinite(array.min()) and np.isfinite(array.max()):
        return array
    good = np.isfinite(array)
    if not good.any():
        raise ImageError(f"'{name}' holds no finite value")
    finite = array.copy(order="K")
    finite[~good] = np.min(array, where=good, initial=np.inf)
    return finite


def _guess(array: NDArray[np.generic]) -> Modality:
    """'CT' for values like Hounsfield units, else None."""
    if array.ndim == 4:
        return None
    low, high = float(array.min()), float(array.max())
    return "CT" if _CT_RANGE[0] <= low < _CT_BELOW and low < high <= _CT_RANGE[1] else None


def _window(array: NDArray[np.generic], modality: Modality) -> Window | None:
    """Soft tissue for CT; none for pictures of 8 bit; else percentiles of all that is not the least value."""
    if array.ndim == 4 or (array.shape[2] == 1 and array.dtype == np.uint8):
        return None
    if modality == "CT":
        return SOFT_TISSUE
    values = array.ravel(order="K")
    values = values[:: max(1, len(values) // _SAMPLE)].astype(np.float32)
    # Outside the body most scanners write one value, the least; it says nothing of contrast.
    inside = values[values > values.min()]
    if len(inside) == 0:
        return Window(float(values[0]), float(values[0]) + 1)
    low, high = (float(x) for x in np.percentile(inside, _PERCENTILES))
    return Window(low, high) if low < high else Window(float(values.min()), high)
