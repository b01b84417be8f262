"""Images from files, their slices as the models take them, and masks back on the same grid.

Arrays are [I, J, K] in the order of MONAI's LoadImaged, which is ITK's index order: i runs fastest in the
file. A 2-D image has K = 1; colour adds a last axis of 3. A slice for the model is [H, W] = [I, J].
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from monailabel_dfqsam.memory import MemoryShortage, shortage_told
from monailabel_dfqsam.segmentation.image import Image, ImageError, Modality
from monailabel_dfqsam.segmentation.nifti import nifti_on
from monailabel_dfqsam.segmentation.reading import read_image

__all__ = [
    "ImageError", "Volume", "VolumeTooLarge", "Window", "load_labels", "load_volume", "slice_rgb",
    "write_mask",
]  # fmt: skip

# Hounsfield units: below every tissue but lung and fat, so that only CT has such values.
_CT_BELOW = -200
_CT_RANGE = (-10_000, 32_767)
_PERCENTILES = (0.5, 99.5)
# A preset shows something if these percentiles of what it shows lie apart by this share of black to white.
_USUAL, _LEAST_CONTRAST = (1, 99), 0.1
# Cosine between two axes up to which ITK takes them as orthogonal.
_ORTHOGONAL = 1e-4
# Enough for a percentile, and few enough to sort in a tenth of a second.
_SAMPLE = 1_000_000
_UINT8 = np.dtype(np.uint8)
_SCANNER = 1  # NIfTI's code of a scanner's coordinates


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
        origin, spacing, direction: ITK's, millimetres, LPS; of 3 axes, or of 2 for a flat picture.
        modality: DICOM's name ('CT', 'MR', 'US' …); guessed 'CT' by the values, else None.
        window: what `slice_rgb` shows unless told otherwise; None for images shown as they are.
        inverted: whether low values are shown white (DICOM's MONOCHROME1).
        nifti: the header of a NIfTI. nibabel and ITK differ about the place of some: see `nifti`.
        key: tells its content from any other's; None where `VolumeLoader` did not read it.
    """

    array: NDArray[np.generic]
    origin: tuple[float, ...]
    spacing: tuple[float, ...]
    direction: tuple[float, ...]
    modality: Modality
    window: Window | None
    inverted: bool = False
    nifti: nibabel.Nifti1Header | None = None
    key: Hashable = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(I, J, K)."""
        i, j, k = self.array.shape[:3]
        return i, j, k

    @cached_property
    def extent(self) -> tuple[float, float]:
        """The least and the greatest value."""
        return float(self.array.min()), float(self.array.max())

    def is_shown_by(self, window: Window) -> bool:
        """Whether a window leaves more than one colour of all but the background.

        CT of a cone beam often has the tag and no Hounsfield units: a preset of CT shows all of it white.
        """
        dark, light = _grey(self._usual, window) / 255
        return bool(light - dark >= _LEAST_CONTRAST)

    @cached_property
    def _usual(self) -> NDArray[np.float32]:
        """[2]: between them lie nearly all values that are no background."""
        inside = _inside(self.array)
        return np.percentile(inside, _USUAL).astype(np.float32) if len(inside) else np.zeros(2, np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of memory it holds."""
        return self.array.nbytes

    @property
    def affine(self) -> NDArray[np.float64]:
        """[4, 4] float64, voxel indices (i, j, k, 1) to RAS, as nibabel says: of a NIfTI the sform first."""
        if self.nifti is not None:
            return np.asarray(self.nifti.get_best_affine(), dtype=np.float64)
        return self.itk_affine

    @property
    def itk_affine(self) -> NDArray[np.float64]:
        """[4, 4] float64, the same as ITK and 3D Slicer say, millimetres in RAS."""
        n = len(self.spacing)
        lps = np.eye(4)
        lps[:n, :n] = np.array(self.direction).reshape(n, n) * np.array(self.spacing)
        lps[:n, 3] = self.origin
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def load_volume(path: str | Path, name: str | None = None) -> Volume:
    """Reads an image file, or a folder with one DICOM series.

    Values are as stored after the file's own slope and intercept; NaN and infinities become the least finite
    value.

    Args:
        path: .nii, .nii.gz, .nrrd, .mha, .png, .jpg, DICOM, or a folder of DICOM.
        name: what messages call it; None for the name of the file or folder.

    Raises:
        ImageError: when it is missing, unreadable, empty, of more than three dimensions or of another kind.
        VolumeTooLarge: when it does not fit in memory, by its header before its voxels are read.
    """
    path = Path(path)
    name = name or path.name
    try:
        with shortage_told(f"reading '{name}'"):
            return _volume(read_image(path, name), name)
    except MemoryShortage as error:
        raise VolumeTooLarge(str(error)) from None


def _volume(image: Image, name: str) -> Volume:
    array = _finite(image.array, name)
    parts = {**vars(image), "array": array, "modality": image.modality or _guess(array)}
    volume = Volume(**parts, window=None)
    return replace(volume, window=_window(volume))


