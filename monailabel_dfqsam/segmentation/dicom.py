"""DICOM: which files of a folder are one series, and the values of each by its own transform.

A slope, an intercept and a sign belong to a file, or to a frame; PET and some CT have others in each slice.
pydicom reads the headers and plain pixels, GDCM unpacks compressed ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixel_data_handlers.util import apply_color_lut, apply_modality_lut, convert_color_space
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from monailabel_dfqsam.memory import shortage_told
from monailabel_dfqsam.segmentation.image import Image, ImageError, check_size, damaged
from monailabel_dfqsam.segmentation.slices import DAMAGED, TAGS, GeometryError, Grid, grid_of

GDCM = "GDCMImageIO"

_PREAMBLE, _MAGIC = 128, b"DICM"
# Little-endian groups that a data set without preamble begins with, and the most bytes of its first value.
_FIRST_GROUPS, _FIRST_BYTES = (b"\x02\0", b"\x08\0"), 256
_PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless)
_SAMPLES = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation",
)  # fmt: skip
_HEADER = [
    *TAGS, *_SAMPLES, "SeriesInstanceUID", "InstanceNumber", "Modality", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence",
]  # fmt: skip
_LITTLE, _BIG = np.iinfo(np.int16), np.iinfo(np.int32)


def is_dicom(head: bytes) -> bool:
    """Whether a file begins as DICOM does, with or without the preamble."""
    if head[_PREAMBLE : _PREAMBLE + 4] == _MAGIC:
        return True
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    length = int.from_bytes(head[6:8] if explicit else head[4:8], "little")
    return len(head) > 8 and head[:2] in _FIRST_GROUPS and length <= _FIRST_BYTES


def read_series(folder: Path, name: str) -> Image:
    """The one series in a folder, whose other files are left alone.

    Raises:
        ImageError, MemoryShortage: as `volume.load_volume` says.
    """
    series: dict[str, list[tuple[Path, Dataset]]] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as file:
            head = file.read(_PREAMBLE + 4)
        if is_dicom(head) and "Rows" in (header := _header(path, path.name)):
            series.setdefault(str(header.get("SeriesInstanceUID")), []).append((path, header))
    if len(series) != 1:
        raise ImageError(f"the folder '{name}' must hold one DICOM series, not {len(series)}")
    (files,) = series.values()
    # By their numbers, which stand where no place is told.
    files.sort(key=lambda file: (_integer(file[1], "InstanceNumber"), file[0].name))
    return _read(files, name)


def read_dicom(path: Path, name: str) -> Image:
    """One file, of one or many frames; raises as `read_series` does."""
    header = _header(path, name)
    if "Rows" not in header:
        raise ImageError(f"'{name}' is a DICOM file without an image") if header else damaged(name)
    return _read([(path, header)], name)


def _read(files: Sequence[tuple[Path, Dataset]], name: str) -> Image:
    headers = [header for _, header in files]
    try:
        grid = grid_of(headers)
        first = headers[0]
        frames = len(files) if len(files) > 1 else max(1, _integer(first, "NumberOfFrames", 1))
        samples, stored = _integer(first, "SamplesPerPixel", 1), _integer(first, "BitsAllocated", 16) // 8
        # Of one file, what is stored stays until all of it is converted.
        value_bytes = samples * max(stored, 1) * (2 if len(files) == 1 else 1)
        check_size((frames, int(first.Rows), int(first.Columns)), value_bytes, name)
        ordered = [files[n] for n in grid.order] if grid and len(files) > 1 else files
        inverted = {header.get("PhotometricInterpretation") == "MONOCHROME1" for header in headers}
        if len(inverted) > 1:
            raise ImageError(f"'{name}' mixes slices whose low values are white with others")
        with shortage_told(f"reading '{name}'"):
            single = name if len(files) == 1 else None
            planes = (plane for path, _ in ordered for plane in _planes(path, single or path.name))
            array = _stacked(planes, frames, name)
    except GeometryError as error:
        raise ImageError(f"'{name}' {error}") from None
    except DAMAGED as error:
        raise error if isinstance(error, ImageError) else damaged(name) from None
    place = grid or _unplaced(ordered[0][0])
    modality = str(first.get("Modality") or "").strip() or None
    turned = array.transpose(2, 1, 0, *range(3, array.ndim))
    return Image(turned, place.origin, place.spacing, place.direction, modality, inverted.pop())


def _header(path: Path, name: str) -> Dataset:
    try:
        return pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=_HEADER)
    except DAMAGED:
        raise damaged(name) from None


def _integer(header: Dataset, name: str, default: int = 0) -> int:
    try:
        return int(header.get(name) or default)
    except (TypeError, ValueError):
        return default


def _planes(path: Path, name: str) -> Iterator[NDArray[Any]]:
    """A file's frames [J, I] or [J, I, 3], by each one's own transform."""
    try:
        data = pydicom.dcmread(path, force=True)
        stored = _stored(data, name)
        transforms = _transforms(data, len(stored))
        if "PixelData" in data:
            del data.PixelData
        for frame, (slope, intercept) in zip(stored, transforms, strict=True):
            yield _transformed(frame, data, slope, intercept)
    except DAMAGED as error:
        raise error if isinstance(error, ImageError) else damaged(name) from None


def _stored(data: FileDataset, name: str) -> NDArray[Any]:
    """[K, J, I] or [K, J, I, samples] as stored, without bits that are no part of a value."""
    if "TransferSyntaxUID" not in data.file_meta:
        plain = ImplicitVRLittleEndian if data.is_implicit_VR else ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = plain if data.is_little_endian else ExplicitVRBigEndian
    array = data.pixel_array if data.file_meta.TransferSyntaxUID in _PLAIN else _unpacked(data, name)
    frame = array.shape[-2:] if data.SamplesPerPixel == 1 else array.shape[-3:]
    array = array.reshape(max(1, _integer(data, "NumberOfFrames", 1)), *frame)
    return array if array.dtype.kind == "f" else _valid_bits(array, data)


def _valid_bits(array: NDArray[Any], data: Dataset) -> NDArray[Any]:
    """Whole numbers of `BitsStored` bits up to `HighBit`; the others may hold an overlay, or anything."""
    stored, allocated = int(data.BitsStored), array.dtype.itemsize * 8
    high = _integer(data, "HighBit", stored - 1)
    if stored >= allocated or not stored - 1 <= high < allocated or data.BitsAllocated == 1:
        return array
    # A signed number's sign comes from its highest valid bit.
    raised: NDArray[Any] = np.left_shift(array, allocated - 1 - high, dtype=array.dtype)
    return np.right_shift(raised, allocated - stored, dtype=array.dtype, out=raised)


def _unpacked(data: Dataset, name: str) -> NDArray[Any]:
    """Compressed pixels as stored: GDCM is given them without transforms and without the patient."""
    bare = Dataset()
    bare.SOPClassUID, bare.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    for tag in (*_SAMPLES, "PixelData"):
        if tag in data:
            bare[tag] = data[tag]
    if data.SamplesPerPixel == 1:
        bare.PhotometricInterpretation = "MONOCHROME2"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = bare.SOPClassUID, bare.SOPInstanceUID
    meta.TransferSyntaxUID = data.file_meta.TransferSyntaxUID
    with tempfile.TemporaryDirectory(prefix="dfqsam-") as folder:
        path = Path(folder) / "bare.dcm"
        whole = FileDataset(str(path), bare, file_meta=meta, preamble=bytes(_PREAMBLE))
        whole.is_little_endian, whole.is_implicit_VR = True, False
        whole.save_as(path, write_like_original=False)
        try:
            image = sitk.ReadImage(str(path), imageIO=GDCM)
        except RuntimeError:
            way = meta.TransferSyntaxUID.name
            raise ImageError(
                f"'{name}' cannot be read: its pixels are damaged, or packed in a way unknown here ({way})"
            ) from None
    array: NDArray[Any] = sitk.GetArrayFromImage(image)
    return array


def _transforms(data: Dataset, frames: int) -> list[tuple[float, float]]:
    """Slope and intercept of each frame; a slope of 0 says none, since it would leave nothing to see."""
    shared = list(data.get("SharedFunctionalGroupsSequence") or [])
    each = list(data.get("PerFrameFunctionalGroupsSequence") or [])
    if len(each) != frames:
        each = [Dataset()] * frames
    found = []
    for groups in each:
        sources = [
            sequence[0]
            for holder in (groups, *shared)
            if (sequence := holder.get("PixelValueTransformationSequence"))
        ]
        source = next(iter([*sources, data]))
        slope, intercept = (source.get(name) for name in ("RescaleSlope", "RescaleIntercept"))
        found.append((float(slope or 1), float(intercept or 0)))
    return found


def _transformed(frame: NDArray[Any], data: Dataset, slope: float, intercept: float) -> NDArray[Any]:
    kind = str(data.get("PhotometricInterpretation"))
    if kind == "PALETTE COLOR":
        colours: NDArray[Any] = apply_color_lut(frame, data)
        return (colours >> 8).astype(np.uint8) if colours.dtype == np.uint16 else colours
    if frame.ndim == 3:
        # GDCM unpacks to RGB.
        if kind.startswith("YBR_FULL") and data.file_meta.TransferSyntaxUID in _PLAIN:
            frame = convert_color_space(frame, kind, "RGB")
        return frame
    if data.get("ModalityLUTSequence"):
        return _narrowed(apply_modality_lut(frame, data))
    if (slope, intercept) == (1, 0):
        return frame if frame.dtype == np.uint8 else _narrowed(frame)
    if frame.dtype.kind != "f" and slope.is_integer() and intercept.is_integer():
        return _narrowed(frame.astype(np.int64) * int(slope) + int(intercept))
    return (frame * slope + intercept).astype(np.float32)


def _narrowed(plane: NDArray[Any]) -> NDArray[Any]:
    """The smallest of int16, int32 and float32 that holds a plane."""
    if plane.dtype.kind == "f":
        return plane.astype(np.float32)
    low, high = int(plane.min()), int(plane.max())
    for limits in (_LITTLE, _BIG):
        if limits.min <= low and high <= limits.max:
            return plane.astype(limits.dtype, copy=False)
    return plane.astype(np.float32)


def _stacked(planes: Iterator[NDArray[Any]], count: int, name: str) -> NDArray[Any]:
    """[K, …] of planes of one shape, of a type that holds all."""
    whole: NDArray[Any] | None = None
    done = 0
    for k, plane in enumerate(planes):
        if whole is None:
            whole = np.empty((count, *plane.shape), plane.dtype)
        if plane.shape != whole.shape[1:]:
            raise ImageError(f"'{name}' has slices of different sizes, or of grey and of colour")
        joint = np.result_type(whole, plane)
        joint = np.dtype(np.float32) if joint.kind == "f" else joint
        whole = whole.astype(joint, copy=False)
        whole[k] = plane
        done = k + 1
    if whole is None or done != count:
        raise damaged(name)
    return whole


def _unplaced(path: Path) -> Grid:
    """Where ITK, and so 3D Slicer, puts an image that does not say where it lies."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(GDCM)
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return Grid([0], (0.0,) * 3, (1.0,) * 3, tuple(np.eye(3).ravel().tolist()))
    return Grid([0], reader.GetOrigin()[:3], reader.GetSpacing()[:3], reader.GetDirection()[:9])
