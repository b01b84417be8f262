"""What MONAI Label makes of DICOM, and makes DICOM of, put right.

- A series of an archive becomes one file whatever the places of its slices are: `segmentation.reading` reads
  it here, and refuses what is no volume.
- A label's segments are named by their rank among the values present, all have the code of the spleen, and a
  colour in words is a fault of the server. Here the values choose, and codes are DICOM's own or none.
- Each click asks the archive how many series it has: while it is away, what was told last counts.
- A label without voxels, or beside the series, is a fault of the server: refused here.
- Without a filter, segmentations, reports and the like are listed among the images: they are left out.
- A series that is refused would be proposed as the next sample again and again: it is passed over. So
  is one labelled here, which the archive's list, kept for minutes, does not know yet.
- A label that another server, or this one before its cache was emptied, left in the archive is never found.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
import requests
import SimpleITK as sitk
from cachetools import TTLCache, cached
from monailabel.config import settings
from monailabel.datastore import dicom as upstream
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.datastore.utils.colors import GENERIC_ANATOMY_COLORS
from monailabel.datastore.utils.convert import dicom_seg_to_itk_image, dicom_to_nifti, nifti_to_dicom_seg
from monailabel.datastore.utils.dicom import dicom_web_download_series
from monailabel.endpoints import activelearning as activelearning_endpoint
from pydicom.dataset import Dataset

from monailabel_dfqsam.segmentation.image import ImageError
from monailabel_dfqsam.segmentation.reading import read_itk
from monailabel_dfqsam.server.gate.guard import Refusal

if TYPE_CHECKING:
    from pydicom.sr.coding import Code

Info = Mapping[str, Any]

_RGB = re.compile(r"rgba?\(\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*(?:,[^)]*)?\)")
_RED = (255, 0, 0)
_OFF = 0.1  # voxels

_NO_IMAGES = {
    "SEG",
    "RTSTRUCT",
    "RTPLAN",
    "RTRECORD",
    "SR",
    "PR",
    "KO",
    "REG",
    "AU",
    "DOC",
    "FID",
    "ECG",
    "M3D",
}

# Series of which this process knows that they are no volume; one that was completed since is read when named.
_refused: set[str] = set()


def repair_dicom() -> None:
    """Replaces upstream's conversions; call it once in each process that fetches from an archive."""
    upstream.dicom_to_nifti = _image_file
    upstream.nifti_to_dicom_seg = _segmentation_file
    unlabeled, sample = DICOMWebDatastore.get_unlabeled_images, activelearning_endpoint.sample

    @functools.wraps(unlabeled)
    def readable(self: Any, *arguments: Any, **options: Any) -> list[str]:
        left_out = {*_refused, *LocalDatastore.get_labeled_images(self)}
        return [image for image in unlabeled(self, *arguments, **options) if image not in left_out]

    @functools.wraps(sample)
    def readable_sample(*arguments: Any, **options: Any) -> Any:
        while True:
            known = len(_refused)
            try:
                return sample(*arguments, **options)
            except Refusal:
                if len(_refused) <= known:
                    raise

    DICOMWebDatastore.list_images, DICOMWebDatastore.get_unlabeled_images = _list_images, readable
    activelearning_endpoint.sample = readable_sample
    DICOMWebDatastore.status = _last_known(DICOMWebDatastore.status)


def segments(values: Sequence[int], label_info: Sequence[Info]) -> list[dict[str, Any]]:
    """What `itkimage2segimage` is told of each value in a label.

    Args:
        values: those other than 0, in order.
        label_info: as a client sends it: `name`, and perhaps `idx`, the value, `color`, `description`,
            `segmentAttribute`. Where a value is nobody's `idx`, the place in the list counts: Slicer counts
            segments that it does not send.

    Returns:
        `label_info`'s entry of each value, its `segmentAttribute` complete.
    """
    by_value = {entry["idx"]: entry for entry in label_info if isinstance(entry.get("idx"), int)}
    if not set(values) <= set(by_value):
        by_value = dict(enumerate(label_info, start=1))
    return [_segment(value, by_value.get(value, {})) for value in values]


def archived_label(store: DICOMWebDatastore, image: str, tag: str) -> str:
    """Fetches a series' newest label from the archive into the store; its file, or "" when there is none.

    Raises:
        Refusal: 400 when it cannot be one label map.
    """
    found = _newest_segmentation(store, image)
    if found is None:
        return ""
    with tempfile.TemporaryDirectory(prefix="dfqsam-") as folder:
        series = str(found.SeriesInstanceUID)
        dicom_web_download_series(str(found.StudyInstanceUID), series, folder, store._client, False)
        (path,) = Path(folder).iterdir()
        names = [
            {"name": str(segment.SegmentLabel), "idx": int(segment.SegmentNumber)}
            for segment in pydicom.dcmread(path, stop_before_pixels=True).SegmentSequence
        ]
        label = os.path.join(folder, "label.nii.gz")
        _resample(path, Path(store.get_image_uri(image)), label)
        LocalDatastore.save_label(
            store, image, label, tag, {"label_info": names, "SeriesInstanceUID": series}
        )
    return str(LocalDatastore.get_label_uri(store, image, tag))


