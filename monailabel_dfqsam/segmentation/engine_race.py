"""Which engine runs an artifact on this machine: a short race in speed and in masks, remembered beside it.

Every engine that works here embeds one computed image and answers a few prompts on it. The reference engine
is the oracle of masks: who draws others is out, however fast. It is timed itself where it may win. Engines
whose products of integers are wrong on this processor do not start: see `ops.saturation`. OpenVINO takes no
part in models of 1024 pixels, beside another engine: to make its model takes half a minute at every start.

Rounding alone moves the masks of some models, since 4-bit integers pass a difference on or swallow it.
Where an engine does not agree, the reference engine is held to itself, on an image of which one value differs
by one.

The record, `{key}.engines.json`, holds the race and the conditions it holds under; under any others (another
machine, version, library or artifact) it is run again. Where there is one, only the winner is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from monailabel_dfqsam import __version__
from monailabel_dfqsam.artifact import Artifact, ArtifactError
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines import candidates
from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.machine import cpu
from monailabel_dfqsam.ops import compiled, cuda_library
from monailabel_dfqsam.sam.variants import VARIANTS, Variant
from monailabel_dfqsam.segmentation.segmenter import Prompts, Segmenter, load_segmenter

logger = logging.getLogger(__name__)

LEAST_AGREEMENT = 0.95
"""Of an engine's masks with the reference engine's, as intersection over union of all together."""

# So much more than the reference engine from itself may an engine differ from it.
_OWN_DIFFERENCES = 2.0

_SIDE = 256
# (x, y, radius) of bright discs on dark, in pixels: large and small, apart and near the edge.
_DISCS = ((70, 80, 38), (180, 60, 22), (190, 185, 50), (60, 200, 14))
_LEAST_RUNS, _MOST_RUNS, _SECONDS = 3, 15, 0.5
_NO_RIVAL = 3.0  # an engine whose first image takes so many times the best one's median is not timed further
# Multiplications of an encoder up to which the reference engine answers within a few seconds: 22 G at 256 px.
# So long, too, takes the one run of a float model that a model of OpenVINO is made by.
_QUICK_PRODUCTS = 50_000_000_000
_FAILURES = (RuntimeError, MemoryError, ArtifactError)
# By which oneDNN, in torch and in OpenVINO, is kept from instructions that the processor has.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@dataclass(frozen=True)
class Entrant:
    """One engine's race.

    Attributes:
        seconds: median of an image's embedding; None when it failed.
        agreement: of its masks with the reference engine's, 0 … 1; None where either failed.
        problem: why it is out, in a few words.
    """

    engine: EngineKind
    seconds: float | None
    agreement: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Race:
    """The engine chosen, and all that took part; nobody raced where there was no choice."""

    winner: EngineKind
    entrants: tuple[Entrant, ...] = ()

    @property
    def seconds(self) -> float | None:
        """Median of an image's embedding by the winner."""
        return next((e.seconds for e in self.entrants if e.engine is self.winner), None)

    def sentence(self) -> str:
        """For the log: who won, by how much, and who is out."""
        if not self.entrants:
            return f"{self.winner.value}: the only engine that works here for this model"
        texts = []
        for e in sorted(self.entrants, key=lambda e: e.seconds or np.inf):
            parts = [] if e.seconds is None else [f"{e.seconds * 1000:.1f} ms"]
            if e.agreement is not None and not e.problem and e.engine is not EngineKind.REFERENCE:
                parts.append(f"agreement {e.agreement:.3f}")
            texts.append(f"{e.engine.value} {', '.join([*parts, *filter(None, [e.problem])])}")
        return f"{self.winner.value} of {len(texts)}: {'; '.join(texts)}"


class _Run(NamedTuple):
    segmenter: Segmenter
    first: float
    masks: NDArray[np.bool_]


def load_fastest(artifact: Artifact, record: Path) -> tuple[Segmenter, Race]:
    """An artifact on the engine that wins here, and the race, which is run only if `record` has none.

    Args:
        record: file for the race's result; a folder that cannot be written to does no harm.

    Raises:
        ValueError: as `load_segmenter`, for an artifact that no engine runs.
        RuntimeError: when the GPU kernels are there but broken.
    """
    kinds = candidates(artifact)
    if len(kinds) == 1:
        return load_segmenter(artifact, kinds[0]), Race(kinds[0])
    conditions = _conditions(artifact, kinds)
    race = _remembered(record, conditions)
    if race is not None:
        try:
            return load_segmenter(artifact, race.winner), race
        except _FAILURES as error:
            logger.warning("The engine %s, chosen earlier, fails: %s", race.winner.value, error)
    segmenter, race = _race(artifact, kinds)
    logger.info("Engine chosen for %s: %s", artifact.label, race.sentence())
    _remember(record, conditions, race)
    return segmenter, race


