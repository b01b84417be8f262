"""TinyViT's convolutions on integers, a few rows of the image at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.engines.kernels import Kernel, Kernels
from monailabel_dfqsam.ops import QuantizedLayer
from monailabel_dfqsam.sam.tiny_vit import Bottleneck, ConvNorm, Merging

# Floats between the convolutions at a time, which then stay in cache; those of a whole image take 67 MB.
_HIDDEN = 1 << 20


class _Product(NamedTuple):
    layer: QuantizedLayer
    kernel: Kernel


class IntegerConvolutions(nn.Module):
    """A bottleneck or a merging: pointwise convolutions on integers, the depthwise one between in floats."""

    conv2: ConvNorm

    def __init__(self, step: Bottleneck | Merging, kernels: Kernels) -> None:
        super().__init__()
        for name, child in step.named_children():
            self.add_module(name, child)
        ends: tuple[Any, Any] = (step.conv1.c, step.conv3.c)
        self._first, self._last = (_Product(end.layer, end.kernel) for end in ends)
        self._around = isinstance(step, Bottleneck)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """As the step's: [B, H, W, C] float32 to [B, H', W', C'] float32."""
        x, convolution = x.contiguous(), self.conv2.c
        stride = convolution.stride[0]
        height, width = ((side - 1) // stride + 1 for side in x.shape[1:3])
        out = x.clone() if self._around else x.new_empty(len(x), height, width, convolution.out_channels)
        rows = max(1, _HIDDEN // (x.shape[2] * convolution.in_channels * stride))
        for image, result in zip(x, out, strict=True):
            for first in range(0, height, rows):
                self._rows(image, result[first : first + rows], first * stride, stride)
        return out

    def _rows(self, image: Tensor, result: Tensor, first: int, stride: int) -> None:
        """Some rows of an image's result [R, W', C'], in place; it holds the input where that goes around.

        Args:
            image: [H, W, C] float32.
            first: its row that the depthwise kernel's middle meets first.
        """
        low, high = first - 1, first + (len(result) - 1) * stride + 2
        seen = image[max(0, low) : high]
        q = self.kernels.quantize_input(seen, self._first.layer)
        hidden = self.kernels.gelu(self._first.kernel(q.flat()))
        hidden = hidden.view(1, *seen.shape[:2], -1)
        above, below = max(0, -low), max(0, high - len(image))
        if above or below:
            hidden = F.pad(hidden, (0, 0, 0, 0, above, below))
        convolution = self.conv2.c
        hidden = F.conv2d(
            hidden.permute(0, 3, 1, 2), convolution.weight, convolution.bias, stride, (0, 1),
            groups=convolution.groups,
        )  # fmt: skip
        hidden = hidden.permute(0, 2, 3, 1).reshape(-1, convolution.out_channels)
        q = self.kernels.gelu_quantize(hidden, self._last.layer)
        target = result.view(-1, result.shape[-1])
        if self._around:
            target.copy_(self.kernels.gelu(self._last.kernel(q, target)))
        else:
            target.copy_(self._last.kernel(q))
