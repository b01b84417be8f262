"""Which models `dfqsam evaluate` scores, each set beside the full-precision model it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from monailabel_dfqsam.artifact import Artifact, ArtifactError, read_artifact
from monailabel_dfqsam.config import EngineKind, Preset, Progress, QuantizationConfig, SynthesisConfig
from monailabel_dfqsam.engines import select
from monailabel_dfqsam.pipeline import quantize
from monailabel_dfqsam.sam import Checkpoint, CheckpointError, build, read_checkpoint
from monailabel_dfqsam.sam.checkpoint import EMBEDDED, file_sha256
from monailabel_dfqsam.segmentation.segmenter import Segmenter, full_precision_segmenter, load_segmenter

Named = tuple[Segmenter, dict[str, Any]]
"""A segmenter, and {model, engine, policy} for its rows."""


def load_groups(
    paths: Sequence[Path], engine: EngineKind | None, progress: Progress
) -> Iterator[tuple[Segmenter, list[Named]]]:
    """The models to score, by the checkpoint they come from.

    Args:
        paths: checkpoints and artifacts in any order; none for the embedded model in full precision and as
            W4A4, quantized here.
        engine: what runs artifacts; None takes the fastest that works here.
        progress: of the quantization, where there is one.

    Yields:
        The full-precision model of a group, and what to score: itself first where it was asked for.

    Raises:
        ValueError: for a file that is neither, and for an artifact whose checkpoint is not among `paths` and
            is not the embedded one.
    """
    checkpoints: dict[str, Checkpoint] = {}
    artifacts: dict[str, list[Artifact]] = {}
    if not paths:
        embedded = read_checkpoint()
        config = QuantizationConfig(synthesis=SynthesisConfig(iterations=Preset.FAST.iterations))
        checkpoints[embedded.sha256] = embedded
        artifacts[embedded.sha256] = [
            quantize(embedded, config, device=_device(), progress=progress).artifact
        ]
    for path in paths:
        found = _read(path)
        if isinstance(found, Checkpoint):
            checkpoints[found.sha256] = found
        else:
            artifacts.setdefault(found.header["source_sha256"], []).append(found)
    for sha256 in dict.fromkeys([*checkpoints, *artifacts]):
        own = checkpoints.get(sha256)
        children = artifacts.get(sha256, [])
        source = own or _embedded(sha256, children[0])
        reference = full_precision_segmenter(build(source).to(_device()))
        scored: list[Named] = []
        if own is not None:
            scored.append((reference, {"model": source.variant.name, "engine": "torch", "policy": None}))
        scored += [_named(artifact, engine) for artifact in children]
        yield reference, scored


def _read(path: Path) -> Checkpoint | Artifact:
    try:
        return read_artifact(path)
    except ArtifactError as refused:
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            raise ValueError(f"neither an artifact ({refused}) nor a checkpoint ({error})") from None


def _embedded(sha256: str, artifact: Artifact) -> Checkpoint:
    if not EMBEDDED.is_file() or file_sha256(EMBEDDED) != sha256:
        raise ValueError(
            f"the artifact {artifact.header['key']} was made of '{artifact.header['source_name']}': give "
            "that checkpoint with --model too, for drop and agreement are measured against it"
        )
    return read_checkpoint()


def _named(artifact: Artifact, engine: EngineKind | None) -> Named:
    kind = engine or select(artifact)
    name = f"{artifact.header['variant']} {artifact.label}"
    meta = {"model": name, "engine": kind.value, "policy": artifact.header["config"]["policy"]}
    return load_segmenter(artifact, kind), meta


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
