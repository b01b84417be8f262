"""A mask on a few slices, where a person pointed, to a mask on all slices that the object reaches.

    sources    slices with prompts of their own: answered from these alone, and left as answered
    segments   the slices between two sources, or from the outermost to the end
    fronts     one enters a segment from each source beside it and goes from slice to slice, until there is
               a reason to stop, or until it meets the other one

Segments share nothing but their sources. Embeddings are made in batches, ahead of the fronts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice, pairwise

import numpy as np
from numpy.typing import NDArray

from monailabel_dfqsam.segmentation.following import Predict, Source, Stop, follow
from monailabel_dfqsam.segmentation.segmenter import Embedding, Prompts
from monailabel_dfqsam.segmentation.volume import Volume, Window, slice_rgb

__all__ = ["BATCH", "Embed", "Front", "Predict", "Propagation", "Stop", "propagate"]

Mask = NDArray[np.bool_]
Embed = Callable[[Sequence[int]], Sequence[Embedding]]
"""Slices k to their embeddings, in order; called with at most `BATCH` at a time."""

BATCH = 8
"""Slices embedded together: enough to fill a device, and little that is done in vain when a front stops."""


@dataclass(frozen=True)
class Front:
    """How far a direction came: from slice `source` by `step` (1 or −1) to `last`, and why no farther."""

    source: int
    step: int
    last: int
    stop: Stop


@dataclass(frozen=True, eq=False)
class Propagation:
    """An object in a volume.

    Attributes:
        mask: [I, J, K] bool.
        scores: [K] float, the model's estimate of the IoU of the mask there, NaN where nothing was kept.
        fronts: two for each prompted slice, by source, downwards first.
    """

    mask: Mask
    scores: NDArray[np.float64]
    fronts: tuple[Front, ...]


def propagate(
    embed: Embed,
    predict: Predict,
    volume: Volume,
    prompts: Mapping[int, Prompts],
    *,
    window: Window | None = None,
    roi: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Propagation:
    """Segments one object through a volume.

    A slice with a foreground point or a box is a source: its mask is the model's answer to these prompts
    alone. Background points on another slice refine what propagation brings there; where one stays inside the
    mask all the same, the object ends before that slice. A slice between two sources belongs to the nearer
    one that reaches it, at equal distance to the one with the higher score.

    Args:
        embed: embeddings of slices as `slice_rgb` shows them in `window`.
        predict: `Segmenter.predict` of the same model.
        prompts: of one object, by slice k, 0 … K − 1; (x, y) in the slice's pixels.
        window: the values to show; None takes the volume's own.
        roi: (first, last) slice to go to.
        progress: called with the slices that are settled and all that may be reached.

    Raises:
        ValueError: without a foreground point or a box, for a slice that is not there or outside the ROI, and
            what `predict` raises for prompts it cannot answer.
    """
    depth = volume.shape[2]
    low, high = (0, depth - 1) if roi is None else (max(roi[0], 0), min(roi[1], depth - 1))
    sources = sorted(k for k, given in prompts.items() if _begins(given))
    _check(prompts, sources, low, high, depth)
    run = _Run(embed, predict, lambda k: slice_rgb(volume, k, window), prompts)
    run.answer(sources)
    total, settled = high - low + 1, len(sources)
    progress(settled, total)
    fronts: list[_Front] = []
    for before, after in pairwise((low - 1, *sources, high + 1)):
        here = [
            _Front(run, k, step, before + 1, after - 1)
            for k, step in ((before, 1), (after, -1))
            if low <= k <= high
        ]
        beyond = Stop.MET if len(here) == 2 else Stop.END if (before < 0 or after == depth) else Stop.ROI
        for part in _advance(run, here, beyond):
            progress(settled + part, total)
        fronts += here
        settled += after - before - 1
        progress(settled, total)
    return _result(run, volume.shape, fronts)


def _begins(prompts: Prompts) -> bool:
    return prompts.box is not None or bool(np.any(np.asarray(prompts.labels) == 1))


def _check(prompts: Mapping[int, Prompts], sources: Sequence[int], low: int, high: int, depth: int) -> None:
    for k in prompts:
        if not 0 <= k < depth:
            raise ValueError(f"there is no slice {k} in an image of {depth}")
    if not sources:
        raise ValueError("there is nothing to propagate: give at least one foreground point or a box")
    for k in sources:
        if not low <= k <= high:
            raise ValueError(f"slice {k} is prompted, but the ROI goes from slice {low} to {high}")


@dataclass(frozen=True, eq=False)
class _Answer:
    """A slice's mask [H, W], its score, and the source that it comes from."""

    source: int
    mask: Mask
    score: float


