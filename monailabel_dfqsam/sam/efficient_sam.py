"""EfficientSAM (arXiv 2312.00863): its checkpoint's names and what its decoder computes otherwise.

Its image encoder is a plain ViT, `vit.ImageEncoderViT`, under other names, with a table of positions for
14×14 tokens and a class token. Prompt encoder and mask decoder differ from segment-anything's:

- A prompt is always at least six points, the missing ones filled up with invalid ones; there are neither mask
  prompts nor a vector for clicks outside the object, which are told by their place alone.
- Tokens attend to each other around a residual in every block, and carry their positions on from there.
- GELU stands where ReLU does, and the upscaling is normalised over channels and places together.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.sam.variants import Variant

logger = logging.getLogger(__name__)

POINTS = 6
"""Points of the shortest prompt; a box counts as two."""

_OWN = "prompt_encoder.bbox_top_left_embeddings.weight"
_POSITIONS = "image_encoder.pos_embed"
_PATCHES = "image_encoder.patch_embed.proj.weight"
_NAMES = (
    (r"^(image_encoder\.blocks\.\d+\.mlp)\.fc(\d)\.", r"\1.lin\2."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.0\.0\.", r"\1.lin1."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.fc\.", r"\1.lin2."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\.\d+)\.0\.", r"\1."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\.fc\.", r"\1.layers.2."),
    (r"^mask_decoder\.final_output_upscaling_layers\.0\.(\d)\.", r"mask_decoder.output_upscaling.\1."),
    (r"^mask_decoder\.final_output_upscaling_layers\.1\.0\.", "mask_decoder.output_upscaling.3."),
)


def adopted(tensors: Mapping[str, Tensor], size: int = 1024) -> dict[str, Tensor]:
    """A checkpoint under the names used here; one that is not EfficientSAM's comes back as it is.

    Positions are brought to the input's grid as EfficientSAM does it, by cubics; that of the class token,
    which no image has, is left out.

    Args:
        tensors: by published name.
        size: side of the input in pixels.
    """
    if _OWN not in tensors:
        return dict(tensors)
    found = {}
    for key, value in tensors.items():
        for pattern, replacement in _NAMES:
            key = re.sub(pattern, replacement, key)
        found[key] = value
    positions, patches = found.get(_POSITIONS), found.get(_PATCHES)
    if positions is not None and positions.ndim == 3 and patches is not None:
        logger.info("not used of the checkpoint: %s[:, 0], the class token's", _POSITIONS)
        side = math.isqrt(positions.shape[1] - 1)
        table = positions[:, 1 : 1 + side * side].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = size // patches.shape[-1]
        table = F.interpolate(table, (grid, grid), mode="bicubic", align_corners=False)
        found[_POSITIONS] = table.permute(0, 2, 3, 1).contiguous()
    return found


class PromptEncoder(nn.Module):
    """Points and boxes as tokens, with segment-anything's signature; mask prompts are passed over."""

    def __init__(self, modeling: ModuleType, variant: Variant) -> None:
        super().__init__()
        self.size, self.grid = variant.input_size, variant.grid
        channels = variant.embed_channels
        self.pe_layer = modeling.prompt_encoder.PositionEmbeddingRandom(channels // 2)
        self.invalid_points = nn.Embedding(1, channels)
        self.point_embeddings = nn.Embedding(1, channels)
        self.bbox_top_left_embeddings = nn.Embedding(1, channels)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, channels)

    def get_dense_pe(self) -> Tensor:
        """[1, C, grid, grid] float32, the positions of an image's tokens."""
        positions: Tensor = self.pe_layer((self.grid, self.grid))
        return positions[None]

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Points ([N, T, 2], [N, T]) and boxes [N, 4] in input pixels whose middles are whole, as published.

        Returns:
            tokens [N, at least 6, C] and what is added to the image, [N, C, grid, grid], here zeros.
        """
        places: list[Tensor] = []
        kinds: list[Tensor] = []
        if points is not None:
            places.append(points[0])
            kinds.append(self._kinds(points[1].long()))
        if boxes is not None:
            places.append(boxes.view(-1, 2, 2))
            corners = (self.bbox_top_left_embeddings.weight, self.bbox_bottom_right_embeddings.weight)
            kinds.append(torch.cat(corners).expand(len(boxes), -1, -1))
        missing = POINTS - sum(place.shape[1] for place in places)
        if missing > 0:
            places.append(places[0].new_full((len(places[0]), missing, 2), -1.0))
            kinds.append(self.invalid_points.weight.expand(len(places[0]), missing, -1))
        where = self.pe_layer.forward_with_coords(torch.cat(places, 1) + 0.5, (self.size, self.size))
        tokens: Tensor = where + torch.cat(kinds, 1)
        channels = tokens.shape[-1]
        return tokens, tokens.new_zeros(()).expand(len(tokens), channels, self.grid, self.grid)

    def _kinds(self, labels: Tensor) -> Tensor:
        """[N, T] int64, 1 inside the object and 0 outside it, to [N, T, C]."""
        return (labels == 1)[..., None] * self.point_embeddings.weight


class _Head(nn.Module):
    """segment-anything's MLP with GELU in the place of ReLU; same names."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.layers = mlp.layers

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.gelu(layer(x))
        result: Tensor = last(x)
        return result


class _TwoWayBlock(nn.Module):
    """segment-anything's block, but for the tokens' attention to each other; same names."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.first: bool = block.skip_first_layer_pe
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [N, T, C] and image [N, H·W, C], each with its positions, to the same two."""
        part: Any = self
        if not self.first:
            queries = queries + query_pe
        queries = part.norm1(queries + part.self_attn(q=queries, k=queries, v=queries))
        at = keys + key_pe
        seen = part.cross_attn_token_to_image(q=queries + query_pe, k=at, v=keys)
        queries = part.norm2(queries + seen)
        queries = part.norm3(queries + part.mlp(queries))
        seen = part.cross_attn_image_to_token(q=at, k=queries + query_pe, v=queries)
        return queries, part.norm4(keys + seen)


def adapt_decoder(decoder: Any) -> None:
    """Makes segment-anything's MaskDecoder, its transformer made for GELU, EfficientSAM's; in place."""
    layers = decoder.transformer.layers
    for index, block in enumerate(layers):
        layers[index] = _TwoWayBlock(block)
    norm = decoder.output_upscaling[1]
    decoder.output_upscaling[1] = nn.GroupNorm(1, len(norm.weight))
    heads = decoder.output_hypernetworks_mlps
    for index, mlp in enumerate(heads):
        heads[index] = _Head(mlp)
    decoder.iou_prediction_head = _Head(decoder.iou_prediction_head)
