"""The terms that image synthesis minimises besides patch similarity (DFQ-SAM Eq. 5, 6 and 11)."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this probability the gradient of a logarithm would drown all else.
MIN_PROBABILITY = 1e-4


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - soft IoU, averaged over masks.

    Args:
        logits: [K, h, w] float, predicted mask logits.
        masks: [K, h, w] bool, the pseudo-labels.

    Returns:
        A scalar in [0, 1]; differentiable.
    """
    probability, target = logits.sigmoid(), masks.to(logits.dtype)
    overlap = (probability * target).sum((1, 2))
    union = (probability + target - probability * target).sum((1, 2))
    return (1 - overlap / union.clamp_min(1)).mean()


def class_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """-mean log S of the labelled class over the labelled cells.

    Args:
        scores: [C, h, w] float, class probabilities of the auxiliary model.
        labels: [h, w] int64, 0 for none, else class + 1.

    Returns:
        A scalar; 0 where nothing is labelled; differentiable.
    """
    labelled = labels > 0
    inside = scores[:, labelled].gather(0, labels[labelled][None] - 1)
    if inside.numel() == 0:
        return scores.sum() * 0
    return -inside.clamp_min(MIN_PROBABILITY).log().mean()


def similarity_loss(entropies: Tensor, ceiling: Tensor | None) -> Tensor:
    """Minus the sum of the blocks' patch entropies (Eq. 9), of which only what is below a ceiling counts.

    Without one, diversity is worth more the further it is driven, beyond what any image has.

    Args:
        entropies: [blocks] float, in nats.
        ceiling: [blocks] float; None for none, as in the paper.
    """
    return -(entropies if ceiling is None else torch.minimum(entropies, ceiling)).sum()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, down and right, of [N, 3, S, S] float; a scalar."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    right = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    return 0.5 * (down + right)


def jitter_boxes(boxes: Tensor, amount: float, size: int, generator: torch.Generator) -> Tensor:
    """Moves each side of a box by up to `amount` of the box's extent.

    Args:
        boxes: [K, 4] float, (x0, y0, x1, y1) in pixels, on the CPU.
        size: side of the image in pixels, to which results are clipped.

    Returns:
        [K, 4] float.
    """
    extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = (2 * torch.rand(boxes.shape, generator=generator) - 1) * amount
    return (boxes + noise * extent).clamp(0, size)
