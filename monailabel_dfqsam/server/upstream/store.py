"""MONAI Label's datastore and sessions, put right.

- Uploads of any name, extension and number of parts are taken, and archives unpacked: only images and labels
  under plain names are, and what was received is removed when its handler fails.
- An image is named by its file's name up to the first dot: here by the whole stem.
- Any file counts as a finished label: here one that is no label map, lies elsewhere than its image, or is
  empty without saying so, is refused before anything is stored.
- Fields that must be JSON objects are stored whatever they are.
- A session is named by the clock and the network card: by chance here. One that was written in part stops
  the removal of all old ones: it is removed at once.
- The archive of the dataset stays in the temporary folder; without any label there is a fault of the server.
- A DICOMweb series that came in part is taken for the whole; a label is looked for in the archive under the
  image's name, although it lies here.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from fastapi import BackgroundTasks, UploadFile
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.endpoints import datastore as datastore_endpoint
from monailabel.endpoints import session as session_endpoint
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.utils.app import app_instance
from starlette.background import BackgroundTask

from monailabel_dfqsam.files import IMAGE_ENDINGS
from monailabel_dfqsam.memory import MemoryShortage
from monailabel_dfqsam.segmentation.label_map import fit_label
from monailabel_dfqsam.segmentation.volume import ImageError, Volume
from monailabel_dfqsam.server.gate.guard import Refusal, check_name
from monailabel_dfqsam.server.gate.json_input import read_object
from monailabel_dfqsam.server.upstream.dicom import archived_label, repair_dicom
from monailabel_dfqsam.server.upstream.folder import FolderStore

MASK_EXTENSIONS = (".nii.gz", ".nii", ".nrrd")
LABEL_EXTENSIONS = (*MASK_EXTENSIONS, ".bin")

EMPTY = "empty"
"""The name of a segment by which a viewer says that nothing is to be found in an image."""

# What strategies and scoring read again, and take to be as they left it.
_SERVERS_OWN = frozenset({"strategy", "confidence", "name", "path", "ts"})
# Of a series' files, which often end in nothing or in a number.
_SLICE = re.compile(r".*\.(dcm|ima|dicom|[0-9]+)|[^.]+", re.IGNORECASE | re.DOTALL)
_UID = re.compile(r"[0-9][0-9.]{0,63}")
_SEPARATORS = re.compile(r"[/\\]")
_ABSOLUTE = re.compile(r"([A-Za-z]:)?[/\\]")
_CHECKSUM = re.compile(r"((SHA256|SHA512|MD5):)?[0-9A-Fa-f]+")


class UploadsRemoved:
    """Runs a request's clean-up when its handler fails; upstream only does when it succeeds."""

    def __init__(self, tasks: BackgroundTasks) -> None:
        self._tasks = tasks

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            for task in self._tasks.tasks:
                task.func(*task.args, **task.kwargs)


def repair_store() -> None:
    """Replaces upstream's handlers; call it once."""
    datastore_endpoint.add_image, datastore_endpoint.save_label = _add_image, _save_label
    _check_infos()
    _check_downloads()
    _replace_sessions()


def check_upload(upload: UploadFile, allowed: tuple[str, ...], what: str) -> None:
    """Refuses an upload by its file's name, which is left without the folder that it had there.

    Args:
        upload: Slicer sends the whole path of its temporary file, on Windows with both kinds of separators.
        allowed: endings.
        what: the part of the form, for the message.

    Raises:
        Refusal: 400.
    """
    name = upload.filename or ""
    parts = _SEPARATORS.split(name)
    if _ABSOLUTE.match(name) and ".." not in parts:
        name = parts[-1]
    check_name(name, f"the file name of {what}")
    if not name.lower().endswith(allowed):
        raise Refusal(400, f"{what} must be a {', '.join(allowed)} file")
    upload.filename = name


