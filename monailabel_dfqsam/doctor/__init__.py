"""`dfqsam doctor`: whether a server will serve here, how fast, and what to do about what is wrong.

Nothing leaves the machine but one question to the archive that was named.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from monailabel_dfqsam.doctor.finding import Finding, Level
from monailabel_dfqsam.doctor.software import engines, hardware, packages
from monailabel_dfqsam.doctor.speed import Measured, model
from monailabel_dfqsam.doctor.surroundings import archive, folder, is_archive, settings, viewers
from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.server.serve import default_app_dir

__all__ = ["Diagnosis", "Finding", "Level", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """All findings, in the order in which they are told, and the model's speed where it was measured."""

    findings: tuple[Finding, ...]
    measured: Measured | None

    @property
    def serves(self) -> bool:
        """Whether nothing prevents serving."""
        return all(finding.level is not Level.PROBLEM for finding in self.findings)


def diagnose(studies: str | None, checkpoint: Path | None) -> Diagnosis:
    """Looks at everything that a server started now would need.

    Args:
        studies: a folder, or the URL of a DICOMweb archive, which is asked one question; None for neither.
        checkpoint: full-precision weights; None takes the embedded ones.
    """
    app = default_app_dir()
    findings = [*packages(), *hardware((app,)), *engines(), *viewers()]
    if studies is not None:
        findings.append(archive(studies) if is_archive(studies) else folder(Path(studies)))
    findings += settings(os.environ)
    about_model, measured = model(checkpoint, ModelFolder(app / "model"))
    return Diagnosis((*findings, *about_model), measured)
