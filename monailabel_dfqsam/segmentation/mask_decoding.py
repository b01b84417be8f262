"""segment-anything's mask decoder, asked for one mask of each object only.

The modules and their weights are segment-anything's, and so is the result, up to the rounding of float32. The
way differs: channels come last throughout, so that no product needs a copy; the upscaling, whose kernels do
not overlap, is two products; on CPUs products are oneDNN's; and only the mask that is chosen is computed, of
four, unless the masks have a say in the choice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.quantization.modules import shared_copy
from monailabel_dfqsam.sam.prompt_maps import apart


class OneMaskDecoder:
    """From an image's and prompts' embeddings to the best mask; stateless between calls."""

    def __init__(self, decoder: nn.Module, positions: Tensor, side: int) -> None:
        """Wraps a `MaskDecoder` of segment-anything.

        Args:
            decoder: in evaluation mode, on the device it stays on.
            positions: [1, C, h, w] float32, the prompt encoder's `get_dense_pe()`.
            side: of the model's input in pixels.
        """
        self._side = side
        self._decoder: Any = _with_own_products(decoder)
        self._positions = channels_last(positions)
        stages: Any = decoder.output_upscaling
        first, self._norm, self._activation, second, self._last_activation = stages
        self._first, self._second = _as_product(first), _as_product(second)

    def __call__(
        self, image: Tensor, sparse: Tensor, dense: Tensor, multimask: bool, box: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """The mask and its predicted IoU.

        Args:
            image: [1, C, h, w] float32, fastest in the layout of `channels_last`.
            sparse: [1, N, C] float32, points and boxes.
            dense: [1, C, h, w] float32, the mask prompt, or more channels as `PromptMaps` says.
            multimask: take the best of outputs 1 to 3, otherwise output 0.
            box: [4] float32, (x0, y0, x1, y1) in pixels of the model's input: then, of all outputs, take the
                one with the greatest sum of predicted IoU and `box_fits`.

        Returns:
            [1, 1, 4h, 4w] float32 logits, and the IoU that the decoder expects, about 0 … 1.
        """
        decoder = self._decoder
        dense, said = apart(dense, image.shape[1])
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight, sparse[0]])[None]
        queries, keys = decoder.transformer(image + dense, self._positions, tokens)
        scores = decoder.iou_prediction_head(queries[:, 0])[0]
        best = 1 + int(scores[1:].argmax()) if multimask else 0
        outputs = [best] if box is None else list(range(len(scores)))
        mlps = decoder.output_hypernetworks_mlps
        weights = torch.stack([mlps[n](queries[0, 1 + n]) for n in outputs], dim=1)
        height, width = image.shape[2:]
        # Axes: row, column, row and column within each of the two enlargements, output.
        logits = (self._upscaled(keys)[0] @ weights).view(height, width, 2, 2, 2, 2, len(outputs))
        logits = logits.permute(6, 0, 2, 4, 1, 3, 5).reshape(1, len(outputs), 4 * height, 4 * width)
        logits = logits if said is None else logits + said
        if box is not None:
            best = int((scores + box_fits(logits[0], box, self._side)).argmax())
            logits = logits[:, best : best + 1].contiguous()
        return logits, float(scores[best])

    def each(self, image: Tensor, sparse: Tensor, dense: Tensor, multimask: bool) -> tuple[Tensor, Tensor]:
        """Many objects of one image.

        Args:
            image: [1, C, h, w] float32.
            sparse: [B, N, C] float32, the points of B objects.
            dense: [B, C, h, w] float32, the mask prompts, or as above; or [1, C, h, w], one of all.
            multimask: take the best of outputs 1 to 3 for each, otherwise output 0.

        Returns:
            [B, 1, 4h, 4w] float32 logits, and [B] float32, the IoUs that the decoder expects.
        """
        decoder, count = self._decoder, len(sparse)
        dense, said = apart(dense, image.shape[1])
        fixed = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([fixed.expand(count, -1, -1), sparse], dim=1)
        keys = (image + dense).expand(count, -1, -1, -1)
        queries, keys = decoder.transformer(keys, self._positions, tokens)
        asked = range(1, 4) if multimask else range(1)
        scores, best = decoder.iou_prediction_head(queries[:, 0])[:, asked.start : asked.stop].max(1)
        mlps = decoder.output_hypernetworks_mlps
        weights = torch.stack([mlps[n](queries[:, 1 + n]) for n in asked], dim=1)[torch.arange(count), best]
        height, width = image.shape[2:]
        pixels = self._upscaled(keys)
        logits = (pixels @ weights[:, :, None]).view(count, height, width, 2, 2, 2, 2)
        logits = logits.permute(0, 1, 3, 5, 2, 4, 6).reshape(count, 1, 4 * height, 4 * width)
        return logits if said is None else logits + said, scores

    def _upscaled(self, keys: Tensor) -> Tensor:
        """[B, tokens, C] to [B, tokens·16, C/8]; the 16 pixels of a token follow one another."""
        norm = self._norm
        x = product(keys, *self._first).view(len(keys), -1, norm.weight.numel())
        if isinstance(norm, nn.GroupNorm):
            x = norm(x.transpose(1, 2)).transpose(1, 2)
        else:
            # segment-anything's LayerNorm2d is LayerNorm over the channels, here the last axis.
            x = F.layer_norm(x, x.shape[2:], norm.weight, norm.bias, norm.eps)
        x = product(self._activation(x), *self._second)
        pixels: Tensor = self._last_activation(x.view(len(keys), -1, x.shape[2] // 4))
        return pixels


def box_fits(logits: Tensor, box: Tensor, side: int) -> Tensor:
    """IoU of a box and of the tight boxes of masks, 0 for an empty mask.

    Whoever draws a box means that the object reaches its sides; predicted IoUs take little account of that.

    Args:
        logits: [K, h, w] float32.
        box: [4] float32, (x0, y0, x1, y1) in pixels of the model's input.
        side: of that input, at whose size the masks are looked at.

    Returns:
        [K] float32.
    """
    masks = F.interpolate(logits[None], (side, side), mode="bilinear")[0] > 0
    fits = torch.zeros(len(masks))
    for n, mask in enumerate(masks):
        columns, rows = mask.any(0).nonzero().cpu(), mask.any(1).nonzero().cpu()
        if len(rows) == 0:
            continue
        low = torch.tensor([float(columns[0]), float(rows[0])])
        high = torch.tensor([float(columns[-1]) + 1, float(rows[-1]) + 1])
        shared = (torch.minimum(high, box[2:].cpu()) - torch.maximum(low, box[:2].cpu())).clamp_min(0).prod()
        both = (high - low).prod() + (box[2:] - box[:2]).prod().cpu()
        fits[n] = shared / (both - shared)
    return fits.to(logits.device)


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·weightᵀ + bias, as `torch.nn.functional.linear`.

    That takes MKL's product on CPUs, which on AMD's ran at less than half of oneDNN's rate.

    Args:
        x: [..., K] float32.
        weight: [N, K] float32.
        bias: [N] float32.
    """
    if x.device.type != "cpu" or not _ONEDNN:
        return F.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Product(nn.Module):
    """A Linear by `product`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def _with_own_products(decoder: nn.Module) -> nn.Module:
    """The same decoder on the same tensors, its Linears by `product`; the one given is left as it is."""
    decoder = shared_copy(decoder)
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _Product(child))
    return decoder


def channels_last(grid: Tensor) -> Tensor:
    """The same [B, C, h, w] with the channels of a place side by side in memory."""
    return grid.contiguous(memory_format=torch.channels_last)


def _as_product(convolution: Any) -> tuple[Tensor, Tensor]:
    """Weight [4·Cout, Cin] and bias of a transposed 2×2 convolution of stride 2: each pixel becomes four."""
    weight: Tensor = convolution.weight  # [Cin, Cout, 2, 2]
    bias: Tensor = convolution.bias
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]).contiguous(), bias.repeat(4)
