"""Files to images of one grid: which kinds are read, and what is refused.

A file's first bytes choose its reader, and its name where they do not; ITK, left to choose, also knows
formats that name other files, HDF5 for one. An image's size is taken from its header and refused before its
voxels are read.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from monailabel_dfqsam.memory import shortage_told
from monailabel_dfqsam.segmentation.dicom import is_dicom, read_dicom, read_series
from monailabel_dfqsam.segmentation.image import Image, ImageError, Modality, check_size, damaged
from monailabel_dfqsam.segmentation.nifti import GZIP, HEADER_BYTES, is_nifti, read_nifti

_ITK = {
    ".nrrd": "NrrdImageIO", ".mha": "MetaImageIO", ".png": "PNGImageIO", ".jpg": "JPEGImageIO",
    ".jpeg": "JPEGImageIO",
}  # fmt: skip
_ENDINGS = (".nii", ".nii.gz", *_ITK, ".dcm")
_BEGINNINGS = ((b"NRRD0", ".nrrd"), (b"\x89PNG\r\n\x1a\n", ".png"), (b"\xff\xd8\xff", ".jpg"))
_MHA = re.compile(rb"\s*(#.*\n\s*)*(ObjectType|NDims|Comment)\s*[=:]")
_HEADER_BYTES = 1 << 16
# Fields by which a header names another file as the place of its voxels; such a file could be any on disk.
_NRRD_ELSEWHERE = re.compile(rb"data ?file\s*:", re.IGNORECASE)
_MHA_HERE = re.compile(rb"ElementDataFile *= *LOCAL *\r?", re.IGNORECASE)


def read_image(path: Path, name: str | None = None) -> Image:
    """An image of 2 or 3 dimensions, of one real number or of three uint8 a pixel.

    Args:
        name: what messages call it; None for the name of the file or folder.

    Raises:
        ImageError, MemoryShortage: as `volume.load_volume` says.
    """
    name = name or path.name
    if path.is_dir():
        image = read_series(path, name)
    elif path.is_file():
        image = _read_file(path, name)
    else:
        raise ImageError(f"there is no image '{name}'")
    _check_colour(image.array, name)
    return image


def read_itk(path: Path) -> tuple[sitk.Image, Modality]:
    """`read_image` as ITK's, and DICOM's modality."""
    image = read_image(path)
    return image.to_itk(), image.modality


def _read_file(path: Path, name: str) -> Image:
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    if not head:
        raise ImageError(f"'{name}' is empty")
    kind = _kind(head) or _ending(path.name, name)
    if _names_another_file(head, kind):
        raise ImageError(f"'{name}' keeps its voxels in another file, or its header is unusual")
    if kind == ".dcm":
        return read_dicom(path, name)
    if kind in _ITK:
        return _read_by_itk(path, kind, name)
    with shortage_told(f"reading '{name}'"):
        return read_nifti(path, name)


def _kind(head: bytes) -> str | None:
    """The ending that belongs to a file's first bytes, None for none that is known."""
    if head.startswith(GZIP):
        try:
            inside = zlib.decompressobj(wbits=31).decompress(head, HEADER_BYTES)
        except zlib.error:
            inside = b""
        return ".nii.gz" if is_nifti(inside) else None
    if is_dicom(head):
        return ".dcm"
    found = next((ending for beginning, ending in _BEGINNINGS if head.startswith(beginning)), None)
    if found or not _MHA.match(head):
        return found or (".nii" if is_nifti(head) else None)
    return ".mha"


def _ending(file: str, name: str) -> str:
    """The ending of a kind that is read; raises ImageError for any other."""
    found = [ending for ending in _ENDINGS if file.lower().endswith(ending)]
    if not found:
        raise ImageError(f"'{name}' is not an image of a known kind: expected {', '.join(_ENDINGS)}")
    return found[-1]


def _names_another_file(head: bytes, kind: str) -> bool:
    """Whether a header may lead to voxels elsewhere; also true for one whose end does not lie in `head`."""
    if kind == ".nrrd":
        text = head.replace(b"\r\n", b"\n")
        end = text.find(b"\n\n")
        return end < 0 or b"\r" in text[:end] or _NRRD_ELSEWHERE.search(head) is not None
    if kind == ".mha":
        fields = [line for line in head.split(b"\n") if b"elementdatafile" in line.lower()]
        return not fields or not all(_MHA_HERE.fullmatch(field) for field in fields)
    return False


def _read_by_itk(path: Path, kind: str, name: str) -> Image:
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_ITK[kind])
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        if 0 in reader.GetSize():  # how ITK says that this is no picture
            raise damaged(name)
        _check_reader(reader, name)
        with shortage_told(f"reading '{name}'"):
            image = reader.Execute()
    except RuntimeError:
        raise damaged(name) from None
    if "complex" in image.GetPixelIDTypeAsString():
        raise ImageError(f"'{name}' holds complex numbers; expected real ones")
    return _of_itk(_to_three_dimensions(image, name))


def _check_reader(reader: sitk.ImageFileReader, name: str) -> None:
    """Refuses an image by its header."""
    pixel = sitk.Image([1, 1], reader.GetPixelID())
    value_bytes = int(pixel.GetSizeOfPixelComponent())
    if "vector" in pixel.GetPixelIDTypeAsString():
        value_bytes *= reader.GetNumberOfComponents()
    check_size(reader.GetSize(), value_bytes, name)


def _to_three_dimensions(image: sitk.Image, name: str) -> sitk.Image:
    size = image.GetSize()
    if len(size) <= 3:
        return image
    if any(n > 1 for n in size[3:]):
        raise ImageError(f"'{name}' has {len(size)} dimensions, {'×'.join(map(str, size))}; a volume has 3")
    # Extraction drops the axes asked for with size 0.
    return sitk.Extract(image, [*size[:3], *[0] * (len(size) - 3)])


class _Held:
    """An array within an image's memory, which stays as long as the array does: a copy would cost as much."""

    def __init__(self, array: NDArray[np.generic], image: sitk.Image) -> None:
        self.__array_interface__ = array.__array_interface__
        self._image = image


def _of_itk(image: sitk.Image) -> Image:
    stored = sitk.GetArrayViewFromImage(image)
    spatial = image.GetDimension()
    # ITK's arrays run [k, j, i], colour last.
    array = stored.transpose(*range(spatial - 1, -1, -1), *range(spatial, stored.ndim))
    if spatial == 2:
        array = np.expand_dims(array, 2)
    array = np.asarray(_Held(array, image))
    if array.ndim == 4 and array.shape[3] == 4:
        array = array[..., :3]  # opacity is left out
    return Image(array, image.GetOrigin(), image.GetSpacing(), image.GetDirection())


def _check_colour(array: NDArray[np.generic], name: str) -> None:
    if array.ndim == 4 and (array.shape[3] != 3 or array.dtype != np.uint8):
        raise ImageError(
            f"'{name}' holds {array.shape[3]} values a pixel ({array.dtype}); expected one, or colour of 8 "
            "bit"
        )
