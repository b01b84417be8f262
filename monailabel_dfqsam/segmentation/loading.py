"""Volumes of files that may be replaced at any time, each with the key of the content it was read from."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from monailabel_dfqsam.segmentation.embeddings import BoundedCache
from monailabel_dfqsam.segmentation.volume import ImageError, Volume, load_volume

_READS = 5
# Linux stamps a change with a clock that ticks every 1 to 10 ms: two changes within a tick look like one.
_TICK_NS = 20_000_000

FileKey = tuple[object, ...]


class VolumeLoader:
    """`load_volume` with the last volumes kept, at most `max_bytes` of them; safe to share between threads.

    A file that changed is read anew, and one that changes while it is read is read again.
    """

    def __init__(self, max_bytes: int) -> None:
        self._cache: BoundedCache[Volume] = BoundedCache(max_bytes)

    def load(self, path: str | Path, name: str | None = None) -> Volume:
        """As `load_volume`, with the `file_key` of what was read as the volume's key.

        Raises:
            ImageError: also for a file that is still being written to.
        """
        path = Path(path)
        for _ in range(_READS):
            key = file_key(path)
            try:
                return self._cache.get_or_compute(key, partial(_read, path, key, name))[0]
            except _ChangedError:
                continue
        raise ImageError(f"'{name or path.name}' is being written to: ask again when it is complete")


class _ChangedError(Exception):
    """The file is another one by now."""


def _read(path: Path, key: FileKey, name: str | None) -> Volume:
    """The volume of the file that `key` tells; raises _ChangedError where that one has gone."""
    _wait_for_a_tick(path)
    try:
        volume = load_volume(path, name)
    except (ValueError, MemoryError, OSError):
        if file_key(path) != key:
            raise _ChangedError from None
        raise
    if file_key(path) != key:
        raise _ChangedError
    return replace(volume, key=key)


def file_key(path: Path) -> FileKey:
    """Equal for a file, or for all files of a folder, whose content is the same; differs after any change.

    By size, inode, and times of change: a copy may bring the old file's modification time along, but no
    program sets the time of a change of status.

    Raises:
        ImageError: when there is no such file.
    """
    try:
        stats = [(file.name, file.stat()) for file in _files(path)]
    except OSError:
        raise ImageError(f"there is no image '{path.name}'") from None
    return (
        path.resolve(),
        *((name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats),
    )


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _wait_for_a_tick(path: Path) -> None:
    """Waits until the next change of a file changed just now gets another time than that one did."""
    try:
        last = max((file.stat().st_ctime_ns for file in _files(path)), default=0)
    except OSError:
        return  # gone: whoever reads it says so
    age = time.time_ns() - last
    if 0 <= age < _TICK_NS:
        time.sleep((_TICK_NS - age) / 1e9)
