"""Objects through volumes against the truth, prompted as an ideal person would, beside baselines."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monailabel_dfqsam.evaluation.baselines import box_baseline, ellipse_baseline
from monailabel_dfqsam.evaluation.items import EvaluationError, Item
from monailabel_dfqsam.evaluation.measures import dice
from monailabel_dfqsam.evaluation.models import Named
from monailabel_dfqsam.evaluation.prompts import PROMPTS, box_prompt
from monailabel_dfqsam.masks import Mask
from monailabel_dfqsam.segmentation.propagation import Propagation, propagate
from monailabel_dfqsam.segmentation.segmenter import Embedding, Segmenter
from monailabel_dfqsam.segmentation.volume import Volume, load_volume

PLACES: dict[str, tuple[str, tuple[float, ...]]] = {
    "box": ("box", (0.5,)),
    "point": ("point", (0.5,)),
    "boxes": ("box", (0.25, 0.5, 0.75)),
}
"""What an ideal person gives, and on which of the object's slices, as parts of the way through them."""


def prompted_slices(truth: Mask, places: Sequence[float]) -> list[int]:
    """The slices k at these parts, 0 … 1, of the way through those that hold some of an object [I, J, K]."""
    ks = np.flatnonzero(truth.any(axis=(0, 1)))
    return sorted({int(ks[round(place * (len(ks) - 1))]) for place in places})


def segment(segmenter: Segmenter, volume: Volume, truth: Mask, kind: str) -> tuple[Propagation, float]:
    """What comes of the prompts of a kind in `PLACES`, and in how many seconds, embeddings included."""
    name, places = PLACES[kind]
    prompts = {k: PROMPTS[name].first(truth[:, :, k]) for k in prompted_slices(truth, places)}

    def embed(ks: Sequence[int]) -> list[Embedding]:
        return segmenter.embed_slices(volume, ks, None)

    begin = time.perf_counter()
    found = propagate(embed, segmenter.predict, volume, prompts)
    return found, time.perf_counter() - begin


def extruded(truth: Mask, kind: str, slices: Sequence[int], fill: Callable[[Item], Mask]) -> Mask:
    """[I, J, K]: on each of some slices, what fills the box of the prompted slice nearest to it."""
    given = prompted_slices(truth, PLACES[kind][1])
    blank = np.zeros((*truth.shape[:2], 3), dtype=np.uint8)
    filled = {k: fill(Item(blank, truth[:, :, k], "")) for k in given}
    result = np.zeros_like(truth)
    for k in slices:
        result[:, :, k] = filled[min(given, key=lambda near: abs(near - k))]
    return result


def every_box(segmenter: Segmenter, volume: Volume, truth: Mask) -> Mask:
    """[I, J, K]: the model's answers to the true box on every slice; what propagation can hardly exceed."""
    result = np.zeros_like(truth)
    for k in np.flatnonzero(truth.any(axis=(0, 1))):
        embedding = segmenter.embed_slices(volume, [int(k)], None)[0]
        result[:, :, k] = segmenter.predict(embedding, box_prompt(truth[:, :, k])).mask
    return result


def evaluate_volumes(
    pairs: Sequence[tuple[Path, Path]], reference: Segmenter, segmenters: Sequence[Named]
) -> list[dict[str, Any]]:
    """Scores each segmenter on each object with each kind of prompts.

    Args:
        pairs: image and mask files.
        reference: the model in full precision.
        segmenters: each with what names it in its rows.

    Returns:
        Rows {model, engine, image, object, prompts, dice, agreement, seconds, slices, slices_true, reached,
        stops, every_box, ellipse, box, box_reached}. dice and those after `stops`: volumetric Dice with the
        truth, 0 … 1; agreement: Dice with the full-precision model's mask; seconds: of embedding and
        propagating, without reading the file; slices: of the image; reached: [first, last] slice with a mask;
        ellipse, box: of the prompted slices' tight boxes (whatever the prompts), extruded through the slices
        that the truth spans; box_reached: through those that the mask does.

    Raises:
        EvaluationError: for a mask that is empty or of another shape.
    """
    rows = []
    for image, label in pairs:
        volume, truth = load_volume(image), load_volume(label).array != 0
        if truth.shape != volume.shape or not truth.any():
            raise EvaluationError(f"'{label.name}' is empty or has not the shape of '{image.name}'")
        names = {"image": image.name, "object": label.name.split(".")[0].removeprefix(_stem(image) + "_")}
        expected = {kind: segment(reference, volume, truth, kind) for kind in PLACES}
        for segmenter, meta in segmenters:
            most = dice(every_box(segmenter, volume, truth), truth)
            for kind in PLACES:
                found, seconds = (
                    expected[kind] if segmenter is reference else segment(segmenter, volume, truth, kind)
                )
                score = _scores(found, expected[kind][0].mask, truth, kind)
                rows.append(
                    {
                        "model": meta["model"],
                        "engine": meta["engine"],
                        **names,
                        "prompts": kind,
                        "seconds": round(seconds, 2),
                        **score,
                        "every_box": most,
                    }
                )
    return rows


def _scores(found: Propagation, expected: Mask, truth: Mask, kind: str) -> dict[str, Any]:
    spans = [np.flatnonzero(mask.any(axis=(0, 1))) for mask in (found.mask, truth)]
    reached, true = ([int(span[0]), int(span[-1])] if len(span) else [] for span in spans)
    return {
        "slices": truth.shape[2],
        "slices_true": true,
        "reached": reached,
        "stops": [front.stop.name.lower() for front in found.fronts],
        "dice": dice(found.mask, truth),
        "agreement": dice(found.mask, expected),
        "ellipse": dice(extruded(truth, kind, spans[1].tolist(), ellipse_baseline), truth),
        "box": dice(extruded(truth, kind, spans[1].tolist(), box_baseline), truth),
        "box_reached": dice(extruded(truth, kind, spans[0].tolist(), box_baseline), truth),
    }


def _stem(path: Path) -> str:
    return path.name.split(".")[0]
