"""The trainer `dfqsam`: quantizes the checkpoint, without any data, in MONAI Label's training process.

It never touches the datastore it is handed. What it prints becomes the `details` of `GET /train/`; how far it
is goes to the model folder, where `stats` reads it in the server. The artifact is made in `building/` and
moved into place whole, so that stopping at any time leaves the model served as it is.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from monailabel.interfaces.tasks.train import TrainTask

from monailabel_dfqsam.artifact import ArtifactError, read_artifact, write_artifact
from monailabel_dfqsam.config import QuantizationConfig
from monailabel_dfqsam.server.model_folder import ModelFolder
from monailabel_dfqsam.server.options import defaults, read_options
from monailabel_dfqsam.server.settings import Settings

logger = logging.getLogger(__name__)

SERVER_PID = "DFQSAM_SERVER_PID"
"""Environment variable by which the server tells its training process whose child it is."""

PRINTED = re.compile(r"[a-z]+ (\d+/\d+, \d+ s|after [\d.]+ s, .*)")
"""What the task prints itself; the other lines of its process are MONAI Label's and name folders."""

# Slicer takes 1 of 1 for what is missing, and shows work as done before it has begun.
_NOTHING_DONE = {"epoch": 0, "total_epochs": 1}
_PARENT_CHECK_SECONDS = 1.0
_REPORT_SECONDS = 2.0
_NICENESS = 10  # clicks come first


