"""Pseudo-positive labels that evolve with the image (DFQ-SAM Eq. 3-4).

A label map begins as one random ellipse. At each iteration the model's own masks for prompts drawn from the
map are candidates; the surest one joins the map, and regions that have become unsure leave it. All functions
are pure: label maps are [g, g] int64 tensors on the CPU, 0 for none and class + 1 elsewhere, on the grid of
the model's low-resolution masks; areas count cells of that grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Generator, Tensor

from monailabel_dfqsam.config import SynthesisConfig

REGIONS_PER_CLASS = 2


@dataclass(frozen=True)
class EvolutionStep:
    """A snapshot of the labels.

    Attributes:
        iteration: optimisation step after which it was taken.
        labels: [g, g] int64, 0 for none, else class + 1.
        score: mean confidence of the labelled cells at that step, 0 to 1.
        image: [3, S/2, S/2] uint8 RGB, the image at that step.
    """

    iteration: int
    labels: Tensor
    score: float
    image: Tensor


@dataclass(frozen=True)
class EvolutionRules:
    """What a region must be to stay: least confidence in [0, 1], least and greatest area in cells."""

    min_score: float
    min_area: int
    max_area: int

    @classmethod
    def of(cls, config: SynthesisConfig, grid: int) -> EvolutionRules:
        """The rules of a configuration on a grid of `grid`² cells."""
        cells = grid * grid
        return cls(config.min_score, int(config.min_area * cells), int(config.max_area * cells))


@dataclass(frozen=True)
class Region:
    """A connected part of one class: mask [g, g] bool and its class."""

    mask: Tensor
    kind: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) in cells, the far sides exclusive."""
        ys, xs = torch.where(self.mask)
        return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


@dataclass(frozen=True)
class Candidates:
    """Masks that may join the labels.

    Attributes:
        masks: [M, g, g] bool.
        scores: [M] float, mean confidence inside.
        peaks: [M] float, greatest confidence inside.
        kinds: [M] int64, class of each.
    """

    masks: Tensor
    scores: Tensor
    peaks: Tensor
    kinds: Tensor


def random_ellipse(generator: Generator, grid: int, kinds: list[int], rules: EvolutionRules) -> Tensor:
    """A label map with one turned ellipse of a random class, place and size between the rules' two areas."""

    def draw() -> float:
        return float(torch.rand((), generator=generator))

    kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
    least, most = 4 * max(rules.min_area, 1), max(rules.max_area, 1)
    area = min(least, most) + draw() * max(0, most - least)
    aspect, angle = 0.5 + 0.5 * draw(), math.pi * draw()
    a, b = math.sqrt(area / math.pi / aspect), math.sqrt(area / math.pi * aspect)
    axis = torch.arange(grid) + 0.5
    dy = axis[:, None] - grid * (0.2 + 0.6 * draw())
    dx = axis[None, :] - grid * (0.2 + 0.6 * draw())
    u = math.cos(angle) * dx + math.sin(angle) * dy
    v = math.cos(angle) * dy - math.sin(angle) * dx
    return ((u / a) ** 2 + (v / b) ** 2 < 1).long() * (kind + 1)


def regions(labels: Tensor, min_area: int = 0) -> list[Region]:
    """Connected regions (4-neighbours) of more than `min_area` cells, by class, largest first within one."""
    found = []
    for value in torch.unique(labels).tolist():
        if value == 0:
            continue
        parts, count = ndimage.label((labels == value).numpy())
        areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        found += [
            Region(torch.from_numpy(parts == index + 1), value - 1)
            for index in np.argsort(-areas, kind="stable")
            if areas[index] > min_area
        ]
    return found


def class_candidates(masks: Tensor, class_scores: Tensor, kinds: list[int]) -> Candidates:
    """Scores masks by an auxiliary model: mean class score inside, of the class for which it is greatest.

    Args:
        masks: [M, g, g] bool.
        class_scores: [C, g, g] float probabilities.
        kinds: classes a region may be of.
    """
    allowed = class_scores[kinds]
    weight = masks.to(allowed.dtype).flatten(1)
    mean = weight @ allowed.flatten(1).T / weight.sum(1, keepdim=True).clamp_min(1)
    scores, best = mean.max(1)
    peaks = (allowed[best] * masks).amax((1, 2))
    return Candidates(masks, scores, peaks, torch.tensor(kinds)[best])


