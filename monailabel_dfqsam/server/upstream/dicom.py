"""MONAI Label's datastore of a DICOMweb archive, put right.

- A series of an archive becomes one file whatever the places of its slices are: `segmentation.reading` reads
  it here, and refuses what is no volume. One of which a part came is refused, too.
- Labels become segmentations, and segmentations labels, by `segmentations`.
- Each click asks the archive how many series it has: for a click, and while the archive is away, what was
  told last counts.
- Without a filter, segmentations, reports and the like are listed among the images: they are left out.
- A series that is refused would be proposed as the next sample again and again: it is passed over. So
  is one labelled here, which the archive's list, kept for minutes, does not know yet.
- A label that another server, or this one before its cache was emptied, left in the archive is never found.
- Lists are kept in caches that two threads must not change at once.
- At its start, the server downloads a program for segmentations that it does not need.
"""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import SimpleITK as sitk
from cachetools import TTLCache, cached
from monailabel.config import settings
from monailabel.datastore import dicom as upstream
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.utils.convert import dicom_to_nifti
from monailabel.datastore.utils.dicom import dicom_web_download_series, dicom_web_upload_dcm
from monailabel.endpoints import activelearning as activelearning_endpoint
from monailabel.interfaces import app as upstream_app
from pydicom.dataset import Dataset

from monailabel_dfqsam.server.gate.guard import Refusal
from monailabel_dfqsam.server.upstream.archive import (
    ArchiveClient,
    ArchiveError,
    check_complete,
    failing,
    found_series,
)
from monailabel_dfqsam.server.upstream.folder import FolderStore
from monailabel_dfqsam.server.upstream.segmentations import (
    Info,
    read_image,
    read_segmentation,
    write_segmentation,
)

_NO_IMAGES = frozenset(
    {"SEG", "RTSTRUCT", "RTPLAN", "RTRECORD", "SR", "PR", "KO", "REG", "AU", "DOC", "FID", "ECG", "M3D"}
)

# Series of which this process knows that they are no volume, or that the archive has lost them; one that was
# completed since is read when named.
_refused: set[str] = set()
_here = threading.local()


def repair_dicom() -> None:
    """Replaces upstream's methods; call it once in each process that fetches from an archive."""
    upstream_app.DICOMwebClientX = upstream_app.DICOMwebClient = ArchiveClient
    upstream_app.MONAILabelApp._download_dcmqi_tools = lambda self: None
    upstream.dicom_web_download_series, upstream.dicom_web_upload_dcm = _download, _upload
    upstream.dicom_to_nifti, upstream.nifti_to_dicom_seg = _image_file, _segmentation_file
    unlabeled, sample = DICOMWebDatastore.get_unlabeled_images, activelearning_endpoint.sample

    @functools.wraps(unlabeled)
    def readable(self: Any, *arguments: Any, **options: Any) -> list[str]:
        left_out = {*_refused, *FolderStore.get_labeled_images(self)}
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
    DICOMWebDatastore.get_labeled_images = _kept(DICOMWebDatastore.get_labeled_images.__wrapped__)
    DICOMWebDatastore._dicom_info = _known_info(DICOMWebDatastore._dicom_info)
    activelearning_endpoint.sample = readable_sample
    DICOMWebDatastore.status = _last_known(DICOMWebDatastore.status)


@contextmanager
def not_asking() -> Iterator[None]:
    """Within, this thread takes the numbers that the archive told last."""
    _here.known = True
    try:
        yield
    finally:
        _here.known = False


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
        path = Path(folder) / f"{found.SOPInstanceUID}.dcm"
        label = Path(folder) / "label.nii.gz"
        names = read_segmentation(path, Path(store.get_image_uri(image)), label)
        FolderStore.save_label(
            store, image, str(label), tag, {"label_info": names, "SeriesInstanceUID": series}
        )
    return str(FolderStore.get_label_uri(store, image, tag))


def _kept(lists: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Keeps what a method answers for as long as upstream does."""
    cache = TTLCache[Any, list[str]](maxsize=16, ttl=settings.MONAI_LABEL_DICOMWEB_CACHE_EXPIRY)
    kept: Callable[..., list[str]] = cached(cache, lock=threading.Lock())(lists)
    return kept


@_kept
def _list_images(self: DICOMWebDatastore) -> list[str]:
    found = [
        Dataset.from_json(entry)
        for entry in self._client.search_for_series(search_filters=self._search_filter)
    ]
    return [str(d.SeriesInstanceUID) for d in found if d.get("Modality") not in _NO_IMAGES]


def _last_known(status: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(status)
    def last_known(self: Any) -> Any:
        if not getattr(_here, "known", False):
            with suppress(Refusal):  # everything but new series goes on without the archive
                self._dfqsam_status = status(self)
        return self.__dict__.get("_dfqsam_status", {"total": 0, "completed": 0, "label_tags": {}})

    return last_known


def _known_info(info: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(info)
    def known_info(self: Any, series_id: str) -> dict[str, Any]:
        found_series(self._client, series_id)
        return info(self, series_id)

    return known_info


def _download(
    study: str | None, series: str, folder: str, client: ArchiveClient, frames: bool = False
) -> None:
    """Upstream's, of a whole series or of nothing; raises ArchiveError."""
    try:
        announced = found_series(client, series)
        with failing():
            dicom_web_download_series(str(announced.StudyInstanceUID), series, folder, client, frames)
        check_complete(announced, len(os.listdir(folder)))
    except ArchiveError as error:
        if error.status == 404:
            _refused.add(series)
        raise


def _upload(file: str, client: ArchiveClient) -> str:
    """Upstream's, which leaves the file behind when the archive does not take it."""
    try:
        return str(dicom_web_upload_dcm(file, client))
    except BaseException:
        os.unlink(file)
        raise


def _image_file(series_dir: str, is_seg: bool = False) -> str:
    """A NIfTI of a series, the caller's to remove."""
    if is_seg:
        return str(dicom_to_nifti(series_dir, is_seg))
    try:
        image = read_image(Path(series_dir))
    except Refusal:
        _refused.add(os.path.basename(series_dir))
        raise
    _refused.discard(os.path.basename(series_dir))
    handle, path = tempfile.mkstemp(prefix="dfqsam-", suffix=".nii.gz")
    os.close(handle)
    sitk.WriteImage(image, path)
    return path


def _segmentation_file(series_dir: str, label: str, label_info: Sequence[Info] | None = None) -> str:
    return str(write_segmentation(Path(series_dir), Path(label), label_info or []))


def _newest_segmentation(store: DICOMWebDatastore, image: str) -> Dataset | None:
    """The header of the last segmentation that names the series as its source."""
    study = store._dicom_info(image)["StudyInstanceUID"]
    found = []
    for entry in store._client.search_for_series(study, search_filters={"Modality": "SEG"}):
        series = str(Dataset.from_json(entry).SeriesInstanceUID)
        for header in map(Dataset.from_json, store._client.retrieve_series_metadata(study, series)):
            sources = header.get("ReferencedSeriesSequence") or []
            if any(str(source.SeriesInstanceUID) == image for source in sources):
                found.append(header)
    return max(found, key=lambda d: (str(d.get("ContentDate")), str(d.get("ContentTime"))), default=None)