class QuantizeTask(TrainTask):  # type: ignore[misc]
    """MONAI Label's view of quantization."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__("Quantizes the Segment Anything model to few bits, out of its own weights")
        self._name = name
        self._settings = settings
        self._folder = ModelFolder(settings.model_dir)

    def config(self) -> dict[str, Any]:
        """The options that a viewer shows."""
        return defaults(self._settings)

    def stats(self) -> dict[str, Any]:
        """How far the quantization is, or how the last one ended; in Slicer's words.

        A record as `model_folder` describes it, without its process, and with `total_time` (seconds) at the
        end. `epoch` of `total_epochs` counts the steps of `stage`, `best_metric` is the fidelity.
        """
        found = {**_NOTHING_DONE, **self._folder.read_progress()}
        found.pop("pid", None)
        return found

    def check(self, request: Mapping[str, Any]) -> None:
        """Raises OptionError for a request that `__call__` could not serve."""
        read_options(request, self._settings, self._name)

    def __call__(self, request: Mapping[str, Any], datastore: object) -> dict[str, Any]:
        """Quantizes and publishes; `datastore` is not touched.

        Returns:
            `stats()` at the end.

        Raises:
            ValueError: for options or a checkpoint that cannot be used.
        """
        config, checkpoint = read_options(request, self._settings, self._name)
        exit_with_parent("quantization")
        self._folder.prepare()
        report = _Reporter(self._folder, _options(config, checkpoint))
        try:
            try:
                self._run(config, checkpoint, report)
            finally:
                shutil.rmtree(self._folder.building, ignore_errors=True)
        except Exception as error:
            report.end("failed", error=str(error) or type(error).__name__)
            raise
        return self.stats()

    def _run(self, config: QuantizationConfig, path: Path, report: _Reporter) -> None:
        # The server answers clicks without these.
        from monailabel_dfqsam.pipeline import quantize
        from monailabel_dfqsam.report import write_report
        from monailabel_dfqsam.sam import read_checkpoint

        folder, settings = self._folder, self._settings
        variant = settings.variant if path == settings.checkpoint else None
        checkpoint = read_checkpoint(path, variant)
        key = config.key(checkpoint.sha256)
        report.name(key)
        header = _ready(folder.artifact(key))
        if header is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            result = quantize(checkpoint, config, device=device, progress=report)
            report("writing", 0, 1)
            folder.building.mkdir(parents=True, exist_ok=True)
            write_artifact(result.artifact, folder.building / "artifact")
            write_report(result, checkpoint, folder.building / "report")
            os.replace(folder.building / "report", folder.report(key))
            os.replace(folder.building / "artifact", folder.artifact(key))
            header = result.artifact.header
        fidelity = float(header["fidelity"]["mean_iou"])
        if not fidelity >= settings.min_fidelity:
            reason = f"fidelity {fidelity:.3f} is below {settings.min_fidelity:.3f}: the served model stays"
            report.end("rejected", fidelity, error=reason)
            return
        default_key = settings.quantization.key(_sha256_of(settings, path, checkpoint.sha256))
        folder.publish(key, default_key)
        report.end("published", fidelity)


class _Reporter:
    """A `Progress` that prints a line, writes the progress now and then, and begins and ends the history."""

    def __init__(self, folder: ModelFolder, options: Mapping[str, Any]) -> None:
        self._folder = folder
        self._begin = time.monotonic()
        self._last = (-_REPORT_SECONDS, "")
        self._record: dict[str, Any] = {
            "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "options": dict(options), "key": "", "state": "running", "seconds": 0.0, "pid": os.getpid(),
            "stage": "starting", "epoch": 0, "total_epochs": 1, "best_metric": 0.0,
        }  # fmt: skip
        self._write(history=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        last, last_stage = self._last
        if stage == last_stage and done < total and now - last < _REPORT_SECONDS:
            return
        self._last = (now, stage)
        self._record.update(stage=stage, epoch=done, total_epochs=max(1, total), seconds=self._seconds())
        self._write()
        _say(f"{stage} {done}/{total}, {now - self._begin:.0f} s")

    def name(self, key: str) -> None:
        """Says which artifact is being made."""
        self._record["key"] = key

    def end(self, state: str, fidelity: float = 0.0, error: str = "") -> None:
        """The last line: how it ended."""
        seconds = self._seconds()
        self._record.update(state=state, seconds=seconds, total_time=seconds, best_metric=round(fidelity, 4))
        if fidelity:
            self._record["fidelity"] = fidelity
        if error:
            self._record["error"] = error
        self._write(history=True)
        _say(f"{state} after {seconds} s, {error or f'fidelity {fidelity:.3f}'}")

    def _seconds(self) -> float:
        return round(time.monotonic() - self._begin, 1)

    def _write(self, history: bool = False) -> None:
        try:
            self._folder.write_progress(self._record)
            if history:
                self._folder.write_history(self._record)
        except OSError as error:  # of a full disk; nobody's model is worse for it
            print(f"the progress could not be written: {error.strerror}", file=sys.stderr, flush=True)


def _options(config: QuantizationConfig, checkpoint: Path) -> dict[str, Any]:
    """What was chosen, by its name in a request."""
    return {
        "bits": config.bits,
        "policy": config.policy.value,
        "calibration": config.calibration.value,
        "iterations": config.synthesis.iterations,
        "images": config.images,
        "seed": config.seed,
        "checkpoint": checkpoint.name,
    }


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os._exit(1)  # the server, which reads this, has gone


def _ready(path: Path) -> dict[str, Any] | None:
    """The header of an artifact that is already there and whole."""
    if not path.is_file():
        return None
    try:
        return read_artifact(path).header
    except ArtifactError as error:
        logger.warning("Making an artifact again: %s", error)
        return None


def _sha256_of(settings: Settings, path: Path, sha256: str) -> str:
    """The sha256 of the server's own checkpoint, given that of `path`."""
    from monailabel_dfqsam.sam.checkpoint import file_sha256

    return sha256 if path == settings.checkpoint else file_sha256(settings.checkpoint)


def exit_with_parent(work: str) -> None:
    """Ends this process soon after the server that started it has gone, for nobody else would.

    Does nothing within the server itself, or called from Python.

    Args:
        work: what this process does, for the message.
    """
    server = os.environ.get(SERVER_PID, "")
    if not server.isdecimal() or int(server) == os.getpid():
        return
    if hasattr(os, "nice"):
        os.nice(_NICENESS)

    def watch() -> None:
        while os.getppid() == int(server):
            time.sleep(_PARENT_CHECK_SECONDS)
        print(f"the server has gone: {work} stops", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="dfqsam-parent", daemon=True).start()
