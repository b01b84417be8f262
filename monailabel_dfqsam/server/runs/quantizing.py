"""The trainer `dfqsam`: quantizes the checkpoint, without any data.

Its process has no datastore and does not even import MONAI Label. The artifact is made in `building/` and
moved into place whole, so that stopping at any time leaves the model served as it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from monailabel_dfqsam.agreement import shortfall
from monailabel_dfqsam.artifact import ArtifactError, Header, read_artifact, write_artifact
from monailabel_dfqsam.config import QuantizationConfig
from monailabel_dfqsam.identity import artifact_key
from monailabel_dfqsam.sam import read_checkpoint
from monailabel_dfqsam.sam.checkpoint import Checkpoint
from monailabel_dfqsam.server.runs.folder import ModelFolder, default_key
from monailabel_dfqsam.server.runs.options import read_options
from monailabel_dfqsam.server.runs.record import RunState
from monailabel_dfqsam.server.runs.reporter import Outcome, Reporter
from monailabel_dfqsam.server.settings import Settings

logger = logging.getLogger(__name__)

NAME = "dfqsam"
DESCRIPTION = "Quantizes the Segment Anything model to few bits, out of its own weights"


def work(options: Mapping[str, Any], settings: Settings, folder: ModelFolder, report: Reporter) -> Outcome:
    """Quantizes and publishes.

    Raises:
        ValueError: for options or a checkpoint that cannot be used.
    """
    config, path = read_options(options, settings, NAME)
    variant = settings.variant if path == settings.checkpoint else None
    own = default_key(settings)  # first, since the server's checkpoint may be replaced meanwhile
    header = quantized(read_checkpoint(path, variant), config, folder, report)
    return publish(header, own, settings, folder)


def quantized(
    checkpoint: Checkpoint, config: QuantizationConfig, folder: ModelFolder, report: Reporter
) -> Header:
    """The header of the artifact that a configuration makes of a checkpoint; made if it is not there."""
    # The server, which knows this trainer's name and options, answers clicks without these.
    from monailabel_dfqsam.pipeline import quantize
    from monailabel_dfqsam.report import write_report

    key = artifact_key(config, checkpoint.sha256, checkpoint.variant.name)
    report.name(key)
    header = ready(folder, key)
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


def publish(header: Header, own: str, settings: Settings, folder: ModelFolder) -> Outcome:
    """Names an artifact in place the one to serve, unless its fidelity is too low.

    Args:
        own: `default_key` when the run began.
    """
    fidelity = header["fidelity"]
    if low := shortfall(fidelity, settings.min_fidelity):
        return Outcome(RunState.REJECTED, fidelity, f"{low}: the served model stays")
    folder.publish(header["key"], own)
    return Outcome(RunState.PUBLISHED, fidelity)


def device() -> torch.device:
    """Where trainings compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ready(folder: ModelFolder, key: str) -> Header | None:
    """The header of an artifact that is already there and whole."""
    path = folder.artifact(key)
    if not path.is_file():
        return None
    try:
        return read_artifact(path, key).header
    except ArtifactError as error:
        logger.warning("Making an artifact again: %s", error)
        return None
