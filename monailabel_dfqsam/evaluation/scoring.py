"""Models' answers to prompts against the truth, against full precision, and their means as rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from monailabel_dfqsam.agreement import one_grey_level_away
from monailabel_dfqsam.config import Progress, silent
from monailabel_dfqsam.evaluation.baselines import BASELINES
from monailabel_dfqsam.evaluation.items import Item, read_items
from monailabel_dfqsam.evaluation.measures import dice, iou, surface_dice
from monailabel_dfqsam.evaluation.prompts import Dialogue, converse, dialogues
from monailabel_dfqsam.masks import Mask
from monailabel_dfqsam.segmentation.segmenter import Embedding, Prediction, Prompts

NAMES = ("model", "engine", "policy")
"""What names a segmenter in its rows."""

_MEANS = ("iou", "dice", "nsd", "drop", "agreement")
_MEDIANS = ("embed_ms", "predict_ms")
_RESAMPLES = 2000


class Model(Protocol):
    """What can be scored: a `Segmenter`, or what answers like one."""

    def embed(self, rgb: NDArray[Any], /) -> Embedding:
        """As `Segmenter.embed`."""

    def predict(self, embedding: Embedding, prompts: Prompts, /) -> Prediction:
        """As `Segmenter.predict`."""


@dataclass(frozen=True, eq=False)
class OneGreyLevelAway:
    """The yardstick of agreement: a model that sees every image one grey level away from what it is."""

    model: Model
    seed: int = 0

    def embed(self, rgb: NDArray[Any], /) -> Embedding:
        """As `Segmenter.embed`."""
        return self.model.embed(one_grey_level_away(rgb, self.seed))

    def predict(self, embedding: Embedding, prompts: Prompts, /) -> Prediction:
        """As `Segmenter.predict`."""
        return self.model.predict(embedding, prompts)


@dataclass(frozen=True, eq=False)
class Answer:
    """A mask [H, W] bool, all prompts that led to it, and milliseconds of the embedding and of a prompt."""

    mask: Mask
    prompts: Prompts
    embed_ms: float
    predict_ms: float


@dataclass(frozen=True, eq=False)
class Scored:
    """One model's answer about one object, measured.

    Attributes:
        number: the item's, from 1, in the order of the data.
        item: what was asked about.
        names: of the model, {model, engine, policy}.
        prompt: its kind, a name from `PROMPTS`.
        answer: the model's.
        expected: [H, W] bool, the full-precision model's mask.
        scores: {iou, dice, nsd, agreement}, 0 … 1; drop, the full-precision model's IoU minus this one's;
            embed_ms, predict_ms.
    """

    number: int
    item: Item
    names: Mapping[str, Any]
    prompt: str
    answer: Answer
    expected: Mask
    scores: Mapping[str, float]


def evaluate(
    data: Path,
    segmenters: Sequence[tuple[Model, Mapping[str, Any]]],
    reference: Model,
    prompts: Sequence[str] = ("box", "point"),
    progress: Progress = silent,
    observe: Callable[[Scored], None] = lambda scored: None,
) -> list[dict[str, Any]]:
    """Scores segmenters on images with ground truth.

    Args:
        data: as `read_items` takes it.
        segmenters: each with what names it in its rows: {model, engine, policy}.
        reference: the model in full precision, to which `drop` and `agreement` compare.
        prompts: names from `PROMPTS`.
        progress: called with stage 'evaluation'.
        observe: called with each answer as it is scored.

    Returns:
        A row for each segmenter, prompt and modality, 'all' first: {model, engine, policy, prompt, modality,
        n, iou, dice, nsd, drop, drop_ci, agreement, agreement_median, embed_ms, predict_ms, baseline_box,
        baseline_ellipse, baseline_otsu}. Scores are means over n images, 0 … 1. drop: the reference's IoU
        minus this one's; drop_ci: [low, high], its 95 % interval by bootstrap over images; agreement: IoU
        with the reference's mask, each model's last one where it was corrected by its own errors;
        agreement_median: its median; embed_ms, predict_ms: medians of
        an embedding and of a prompt, milliseconds; the baselines' IoU are of the tight box, whatever the
        prompt.

    Raises:
        EvaluationError: for a prompt that is not known, or as `read_items`.
    """
    kinds = dialogues(list(prompts))
    readers = read_items(Path(data))
    named = [{key: meta.get(key) for key in NAMES} for _, meta in segmenters]
    modalities: list[str] = []
    baselines: list[dict[str, float]] = []
    scores: list[dict[str, list[Mapping[str, float]]]] = [{kind: [] for kind in kinds} for _ in segmenters]
    for number, read in enumerate(readers, start=1):
        progress("evaluation", number - 1, len(readers))
        item = read()
        modalities.append(item.modality)
        baselines.append({name: iou(make(item), item.mask) for name, make in BASELINES.items()})
        expected = _answers(reference, item, kinds)
        for (segmenter, _), names, kept in zip(segmenters, named, scores, strict=True):
            answers = expected if segmenter is reference else _answers(segmenter, item, kinds)
            for kind, answer in answers.items():
                full = expected[kind].mask
                scored = Scored(number, item, names, kind, answer, full, _score(answer, full, item.mask))
                kept[kind].append(scored.scores)
                observe(scored)
    progress("evaluation", len(readers), len(readers))
    return [
        {**names, "prompt": kind, **row}
        for names, kept in zip(named, scores, strict=True)
        for kind in kinds
        for row in _rows(kept[kind], baselines, modalities)
    ]


def _answers(segmenter: Model, item: Item, kinds: Mapping[str, Dialogue]) -> dict[str, Answer]:
    begin = time.perf_counter()
    embedding = segmenter.embed(item.rgb)
    embed_ms = 1000 * (time.perf_counter() - begin)
    answers = {}
    for kind, dialogue in kinds.items():
        begin = time.perf_counter()
        mask, prompts = converse(lambda given: segmenter.predict(embedding, given), dialogue, item.mask)
        rounds = max(1, len(prompts.points))
        answers[kind] = Answer(mask, prompts, embed_ms, 1000 * (time.perf_counter() - begin) / rounds)
    return answers


def _score(answer: Answer, expected: Mask, truth: Mask) -> dict[str, float]:
    reached = iou(answer.mask, truth)
    return {
        "iou": reached,
        "dice": dice(answer.mask, truth),
        "nsd": surface_dice(answer.mask, truth),
        "drop": iou(expected, truth) - reached,
        "agreement": iou(answer.mask, expected),
        "embed_ms": answer.embed_ms,
        "predict_ms": answer.predict_ms,
    }


def _rows(
    scores: Sequence[Mapping[str, float]], baselines: Sequence[Mapping[str, float]], modalities: Sequence[str]
) -> list[dict[str, Any]]:
    """A row of means for all images, then one for each modality."""
    rows = []
    for group in ["all", *sorted(set(modalities))]:
        member = [i for i, modality in enumerate(modalities) if group in ("all", modality)]
        found = {key: np.array([scores[i][key] for i in member]) for key in scores[0]}
        row: dict[str, Any] = {"modality": group, "n": len(member)}
        row.update({key: float(found[key].mean()) for key in _MEANS})
        row["agreement_median"] = float(np.median(found["agreement"]))
        row["drop_ci"] = _interval(found["drop"])
        row.update({key: round(float(np.median(found[key])), 2) for key in _MEDIANS})
        row.update({name: float(np.mean([baselines[i][name] for i in member])) for name in BASELINES})
        rows.append(row)
    return rows


def _interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """95 % interval of the mean by bootstrap; the same for the same values."""
    from scipy.stats import bootstrap  # slow to import

    if np.ptp(values) == 0:
        return [float(values[0])] * 2  # nothing to resample
    found = bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]
