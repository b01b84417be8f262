"""Chooses the engine that runs an artifact on this machine, by a short race.

    image       every engine embeds the same drawn image and answers the same few prompts on it
    masks       an engine whose masks are not the reference engine's is out, however fast it is
    speed       of the others, the one with the shortest median embedding wins

An engine whose integer products are wrong on this processor does not start: see `ops.saturation`. OpenVINO
needs half a minute at every start to prepare a model of 1024 pixels, and runs these only if no other engine
does.

In some models rounding alone moves the masks. The reference engine then shows how much: it runs again on the
image with one value changed by one, and another engine may differ from it by twice what that changes.

The result is written to `{key}.engines.json`, with the machine, versions and libraries it was measured on.
While these stay the same, later starts load the winner without a race.
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
from monailabel_dfqsam.artifact import Artifact
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines import candidates
from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.machine import cpu
from monailabel_dfqsam.memory import MemoryShortage, shortage_told
from monailabel_dfqsam.ops import compiled, cuda_library, product
from monailabel_dfqsam.sam.variants import VARIANTS, Variant
from monailabel_dfqsam.segmentation.segmenter import Prompts, Segmenter, load_segmenter

logger = logging.getLogger(__name__)

LEAST_AGREEMENT = 0.95
"""IoU, over all masks together, from which an engine's masks count as the reference engine's."""

# An engine may differ from the reference engine by this many times what one changed pixel value changes.
_OWN_DIFFERENCES = 2.0

_SIDE = 256
# (x, y, radius) of bright discs on dark, in pixels: large and small, apart and near the edge.
_DISCS = ((70, 80, 38), (180, 60, 22), (190, 185, 50), (60, 200, 14))
_LEAST_RUNS, _MOST_RUNS, _SECONDS = 3, 15, 0.5
# The reference engine is not timed when its first image takes this many times the fastest median.
_NO_RIVAL = 3.0
# Multiplications of an encoder that the reference engine, or OpenVINO's preparation, does in a few seconds;
# models of 256 pixels have 22 G.
_QUICK_PRODUCTS = 50_000_000_000
# Environment variables that forbid oneDNN, in torch and in OpenVINO, some of the processor's instructions.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@dataclass(frozen=True)
class Entrant:
    """How one engine did in the race.

    Attributes:
        seconds: median of an image's embedding; None when it failed.
        agreement: of its masks with the reference engine's, 0 … 1; None where either failed.
        problem: why it cannot win, in a few words; None where it can.
    """

    engine: EngineKind
    seconds: float | None
    agreement: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Race:
    """The engine chosen, and all that took part; `entrants` is empty where only one engine works."""

    winner: EngineKind
    entrants: tuple[Entrant, ...] = ()

    @property
    def seconds(self) -> float | None:
        """Median of an image's embedding by the winner."""
        return next((e.seconds for e in self.entrants if e.engine is self.winner), None)

    def sentence(self) -> str:
        """For the log: the winner, every engine's milliseconds, and why an engine cannot win."""
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
    """Loads an artifact on the fastest right engine, and says how the race went.

    Args:
        record: file of the race's result, read if it is there and holds here, else written if it can be.

    Raises:
        ValueError: for an artifact that no engine runs.
        MemoryShortage: when engines failed for want of memory, and none other runs it.
        Exception: whatever the only engine raises that could run it.
    """
    kinds = candidates(artifact)
    if len(kinds) == 1:
        return load_segmenter(artifact, kinds[0]), Race(kinds[0])
    conditions = _conditions(artifact, kinds)
    race = _remembered(record, conditions)
    if race is not None:
        try:
            return load_segmenter(artifact, race.winner), race
        except Exception as error:  # engines are libraries: any of them may raise anything
            logger.warning("The engine %s, chosen earlier, fails: %s", race.winner.value, error)
    segmenter, race, is_lasting = _race(artifact, kinds)
    logger.info("Engine chosen for %s: %s", artifact.label, race.sentence())
    if is_lasting:
        _remember(record, conditions, race)
    return segmenter, race


def _race(artifact: Artifact, kinds: Sequence[EngineKind]) -> tuple[Segmenter, Race, bool]:
    """The winner, the race, and whether it would end the same way tomorrow: no engine lacked memory."""
    image = _image()
    runs: dict[EngineKind, _Run] = {}
    entrants: list[Entrant] = []
    shortage: MemoryShortage | None = None
    quick = _products(VARIANTS[artifact.header["variant"]]) <= _QUICK_PRODUCTS
    for kind in kinds:
        if kind is EngineKind.OPENVINO and runs and not quick:
            continue
        if kind is EngineKind.REFERENCE and runs and not quick:
            logger.info("The reference engine draws the masks to compare with: a minute or so, this once")
        try:
            with shortage_told(f"the engine {kind.value}"):
                runs[kind] = _run(load_segmenter(artifact, kind), image)
        except Exception as error:  # engines are libraries: any of them may raise anything
            shortage = shortage or (error if isinstance(error, MemoryShortage) else None)
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
        if shortage is not None:
            raise shortage
        raise ValueError("; ".join(f"{e.engine.value}: {e.problem}" for e in entrants))
    for entrant in entrants:
        if entrant.problem:
            logger.warning("The engine %s is not used: %s", entrant.engine.value, entrant.problem)
    winner = min((e for e in entrants if not e.problem), key=lambda e: e.seconds or np.inf).engine
    return runs[winner].segmenter, Race(winner, tuple(entrants)), shortage is None


def _agrees(agreement: float, oracle: _Run, image: NDArray[np.uint8]) -> bool:
    """Whether an engine's masks differ from the oracle's by no more than rounding does in this model."""
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
    """Median seconds of 3 to 15 embeddings, as many as fit into half a second."""
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
    """IoU over the pixels of all masks together, so that no mask of a few pixels decides."""
    union = int((masks | expected).sum())
    return int((masks & expected).sum()) / union if union else 1.0


def _products(variant: Variant) -> int:
    """Multiplications in the blocks' linear layers: 12 C² a token and block."""
    return sum(12 * block.dim**2 * block.grid**2 for block in variant.blocks)


def _conditions(artifact: Artifact, kinds: Sequence[EngineKind]) -> dict[str, Any]:
    """Everything on which the race's result depends, as JSON values."""
    libraries = (compiled.library_path(), product.PATH, cuda_library.LIBRARY)
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
