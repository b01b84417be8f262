"""Engines: from an artifact alone to an image embedding."""

from __future__ import annotations

from collections.abc import Callable

from monailabel_dfqsam.artifact import Artifact, ArtifactError
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines import cutlass, native, onednn, openvino
from monailabel_dfqsam.engines.cutlass import CutlassEncoder
from monailabel_dfqsam.engines.encoder import Encoder
from monailabel_dfqsam.engines.native import NativeEncoder
from monailabel_dfqsam.engines.onednn import OnednnEncoder
from monailabel_dfqsam.engines.openvino import OpenvinoEncoder
from monailabel_dfqsam.engines.reference import ReferenceEncoder, layer_by_layer
from monailabel_dfqsam.ops import cuda_library, openvino_library

__all__ = ["Encoder", "candidates", "layer_by_layer", "load_encoder", "select", "why_not"]

# The fastest first, as measured where each was made for.
_ORDER = (
    EngineKind.CUTLASS, EngineKind.NATIVE, EngineKind.ONEDNN, EngineKind.OPENVINO, EngineKind.REFERENCE,
)  # fmt: skip

_ENCODERS: dict[EngineKind, Callable[[Artifact], Encoder]] = {
    EngineKind.CUTLASS: CutlassEncoder,
    EngineKind.NATIVE: NativeEncoder,
    EngineKind.ONEDNN: OnednnEncoder,
    EngineKind.OPENVINO: OpenvinoEncoder,
    EngineKind.REFERENCE: ReferenceEncoder,
}


def why_not(kind: EngineKind, artifact: Artifact | None = None) -> str | None:
    """Why an engine cannot run here, or not this artifact; None when it can, and has proved its products.

    Raises:
        RuntimeError: when its library is there but broken.
    """
    reason = _why_no_candidate(kind, artifact)
    return openvino.why_unavailable() if reason is None and kind is EngineKind.OPENVINO else reason


def candidates(artifact: Artifact) -> list[EngineKind]:
    """The engines that run an artifact here, the one expected to be fastest first.

    OpenVINO, which takes long to load, is named where it is installed: its encoder says whether it works.
    """
    return [kind for kind in _ORDER if _why_no_candidate(kind, artifact) is None]


def _why_no_candidate(kind: EngineKind, artifact: Artifact | None) -> str | None:
    if kind is EngineKind.REFERENCE:
        return None
    if artifact is not None and artifact.header["attention_bits"]:
        return "policy 'paper' quantizes attention, which only the reference engine runs"
    if kind is EngineKind.NATIVE:
        return native.why_unavailable()
    if kind is EngineKind.ONEDNN:
        return onednn.why_unavailable()
    if kind is EngineKind.OPENVINO:
        return openvino_library.why_absent()
    refusal = None if artifact is None else cutlass.why_not(artifact)
    return cuda_library.why_unavailable() if refusal is None else refusal


def select(artifact: Artifact) -> EngineKind:
    """The engine expected to be fastest of those that work here for an artifact."""
    return next(kind for kind in _ORDER if why_not(kind, artifact) is None)


def load_encoder(artifact: Artifact, kind: EngineKind | None = None) -> Encoder:
    """An artifact's encoder on an engine, by default the one `select` names.

    Raises:
        ArtifactError: when the artifact does not fit its model or the engine, or the engine cannot run here.
        RuntimeError: when the engine's library is there but broken.
    """
    kind = kind or select(artifact)
    reason = why_not(kind, artifact)
    if reason is not None:
        raise ArtifactError(f"the engine '{kind.value}' cannot run here: {reason}")
    return _ENCODERS[kind](artifact)
