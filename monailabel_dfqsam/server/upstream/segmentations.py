"""Label maps to DICOM segmentations of a series, written by highdicom, and back.

Upstream names a label's segments by their rank among the values present, gives all the code of the spleen,
and fails for a colour in words, a label without voxels and one beside the series. Here the values choose,
codes are DICOM's own, colours are read, and what no segmentation can be made of is refused.
"""

from __future__ import annotations

import functools
import importlib
import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
import SimpleITK as sitk
from monailabel.datastore.utils.colors import GENERIC_ANATOMY_COLORS
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from monailabel_dfqsam.segmentation.image import ImageError
from monailabel_dfqsam.segmentation.reading import read_itk
from monailabel_dfqsam.segmentation.slices import GeometryError, grid_of
from monailabel_dfqsam.server.gate.guard import Refusal

if TYPE_CHECKING:
    from pydicom.sr.coding import Code

Info = Mapping[str, Any]

_RGB = re.compile(r"rgba?\(\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*(?:,[^)]*)?\)")
_RED = (255, 0, 0)
_OFF = 0.1  # voxels
_SERIES_NUMBER = 300
_MAX_SEGMENTS = 1000
# Which DICOM has every image hold, be it empty, and some do not.
_HELD = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime",
)  # fmt: skip
# What highdicom raises for headers that are not as DICOM has them.
_NOT_DICOM = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def load_in_background() -> None:
    """Loads what a segmentation is written with, so that no click waits while the first one is."""

    def load() -> None:
        # The second is 20 MB of DICOM's tables.
        for name in ("highdicom.seg", "highdicom._modules", "skimage.color"):
            importlib.import_module(name)
        _known_codes()

    threading.Thread(target=load, name="dfqsam-segmentations", daemon=True).start()


def write_segmentation(series: Path, label: Path, label_info: Sequence[Info]) -> Path:
    """Writes a label map as a DICOM segmentation of a series.

    Args:
        series: a folder with the files of one series; beside it lies the same as `.nii.gz`.
        label: on the grid of that; every value but 0 becomes a segment.
        label_info: what the values are, see `segments`.

    Returns:
        A temporary file, the caller's to remove.

    Raises:
        Refusal: 400 with a sentence.
    """
    mask = read_image(label)
    present, numbers = _numbered(sitk.GetArrayViewFromImage(mask))
    image = sitk.ImageFileReader()
    image.SetFileName(f"{series}.nii.gz")
    image.ReadImageInformation()
    if not _same_grid(mask, image):
        raise Refusal(
            400, "the label does not lie on the grid of its series: no segmentation can be made of it"
        )
    try:
        made = _segmentation(
            _headers(series, image.GetSpacing()[2]),
            numbers,
            [_description(n, segment) for n, segment in enumerate(segments(present, label_info), start=1)],
        )
    except (*_NOT_DICOM, GeometryError):
        raise Refusal(
            400, "no DICOM segmentation can be made of this series: its headers lack what one needs"
        ) from None
    with tempfile.NamedTemporaryFile(prefix="dfqsam-", suffix=".dcm", delete=False) as file:
        made.save_as(file, write_like_original=False)
    return Path(file.name)


def read_segmentation(segmentation: Path, image: Path, label: Path) -> list[dict[str, Any]]:
    """Writes a DICOM segmentation as a label map on an image's grid, whose empty slices it need not hold.

    Returns:
        `name` and `idx`, the value, of each segment.

    Raises:
        Refusal: 400 when it cannot be one label map.
    """
    from pydicom_seg import MultiClassReader

    d, grid = pydicom.dcmread(segmentation), read_image(image)
    if d.get("SegmentationType") != "BINARY":
        raise Refusal(400, "the series' label in the archive holds fractions: it is no label map")
    try:
        measures = d.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        if "SpacingBetweenSlices" not in measures:  # slices need not be as far apart as they are thick
            measures.SpacingBetweenSlices = pydicom.valuerep.DSfloat(grid.GetSpacing()[2], auto_format=True)
        d.SegmentsOverlap = "UNDEFINED"  # whatever is said of it: looked for
        found = MultiClassReader().read(d).image
        names = [
            {"name": str(segment.SegmentLabel), "idx": int(segment.SegmentNumber)}
            for segment in d.SegmentSequence
        ]
    except _NOT_DICOM as error:
        overlap = "overlapping" in str(error)
        raise Refusal(
            400,
            "the series' label in the archive "
            + (
                "has overlapping parts: it is no one map"
                if overlap
                else "cannot be read: it is of a rare kind"
            ),
        ) from None
    placed = sitk.Resample(found, grid, sitk.Transform(), sitk.sitkNearestNeighbor, 0.0)
    sitk.WriteImage(placed, str(label))
    return names


