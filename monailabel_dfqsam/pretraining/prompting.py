"""Prompts for many objects of many images at once, which segment-anything's own modules take one image at a
time: training lives on batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from monailabel_dfqsam.masks import depth
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.prompt_maps import (
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    NOTHING,
    TOP_LEFT,
    prompt_map,
)

BOX_SHARE = 0.5
STROKE_SHARE = 0.1
"""Share of rounds in which a stroke is drawn instead of a click."""
STROKE = 10
"""Places along a stroke."""
MASK_SHARE = 0.7
"""Share of corrections that come with the answer they correct."""
DEEP_SHARE = 0.5
"""Share of corrections that click in the middle of what is wrong, as people do; others on any wrong pixel."""
SILENT_SHARE = 0.1
"""Share of corrections that say nothing more: the answer alone is to be made better."""


@dataclass(frozen=True)
class Prompted:
    """Prompts of N objects, T places each.

    Attributes:
        places: [N, T, 2] float32, (x, y) in model-input pixels from the corner.
        kinds: [N, T] int64, `NOTHING` … `BOTTOM_RIGHT`.
        boxed: [N] bool, whether a box is among them.
        corners: [N, 2] int64, (x, y) of the first cell seen of the image embedding.
        masks: [N, 1, h, w] float, logits of an earlier answer, or None.
        pointed: [N, h, w] bool, the wrong regions of that answer which the last correction lies in, or None.
    """

    places: Tensor
    kinds: Tensor
    boxed: Tensor
    corners: Tensor
    masks: Tensor | None = None
    pointed: Tensor | None = None


def first_prompts(boxes: Tensor, points: Tensor, target: Tensor, corners: Tensor, size: int) -> Prompted:
    """A box for half of the objects, drawn at random, a point for the others; or a stroke for each.

    Points without a box end with an empty place, as segment-anything's do.

    Args:
        boxes: [N, 4] float32 (x0, y0, x1, y1).
        points: [N, 2] float32.
        target: [N, h, w] float in [0, 1].
        corners: [N, 2] int64, as of `Prompted`.
        size: side of what is seen of the model's input, in pixels.
    """
    if _chance(STROKE_SHARE):
        places, _, drawn = _stroke(target > 0.5, size)
        kinds = F.pad(torch.where(drawn, FOREGROUND, NOTHING), (0, 1), value=NOTHING)
        unboxed = torch.zeros(len(kinds), dtype=torch.bool, device=kinds.device)
        return Prompted(F.pad(places, (0, 0, 0, 1)), kinds, unboxed, corners)
    boxed = torch.rand(len(boxes), device=boxes.device) < BOX_SHARE
    places = torch.where(
        boxed[:, None, None], boxes.view(-1, 2, 2), torch.stack([points, torch.zeros_like(points)], 1)
    )
    kinds = torch.where(
        boxed[:, None],
        torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device),
        torch.tensor([FOREGROUND, NOTHING], device=boxes.device),
    )
    return Prompted(places, kinds, boxed, corners)


def corrected(prompts: Prompted, logits: Tensor, target: Tensor, size: int) -> Prompted:
    """The prompts with a click or a stroke more each, where the answer was wrong, and mostly that answer.

    Args:
        logits: [N, h, w] float, the answer; given back as mask prompt.
        target: [N, h, w] float in [0, 1].
        size: side of what is seen of the model's input, in pixels.
    """
    truth = target > 0.5
    wrong = (logits > 0) != truth
    if _chance(SILENT_SHARE):
        return replace(prompts, masks=logits[:, None], pointed=None)
    if _chance(STROKE_SHARE):
        missing = wrong & truth
        more = (2 * missing.sum((1, 2)) >= wrong.sum((1, 2)))[:, None]
        places, at, drawn = _stroke(torch.where(more[..., None], missing, wrong & ~truth), size)
        kinds = torch.where(drawn, torch.where(more, FOREGROUND, BACKGROUND), NOTHING)
    else:
        at = _deepest(wrong) if _chance(DEEP_SHARE) else _pixels(wrong, 1)
        places = _places(at, logits.shape[-1], size)
        kinds = truth.flatten(1).gather(1, at).long()
    return replace(
        prompts,
        places=torch.cat([prompts.places, places], 1),
        kinds=torch.cat([prompts.kinds, kinds], 1),
        masks=logits[:, None] if _chance(MASK_SHARE) else None,
        pointed=_regions(wrong, truth, at, kinds),
    )


def _chance(share: float) -> bool:
    return float(torch.rand(())) < share


def _pixels(region: Tensor, count: int) -> Tensor:
    """[N, count] int64, flat indices of random pixels of regions [N, h, w] bool, or of any where none is."""
    return torch.multinomial(region.flatten(1).float() + 1e-6, count, replacement=True)


def _deepest(region: Tensor) -> Tensor:
    """[N, 1] int64, as `_pixels`: pixels of regions that are farthest from their borders."""
    deepest = [int(depth(one).argmax()) for one in region.cpu().numpy()]
    return torch.tensor(deepest, device=region.device)[:, None]


def _regions(wrong: Tensor, truth: Tensor, at: Tensor, kinds: Tensor) -> Tensor:
    """[N, h, w] bool: of what is wrong as a prompt says, the connected regions that it lies in.

    Args:
        wrong: [N, h, w] bool.
        truth: [N, h, w] bool.
        at: [N, T] int64, flat indices of its places.
        kinds: [N, T] int64, `NOTHING`, `BACKGROUND` or `FOREGROUND`, the same for all of an object's.
    """
    said = wrong & (truth == (kinds == FOREGROUND).any(1)[:, None, None])
    found = np.zeros(said.shape, dtype=bool)
    for one, region, places, kind in zip(found, said.cpu(), at.cpu(), kinds.cpu(), strict=True):
        numbered, _ = ndimage.label(region.numpy())
        hit = np.unique(numbered.flat[places[kind != NOTHING].numpy()])
        one[:] = np.isin(numbered, hit[hit > 0])
    return torch.from_numpy(found).to(wrong.device)


def _places(at: Tensor, w: int, size: int) -> Tensor:
    """[N, T, 2] float32, (x, y) of the middles of pixels by their flat indices [N, T]."""
    return (torch.stack([at % w, at // w], 2).float() + 0.5) * (size / w)


def _stroke(region: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places [N, STROKE, 2] along a line through two random pixels of a region, their pixels' flat indices
    [N, STROKE], and which lie in it.

    Args:
        region: [N, h, w] bool.
        size: side of h and w in model-input pixels.
    """
    w = region.shape[-1]
    ends = _places(_pixels(region, 2), w, size)
    along = torch.linspace(0, 1, STROKE, device=region.device)[:, None]
    places = ends[:, :1] + along * (ends[:, 1:] - ends[:, :1])
    x, y = (places * (w / size)).long().clamp(0, w - 1).unbind(2)
    at = y * w + x
    return places, at, region.flatten(1).gather(1, at)


