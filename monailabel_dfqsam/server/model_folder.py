"""The folder of models, shared by the server and the quantization process.

    {key}.safetensors   an artifact, whole or absent (written in `building/`, then renamed)
    {key}.html          its report, in place before the artifact is
    current.json        names the artifact to serve; replaced in one step, this is what publishes
    progress.json       how far the quantization is; replaced in one step
    history.json        the last `HISTORY` quantizations, oldest first; replaced in one step
    finetuning/{key}/   checkpoints of a fine-tuning that was stopped, to go on from
    building/           where the quantization process writes; what it left there is removed at the next start

Progress and history hold records of the same shape, one a quantization: `started` (ISO 8601, UTC), `options`
(as of `POST /train/dfqsam`), `key`, `state` ('running', 'published', 'rejected', 'failed', 'stopped'),
`error` (a sentence, where it was not published), `fidelity` (where it was measured), `seconds` so far, `pid`
of its process, and what Slicer shows: `stage`, `epoch` of `total_epochs`, `best_metric` (the fidelity for
people, 0 where there is none). The quantization process writes them; whoever reads finds 'stopped' where that
process is gone without having said how it ended.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from monailabel_dfqsam.files import replacing

HISTORY = 50
STOPPED = "it ended before it was done: stopped by somebody, with its server, or for want of memory"

_KEY = re.compile(r"[0-9a-f]{16}")


def is_key(text: object) -> bool:
    """Whether a text can be an artifact's key: 16 hex digits, so never a path."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


class ModelFolder:
    """The files above; safe between processes, since every file appears in one step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def building(self) -> Path:
        """Where an artifact is made before it is moved into place."""
        return self.path / "building"

    def report(self, key: str) -> Path:
        """The report of an artifact, whether or not it exists."""
        return self.path / f"{key}.html"

    def artifact(self, key: str) -> Path:
        """The artifact of a key, whether or not it exists."""
        return self.path / f"{key}.safetensors"

    def keys_kept(self) -> list[str]:
        """Of the artifacts here; checkpoints, which may lie here too, are not named by a key."""
        return sorted(path.stem for path in self.path.glob("*.safetensors") if is_key(path.stem))

    def prepare(self) -> None:
        """Makes the folder, removes what an interrupted quantization left, and notes that it was stopped.

        To be called while no quantization runs.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.building, ignore_errors=True)
        for partial in self.path.glob(".*.partial"):
            partial.unlink(missing_ok=True)
        records = self._records()
        settled = [_stopped(record) for record in records]
        if settled != records:
            self._replace("history.json", settled)
        progress = self._progress()
        if progress != _stopped(progress):
            self.write_progress(_stopped(progress))

    def publish(self, key: str, default_key: str) -> tuple[int, int]:
        """Names the artifact to serve.

        Args:
            key: of an artifact that is in place.
            default_key: of the server's own configuration; a later start with another one follows that.

        Returns:
            What `stamp` answers until something else is published.
        """
        return self._replace("current.json", {"key": key, "default_key": default_key})

    def published(self) -> dict[str, str] | None:
        """What `publish` was last given, or None; a damaged file counts as none."""
        found = self._read("current.json")
        return found if isinstance(found, dict) and is_key(found.get("key")) else None

    def stamp(self) -> tuple[int, int] | None:
        """Changes whenever something is published: (mtime in ns, bytes) of current.json."""
        try:
            return _stamp(self.path / "current.json")
        except FileNotFoundError:
            return None

    def write_progress(self, record: Mapping[str, Any]) -> None:
        """Keeps a record for `read_progress` in any process."""
        self._replace("progress.json", record)

    def read_progress(self) -> dict[str, Any]:
        """The record last written, or an empty dict."""
        return _settled(self._progress())

    def write_history(self, record: Mapping[str, Any]) -> None:
        """Adds a quantization's record, or replaces an earlier one of the same start."""
        others = [other for other in self._records() if other.get("started") != record["started"]]
        self._replace("history.json", [*others, dict(record)][-HISTORY:])

    def read_history(self) -> list[dict[str, Any]]:
        """The records of the last quantizations, the newest first."""
        return [_settled(record) for record in self._records()][::-1]

    def _progress(self) -> dict[str, Any]:
        found = self._read("progress.json")
        return found if isinstance(found, dict) else {}

    def _records(self) -> list[dict[str, Any]]:
        """The oldest first; of the last one, as much as its progress says."""
        found = self._read("history.json")
        records = [r for r in found if isinstance(r, dict)] if isinstance(found, list) else []
        latest = self._progress()
        return [latest if r.get("started") == latest.get("started", "") else r for r in records]

    def _replace(self, name: str, values: Any) -> tuple[int, int]:
        """Writes a file in one step; returns its stamp, which renaming does not change."""
        with replacing(self.path / name) as partial:
            partial.write_text(json.dumps(values))
            return _stamp(partial)

    def _read(self, name: str) -> Any:
        """A file's JSON value; None for one that is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _settled(record: dict[str, Any]) -> dict[str, Any]:
    """The record, as stopped where its process is gone."""
    runs = record.get("state") == "running" and _is_alive(record.get("pid"))
    return record if runs else _stopped(record)


def _stopped(record: dict[str, Any]) -> dict[str, Any]:
    """The record, as stopped where it says that it runs."""
    return {**record, "state": "stopped", "error": STOPPED} if record.get("state") == "running" else record


def _is_alive(pid: object) -> bool:
    """Whether a process runs; one that has ended but was not yet collected by the server does not."""
    if not isinstance(pid, int):
        return False
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
