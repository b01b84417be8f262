"""How much of one mask is another: overlap, and distance of outlines."""

from __future__ import annotations

import warnings

import torch

from monailabel_dfqsam.masks import Mask

NSD_TOLERANCE = 2.0
"""Pixels between two outlines that still count as the same."""


def iou(a: Mask, b: Mask) -> float:
    """|A ∩ B| / |A ∪ B| of two masks of one shape; 1 when both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def dice(a: Mask, b: Mask) -> float:
    """2·|A ∩ B| / (|A| + |B|) of two masks of one shape; 1 when both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def surface_dice(predicted: Mask, truth: Mask) -> float:
    """MONAI's normalised surface Dice of masks [H, W], truth not empty; 0 for an empty prediction.

    It is the part of both outlines that lies within `NSD_TOLERANCE` of the other. An outline is a mask's
    pixels beside one outside it or at the image's edge.
    """
    # Here, since importing it takes longer than everything else that a user of `iou` loads.
    from monai.metrics import compute_surface_dice

    if not predicted.any():
        return 0.0
    pair = [torch.from_numpy(mask[None, None]) for mask in (predicted, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's own, about how it calls itself
        return float(compute_surface_dice(*pair, class_thresholds=[NSD_TOLERANCE], include_background=True))
