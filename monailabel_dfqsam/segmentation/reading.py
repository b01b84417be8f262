"""Files to ITK images of one grid: which kinds are read, and what is refused.

A file's name chooses its reader, since ITK, left to choose by content, also knows formats that name other
files, HDF5 for one. Its size is taken from its header and refused before its voxels are read.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from monailabel_dfqsam.memory import require, shortage_told
from monailabel_dfqsam.segmentation.slices import GeometryError, Grid, read_grid

Modality = str | None

_READERS = {
    ".nii": "NiftiImageIO", ".nii.gz": "NiftiImageIO", ".nrrd": "NrrdImageIO", ".mha": "MetaImageIO",
    ".png": "PNGImageIO", ".jpg": "JPEGImageIO", ".jpeg": "JPEGImageIO", ".dcm": "GDCMImageIO",
}  # fmt: skip
_NIFTI = (".nii", ".nii.gz")
_NIFTI_HEADER = 352
_HEADER_BYTES = 1 << 16
# Fields by which a header names another file as the place of its voxels; such a file could be any on disk.
_NRRD_ELSEWHERE = re.compile(rb"data ?file\s*:", re.IGNORECASE)
_MHA_HERE = re.compile(rb"ElementDataFile *= *LOCAL *\r?", re.IGNORECASE)

MAX_VOXELS = 1 << 31
"""1024×1024×2048, more than any scanner in hospitals makes."""
# ITK's own, and one while values are converted: measured 1.0 for whole numbers and 2.0 for a floating NIfTI.
_COPIES = 2


class ImageError(ValueError):
    """An image that cannot be used; the message says why and names no folder."""


def read_itk(path: Path) -> tuple[sitk.Image, Modality]:
    """An image of 2 or 3 dimensions, of one real number or of three uint8 a pixel; and DICOM's modality.

    Raises:
        ImageError, MemoryShortage: as `volume.load_volume` says.
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
    if not head:
        raise ImageError(f"'{path.name}' is empty")
    suffix = ".dcm" if head[128:132] == b"DICM" else _suffix(path.name)
    if _names_another_file(head, suffix):
        raise ImageError(f"'{path.name}' keeps its voxels in another file, or its header is unusual")
    if suffix == ".dcm":
        return _read_dicom([str(path)], path.name)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_READERS[suffix])
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _check_reader(reader, path.name)
        with shortage_told(f"reading '{path.name}'"):
            image = reader.Execute()
        if suffix in _NIFTI:
            # As stored: ITK's type is that of the values after slope and intercept.
            _check_length(path, math.prod(reader.GetSize()) * int(reader.GetMetaData("bitpix")) // 8)
            if "float" in image.GetPixelIDTypeAsString():
                image = _restore_nan(image, path)
    except RuntimeError as error:
        if suffix in _NIFTI and "orthonormal" in str(error):
            return _read_sheared(path), None
        raise ImageError(f"'{path.name}' cannot be read: it is damaged, or of a rare kind") from None
    return image, None


def _suffix(name: str) -> str:
    """The ending of a kind that is read; raises ImageError for any other."""
    found = [suffix for suffix in _READERS if name.lower().endswith(suffix)]
    if not found:
        raise ImageError(f"'{name}' is not an image of a known kind: expected {', '.join(_READERS)}")
    return found[-1]


def _names_another_file(head: bytes, suffix: str) -> bool:
    """Whether a header may lead to voxels elsewhere; also true for one whose end does not lie in `head`."""
    if suffix == ".nrrd":
        text = head.replace(b"\r\n", b"\n")
        end = text.find(b"\n\n")
        return end < 0 or b"\r" in text[:end] or _NRRD_ELSEWHERE.search(head) is not None
    if suffix == ".mha":
        fields = [line for line in head.split(b"\n") if b"elementdatafile" in line.lower()]
        return not fields or not all(_MHA_HERE.fullmatch(field) for field in fields)
    return False


def _check_reader(reader: sitk.ImageFileReader, name: str, files: int = 1) -> None:
    """Refuses an image by its header; `files` are as large each."""
    pixel = sitk.Image([1, 1], reader.GetPixelID())
    value_bytes = int(pixel.GetSizeOfPixelComponent())
    if "vector" in pixel.GetPixelIDTypeAsString():
        value_bytes *= reader.GetNumberOfComponents()
    check_size([*reader.GetSize(), files], value_bytes, name)


def _check_length(path: Path, size: int) -> None:
    """Refuses a NIfTI that ends before its `size` bytes of voxels do; ITK takes the rest for zeros."""
    needed = _NIFTI_HEADER + size
    if path.suffix != ".gz":
        found = path.stat().st_size
    else:
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            (told,) = struct.unpack("<I", file.read(4))
        # What gzip's last four bytes say is not so for a file cut off, or made of several parts.
        found = needed if told == needed % (1 << 32) else _unpacked_length(path, needed)
    if found < needed:
        raise ImageError(f"'{path.name}' is incomplete: its header announces more voxels than it holds")


def _unpacked_length(path: Path, enough: int) -> int:
    """Bytes that a gzip file unpacks to; counting stops at `enough` and at damage."""
    found = 0
    with contextlib.suppress(EOFError, OSError, zlib.error), gzip.open(path) as file:
        while found < enough and (block := file.read(1 << 20)):
            found += len(block)
    return found


def check_size(shape: Sequence[int], value_bytes: int, name: str) -> None:
    """Refuses an image that is too large for any use, or for this machine's free memory.

    Args:
        shape: voxels along each axis.
        value_bytes: bytes of one voxel.

    Raises:
        ImageError: for more than `MAX_VOXELS`.
        MemoryShortage: saying what it needs and what there is.
    """
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS:
        raise ImageError(f"'{name}' has {voxels} voxels; at most {MAX_VOXELS} are read")
    require(voxels * value_bytes * _COPIES, f"reading '{name}'")


def _read_series(folder: Path) -> tuple[sitk.Image, Modality]:
    """The one DICOM series in a folder."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        raise ImageError(f"the folder '{folder.name}' must hold one DICOM series, not {len(series)}")
    return _read_dicom(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0]), folder.name)


def _read_dicom(files: Sequence[str], name: str) -> tuple[sitk.Image, Modality]:
    """One DICOM file, or the files of a series, slices by position."""
    try:
        grid, modality = read_grid(files)
        # Without places, ITK's order stands, which is that of the instance numbers.
        files = [files[n] for n in grid.order] if grid and len(files) > 1 else files
        reader = sitk.ImageFileReader()
        reader.SetImageIO(_READERS[".dcm"])
        reader.SetFileName(files[0])
        reader.ReadImageInformation()
        _check_reader(reader, name, len(files))
        with shortage_told(f"reading '{name}'"):
            image = sitk.ReadImage(files, imageIO=_READERS[".dcm"]) if len(files) > 1 else reader.Execute()
    except GeometryError as error:
        raise ImageError(f"'{name}' {error}") from None
    except RuntimeError:
        raise ImageError(f"'{name}' cannot be read: it is damaged, or of a rare kind") from None
    return _placed(image, grid), modality


def _placed(image: sitk.Image, grid: Grid | None) -> sitk.Image:
    """The image where its headers say; ITK's guess differs for a single slice."""
    if grid is not None and image.GetDimension() == 3:
        image.SetOrigin(grid.origin)
        image.SetSpacing(grid.spacing)
        image.SetDirection(grid.direction)
    return image


def _restore_nan(image: sitk.Image, path: Path) -> sitk.Image:
    """A floating NIfTI with its NaN and infinities, which ITK reads as 0: soft tissue, in a CT."""
    source = nibabel.load(path)
    if source.get_data_dtype().kind != "f" or source.ndim != image.GetDimension():
        return image  # whole numbers, made floating by slope and intercept
    raw = source.dataobj.get_unscaled()
    if np.isfinite(raw.min()) and np.isfinite(raw.max()):
        return image
    del raw
    array = np.asanyarray(source.dataobj)
    restored = sitk.GetImageFromArray(np.ascontiguousarray(array.T), isVector=False)
    restored.CopyInformation(image)
    return restored


def _read_sheared(path: Path) -> sitk.Image:
    """A NIfTI whose axes are not at right angles, which ITK refuses to read though it can hold one."""
    source = nibabel.load(path)
    check_size(source.shape, source.get_data_dtype().itemsize, path.name)
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
    if channels == 3:
        return image
    # Opacity is left out.
    return sitk.Compose([sitk.VectorIndexSelectionCast(image, channel) for channel in range(3)])
