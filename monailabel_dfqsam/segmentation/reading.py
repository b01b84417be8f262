"""Files to ITK images of one grid: which kinds are read, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

Modality = str | None

_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".png", ".jpg", ".jpeg", ".dcm")
_MODALITY_TAG = "0008|0060"
_HEADER_BYTES = 1 << 16
# Fields by which a header names another file as the place of its voxels; such a file could be any on disk.
_ELSEWHERE = re.compile(rb"^(data ?file:|ElementDataFile *=(?! *LOCAL))", re.IGNORECASE | re.MULTILINE)


class ImageError(ValueError):
    """An image that cannot be used; the message says why and names no folder."""


def read_itk(path: Path) -> tuple[sitk.Image, Modality]:
    """An image of 2 or 3 dimensions, of one real number or of three uint8 a pixel; and DICOM's modality.

    Raises:
        ImageError: as `volume.load_volume` says.
    """
    if path.is_dir():
        image, modality = _read_series(path)
    elif path.is_file():
        image, modality = _read_file(path)
    else:
        raise ImageError(f"there is no image '{path.name}'")
    return _to_grey_or_rgb(_to_three_dimensions(image, path.name), path.name), modality


def _read_file(path: Path) -> tuple[sitk.Image, Modality]:
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    is_dicom = head[128:132] == b"DICM"
    if not head:
        raise ImageError(f"'{path.name}' is empty")
    if not is_dicom and not path.name.lower().endswith(_SUFFIXES):
        raise ImageError(f"'{path.name}' is not an image of a known kind: expected {', '.join(_SUFFIXES)}")
    if path.suffix.lower() in (".nrrd", ".mha") and _ELSEWHERE.search(head.split(b"\n\n", 1)[0]):
        raise ImageError(f"'{path.name}' keeps its voxels in another file, which is not read")
    is_nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    try:
        image = sitk.ReadImage(str(path))
        if is_nifti and "float" in image.GetPixelIDTypeAsString():
            image = _restore_nan(image, path)
    except RuntimeError as error:
        if is_nifti and "orthonormal" in str(error):
            return _read_sheared(path), None
        raise ImageError(f"'{path.name}' cannot be read: it is damaged, or of a rare kind") from None
    return image, image.GetMetaData(_MODALITY_TAG).strip() if image.HasMetaDataKey(_MODALITY_TAG) else None


def _read_series(folder: Path) -> tuple[sitk.Image, Modality]:
    """The one DICOM series in a folder, slices by position."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        raise ImageError(f"the folder '{folder.name}' must hold one DICOM series, not {len(series)}")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    try:
        image = sitk.ReadImage(files)
        first = sitk.ImageFileReader()
        first.SetFileName(files[0])
        first.ReadImageInformation()
    except RuntimeError:
        raise ImageError(f"the DICOM series in '{folder.name}' cannot be read") from None
    return image, first.GetMetaData(_MODALITY_TAG).strip() if first.HasMetaDataKey(_MODALITY_TAG) else None


def _restore_nan(image: sitk.Image, path: Path) -> sitk.Image:
    """A floating NIfTI with its NaN and infinities, which ITK reads as 0: soft tissue, in a CT."""
    array = np.asanyarray(nibabel.load(path).dataobj)
    if array.ndim != image.GetDimension() or np.isfinite(array).all():
        return image
    restored = sitk.GetImageFromArray(np.ascontiguousarray(array.T), isVector=False)
    restored.CopyInformation(image)
    return restored


def _read_sheared(path: Path) -> sitk.Image:
    """A NIfTI whose axes are not at right angles, which ITK refuses to read though it can hold one."""
    source = nibabel.load(path)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ source.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    array = np.asanyarray(source.dataobj)
    if array.ndim != 3:
        raise ImageError(f"'{path.name}' has {array.ndim} dimensions; a volume has 3")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def _to_three_dimensions(image: sitk.Image, name: str) -> sitk.Image:
    size = image.GetSize()
    if 0 in size:
        raise ImageError(f"'{name}' is empty: its size is {'×'.join(map(str, size))}")
    if len(size) <= 3:
        return image
    if any(n > 1 for n in size[3:]):
        raise ImageError(f"'{name}' has {len(size)} dimensions, {'×'.join(map(str, size))}; a volume has 3")
    # Extraction drops the axes asked for with size 0.
    return sitk.Extract(image, [*size[:3], *[0] * (len(size) - 3)])


def _to_grey_or_rgb(image: sitk.Image, name: str) -> sitk.Image:
    channels = image.GetNumberOfComponentsPerPixel()
    if "complex" in image.GetPixelIDTypeAsString():
        raise ImageError(f"'{name}' holds complex numbers; expected real ones")
    if channels == 1:
        return image
    eight_bit = "8-bit unsigned" in image.GetPixelIDTypeAsString()
    if channels not in (3, 4) or not eight_bit:
        raise ImageError(
            f"'{name}' holds {channels} values a pixel ({image.GetPixelIDTypeAsString()}); expected one, or "
            "colour of 8 bit"
        )
    # Opacity is left out.
    return sitk.Compose([sitk.VectorIndexSelectionCast(image, channel) for channel in range(3)])