class _Run:
    """What the fronts of one call share: slices answered so far, and embeddings ready for the next."""

    def __init__(
        self,
        embed: Embed,
        predict: Predict,
        rgb: Callable[[int], NDArray[np.uint8]],
        prompts: Mapping[int, Prompts],
    ) -> None:
        self.predict, self.rgb, self.prompts = predict, rgb, prompts
        self.answers: dict[int, _Answer] = {}
        self._looks: dict[int, Source] = {}
        self._embed = embed
        self._ready: dict[int, Embedding] = {}

    def answer(self, sources: Sequence[int]) -> None:
        """The model's answers to the prompts of these slices."""
        for first in range(0, len(sources), BATCH):
            ks = sources[first : first + BATCH]
            for k, embedding in zip(ks, self._embed(ks), strict=True):
                found = self.predict(embedding, self.prompts[k])
                self.answers[k] = _Answer(k, found.mask, found.score)

    def looks(self, k: int) -> Source:
        """How the object looks on slice k, a source; found when it is followed, since that takes long."""
        if k not in self._looks:
            self._looks[k] = Source.of(self.rgb(k), self.answers[k].mask, self.answers[k].score)
        return self._looks[k]

    def embedding(self, k: int, wanted: Iterator[int]) -> Embedding:
        """That of slice k; made together with those that are `wanted` next, k among them."""
        if k not in self._ready:
            ks = list(islice(wanted, BATCH))
            self._ready = dict(zip(ks, self._embed(ks), strict=True))
        return self._ready[k]

    def background(self, k: int) -> NDArray[np.float64]:
        """[N, 2] float (x, y), the points of a slice that is no source."""
        return np.asarray(self.prompts[k].points if k in self.prompts else np.zeros((0, 2)), dtype=np.float64)


class _Front:
    """A direction from a source, at distance 0 to begin with."""

    def __init__(self, run: _Run, source: int, step: int, low: int, high: int) -> None:
        self._run, self.source, self.step, self._low, self._high = run, source, step, low, high
        answer = run.answers[source]
        self.last, self._mask = source, answer.mask
        self.stop: Stop | None = None if answer.mask.any() else Stop.EMPTY

    def slice(self, distance: int) -> int | None:
        """The slice at a distance, unless it is beyond the segment or taken by a nearer source."""
        k = self.source + distance * self.step
        taken = self._run.answers.get(k)
        inside = self._low <= k <= self._high
        return k if inside and (taken is None or abs(taken.source - k) >= distance) else None

    def advance(self, k: int, embedding: Embedding) -> None:
        """Answers slice k, or stops."""
        run = self._run
        looks, background = run.looks(self.source), run.background(k)
        found = follow(run.predict, embedding, run.rgb(k), self._mask, looks, background)
        if isinstance(found, Stop):
            self.stop = found
            return
        self._mask, score = found
        self.last = k
        taken = run.answers.get(k)
        if taken is None or score > taken.score:
            run.answers[k] = _Answer(self.source, self._mask, score)


def _advance(run: _Run, fronts: Sequence[_Front], beyond: Stop) -> Iterator[int]:
    """Takes the fronts of one segment through it, in step; yields how many slices are settled, now and then.

    Args:
        beyond: why a front stops at the segment's far end.
    """
    before = len(run.answers)
    for distance in count(1):
        alive = [front for front in fronts if front.stop is None]
        if not alive:
            return
        for front in alive:
            k = front.slice(distance)
            if k is None:
                front.stop = beyond
            else:
                front.advance(k, run.embedding(k, _wanted(alive, distance)))
        yield len(run.answers) - before


def _wanted(alive: Sequence[_Front], distance: int) -> Iterator[int]:
    """The slices that fronts will come to from a distance on, nearest first, each once."""
    seen: set[int] = set()
    for d in count(distance):
        ks = {k for front in alive if (k := front.slice(d)) is not None} - seen
        if not ks:
            return
        seen |= ks
        yield from sorted(ks)


def _result(run: _Run, shape: tuple[int, int, int], fronts: Sequence[_Front]) -> Propagation:
    # As in files, so that a slice's voxels lie together.
    mask, scores = np.zeros(shape, dtype=bool, order="F"), np.full(shape[2], np.nan)
    for k, answer in run.answers.items():
        mask[:, :, k], scores[k] = answer.mask, answer.score
    ways = [Front(f.source, f.step, f.last, f.stop) for f in fronts if f.stop is not None]
    return Propagation(mask, scores, tuple(sorted(ways, key=lambda way: (way.source, way.step))))
