"""Copies that a full disk or a kill cannot spoil, and how a full disk is told."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from monailabel_dfqsam.files import replacing

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file, which takes the target's place when all of it is on the disk."""
    with replacing(target) as partial:
        shutil.copyfile(source, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())


def is_full_disk(error: Exception) -> bool:
    """Whether an error says that there is no room left."""
    return isinstance(error, OSError) and error.errno in _FULL