@contextmanager
def _received(upload: UploadFile, name: str) -> Iterator[Path]:
    """An upload as a file of this name, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="dfqsam-") as folder:
        path = Path(folder) / name
        with path.open("wb") as file:
            shutil.copyfileobj(upload.file, file)
        yield path


def _add_image(
    tasks: BackgroundTasks, image: str | None, params: str, file: UploadFile, user: str | None = None
) -> Any:
    check_upload(file, IMAGE_ENDINGS, "file")
    info = read_object(params, "params")
    _check_image_info(info)
    with _received(file, str(file.filename)) as path:
        stored = app_instance().datastore().add_image(image or "", str(path), _by(user, info))
    return {"image": stored}


def _save_label(
    tasks: BackgroundTasks,
    image: str,
    params: str,
    tag: str,
    label: UploadFile,
    user: str | None = None,
) -> Any:
    store = app_instance().datastore()
    is_archive = isinstance(store, DICOMWebDatastore)
    check_upload(label, LABEL_EXTENSIONS if is_archive else MASK_EXTENSIONS, "label")
    info = read_object(params, "params")
    check_label_info(info)
    with _received(label, str(label.filename)) as path:
        if not is_archive:
            _fit_label(path, store.get_image_uri(image), info)
        identity = store.save_label(image, str(path), tag or DefaultLabelTag.FINAL.value, _by(user, info))
    reply = app_instance().on_save_label(image, identity) or {}
    return {**reply, "image": image, "label": identity}


def _by(user: str | None, info: Mapping[str, Any]) -> dict[str, Any]:
    return {**info, **({"user": user} if user else {})}


def _fit_label(path: Path, image: str, info: Mapping[str, Any]) -> None:
    """Refuses an upload that is no label of the image at a path; one whose axes run otherwise is turned."""
    if not image:
        return  # there is none: `save_label` says so
    try:
        marks = fit_label(path, _volume(image))
    except ImageError as error:
        raise Refusal(400, f"the label was not saved: {error}") from None
    except MemoryShortage as error:
        raise Refusal(503, f"the label was not saved: {error}") from None
    names = [entry.get("name") for entry in info.get("label_info") or []]
    if not (marks or info.get("empty") is True or EMPTY in names):
        raise Refusal(
            400,
            f"the label was not saved: it is empty. If nothing is to be found, add a segment named '{EMPTY}' "
            'and submit again, or send "empty": true in params',
        )


def _volume(image: str) -> Volume | None:
    """An image; None for one that viewers may read, but this server does not."""
    try:
        return cast("Volume", app_instance().volume(Path(image)))
    except ImageError:
        return None


def check_label_info(params: Mapping[str, Any]) -> None:
    """Refuses names of a label's values that are none; raises Refusal 400."""
    entries = params.get("label_info")
    if entries is None:
        return
    named = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name", ""), str) for entry in entries
    )
    if not named:
        raise Refusal(400, "label_info must be a list of objects with a name each")


def _check_image_info(info: Mapping[str, Any]) -> None:
    reserved = sorted(_SERVERS_OWN & set(info))
    if reserved:
        raise Refusal(
            400, f"an image's info must not hold {', '.join(reserved)}, which the server keeps itself"
        )


def _check_infos() -> None:
    update_image, update_label = datastore_endpoint.update_image_info, datastore_endpoint.update_label_info

    @functools.wraps(update_image)
    def checked_image(image: str, info: str, user: str | None = None) -> Any:
        _check_image_info(read_object(info, "info"))
        return update_image(image, info, user)

    @functools.wraps(update_label)
    def checked_label(label: str, tag: str, info: str, user: str | None = None) -> Any:
        check_label_info(read_object(info, "info"))
        return update_label(label, tag, info, user)

    datastore_endpoint.update_image_info, datastore_endpoint.update_label_info = checked_image, checked_label


def _check_downloads() -> None:
    download_image, remove_label = datastore_endpoint.download_image, datastore_endpoint.remove_label
    download_dataset = datastore_endpoint.download_dataset

    @functools.wraps(download_image)
    def checked_image(image: str, check_only: bool = False, check_sum: str | None = None) -> Any:
        if check_sum and not _CHECKSUM.fullmatch(check_sum):
            raise Refusal(400, "check_sum must be hexadecimal, with SHA256:, SHA512: or MD5: before it")
        return download_image(image, check_only, check_sum)

    @functools.wraps(remove_label)
    def existing_label(id: str, tag: str, user: str | None = None) -> Any:
        if tag not in app_instance().datastore().get_labels_by_image_id(id):
            raise Refusal(404, f"the image has no label with the tag '{tag}'")
        return remove_label(id, tag, user)

    @functools.wraps(download_dataset)
    def removed_dataset(limit_cases: int | None = None) -> Any:
        if not app_instance().datastore().datalist():
            raise Refusal(404, "no image has a finished label yet")
        reply = download_dataset(limit_cases)
        reply.background = BackgroundTask(os.unlink, reply.path)
        return reply

    datastore_endpoint.download_image, datastore_endpoint.remove_label = checked_image, existing_label
    datastore_endpoint.download_dataset = removed_dataset


