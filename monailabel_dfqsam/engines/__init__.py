"""Engines: from an artifact alone to an image embedding."""

from __future__ import annotations

from monailabel_dfqsam.artifact import Artifact
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines import cutlass, onednn
from monailabel_dfqsam.engines.cutlass import CutlassEncoder
from monailabel_dfqsam.engines.encoder import Encoder
from monailabel_dfqsam.engines.onednn import OnednnEncoder
from monailabel_dfqsam.engines.reference import ReferenceEncoder, layer_by_layer

__all__ = ["Encoder", "layer_by_layer", "load_encoder", "select"]


def select(artifact: Artifact) -> EngineKind:
    """The fastest engine that works here for an artifact."""
    if artifact.header["attention_bits"]:
        return EngineKind.REFERENCE
    if cutlass.available():
        return EngineKind.CUTLASS
    return EngineKind.ONEDNN if onednn.available() else EngineKind.REFERENCE


def load_encoder(artifact: Artifact, kind: EngineKind | None = None) -> Encoder:
    """An artifact's encoder on an engine, by default the one `select` names.

    Raises:
        ArtifactError: when the artifact does not fit its model or the engine.
    """
    kind = kind or select(artifact)
    if kind is EngineKind.CUTLASS:
        return CutlassEncoder(artifact)
    return OnednnEncoder(artifact) if kind is EngineKind.ONEDNN else ReferenceEncoder(artifact)