def read_image(path: Path) -> sitk.Image:
    """As `read_itk`; raises Refusal 400 for what cannot be read."""
    try:
        return read_itk(path)[0]
    except ImageError as error:
        raise Refusal(400, str(error)) from None


def segments(values: Sequence[int], label_info: Sequence[Info]) -> list[dict[str, Any]]:
    """What is said of each value in a label, in the words of dcmqi's segment attributes.

    Args:
        values: those other than 0, in order.
        label_info: as a client sends it: `name`, and perhaps `idx`, the value, `color`, `description`, and
            `segmentAttribute`, which stands as it is. Where a value is nobody's `idx`, the place in the list
            counts: Slicer counts segments that it does not send.
    """
    by_value = {entry["idx"]: entry for entry in label_info if isinstance(entry.get("idx"), int)}
    if not set(values) <= set(by_value):
        by_value = dict(enumerate(label_info, start=1))
    return [_segment(value, by_value.get(value, {})) for value in values]


def _numbered(array: NDArray[Any]) -> tuple[list[int], NDArray[np.uint16]]:
    """The values other than 0 in a label map, in order, and the map with 1, 2, … in their place."""
    values = np.unique(array)
    present = values[values != 0]
    if not len(present):
        raise Refusal(400, "the label is empty: a DICOM segmentation holds at least one voxel")
    if len(present) > _MAX_SEGMENTS or (present != np.rint(present)).any():
        raise Refusal(400, f"a label holds whole numbers, at most {_MAX_SEGMENTS} different ones")
    numbers = np.zeros(array.shape, np.uint16)
    for number, value in enumerate(present, start=1):
        numbers[array == value] = number
    return [int(value) for value in present], numbers


def _segmentation(headers: Sequence[Dataset], numbers: NDArray[np.uint16], described: list[Any]) -> Dataset:
    """The instance; `numbers` [K, J, I] names a segment for each voxel, 0 none, slices as in `headers`."""
    from highdicom.seg import Segmentation  # slow to import, and a server starts without it

    release = version("monailabel-dfqsam")
    return Segmentation(
        source_images=headers,
        pixel_array=numbers,
        segmentation_type="BINARY",
        segment_descriptions=described,
        series_instance_uid=pydicom.uid.generate_uid(),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=pydicom.uid.generate_uid(),
        instance_number=1,
        manufacturer="DFQ-SAM",
        manufacturer_model_name="DFQ-SAM for MONAI Label",
        software_versions=release,
        device_serial_number=release,
        content_label="SEGMENTATION",
        content_description="MONAI Label - Image segmentation",
        series_description="Segmentation",
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
    )


def _headers(series: Path, distance: float) -> list[Dataset]:
    """Of a series' files, in the order of the slices, with what highdicom asks for.

    Args:
        distance: between slices, millimetres. Without it, some readers take slices to be as far apart as they
            are thick.
    """
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in sorted(series.iterdir())]
    grid = grid_of(headers)
    if grid is not None and len(headers) > 1:
        headers = [headers[n] for n in grid.order]
    for header in headers:
        for name in _HELD:
            if name not in header:
                setattr(header, name, None)
        if grid is None and "FrameOfReferenceUID" in header:
            del header.FrameOfReferenceUID  # it is nothing without a place in it
        measures = header
        if "NumberOfFrames" in header:
            measures = _shared(header)
        measures.SpacingBetweenSlices = pydicom.valuerep.DSfloat(distance, auto_format=True)
        if not measures.get("SliceThickness"):
            measures.SliceThickness = measures.SpacingBetweenSlices
    return headers


def _shared(header: Dataset) -> Dataset:
    """The pixel measures of all frames, which, with their orientation, some scanners repeat for each."""
    shared, first = header.SharedFunctionalGroupsSequence[0], header.PerFrameFunctionalGroupsSequence[0]
    for name in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        if name not in shared:
            setattr(shared, name, getattr(first, name))
    measures: Dataset = shared.PixelMeasuresSequence[0]
    return measures


