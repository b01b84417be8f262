"""Prompt encoder and mask decoder as one OpenVINO model: a click or a box, and an embedding, to masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from monailabel_dfqsam.ops.openvino_library import converted
from monailabel_dfqsam.sam import efficient_sam
from monailabel_dfqsam.sam.prompt_maps import (
    BOTTOM_RIGHT,
    NOTHING,
    TOP_LEFT,
    PromptMaps,
    prompt_map,
)
from monailabel_dfqsam.sam.variants import Variant

_PIXEL_CENTRE = 0.5
_NEVER = 1e6  # below any predicted IoU


def decoder_model(prompt_encoder: nn.Module, mask_decoder: nn.Module, variant: Variant | None = None) -> Any:
    """The prompt encoder and mask decoder of any variant as one model in float32.

    Its inputs are

        embedding   [1, C, G, G] float32, of one image
        points      [1, N, 2] float32, (x, y) in pixels of the model's input whose middles are whole; N ≥ 1
        labels      [1, N] float32: 1 inside the object, 0 outside it; a box is two points, its top left
                    corner with 2 and its bottom right one with 3, at most one box

    and its outputs

        masks       [1, 4, M, M] float32 logits, the single answer and then the three candidates
        iou         [1, 4] float32, what IoU the decoder expects of each

    as `Sam.predict` gives them. With a variant there is a third output,

        best        [1] int64, which of the four the segmenter takes

    What segment-anything adds where there is no box, a point of label −1, the
    model adds itself, and EfficientSAM's filling up to six points too. The order of points does not matter.

    Args:
        prompt_encoder, mask_decoder: as `build_decoder` makes them, in evaluation mode, on the CPU.
        variant: theirs.

    Returns:
        an `openvino.Model` with N left open.

    Raises:
        ImportError: where openvino is not installed.
    """
    decoder = _Decoder(prompt_encoder, mask_decoder).eval()
    shape = tuple(decoder.positions.shape)
    outputs = ("masks", "iou") if variant is None else ("masks", "iou", "best")
    inputs = {
        "embedding": (torch.zeros(shape), shape),
        "points": (torch.tensor([[[10.0, 20.0], [30.0, 40.0], [20.0, 30.0]]]), (1, -1, 2)),
        "labels": (torch.tensor([[2.0, 3.0, 1.0]]), (1, -1)),
    }
    return converted(decoder if variant is None else _Choosing(decoder, variant), inputs, outputs)


class _Choosing(nn.Module):
    """A decoder that also says which of its masks to take, as `Segmenter.predict` and `box_fits` do."""

    def __init__(self, decoder: _Decoder, variant: Variant) -> None:
        super().__init__()
        self.decoder, self.variant = decoder, variant

    def forward(self, embedding: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        masks, scores = self.decoder(embedding, points, labels)
        if self.variant.one_mask:
            return masks, scores, torch.zeros(1, dtype=torch.int64)
        # The single answer is no candidate, unless a box has its say.
        values = torch.cat([scores[:, :1] - _NEVER, scores[:, 1:]], 1)
        if self.variant.taught_here:
            boxed = (labels == TOP_LEFT).any(1, keepdim=True)
            single = torch.cat([scores[:, :1], scores[:, 1:] - _NEVER], 1)
            low, high = (
                (points * (labels == corner)[..., None]).sum(1)[0] + _PIXEL_CENTRE
                for corner in (TOP_LEFT, BOTTOM_RIGHT)
            )
            values = torch.where(boxed, scores + self._fits(masks, low, high), single)
        return masks, scores, values.argmax(1)

    def _fits(self, masks: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """[1, 4], `box_fits` of masks [1, 4, M, M] and of the box from low [2] to high [2], each (x, y)."""
        side = self.variant.input_size
        inside = nn.functional.interpolate(masks, (side, side), mode="bilinear")[0] > 0
        places = torch.arange(side, dtype=torch.float32)
        # Along x and along y: [4, S], whether there is anything at all in that column or row.
        filled = [inside.any(axis) for axis in (1, 2)]
        first = torch.stack([torch.where(line, places, float(side)).amin(1) for line in filled], 1)
        last = torch.stack([torch.where(line, places + 1, 0.0).amax(1) for line in filled], 1)
        shared = (torch.minimum(last, high) - torch.maximum(first, low)).clamp_min(0).prod(1)
        both = (last - first).clamp_min(0).prod(1) + (high - low).prod()
        return (shared / (both - shared))[None]


class _Decoder(nn.Module):
    """The same arithmetic as the two modules', without branches that depend on prompts."""

    positions: Tensor
    kinds: Tensor

    def __init__(self, prompt_encoder: nn.Module, mask_decoder: nn.Module) -> None:
        super().__init__()
        encoder: Any = prompt_encoder
        self.mask_decoder = mask_decoder
        self.prompt_encoder = prompt_encoder
        self.filled = isinstance(prompt_encoder, efficient_sam.PromptEncoder)
        self.mapped = isinstance(prompt_encoder, PromptMaps)
        self.size = encoder.size if self.filled else encoder.input_image_size[0]
        if self.filled:
            # Clicks outside the object are told by their place alone.
            click = encoder.point_embeddings.weight
            kinds = [
                encoder.invalid_points.weight, torch.zeros_like(click), click,
                encoder.bbox_top_left_embeddings.weight, encoder.bbox_bottom_right_embeddings.weight,
            ]  # fmt: skip
        else:
            kinds = [encoder.not_a_point_embed.weight, *(e.weight for e in encoder.point_embeddings)]
        self.register_buffer("kinds", torch.cat([kind.detach() for kind in kinds]))
        self.register_buffer("positions", encoder.get_dense_pe().detach())

    def forward(self, embedding: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        decoder: Any = self.mask_decoder
        masks: Tensor
        scores: Tensor
        masks, scores = decoder.predict_masks(
            embedding, self.positions, self._tokens(points, labels), self._added(points, labels)
        )
        return masks, scores

    def _tokens(self, points: Tensor, labels: Tensor) -> Tensor:
        """[1, N + padding, C] float32."""
        count: Any  # of the rows to add: a tensor, so that the trace depends on the prompt
        if self.filled:
            padding = labels.new_full((1, efficient_sam.POINTS), float(NOTHING))
            count = (efficient_sam.POINTS - labels.shape[1]) * (labels.shape[1] < efficient_sam.POINTS)
        else:
            padding = labels.new_full((1, 1), float(NOTHING))
            count = (labels != TOP_LEFT).all().to(torch.int64)
        padding = padding[:, :count]
        # EfficientSAM's invalid points lie at (−1, −1), which is their label too; others' place is not read.
        places = torch.cat([points, padding[..., None].expand(-1, -1, 2)], 1)
        labels = torch.cat([labels, padding], 1)
        encoder: Any = self.prompt_encoder
        where = encoder.pe_layer._pe_encoding((places + _PIXEL_CENTRE) / self.size)
        if not self.filled:
            where = where * (labels != NOTHING)[..., None]
        all_kinds = torch.arange(NOTHING, BOTTOM_RIGHT + 1, dtype=labels.dtype)
        chosen = (labels[..., None] == all_kinds).to(where.dtype)
        tokens: Tensor = where + chosen @ self.kinds
        return tokens

    def _added(self, points: Tensor, labels: Tensor) -> Tensor:
        """[1, C, G, G] or [1, C, 1, 1] float32, what is added to the embedding; a map may follow it."""
        encoder: Any = self.prompt_encoder
        if self.filled:
            return torch.zeros(1, self.positions.shape[1], 1, 1)
        dense: Tensor = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        if self.mapped:
            side = encoder.mask_input_size[0]
            maps = prompt_map(points + _PIXEL_CENTRE, labels, None, self.size, side)
            dense = encoder.with_map(encoder.mask_downscaling(maps), maps)
        return dense
