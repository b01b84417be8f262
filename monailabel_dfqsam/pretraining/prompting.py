"""Prompts for many objects of many images at once, which segment-anything's own modules take one image at a
time: training lives on batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.prompt_maps import (
    BOTTOM_RIGHT,
    FOREGROUND,
    NOTHING,
    TOP_LEFT,
    prompt_map,
)

BOX_SHARE = 0.5
MASK_SHARE = 0.7
"""Share of corrections that come with the answer they correct."""


@dataclass(frozen=True)
class Prompted:
    """Prompts of N objects, T places each.

    Attributes:
        places: [N, T, 2] float32, (x, y) in model-input pixels.
        kinds: [N, T] int64, `NOTHING` … `BOTTOM_RIGHT`.
        boxed: [N] bool, whether a box is among them.
        masks: [N, 1, h, w] float, logits of an earlier answer, or None.
    """

    places: Tensor
    kinds: Tensor
    boxed: Tensor
    masks: Tensor | None = None


def first_prompts(boxes: Tensor, points: Tensor) -> Prompted:
    """A box for half of the objects, drawn at random, a point for the others.

    Args:
        boxes: [N, 4] float32 (x0, y0, x1, y1).
        points: [N, 2] float32.
    """
    boxed = torch.rand(len(boxes), device=boxes.device) < BOX_SHARE
    places = torch.where(
        boxed[:, None, None], boxes.view(-1, 2, 2), torch.stack([points, torch.zeros_like(points)], 1)
    )
    kinds = torch.where(
        boxed[:, None],
        torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device),
        # Points without a box end with an empty place.
        torch.tensor([FOREGROUND, NOTHING], device=boxes.device),
    )
    return Prompted(places, kinds, boxed)


def corrected(prompts: Prompted, logits: Tensor, target: Tensor, size: int) -> Prompted:
    """The prompts with one more click each, at a place where the answer was wrong, and mostly that answer.

    Args:
        logits: [N, h, w] float, the answer; given back as mask prompt.
        target: [N, h, w] float in [0, 1].
        size: side of the model's input in pixels.
    """
    w = logits.shape[-1]
    truth = (target > 0.5).flatten(1)
    wrong = (logits > 0).flatten(1) != truth
    # An answer without a fault gets a click somewhere; it does no harm.
    at = torch.multinomial(wrong.float() + 1e-6, 1)
    centre = (torch.cat([at % w, at // w], 1).float() + 0.5) * (size / w)
    kind = truth.gather(1, at).long()
    return Prompted(
        torch.cat([prompts.places, centre[:, None]], 1),
        torch.cat([prompts.kinds, kind], 1),
        prompts.boxed,
        logits[:, None] if float(torch.rand(())) < MASK_SHARE else None,
    )


def decode(sam: Sam, image: Tensor, prompts: Prompted) -> tuple[Tensor, Tensor]:
    """Masks of N objects, each with an embedding of its own: logits [N, 4, 4h, 4w], predicted IoU [N, 4].

    Output 0 is the single answer, 1 to 3 are the candidates.

    Args:
        image: [N, C, h, w] float.
    """
    encoder: Any = sam.prompt_encoder
    decoder: Any = sam.mask_decoder
    n, c, h, w = image.shape
    kinds = torch.stack([encoder.not_a_point_embed.weight, *(e.weight for e in encoder.point_embeddings)])
    size, side = encoder.input_image_size, encoder.mask_input_size[0]
    positions = encoder.pe_layer.forward_with_coords(prompts.places, size)
    sparse = positions * (prompts.kinds >= 0)[..., None] + kinds[:, 0][prompts.kinds + 1]
    with torch.autocast(image.device.type, enabled=False):
        maps = prompt_map(prompts.places, prompts.kinds, prompts.masks, size[0], side)
    dense = encoder.mask_downscaling(maps)
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(n, -1, -1)
    seen, attended = decoder.transformer(
        image + dense, encoder.get_dense_pe().expand(n, -1, -1, -1), torch.cat([outputs, sparse], 1)
    )
    pixels = decoder.output_upscaling(attended.transpose(1, 2).reshape(n, c, h, w))
    weights = torch.stack([mlp(seen[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
    logits = torch.einsum("nkc,nchw->nkhw", weights, pixels)
    return logits, decoder.iou_prediction_head(seen[:, 0])