def _description(number: int, said: Info) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes
    from skimage.color import rgb2lab

    found = SegmentDescription(
        number,
        said["SegmentLabel"],
        _read_code(said["SegmentedPropertyCategoryCodeSequence"]),
        _read_code(said["SegmentedPropertyTypeCodeSequence"]),
        said["SegmentAlgorithmType"],
        AlgorithmIdentificationSequence(
            said["SegmentAlgorithmName"],
            codes.cid7162.ArtificialIntelligence,
            version("monailabel-dfqsam"),
        ),
    )
    found.SegmentDescription = said["SegmentDescription"]
    colour = np.array(said["recommendedDisplayRGBValue"], np.uint8)
    # With the white of screens, D65: so dcmqi reads it, which wrote these before, and by which Slicer reads.
    found.RecommendedDisplayCIELabValue = list(CIELabColor(*rgb2lab(colour / 255)).value)
    return found


def _same_grid(mask: sitk.Image, image: sitk.ImageFileReader) -> bool:
    """Whether sizes are the same, and places to a tenth of a voxel over the whole volume."""
    if mask.GetSize() != image.GetSize():
        return False
    n = mask.GetDimension()
    steps = [np.array(x.GetDirection()).reshape(n, n) * x.GetSpacing() for x in (mask, image)]
    apart = np.abs(steps[0] - steps[1]) @ np.array(mask.GetSize()) + np.abs(
        np.array(mask.GetOrigin()) - image.GetOrigin()
    )
    return bool(apart.max() < _OFF * min(image.GetSpacing()))


def _segment(value: int, info: Info) -> dict[str, Any]:
    name = str(info.get("name") or "unknown")[:64]
    kind, category = _code(name)
    given = info.get("segmentAttribute")
    attribute = {
        "labelID": value,
        "SegmentLabel": name,
        "SegmentDescription": str(info.get("description") or name)[:64],
        "SegmentAlgorithmType": "SEMIAUTOMATIC",
        "SegmentAlgorithmName": "MONAILABEL",
        "SegmentedPropertyCategoryCodeSequence": _written(category),
        "SegmentedPropertyTypeCodeSequence": _written(kind),
        "recommendedDisplayRGBValue": _colour(info.get("color"), name),
    }
    return {**attribute, **(given if isinstance(given, dict) else {})}


def _code(name: str) -> tuple[Code, Code]:
    """Type and category; plain tissue for a name that DICOM does not list."""
    known = _known_codes()
    return known.get(_plain(name), known["tissue"])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@functools.cache
def _known_codes() -> dict[str, tuple[Code, Code]]:
    """Type and category by the letters of a name; of DICOM's lists the first that has a name counts."""
    from pydicom.sr.codedict import codes  # slow to import, and a server starts without it

    abnormal = codes.SCT.MorphologicallyAbnormalStructure
    anatomy, tissue = codes.cid7150.AnatomicalStructure, codes.SCT.Tissue
    found = {
        "lesion": (codes.SCT.Lesion, abnormal),
        "tumour": (codes.SCT.Neoplasm, abnormal),
        "tumor": (codes.SCT.Neoplasm, abnormal),
        "vessel": (codes.SCT.BloodVessel, tissue),
        "organ": (codes.SCT.Organ, anatomy),
    }
    for named, category in ((codes.cid7159, abnormal), (codes.cid7166, tissue), (codes.cid7151, anatomy)):
        for name in named.dir():
            with suppress(AttributeError):  # a pacemaker has two codes
                found.setdefault(name.lower(), (getattr(named, name), category))
    return {"tissue": (tissue, tissue), **found}


def _written(code: Code) -> dict[str, str]:
    return {
        "CodeValue": code.value,
        "CodingSchemeDesignator": code.scheme_designator,
        "CodeMeaning": code.meaning,
    }


def _read_code(written: Mapping[str, str]) -> Code:
    from pydicom.sr.coding import Code

    return Code(written["CodeValue"], written["CodingSchemeDesignator"], written["CodeMeaning"])


def _colour(given: Any, name: str) -> list[int]:
    """[3] of 0 … 255, from numbers or 'rgb(…)'; anything else leaves it to the name."""
    if isinstance(given, str) and (match := _RGB.fullmatch(given.strip())):
        given = [int(number) for number in match.groups()]
    if (
        not isinstance(given, list)
        or len(given) < 3
        or not all(isinstance(x, int | float) for x in given[:3])
    ):
        given = GENERIC_ANATOMY_COLORS.get(name.lower(), _RED)
    return [int(min(255, max(0, x))) for x in given[:3]]
