"""Engines: from an artifact alone to an image embedding."""

from __future__ import annotations

from monailabel_dfqsam.artifact import Artifact
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines import onednn
from monailabel_dfqsam.engines.encoder import Encoder
from monailabel_dfqsam.engines.onednn import OnednnEncoder
from monailabel_dfqsam.engines.reference import ReferenceEncoder

__all__ = ["Encoder", "load_encoder", "select"]


def select(artifact: Artifact) -> EngineKind:
    """The fastest engine that works here for an artifact."""
    if not artifact.header["attention_bits"] and onednn.available():
        return EngineKind.ONEDNN
    return EngineKind.REFERENCE


def load_encoder(artifact: Artifact, kind: EngineKind | None = None) -> Encoder:
    """An artifact's encoder on an engine, by default the one `select` names.

    Raises:
        ArtifactError: when the artifact does not fit its model or the engine.
    """
    kind = kind or select(artifact)
    return OnednnEncoder(artifact) if kind is EngineKind.ONEDNN else ReferenceEncoder(artifact)
