"""The folder of models, shared by the server and its training processes.

    {key}.safetensors   an artifact, whole or absent (written in `building/`, then renamed)
    {key}.html          its report, in place before the artifact is
    current.json        names the artifact to serve; replaced in one step, this is what publishes
    runs/{id}.json      a run's record; replaced in one step. The last `HISTORY` are kept
    finetuning/{key}/   checkpoints of a fine-tuning that was stopped, to go on from
    building/           where a training process writes; what it left there is removed when it has ended
    .lock               held by the one server that may start runs here, and settle those of a dead one

Who writes a record: the server until it starts the run's process and after that has ended, the process
meanwhile.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.identity import artifact_key
from monailabel_dfqsam.sam.checkpoint import identify
from monailabel_dfqsam.server.runs.record import Run, is_run_id, run_from_json
from monailabel_dfqsam.server.settings import Settings

HISTORY = 50

_KEY = re.compile(r"[0-9a-f]{16}")
_PARTIAL = re.compile(r"\..*\.(\d+)-\d+\.partial")  # as `files.replacing` names them


def is_key(text: object) -> bool:
    """Whether a text can be an artifact's key: 16 hex digits, so never a path."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


class ModelFolder:
    """The files above; safe between processes, since every file appears in one step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FileLock | None = None

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

    def own(self) -> bool:
        """Whether this process may start runs here, from now until it ends: no other one does.

        Raises:
            OSError: when the folder cannot be written to.
        """
        if self._lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            # By default a lock is the thread's that took it.
            self._lock = FileLock(self.path / ".lock", timeout=0, thread_local=False)
        if not self._lock.is_locked:
            try:
                self._lock.acquire()
            except Timeout:
                return False
        return True

    def sweep(self) -> None:
        """Removes what a training process that has ended left half made."""
        shutil.rmtree(self.building, ignore_errors=True)
        for folder in (self.path, self.path / "runs"):
            for partial in folder.glob(".*.partial"):
                writer = _PARTIAL.fullmatch(partial.name)
                if writer is None or not psutil.pid_exists(int(writer[1])):
                    partial.unlink(missing_ok=True)

    def publish(self, key: str, default_key: str) -> tuple[int, ...]:
        """Names the artifact to serve.

        Args:
            key: of an artifact that is in place.
            default_key: of the server's own configuration; a later start with another one follows that.

        Returns:
            What `stamp` answers until something else is published.
        """
        path = self.path / "current.json"
        with replacing(path) as partial:
            partial.write_text(json.dumps({"key": key, "default_key": default_key}))
            return _stamp(partial)  # which renaming does not change

    def published(self) -> dict[str, str] | None:
        """What `publish` was last given, or None; a damaged file counts as none."""
        found = _read(self.path / "current.json")
        return found if isinstance(found, dict) and is_key(found.get("key")) else None

    def chosen(self, default_key: str) -> str:
        """The artifact that a server serves whose own configuration makes `default_key`.

        A choice made under another configuration, checkpoint included, does not outlive it.
        """
        published = self.published()
        if published is None or published.get("default_key") != default_key:
            return default_key
        return published["key"] if self.artifact(published["key"]).is_file() else default_key

    def stamp(self) -> tuple[int, ...] | None:
        """Changes whenever something is published; None where nothing is, or cannot be looked at."""
        try:
            return _stamp(self.path / "current.json")
        except OSError:
            return None

    def write_run(self, run: Run) -> None:
        """Keeps a run's record; of others that have ended, no more than `HISTORY` stay."""
        path = self._record(run.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with replacing(path) as partial:
            partial.write_text(json.dumps(run.as_json()))
        for old in self.runs()[HISTORY:] if new else ():
            if old.state.ended:
                self._record(old.id).unlink(missing_ok=True)

    def run(self, identity: str) -> Run | None:
        """A run by its id; None when there is none, or its record is damaged."""
        if not is_run_id(identity):
            return None
        try:
            return run_from_json(_read(self._record(identity)))
        except ValueError:
            return None

    def runs(self) -> list[Run]:
        """The last runs, the newest first."""
        found = [self.run(path.stem) for path in (self.path / "runs").glob("*.json")]
        return sorted((run for run in found if run), key=lambda run: run.created, reverse=True)

    def _record(self, identity: str) -> Path:
        return self.path / "runs" / f"{identity}.json"


def default_key(settings: Settings) -> str:
    """The key of the artifact that a server's own configuration makes.

    Raises:
        ValueError: when the checkpoint cannot be read.
    """
    source = identify(settings.checkpoint, settings.variant)
    return artifact_key(settings.quantization, source.sha256, source.variant.name)


def _stamp(path: Path) -> tuple[int, ...]:
    """What renaming a file leaves as it is, and no other file has."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> Any:
    """A file's JSON value; None for one that is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
