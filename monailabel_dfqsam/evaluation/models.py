"""Which models `dfqsam evaluate` scores, each set beside the full-precision model it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from monailabel_dfqsam.artifact import Artifact, ArtifactError, read_artifact
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines import select
from monailabel_dfqsam.evaluation.scoring import Model, OneGreyLevelAway
from monailabel_dfqsam.sam import Checkpoint, CheckpointError, build, find_checkpoint, read_checkpoint
from monailabel_dfqsam.sam.checkpoint import NAMED, file_sha256
from monailabel_dfqsam.segmentation.segmenter import Segmenter, full_precision_segmenter, load_segmenter

Named = tuple[Segmenter, dict[str, Any]]
"""A segmenter, and {model, engine, policy} for its rows."""


def load_groups(
    paths: Sequence[Path], engines: Sequence[EngineKind]
) -> Iterator[tuple[Segmenter, list[Named]]]:
    """The models to score, by the checkpoint they come from.

    Args:
        paths: checkpoints and artifacts in any order; none for the package's own checkpoints.
        engines: what runs artifacts, each on each; none takes the fastest that works here.

    Yields:
        The full-precision model of a group, and what to score: itself first where it was asked for.

    Raises:
        ValueError: for a file that is neither, and for an artifact whose checkpoint is not among `paths` and
            is not of the package's own.
    """
    checkpoints: dict[str, Checkpoint] = {}
    artifacts: dict[str, list[tuple[str, Artifact]]] = {}
    for path in paths or NAMED.values():
        found = _read(path)
        if isinstance(found, Checkpoint):
            checkpoints[found.sha256] = found
        else:
            artifacts.setdefault(found.header["source_sha256"], []).append((path.stem, found))
    for sha256 in dict.fromkeys([*checkpoints, *artifacts]):
        own = checkpoints.get(sha256)
        children = artifacts.get(sha256, [])
        source = own or _embedded(sha256, children[0][1])
        reference = full_precision_segmenter(build(source).to(_device()))
        scored: list[Named] = []
        if own is not None:
            scored.append((reference, {"model": source.variant.name, "engine": "torch", "policy": None}))
        yield reference, scored + _quantized(children, engines)


def beside_yardstick(reference: Segmenter, scored: Sequence[Named]) -> list[tuple[Model, dict[str, Any]]]:
    """What to score of a group, and before what is quantized, full precision one grey level away."""
    name = f"{reference.variant.name} ±1 grey level"
    yardstick = OneGreyLevelAway(reference), {"model": name, "engine": "torch", "policy": None}
    own = [one for one in scored if one[0] is reference]
    return [*own, yardstick, *(one for one in scored if one[0] is not reference)]


def _quantized(artifacts: Sequence[tuple[str, Artifact]], engines: Sequence[EngineKind]) -> list[Named]:
    """Each artifact on each engine; of those that would be called the same, the file's name tells which."""
    found = []
    for stem, artifact in artifacts:
        for engine in engines or (select(artifact),):
            name = f"{artifact.header['variant']} {artifact.label}"
            policy = artifact.header["config"]["policy"]
            meta = {"model": name, "engine": engine.value, "policy": policy}
            found.append((load_segmenter(artifact, engine), meta, stem))
    metas = [meta.copy() for _, meta, _ in found]
    return [
        (segmenter, {**meta, "model": f"{meta['model']} {stem}"} if metas.count(meta) > 1 else meta)
        for segmenter, meta, stem in found
    ]


def _read(path: Path) -> Checkpoint | Artifact:
    path = find_checkpoint(path)
    if not path.is_file():
        raise ValueError(f"there is no file '{path}'")
    try:
        return read_artifact(path)
    except ArtifactError as refused:
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            raise ValueError(
                f"'{path.name}' is neither an artifact ({refused}) nor a checkpoint ({error})"
            ) from None


def _embedded(sha256: str, artifact: Artifact) -> Checkpoint:
    for path in NAMED.values():
        if path.is_file() and file_sha256(path) == sha256:
            return read_checkpoint(path)
    raise ValueError(
        f"the artifact {artifact.header['key']} was made of '{artifact.header['source_name']}': give "
        "that checkpoint with --model too, for drop and agreement are measured against it"
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