def own_candidates(probabilities: Tensor, predicted_iou: Tensor, kind: int) -> Candidates:
    """Scores masks by the model itself: predicted IoU times mean foreground probability.

    Args:
        probabilities: [M, g, g] float in [0, 1]; a mask is where it exceeds one half.
        predicted_iou: [M] float, clipped to [0, 1].
        kind: the one class that there is without an auxiliary model.
    """
    masks = probabilities > 0.5
    iou = predicted_iou.clamp(0, 1)
    inside = probabilities * masks
    mean = inside.sum((1, 2)) / masks.sum((1, 2)).clamp_min(1)
    peaks = iou * inside.amax((1, 2))
    return Candidates(masks, iou * mean, peaks, torch.full((len(masks),), kind))


def superimpose(labels: Tensor, candidates: Candidates, rules: EvolutionRules) -> Tensor:
    """The labels with the best admissible candidate over them, or as they were when there is none.

    Admissible is a candidate whose peak exceeds the rules' score and whose area exceeds their least area.
    """
    areas = candidates.masks.sum((1, 2))
    admissible = (candidates.peaks > rules.min_score) & (areas > rules.min_area)
    if not bool(admissible.any()):
        return labels
    best = int(candidates.scores.masked_fill(~admissible, -1.0).argmax())
    return torch.where(candidates.masks[best], candidates.kinds[best] + 1, labels)


def tidy(labels: Tensor, rules: EvolutionRules) -> Tensor:
    """Keeps each class's two largest regions, none below the least area or above the greatest.

    A region that is too large is reduced to its innermost cells, so that it does not eat the picture.
    """
    result = torch.zeros_like(labels)
    kept: dict[int, int] = {}
    for region in regions(labels, rules.min_area):
        kept[region.kind] = kept.get(region.kind, 0) + 1
        if kept[region.kind] <= REGIONS_PER_CLASS:
            result[_innermost(region.mask, rules.max_area)] = region.kind + 1
    return result


def _innermost(mask: Tensor, area: int) -> Tensor:
    """The largest connected part of the `area` cells of a mask that lie farthest from its edge."""
    if int(mask.sum()) <= area:
        return mask
    depth = torch.from_numpy(ndimage.distance_transform_edt(np.pad(mask.numpy(), 1))[1:-1, 1:-1])
    inner = torch.zeros_like(mask)
    inner.view(-1)[depth.flatten().argsort(descending=True, stable=True)[:area]] = True
    return regions(inner.long())[0].mask


def drop_unsure(labels: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Removes regions whose mean confidence lies below a threshold; the surest one always stays.

    Args:
        labels: [g, g] int64.
        confidence: [g, g] float, confidence in each cell's own label; NaN where it is not known. A region
            nothing is known of stays.
        threshold: in [0, 1].
    """
    found = regions(labels)
    known = [region.mask & ~confidence.isnan() for region in found]
    means = [float(confidence[mask].mean()) if bool(mask.any()) else 1.0 for mask in known]
    result = torch.zeros_like(labels)
    for region, mean in zip(found, means, strict=True):
        if mean >= threshold or mean == max(means):
            result[region.mask] = region.kind + 1
    return result


def label_confidence(labels: Tensor, class_scores: Tensor) -> Tensor:
    """[g, g] float, the score of each labelled cell's own class; NaN where nothing is labelled."""
    own = class_scores.gather(0, (labels - 1).clamp_min(0)[None])[0]
    return own.masked_fill(labels == 0, math.nan)


def evolve(
    labels: Tensor, candidates: Candidates, confidence: Tensor, rules: EvolutionRules, progress: float
) -> Tensor:
    """One iteration of evolution (Eq. 3-4): drop the unsure, add the best candidate, tidy up.

    Args:
        labels: [g, g] int64.
        candidates: masks predicted for prompts out of `labels`.
        confidence: [g, g] float, confidence in the present labels, NaN where unknown.
        rules: which regions may stay.
        progress: share of the evolution that is over, 0 to 1. A region must reach this share of the least
            score: at first the image is noise, of which nothing can be sure.

    Returns:
        [g, g] int64, never empty if `labels` was not.
    """
    remaining = drop_unsure(labels, confidence, rules.min_score * progress)
    result = tidy(superimpose(remaining, candidates, rules), rules)
    return result if bool(result.any()) else labels