def _replace_sessions() -> None:
    get_session = session_endpoint.get_session

    @functools.wraps(session_endpoint.create_session)
    def create(tasks: BackgroundTasks, uncompress: bool, expiry: int, files: list[UploadFile]) -> Any:
        sessions = app_instance().sessions()
        if sessions is None:
            raise Refusal(406, "sessions are turned off on this server")
        if uncompress:
            raise Refusal(400, "archives are not unpacked: send the image, or the files of its series")
        _check_session_files(files)
        name = str(uuid.uuid4())
        with tempfile.TemporaryDirectory(prefix="dfqsam-") as folder:
            image = _receive(files, Path(folder))
            try:
                _, info = sessions.add_session(str(image), expiry, False, name)
            except BaseException:
                shutil.rmtree(os.path.join(sessions.store_path, name), ignore_errors=True)
                raise
        return {"session_id": name, "session_info": info.to_json()}

    @functools.wraps(get_session)
    def get(session_id: str, update_ts: bool = False, image: bool = False) -> Any:
        info = get_session(session_id, update_ts, False)
        if image and os.path.isdir(info["image"]):
            raise Refusal(400, "this session's image is a series of files, which is not sent as one")
        return get_session(session_id, False, image)

    session_endpoint.create_session, session_endpoint.get_session = create, get


def _check_session_files(files: list[UploadFile]) -> None:
    if len(files) == 1:
        check_upload(files[0], IMAGE_ENDINGS, "files")
        return
    names = [file.filename or "" for file in files]
    for name in names:
        check_name(name, "the file name of files")
        if not _SLICE.fullmatch(name):
            raise Refusal(
                400, "several files must be the slices of one DICOM series: .dcm, or without an ending"
            )
    if len(set(names)) != len(names):
        raise Refusal(400, "the files of a series must have different names")


def _receive(files: list[UploadFile], folder: Path) -> Path:
    """Where the one file was written, or else the folder of all."""
    # Messages about a series name its folder.
    first = str(files[0].filename)
    series = folder / (f"{first} and {len(files) - 1} more" if len(files) > 1 else "series")
    series.mkdir()
    for file in files:
        with (series / str(file.filename)).open("wb") as target:
            shutil.copyfileobj(file.file, target)
    return series if len(files) > 1 else series / str(files[0].filename)


def repair_dicomweb() -> None:
    """Replaces what fetches from an archive, in every process that does; call it once in each."""
    repair_dicom()
    get_image_uri, get_label_uri = DICOMWebDatastore.get_image_uri, DICOMWebDatastore.get_label_uri

    @functools.wraps(get_image_uri)
    def whole_image(self: Any, image_id: str) -> str:
        if not _UID.fullmatch(image_id):
            raise Refusal(400, "an image of this server is named by its SeriesInstanceUID")
        folder = os.path.join(self._datastore.image_path(), image_id)
        known = os.path.isdir(folder)
        try:
            fetched = str(get_image_uri(self, image_id))
        except Exception:
            # What came would be taken for the whole series from then on.
            if not known:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        kept = os.path.realpath(f"{folder}.nii.gz")
        if os.path.isfile(kept) and fetched != kept:  # the temporary file of which that is a copy
            os.unlink(fetched)
            return kept
        return fetched

    @functools.wraps(get_label_uri)
    def local_label(self: Any, label_id: str, label_tag: str, image_id: str = "") -> str:
        found = FolderStore.get_label_uri(self, label_id, label_tag)
        if found and os.path.isfile(found):
            return str(found)
        if label_tag == DefaultLabelTag.FINAL and not image_id and _UID.fullmatch(label_id):
            return archived_label(self, label_id, label_tag)
        return str(get_label_uri(self, label_id, label_tag, image_id))

    DICOMWebDatastore.get_image_uri, DICOMWebDatastore.get_label_uri = whole_image, local_label