def decode(sam: Sam, image: Tensor, prompts: Prompted) -> tuple[Tensor, Tensor]:
    """Masks of N objects, each with an embedding of its own: logits [N, 4, 4h, 4w], predicted IoU [N, 4].

    Output 0 is the single answer, 1 to 3 are the candidates. Of an embedding a part is enough: it costs as
    much less as it is smaller.

    Args:
        image: [N, C, h, w] float, of each embedding what begins at its corner; a square.
    """
    encoder: Any = sam.prompt_encoder
    decoder: Any = sam.mask_decoder
    n, c, h, w = image.shape
    kinds = torch.stack([encoder.not_a_point_embed.weight, *(e.weight for e in encoder.point_embeddings)])
    size, grid = encoder.input_image_size, encoder.image_embedding_size[0]
    seen_size, seen_side = size[0] * h // grid, encoder.mask_input_size[0] * h // grid
    corners = prompts.corners * (size[0] // grid)
    positions = encoder.pe_layer.forward_with_coords(prompts.places + corners[:, None], size)
    sparse = positions * (prompts.kinds >= 0)[..., None] + kinds[:, 0][prompts.kinds + 1]
    with torch.autocast(image.device.type, enabled=False):
        maps = prompt_map(prompts.places, prompts.kinds, prompts.masks, seen_size, seen_side)
    dense = encoder.mask_downscaling(maps)
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(n, -1, -1)
    everywhere = encoder.get_dense_pe()[0]
    where = torch.stack([everywhere[:, y : y + h, x : x + w] for x, y in prompts.corners.tolist()])
    seen, attended = decoder.transformer(image + dense, where, torch.cat([outputs, sparse], 1))
    pixels = decoder.output_upscaling(attended.transpose(1, 2).reshape(n, c, h, w))
    weights = torch.stack([mlp(seen[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
    logits = torch.einsum("nkc,nchw->nkhw", weights, pixels) + encoder.said * maps
    return logits, decoder.iou_prediction_head(seen[:, 0])