def load_labels(path: str | Path, name: str | None = None) -> Volume:
    """As `load_volume`, of a label map: what is no number is 0, and there is nothing to show.

    Raises:
        ImageError: also for colour.
        VolumeTooLarge: as there.
    """
    path = Path(path)
    name = name or path.name
    try:
        with shortage_told(f"reading '{name}'"):
            image = read_image(path, name)
            array: NDArray[Any] = image.array
            if array.dtype.kind == "f":
                array = np.where(np.isfinite(array), array, 0)
    except MemoryShortage as error:
        raise VolumeTooLarge(str(error)) from None
    if array.ndim != 3:
        raise ImageError(f"'{name}' must hold one number a voxel, not colour")
    return Volume(array, image.origin, image.spacing, image.direction, None, None, nifti=image.nifti)


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
    plane: NDArray[Any] = volume.array[:, :, k]
    shown = window or volume.window
    if plane.ndim == 3:
        return np.ascontiguousarray(plane, dtype=np.uint8)
    if shown is not None:
        plane = np.rint(_grey(plane, shown))
    if volume.inverted:
        plane = 255 - plane
    return np.repeat(plane.astype(np.uint8)[:, :, None], 3, axis=2)


def write_mask(
    mask: NDArray[np.uint8],
    volume: Volume,
    path: str | Path,
    compress: bool = True,
    dtype: np.dtype[Any] = _UINT8,
) -> None:
    """Writes a label map on exactly the grid of the image it belongs to.

    A NIfTI of a NIfTI image lies by both of that image's transforms; a NRRD lies where ITK and 3D Slicer see
    the image.

    Args:
        mask: [I, J, K] uint8, the shape of `volume`.
        path: .nrrd, .nii or .nii.gz.
        compress: for .nrrd; a NIfTI's name says it.
        dtype: of the voxels in the file.

    Raises:
        ValueError: for another shape, type or file name.
    """
    path = Path(path)
    if not path.name.endswith((".nrrd", ".nii", ".nii.gz")):
        raise ValueError(f"a mask is written as .nrrd, .nii or .nii.gz, not '{path.name}'")
    if mask.shape != volume.shape or mask.dtype != np.uint8:
        raise ValueError(f"the mask must be {list(volume.shape)} uint8, not {list(mask.shape)} {mask.dtype}")
    labels = mask.astype(dtype, copy=False)
    if path.name.endswith((".nii", ".nii.gz")):
        nibabel.save(_nifti(labels, volume), path)
        return
    image = Image(labels, volume.origin, volume.spacing, volume.direction).to_itk()
    sitk.WriteImage(image, str(path), useCompression=compress)


def _nifti(labels: NDArray[np.generic], volume: Volume) -> nibabel.Nifti1Image:
    if volume.nifti is not None:
        return nifti_on(labels, volume.nifti)
    image = nibabel.Nifti1Image(labels[:, :, 0] if len(volume.spacing) == 2 else labels, volume.affine)
    if _at_right_angles(volume):  # a qform holds no others
        image.set_qform(volume.affine, _SCANNER)
        image.set_sform(volume.affine, _SCANNER)
    image.header.set_xyzt_units("mm")
    return image


def _at_right_angles(volume: Volume) -> bool:
    n = len(volume.spacing)
    axes = np.array(volume.direction).reshape(n, n)
    return bool(np.abs(axes.T @ axes - np.eye(n)).max() < _ORTHOGONAL)


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


def _window(volume: Volume) -> Window | None:
    """Soft tissue for CT; none for pictures of 8 bit; else percentiles of all that is not the least value."""
    array = volume.array
    if array.ndim == 4 or (array.shape[2] == 1 and array.dtype == np.uint8):
        return None
    if volume.modality == "CT" and volume.is_shown_by(SOFT_TISSUE):
        return SOFT_TISSUE
    inside = _inside(array)
    if len(inside) == 0:
        return Window(volume.extent[0], volume.extent[0] + 1)
    low, high = (float(x) for x in np.percentile(inside, _PERCENTILES))
    return Window(low, high) if low < high else Window(volume.extent[0], high)


def _inside(array: NDArray[np.generic]) -> NDArray[np.float32]:
    """[N] of an image's values, at most `_SAMPLE` and a few, without the least one.

    Outside the body most scanners write one value, the least; it says nothing of contrast.
    """
    values = array.ravel(order="K")
    sample: NDArray[np.float32] = values[:: max(1, len(values) // _SAMPLE)].astype(np.float32)
    inside: NDArray[np.float32] = sample[sample > sample.min()]
    return inside


def _grey(values: NDArray[Any], window: Window) -> NDArray[np.float32]:
    """0 … 255."""
    scaled = (values.astype(np.float32) - window.low) * (255 / (window.high - window.low))
    return np.asarray(scaled.clip(0, 255), dtype=np.float32)
