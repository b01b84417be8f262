"""Prompts drawn into the mask prompt: what a box and clicks say about each place, besides their tokens.

SAM learns from a billion masks where its prompt tokens point at. A model trained on few learns it sooner from
a map that each image token reads at its own place, as click maps do for interactive networks (RITM, arXiv
2102.06583): outside a box there is nothing, in its middle most likely something, and clicks are certain.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOTHING, BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3
"""What a prompt's place means, numbered as segment-anything does."""

CERTAIN = 4.0
LIKELY = 2.0
"""Logits of what a prompt says for certain, and at most of what it makes likely."""

# A click says something within so many model-input pixels and pixels of the map; over the last of the latter
# that fades. Corrections lie at an object's edge, where a wider disc says what nobody meant.
_CLICK_RADIUS = 2.0, 1.5


def prompt_map(places: Tensor, kinds: Tensor, masks: Tensor | None, size: int, side: int) -> Tensor:
    """What prompts say about each pixel of the low-resolution mask, as logits.

    Args:
        places: [N, T, 2] float, (x, y) in model-input pixels, 0 … size.
        kinds: [N, T] int, `NOTHING` … `BOTTOM_RIGHT`; at most one box each.
        masks: [N, 1, side, side] float, logits of an earlier answer, which take the place of the
            likelihood that a box gives; or None.
        size: side of the model's input in pixels.
        side: of the map in pixels.

    Returns:
        [N, 1, side, side] float32 within ±`CERTAIN`.
    """
    cell = size / side
    axis = (torch.arange(side, device=places.device, dtype=torch.float32) + 0.5) * cell
    low, high = (
        (places * (kinds == corner)[..., None]).sum(1) for corner in (TOP_LEFT, BOTTOM_RIGHT)
    )  # [N, 2] each
    boxed = (kinds == TOP_LEFT).any(1)[:, None, None]
    centre, half = (low + high) / 2, ((high - low) / 2).clamp_min(cell / 2)
    dx = (axis[None, None, :] - centre[:, 0, None, None]).abs()
    dy = (axis[None, :, None] - centre[:, 1, None, None]).abs()
    wide, tall = half[:, 0, None, None], half[:, 1, None, None]
    if masks is None:
        ellipse = LIKELY * (1 - (dx / wide) ** 2 - (dy / tall) ** 2)
        said = torch.where(boxed, ellipse.clamp_min(-LIKELY), 0.0)
    else:
        said = masks[:, 0].float().clamp(-LIKELY, LIKELY)
    outside = (torch.maximum(dx - wide, dy - tall) / cell + 0.5).clamp(0, 1) * boxed
    said = said + outside * (-CERTAIN - said)
    away = (
        (axis[None, None, None, :] - places[:, :, 0, None, None]) ** 2
        + (axis[None, None, :, None] - places[:, :, 1, None, None]) ** 2
    ).sqrt()
    near = ((_CLICK_RADIUS[0] - away) / cell + _CLICK_RADIUS[1]).clamp(0, 1)
    for kind, value in ((FOREGROUND, CERTAIN), (BACKGROUND, -CERTAIN)):
        clicked = (near * (kinds == kind)[..., None, None]).amax(1)
        said = said + clicked * (value - said)
    return said[:, None]


class PromptMaps(nn.Module):
    """To be put before segment-anything's PromptEncoder among a class's bases: maps join its mask prompts.

    With `said` above 0, that share of a map also follows the dense embedding in 16 channels more, a token's
    4 × 4 pixels, for a decoder that is `BeginsAsSaid`.
    """

    said: ClassVar[float] = 0.0
    input_image_size: tuple[int, int]
    mask_input_size: tuple[int, int]

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As the published one: points ([B, N, 2], [B, N]), boxes [B, 4], whose pixels' middles are whole."""
        places, kinds = [], []
        if points is not None:
            places.append(points[0] + 0.5)
            kinds.append(points[1].long())
        if boxes is not None:
            places.append(boxes.view(-1, 2, 2) + 0.5)
            corners = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device)
            kinds.append(corners.expand(len(boxes), 2))
        if places:
            size, side = self.input_image_size[0], self.mask_input_size[0]
            masks = prompt_map(torch.cat(places, 1), torch.cat(kinds, 1), masks, size, side)
        parent: Any = super()
        sparse, dense = parent.forward(points, boxes, masks)
        return sparse, dense if masks is None else self.with_map(dense, masks)

    def with_map(self, dense: Tensor, maps: Tensor) -> Tensor:
        """The dense embedding [N, C, G, G], and behind it what of the maps [N, 1, 4G, 4G] goes past it."""
        return torch.cat([dense, F.pixel_unshuffle(self.said * maps, 4)], 1) if self.said else dense


class BeginsAsSaid(nn.Module):
    """To be put before segment-anything's MaskDecoder: what the prompts say is added to each of its answers.

    So it need only learn where the object differs from that, as residual networks do.
    """

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As the published one; the dense embedding with or without a map behind it."""
        dense, said = apart(dense_prompt_embeddings, image_embeddings.shape[1])
        parent: Any = super()
        masks, scores = parent.predict_masks(image_embeddings, image_pe, sparse_prompt_embeddings, dense)
        return masks if said is None else masks + said, scores


def apart(dense: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A dense embedding [N, C, G, G], and the map behind it, [N, 1, 4G, 4G], or None."""
    said = F.pixel_shuffle(dense[:, channels:], 4) if dense.shape[1] > channels else None
    return dense[:, :channels], said
