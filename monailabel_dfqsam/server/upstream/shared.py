"""The datastore of an archive, whose copies several processes share: the server, a batch, scoring.

Its copies lie in a folder with a record, as `folder` keeps them. A series is fetched into it by one at a
time, so that none takes a part for the whole; a series that is here already waits for nobody. Sessions are
shared by threads only.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.utils.sessions import Sessions

from monailabel_dfqsam.server.upstream.folder import FolderStore
from monailabel_dfqsam.server.upstream.store import repair_dicomweb
from monailabel_dfqsam.server.upstream.threads import holding, slow

_ARCHIVE = "the image archive"
_FETCH_SECONDS = 60.0


def share_datastore() -> None:
    """Puts upstream's class right, in the server and in the processes that it starts; once is enough."""
    if DICOMWebDatastore.__bases__ == (FolderStore,):
        return
    DICOMWebDatastore.__bases__ = (FolderStore,)
    repair_dicomweb()
    DICOMWebDatastore.get_image_uri = _one_at_a_time(DICOMWebDatastore.get_image_uri)
    one = threading.RLock()
    for name in ("get_session", "remove_session", "remove_expired"):
        setattr(Sessions, name, _under(one, getattr(Sessions, name)))


def _under(lock: threading.RLock, method: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[valid-type]
    @functools.wraps(method)
    def under(*arguments: Any, **options: Any) -> Any:
        with lock:  # type: ignore[attr-defined]
            return method(*arguments, **options)

    return under


def _one_at_a_time(fetch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fetch)
    def fetch_alone(self: Any, image_id: str) -> str:
        here = FolderStore.get_image_uri(self, image_id)
        if here and os.path.isfile(here):
            return here
        with slow(_ARCHIVE), holding(self.lock("fetch"), _ARCHIVE, _FETCH_SECONDS):
            return str(fetch(self, image_id))

    return fetch_alone
