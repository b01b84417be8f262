"""How far a model's answers to prompts are from what was meant, and what pulls its embeddings apart.

Two choices get a small model off the all-background plateau: the mask loss counts mostly in the target's
neighbourhood, and embeddings of one region are pulled together and those of different regions apart
(supervised contrastive loss, arXiv 2004.11362).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.pretraining.prompting import corrected, decode, first_prompts
from monailabel_dfqsam.sam.model import Sam

ROUNDS = (0.2, 0.45, 0.62, 0.75, 0.84, 0.9, 0.94, 0.97, 1.0)
"""Cumulative shares of steps with one, two, … rounds of prompts: the first and up to eight corrections."""
LEARNED_ROUNDS = 2
"""The last of a step's rounds, from which it learns; those before them only lead there."""
ESTIMATE = 5.0
"""Weight of the predicted IoUs' error: by them one of three candidates is chosen, where most of a click's
quality is won or lost."""


POINTED = 1.0
"""Weight of the error in the regions that a correction points at: few pixels, but what it was made for."""
_FEW = 50
"""Pixels of a mask, of which a region pointed at has to have some for its error to count in full."""


def contrastive_loss(
    features: Tensor, regions: Tensor, temperature: float = 0.1, pixels: int = 256
) -> Tensor:
    """Supervised contrastive loss over random pixels of each image.

    Args:
        features: [B, C, h, w] float, unit length over C.
        regions: [B, h, w] int64.
    """
    b, c, h, w = features.shape
    pick = torch.randint(h * w, (b, pixels), device=features.device)
    f = features.flatten(2).gather(2, pick[:, None].expand(b, c, pixels))
    r = regions.flatten(1).gather(1, pick)
    logits = torch.einsum("bci,bcj->bij", f, f) / temperature
    eye = torch.eye(pixels, dtype=torch.bool, device=f.device)
    same = (r[:, :, None] == r[:, None, :]) & ~eye
    log_prob = logits - logits.masked_fill(eye, -torch.inf).logsumexp(2, keepdim=True)
    positives = same.sum(2)
    per_pixel = -(log_prob * same).sum(2) / positives.clamp_min(1)
    return per_pixel[positives > 0].mean()


def mask_losses(logits: Tensor, target: Tensor, pointed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per-mask loss 2·BCE + Dice and the IoU reached.

    Args:
        logits: [N, K, h, w] float, K candidate masks.
        target: [N, 1, h, w] float in [0, 1].
        pointed: [N, h, w] bool, where the BCE counts once more.

    Returns:
        loss [N, K] and IoU [N, K] (detached).
    """
    # On a grid of 64: at the size of a large mask, a neighbourhood as wide takes longer than all else here.
    cell = max(1, target.shape[-1] // 64)
    near = F.max_pool2d(F.max_pool2d(target, cell), 15, stride=1, padding=7)
    near = near.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    weight = torch.where(near > 0, 1.0, 0.05)
    t = target.expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    mean = (bce * weight).sum((2, 3)) / weight.sum((2, 3))
    if pointed is not None:
        there = pointed[:, None]
        mean = mean + POINTED * (bce * there).sum((2, 3)) / (there.sum((2, 3)) + _FEW)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)
    return 2 * mean + dice, _ious(logits, t)


def _ious(logits: Tensor, target: Tensor) -> Tensor:
    """[...] float, of masks [..., h, w]."""
    hit, truth = logits > 0, target > 0.5
    return (hit & truth).sum((-2, -1)) / (hit | truth).sum((-2, -1)).clamp_min(1)


def prompted_loss(
    sam: Sam, embedding: Tensor, batch: dict[str, Tensor], rounds: int
) -> tuple[Tensor, dict[str, float]]:
    """Loss over all objects of a batch, prompted at random and then corrected; IoUs of first and last rounds.

    Args:
        embedding: [B, C, h, w] float; whole, or of each image a square that begins at its corner.
        batch: of `Example`s, in pixels from the corners; with `corners` [B, 2] int64, (x, y) in cells of the
            embedding, where they are not the whole's.
        rounds: at least 1; each further one corrects where the last answer was wrong.
    """
    masks = batch["masks"]
    objects, size = masks.shape[1], masks.shape[-1]
    target = F.avg_pool2d(masks.flatten(0, 1)[:, None].float(), sam.variant.mask_cell)
    image = embedding.repeat_interleave(objects, 0)
    corners = batch.get("corners", torch.zeros(len(masks), 2, dtype=torch.int64, device=masks.device))
    prompts = first_prompts(
        batch["boxes"].flatten(0, 1),
        batch["points"].flatten(0, 1),
        target[:, 0],
        corners.repeat_interleave(objects, 0),
        size,
    )
    loss = embedding.new_zeros((), dtype=torch.float32)
    reached: dict[str, float] = {}
    for turn in range(rounds):
        learned = turn >= rounds - LEARNED_ROUNDS
        with torch.set_grad_enabled(learned):
            logits, predicted = decode(sam, image, prompts)
        logits = logits.float()
        best = logits[torch.arange(len(logits)), predicted[:, 1:].argmax(1) + 1]
        if learned:
            losses, ious = mask_losses(logits, target, prompts.pointed)
            # One click may mean a part or the whole: only the best of the candidates learns much from it.
            open_to_doubt = (prompts.kinds >= 0).sum(1) == 1
            all_three = torch.where(open_to_doubt, 0.05, 0.3) * losses[:, 1:].mean(1)
            single = torch.where(open_to_doubt, 0.5, 1.0) * losses[:, 0]
            loss = loss + (losses[:, 1:].min(1).values + all_three + single).mean()
            loss = loss + ESTIMATE * F.mse_loss(predicted.float(), ious)
        # As it is used: of a box the best answer, of clicks the single one.
        answer = torch.where(prompts.boxed[:, None, None], best, logits[:, 0])
        iou = _ious(answer, target[:, 0])
        if turn == 0:
            reached = {"box": float(iou[prompts.boxed].mean()), "point": float(iou[~prompts.boxed].mean())}
        elif turn == rounds - 1:
            reached["corrected"] = float(iou.mean())
        if turn + 1 < rounds:
            prompts = corrected(prompts, answer.detach(), target[:, 0], size)
    return loss / min(rounds, LEARNED_ROUNDS), reached


def rounds_at(step: int) -> int:
    """Rounds of prompts of a step, the same in all processes."""
    draw = float(torch.rand((), generator=torch.Generator().manual_seed(step)))
    return 1 + next(i for i, share in enumerate(ROUNDS) if draw <= share)
