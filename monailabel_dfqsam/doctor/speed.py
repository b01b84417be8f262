"""How long a click will take and how much memory, measured on the model that would be served."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from monailabel_dfqsam.artifact import ArtifactError, read_artifact
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.doctor.finding import Finding, Level
from monailabel_dfqsam.memory import MemoryShortage, available
from monailabel_dfqsam.numbers import in_bytes
from monailabel_dfqsam.sam import build, find_checkpoint, read_checkpoint
from monailabel_dfqsam.sam.checkpoint import DEFAULT
from monailabel_dfqsam.segmentation.engine_race import load_fastest
from monailabel_dfqsam.segmentation.memory import embed_bytes
from monailabel_dfqsam.segmentation.segmenter import Prompts, Segmenter, full_precision_segmenter
from monailabel_dfqsam.server.runs.folder import ModelFolder, default_key
from monailabel_dfqsam.server.settings import Settings

_SIDE = 512
_REPEATS = 5
_ENOUGH_SECONDS = 3.0
# Above these sizes an image takes full precision longer than a diagnosis may.
_LARGEST_TIMED = 256


@dataclass(frozen=True)
class Measured:
    """Of one model.

    Attributes:
        model: its name, like 'W4A4 (onednn)'.
        first_ms: a click on a slice that is shown for the first time; None where not measured.
        cached_ms: a further click on it.
        memory_bytes: what its weights took, and what one embedding takes at most.
    """

    model: str
    first_ms: float | None
    cached_ms: float | None
    memory_bytes: int


def model(checkpoint: Path | None, folder: ModelFolder) -> tuple[list[Finding], Measured | None]:
    """Loads what the server would serve, and clicks a few times.

    Args:
        checkpoint: full-precision weights, as `find_checkpoint` takes them; None takes the default.
        folder: where the server keeps quantized models; a race of engines may be noted there.
    """
    try:
        source = find_checkpoint(checkpoint or DEFAULT)
    except ValueError as error:
        return [Finding("model", "checkpoint", str(error), Level.PROBLEM, "Or give another, or none.")], None
    if not source.is_file():
        remedy = "Give another, or none." if checkpoint else "Install this package again."
        return [Finding("model", "checkpoint", f"there is no file '{source}'", Level.PROBLEM, remedy)], None
    try:
        before = psutil.Process().memory_info().rss
        segmenter, engine = _load(source, folder)
        weights = psutil.Process().memory_info().rss - before
        measured = _measure(segmenter, engine, weights + embed_bytes(segmenter.variant, engine))
    except MemoryShortage as error:
        return [Finding("model", "memory", str(error), Level.PROBLEM, _SMALLER)], None
    except ValueError as error:
        remedy = "Give a checkpoint of a Segment Anything model with a ViT encoder, downloaded whole."
        return [Finding("model", "checkpoint", str(error), Level.PROBLEM, remedy)], None
    return [
        Finding("model", "checkpoint", source.name),
        *_told(measured, quantized=engine is not None),
    ], measured


_SMALLER = "End other programs, raise the container's limit, or serve a smaller model."


def _load(source: Path, folder: ModelFolder) -> tuple[Segmenter, EngineKind | None]:
    """The model, and the engine of a quantized one."""
    path = folder.artifact(folder.chosen(default_key(Settings(folder.path, checkpoint=source))))
    if path.is_file():
        try:
            segmenter, race = load_fastest(read_artifact(path), path.with_suffix(".engines.json"))
            return segmenter, race.winner
        except ArtifactError:
            pass  # the server quantizes again, and answers in full precision until then
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return full_precision_segmenter(build(read_checkpoint(source)).to(device)), None


def _measure(segmenter: Segmenter, engine: EngineKind | None, memory: int) -> Measured:
    if engine is None and segmenter.variant.input_size > _LARGEST_TIMED and not torch.cuda.is_available():
        return Measured(segmenter.name, None, None, memory)
    values = np.random.default_rng(0).integers(0, 255, (_SIDE, _SIDE, 3)).astype(np.uint8)
    click = Prompts(box=np.array([100.0, 150.0, 300.0, 400.0]))
    firsts: list[float] = []
    cached: list[float] = []
    segmenter.predict(segmenter.embed(values), click)  # a server's first image of all takes longer, once
    begin = time.perf_counter()
    while len(firsts) < _REPEATS and (not firsts or time.perf_counter() - begin < _ENOUGH_SECONDS):
        start = time.perf_counter()
        embedding = segmenter.embed(values)
        embedded = time.perf_counter()
        segmenter.predict(embedding, click)
        end = time.perf_counter()
        firsts.append(end - start)
        cached.append(end - embedded)
    return Measured(
        segmenter.name, statistics.median(firsts) * 1000, statistics.median(cached) * 1000, memory
    )


def _told(measured: Measured, quantized: bool) -> list[Finding]:
    name = measured.model if quantized else f"{measured.model}, until the server has quantized it"
    findings = [Finding("model", "answers", name)]
    if measured.first_ms is None or measured.cached_ms is None:
        text = "not measured: an image takes full precision long at this size; quantized it is faster"
        findings.append(Finding("model", "a click", text))
    else:
        text = f"{measured.first_ms:.1f} ms on a new slice, {measured.cached_ms:.1f} ms on one shown before"
        findings.append(Finding("model", "a click", f"{text}, without the viewer's way to the server"))
    findings.append(
        Finding.judged(
            measured.memory_bytes <= available(),
            "model",
            "memory",
            f"{in_bytes(measured.memory_bytes)} for weights and an embedding, beside volumes",
            Level.WARNING,
            _SMALLER,
        )
    )
    return findings
