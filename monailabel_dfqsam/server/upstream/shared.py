"""The datastore of an archive, whose copies several processes share: the server, a batch, scoring.

Its copies lie in a folder with a record, as `folder` keeps them. A series is fetched into it by one at a
time, so that none takes a part for the whole; a series that is here already waits for nobody.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from monailabel.datastore.dicom import DICOMWebDatastore

from monailabel_dfqsam.server.upstream.folder import FolderStore
from monailabel_dfqsam.server.upstream.store import repair_dicomweb


def share_datastore() -> None:
    """Puts upstream's class right, in the server and in the processes that it starts; once is enough."""
    if DICOMWebDatastore.__bases__ == (FolderStore,):
        return
    DICOMWebDatastore.__bases__ = (FolderStore,)
    repair_dicomweb()
    DICOMWebDatastore.get_image_uri = _one_at_a_time(DICOMWebDatastore.get_image_uri)


def _one_at_a_time(fetch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fetch)
    def fetch_alone(self: Any, image_id: str) -> str:
        here = FolderStore.get_image_uri(self, image_id)
        if here and os.path.isfile(here):
            return here
        with self._hold("fetch"):
            return str(fetch(self, image_id))

    return fetch_alone
