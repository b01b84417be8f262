"""MONAI Label's datastore, changed by several processes: the server, a batch, scoring.

Upstream keeps the record of all images in each process's memory and writes it whole, so that whoever writes
last takes back what the others wrote: a label saved while a batch runs loses its entry. Here every change of
a record happens under one lock of the folder, on a copy of the record as it is then, which takes the record's
place when it is complete: a thread that only reads never meets one that changes under it.

An archive's series is fetched into the same folder by all: one at a time, so that none takes a part for the
whole; a series that is here already waits for nobody. Sessions are shared by threads only.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore, LocalDatastoreModel
from monailabel.utils.sessions import Sessions

from monailabel_dfqsam.server.upstream.store import repair_dicomweb
from monailabel_dfqsam.server.upstream.threads import holding, slow

_CHANGES = (
    "add_image", "remove_image", "save_label", "remove_label", "update_image_info", "update_label_info",
    "_reconcile_datastore",
)  # fmt: skip
_ARCHIVE = "the image archive"
_FETCH_SECONDS = 60.0
_POLL_SECONDS = 0.005  # a change takes about as long


def share_datastore() -> None:
    """Replaces upstream's methods, in the server and in the processes that it starts; once is enough."""
    if LocalDatastore._init_from_datastore_file is _read_record:
        return
    for name in _CHANGES:
        setattr(LocalDatastore, name, _alone(getattr(LocalDatastore, name)))
    LocalDatastore._init_from_datastore_file = _read_record
    LocalDatastore._remove_non_existing = _remove_missing
    repair_dicomweb()
    DICOMWebDatastore.get_image_uri = _one_at_a_time(DICOMWebDatastore.get_image_uri)
    one = threading.RLock()
    for name in ("get_session", "remove_session", "remove_expired"):
        setattr(Sessions, name, _under(one, getattr(Sessions, name)))


def _lock(store: Any, what: str) -> FileLock:
    """The folder's lock of a kind; of each thread its own, and one that holds it may take it again."""
    # Upstream's own, which cannot be taken twice, is taken within.
    found: FileLock = store.__dict__.setdefault(f"_dfqsam_{what}", FileLock(f"{store._lock_file}-{what}"))
    return found


def _record(lock: FileLock) -> AbstractContextManager[None]:
    return holding(lock, "the record of the images", poll_seconds=_POLL_SECONDS)


def _alone(change: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(change)
    def alone(self: Any, *arguments: Any, **options: Any) -> Any:
        lock = _lock(self, "change")
        with _record(lock):
            if lock.lock_counter > 1:  # within another change, on its copy
                return change(self, *arguments, **options)
            self._init_from_datastore_file()
            draft = copy.copy(self)
            draft._datastore = self._datastore.model_copy(deep=True)
            result = change(draft, *arguments, **options)
            self._datastore, self._config_ts = draft._datastore, draft._config_ts
            return result

    return alone


def _under(lock: threading.RLock, method: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[valid-type]
    @functools.wraps(method)
    def under(*arguments: Any, **options: Any) -> Any:
        with lock:  # type: ignore[attr-defined]
            return method(*arguments, **options)

    return under


def _read_record(self: Any, throw_exception: bool = False) -> None:
    """Upstream's, but the record takes its place only when it is whole, and not amid a change of the old."""
    path = Path(self._datastore_config_path)
    with _record(_lock(self, "change")):
        if not path.exists():
            return
        written = path.stat().st_mtime
        if written == self._config_ts:
            return
        try:
            record = LocalDatastoreModel.model_validate_json(path.read_text())
        except ValueError:
            if throw_exception:
                raise
            return
        record.base_path = self._datastore_path
        self._datastore, self._config_ts = record, written


def _remove_missing(self: Any) -> int:
    """Upstream's, but the record is never emptied in between; how many entries have no file any more."""
    self._init_from_datastore_file()
    missing = 0
    objects = dict(self._datastore.objects)
    for image, found in objects.copy().items():
        folder = Path(self._datastore.image_path())
        if not (folder / self._filename(image, found.image.ext)).exists():
            del objects[image]
            missing += 1
            continue
        for tag, label in list(found.labels.items()):
            if not (Path(self._datastore.label_path(tag)) / self._filename(image, label.ext)).exists():
                del found.labels[tag]
                missing += 1
    if len(objects) < len(self._datastore.objects):
        self._datastore.objects = objects
    return missing


def _one_at_a_time(fetch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fetch)
    def fetch_alone(self: Any, image_id: str) -> str:
        here = LocalDatastore.get_image_uri(self, image_id)
        if here and os.path.isfile(here):
            return str(here)
        with slow(_ARCHIVE), holding(_lock(self, "fetch"), _ARCHIVE, _FETCH_SECONDS):
            return str(fetch(self, image_id))

    return fetch_alone
