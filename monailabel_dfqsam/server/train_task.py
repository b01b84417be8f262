"""The trainer `dfqsam`: quantizes the checkpoint, without any data, in MONAI Label's training process.

It never touches the datastore it is handed. What it prints becomes the `details` of `GET /train/`; how far it
is goes to the model folder, where `stats` reads it in the server. The artifact is made in `building/` and
moved into place whole, so that stopping at any time leaves the model served as it is.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from monailabel.interfaces.tasks.train import TrainTask

from monailabel_dfqsam.artifact import ArtifactError, read_artifact, write_artifact
from monailabel_dfqsam.config import QuantizationConfig
from monailabel_dfqsam.server.model_folder import ModelFolder
from monailabel_dfqsam.server.options import defaults, read_options
from monailabel_dfqsam.server.settings import Settings
from monailabel_dfqsam.server.train_report import Reporter, exit_with_parent

if TYPE_CHECKING:
    from monailabel_dfqsam.sam.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

# Slicer takes 1 of 1 for what is missing, and shows work as done before it has begun.
_NOTHING_DONE = {"epoch": 0, "total_epochs": 1}


class PublishingTask(TrainTask):  # type: ignore[misc]
    """A trainer that makes an artifact and, if it may be served, publishes it."""

    def __init__(self, name: str, description: str, settings: Settings) -> None:
        super().__init__(description)
        self._name = name
        self._settings = settings
        self._folder = ModelFolder(settings.model_dir)

    def check(self, request: Mapping[str, Any]) -> None:
        """Raises OptionError for a request that `__call__` could not serve."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """How far the training is, whichever of the trainers' it is, or how the last one ended; in Slicer's
        words.

        A record as `model_folder` describes it, without its process, and with `total_time` (seconds) at the
        end. `epoch` of `total_epochs` counts the steps of `stage`, `best_metric` is the fidelity.
        """
        found = {**_NOTHING_DONE, **self._folder.read_progress()}
        found.pop("pid", None)
        return found

    def _reported(self, options: Mapping[str, Any], work: Callable[[Reporter], None]) -> dict[str, Any]:
        """Does the work of this process; `stats()` at the end.

        Args:
            options: what was chosen, for the history.
            work: says by its reporter how it ended, or raises.
        """
        exit_with_parent("the training")
        self._folder.prepare()
        report = Reporter(self._folder, options)
        try:
            try:
                work(report)
            finally:
                shutil.rmtree(self._folder.building, ignore_errors=True)
        except Exception as error:
            report.end("failed", error=str(error) or type(error).__name__)
            raise
        return self.stats()

    def _publish(self, key: str, fidelity: float, default_key: str, report: Reporter) -> None:
        """Names an artifact the one to serve, unless its fidelity is too low."""
        least = self._settings.min_fidelity
        if not fidelity >= least:
            reason = f"fidelity {fidelity:.3f} is below {least:.3f}: the served model stays"
            report.end("rejected", fidelity, error=reason)
            return
        self._folder.publish(key, default_key)
        report.end("published", fidelity)


class QuantizeTask(PublishingTask):
    """MONAI Label's view of quantization."""

    def __init__(self, name: str, settings: Settings) -> None:
        description = "Quantizes the Segment Anything model to few bits, out of its own weights"
        super().__init__(name, description, settings)

    def config(self) -> dict[str, Any]:
        """The options that a viewer shows."""
        return defaults(self._settings)

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
        return self._reported(
            _options(config, checkpoint), lambda report: self._run(config, checkpoint, report)
        )

    def _run(self, config: QuantizationConfig, path: Path, report: Reporter) -> None:
        # The server answers clicks without it.
        from monailabel_dfqsam.sam import read_checkpoint

        settings = self._settings
        variant = settings.variant if path == settings.checkpoint else None
        checkpoint = read_checkpoint(path, variant)
        key = config.key(checkpoint.sha256)
        report.name(key)
        header = quantized(checkpoint, config, self._folder, report)
        default_key = settings.quantization.key(_sha256_of(settings, path, checkpoint.sha256))
        self._publish(key, float(header["fidelity"]["mean_iou"]), default_key, report)


def quantized(
    checkpoint: Checkpoint, config: QuantizationConfig, folder: ModelFolder, report: Reporter
) -> dict[str, Any]:
    """The header of the artifact that a configuration makes of a checkpoint; made if it is not there."""
    from monailabel_dfqsam.pipeline import quantize
    from monailabel_dfqsam.report import write_report

    key = config.key(checkpoint.sha256)
    header = ready(folder.artifact(key))
    if header is None:
        result = quantize(checkpoint, config, device=device(), progress=report)
        report("writing", 0, 1)
        folder.building.mkdir(parents=True, exist_ok=True)
        write_artifact(result.artifact, folder.building / "artifact")
        write_report(result, checkpoint, folder.building / "report")
        os.replace(folder.building / "report", folder.report(key))
        os.replace(folder.building / "artifact", folder.artifact(key))
        header = result.artifact.header
    return header


def device() -> torch.device:
    """Where trainings compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def ready(path: Path) -> dict[str, Any] | None:
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