def _race(artifact: Artifact, kinds: Sequence[EngineKind]) -> tuple[Segmenter, Race]:
    image = _image()
    runs: dict[EngineKind, _Run] = {}
    entrants: list[Entrant] = []
    quick = _products(VARIANTS[artifact.header["variant"]]) <= _QUICK_PRODUCTS
    for kind in kinds:
        if kind is EngineKind.OPENVINO and runs and not quick:
            continue
        if kind is EngineKind.REFERENCE and runs and not quick:
            logger.info("The reference engine draws the masks to compare with: a minute or so, this once")
        try:
            runs[kind] = _run(load_segmenter(artifact, kind), image)
        except _FAILURES as error:  # of a kernel that does not run on this device, say
            entrants.append(Entrant(kind, None, problem=f"it failed: {str(error)[:200]}"))
    oracle = runs.get(EngineKind.REFERENCE)
    best = np.inf
    for kind, run in runs.items():  # the reference engine is the last
        agreement = None if oracle is None else _agreement(run.masks, oracle.masks)
        slow = run is oracle and run.first > _NO_RIVAL * best
        seconds = run.first if slow else _median(run.segmenter, image)
        problem = None
        if oracle is not None and agreement is not None and not _agrees(agreement, oracle, image):
            problem = f"its masks agree with the reference engine's by {agreement:.3f} alone"
        else:
            best = min(best, seconds)
        entrants.append(Entrant(kind, seconds, agreement, problem))
    if not runs:
        raise ValueError("; ".join(f"{e.engine.value}: {e.problem}" for e in entrants))
    for entrant in entrants:
        if entrant.problem:
            logger.warning("The engine %s is not used: %s", entrant.engine.value, entrant.problem)
    winner = min((e for e in entrants if not e.problem), key=lambda e: e.seconds or np.inf).engine
    return runs[winner].segmenter, Race(winner, tuple(entrants))


def _agrees(agreement: float, oracle: _Run, image: NDArray[np.uint8]) -> bool:
    """Whether masks differ by no more than rounding explains in this model."""
    if agreement >= LEAST_AGREEMENT:
        return True
    nearly = image.copy()
    nearly[_SIDE // 2, _SIDE // 2, 0] ^= 1
    own = _agreement(_run(oracle.segmenter, nearly).masks, oracle.masks)
    return 1 - agreement <= _OWN_DIFFERENCES * (1 - own)


def _run(segmenter: Segmenter, image: NDArray[np.uint8]) -> _Run:
    begin = time.perf_counter()
    embedding = segmenter.embed(image)
    first = time.perf_counter() - begin
    points = [
        Prompts(points=np.array([[x, y]], dtype=np.float64), labels=np.ones(1, dtype=np.int64))
        for x, y, _ in _DISCS
    ]
    boxes = [Prompts(box=np.array([x - r, y - r, x + r, y + r], dtype=np.float64)) for x, y, r in _DISCS]
    # Of the decoder's three candidates, two that are nearly as good may change places by a rounding.
    masks = [segmenter.predict(embedding, prompts, multimask=False).mask for prompts in (*points, *boxes)]
    return _Run(segmenter, first, np.stack(masks))


def _median(segmenter: Segmenter, image: NDArray[np.uint8]) -> float:
    """Of a few embeddings, more where they are short."""
    laps: list[float] = []
    while len(laps) < _LEAST_RUNS or (sum(laps) < _SECONDS and len(laps) < _MOST_RUNS):
        begin = time.perf_counter()
        segmenter.embed(image)
        laps.append(time.perf_counter() - begin)
    return statistics.median(laps)


def _image() -> NDArray[np.uint8]:
    """[H, W, 3] uint8: discs with soft edges, and noise."""
    y, x = np.mgrid[:_SIDE, :_SIDE]
    values = np.full((_SIDE, _SIDE), 60.0)
    for cx, cy, radius in _DISCS:
        inside = 1 / (1 + np.exp(np.hypot(x - cx, y - cy) - radius))
        values += (190 - 60) * inside
    values += np.random.default_rng(0).normal(0, 6, values.shape)
    return np.repeat(values.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def _agreement(masks: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
    """Intersection over union of all masks together: a mask of a few pixels alone decides nothing."""
    union = int((masks | expected).sum())
    return int((masks & expected).sum()) / union if union else 1.0


def _products(variant: Variant) -> int:
    """Multiplications in the blocks' linear layers: 12 C² a token and block."""
    return sum(12 * block.dim**2 * block.grid**2 for block in variant.blocks)


def _conditions(artifact: Artifact, kinds: Sequence[EngineKind]) -> dict[str, Any]:
    """All that may change who wins."""
    libraries = (compiled.library_path(), cuda_library.LIBRARY)
    return {
        "artifact": artifact.header.get("tensors_sha256"),
        "version": __version__,
        "torch": torch.__version__,
        "openvino": version("openvino") if EngineKind.OPENVINO in kinds else None,
        "threads": torch.get_num_threads(),
        "cpu": list(cpu()),
        "limits": [os.environ.get(name) for name in _LIMITS],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "libraries": [_sha256(path) for path in libraries if path is not None and path.is_file()],
        "engines": [kind.value for kind in kinds],
    }


@functools.cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _remembered(record: Path, conditions: dict[str, Any]) -> Race | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["conditions"] != conditions:
            return None
        entrants = tuple(Entrant(**{**e, "engine": EngineKind(e["engine"])}) for e in found["entrants"])
        return Race(EngineKind(found["winner"]), entrants)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(record: Path, conditions: dict[str, Any], race: Race) -> None:
    text = json.dumps({"conditions": conditions, **asdict(race)}, indent=1) + "\n"
    try:
        with replacing(record) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        logger.info("The race of engines is run again at the next start: %s", error.strerror)
