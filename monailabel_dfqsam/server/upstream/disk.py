"""MONAI Label's local datastore, so that a full disk or a kill while it writes loses nothing.

Upstream writes a label and the datastore's record over the old ones, which are gone as soon as it begins; and
without a whole record no server starts again. Here both are written beside them, under a name that the
datastore does not list, and renamed; so files that are renamed are noticed too, as those that are made.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock
from monailabel.datastore import local
from monailabel.datastore.local import LocalDatastore

from monailabel_dfqsam.files import replacing

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def repair_writing() -> None:
    """Replaces what upstream writes with, in the server and in the processes that it starts."""
    # `save_label` and `add_image` copy by this name, and nothing else in the module does.
    local.shutil = SimpleNamespace(**{**vars(shutil), "copy": _copy})
    LocalDatastore._update_datastore_file = _write_record


def notice_renamed(store: Any) -> None:
    """Has a datastore that watches its folder notice files put there by a rename."""
    handler = getattr(store, "_handler", None)
    if handler is not None:
        handler.on_moved = store._on_any_event


def is_full_disk(error: Exception) -> bool:
    """Whether an error says that there is no room left."""
    return isinstance(error, OSError) and error.errno in _FULL


def _copy(source: str, target: str) -> str:
    with replacing(Path(target)) as partial:
        shutil.copy(source, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    return target


def _write_record(self: Any, lock: bool = True) -> None:
    with FileLock(self._lock_file) if lock else contextlib.nullcontext():
        text = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
        path = Path(self._datastore_config_path)
        with replacing(path) as partial:
            partial.write_text(text)
        self._config_ts = path.stat().st_mtime