@cached(cache=TTLCache(maxsize=16, ttl=settings.MONAI_LABEL_DICOMWEB_CACHE_EXPIRY))
def _list_images(self: DICOMWebDatastore) -> list[str]:
    found = [
        Dataset.from_json(entry)
        for entry in self._client.search_for_series(search_filters=self._search_filter)
    ]
    return [str(d.SeriesInstanceUID) for d in found if d.get("Modality") not in _NO_IMAGES]


def _last_known(status: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(status)
    def last_known(self: Any) -> Any:
        try:
            self._dfqsam_status = status(self)
        except requests.RequestException:
            # Everything but new series goes on without the archive.
            return self.__dict__.get("_dfqsam_status", {"total": 0, "completed": 0, "label_tags": {}})
        return self._dfqsam_status

    return last_known


def _image_file(series_dir: str, is_seg: bool = False) -> str:
    """A NIfTI of a series, the caller's to remove."""
    if is_seg:
        return str(dicom_to_nifti(series_dir, is_seg))
    try:
        image = _read(series_dir)
    except Refusal:
        _refused.add(os.path.basename(series_dir))
        raise
    _refused.discard(os.path.basename(series_dir))
    handle, path = tempfile.mkstemp(prefix="dfqsam-", suffix=".nii.gz")
    os.close(handle)
    sitk.WriteImage(image, path)
    return path


def _read(path: str) -> sitk.Image:
    try:
        return read_itk(Path(path))[0]
    except ImageError as error:
        raise Refusal(400, str(error)) from None


def _segmentation_file(
    series_dir: str, label: str, label_info: Sequence[Info] | None, *others: Any, **more: Any
) -> str:
    mask = _read(label)
    present = [int(value) for value in np.unique(sitk.GetArrayViewFromImage(mask)) if value]
    if not present:
        raise Refusal(400, "the label is empty: an archive keeps none without a voxel")
    image = sitk.ImageFileReader()
    image.SetFileName(f"{series_dir}.nii.gz")
    image.ReadImageInformation()
    if not _same_grid(mask, image):
        raise Refusal(
            400, "the label does not lie on the grid of its series: no segmentation can be made of it"
        )
    return str(nifti_to_dicom_seg(series_dir, label, segments(present, label_info or []), *others, **more))


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
    given, colour = info.get("segmentAttribute"), _colour(info.get("color"), name)
    attribute = {
        "labelID": value,
        "SegmentLabel": name,
        "SegmentDescription": str(info.get("description") or name)[:64],
        "SegmentAlgorithmType": "SEMIAUTOMATIC",
        "SegmentAlgorithmName": "MONAILABEL",
        "SegmentedPropertyCategoryCodeSequence": _written(category),
        "SegmentedPropertyTypeCodeSequence": _written(kind),
        "recommendedDisplayRGBValue": colour,
    }
    complete = {**attribute, **(given if isinstance(given, dict) else {})}
    return {**info, "color": colour, "segmentAttribute": complete}


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


def _newest_segmentation(store: DICOMWebDatastore, image: str) -> Dataset | None:
    """The header of the last segmentation that names the series as its source."""
    study = store._dicom_info(image)["StudyInstanceUID"]
    found = []
    for entry in store._client.search_for_series(study, search_filters={"Modality": "SEG"}):
        series = str(Dataset.from_json(entry).SeriesInstanceUID)
        header = Dataset.from_json(store._client.retrieve_series_metadata(study, series)[0])
        sources = header.get("ReferencedSeriesSequence") or []
        if any(str(source.SeriesInstanceUID) == image for source in sources):
            found.append(header)
    return max(found, key=lambda d: (str(d.get("ContentDate")), str(d.get("ContentTime"))), default=None)


def _resample(segmentation: Path, image: Path, path: str) -> None:
    """Writes a DICOM segmentation on an image's grid, whose empty slices it need not hold."""
    try:
        read = dicom_seg_to_itk_image(str(segmentation))
    except ValueError:
        raise Refusal(
            400, "the series' label in the archive has overlapping parts: it is no one map"
        ) from None
    try:
        found = sitk.ReadImage(read)
    finally:
        os.unlink(read)
    sitk.WriteImage(
        sitk.Resample(found, _read(str(image)), sitk.Transform(), sitk.sitkNearestNeighbor, 0.0), path
    )
