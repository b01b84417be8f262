"""One quantized layer as numbers: a matrix of integers and what turns them back into floats.

A convolution is a matrix product over gathered patches, a transposed one a product whose result is
scattered; `Geometry` says how, so that every engine needs one integer kernel only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Patches of a convolution, or of a transposed one.

    Attributes:
        kernel, stride, padding: in pixels, the same for both axes.
        transposed: the layer enlarges its input.
    """

    kernel: int
    stride: int
    padding: int
    transposed: bool = False

    def output_side(self, side: int) -> int:
        """Side of the output in pixels for an input of `side` pixels."""
        if self.transposed:
            return (side - 1) * self.stride - 2 * self.padding + self.kernel
        return (side + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def pixels_first(self) -> bool:
        """Whether a patch's values go pixel by pixel; else channel by channel, for patches of images."""
        return not self.transposed and self.kernel != self.stride

    def arrange(self, weight: Tensor) -> Tensor:
        """A stored weight [N, C·kernel²], channel by channel, as [N, K] in the order of `gather`."""
        if not self.pixels_first:
            return weight
        by_channel: Tensor = weight.unflatten(1, (-1, self.kernel**2))
        return by_channel.transpose(1, 2).flatten(1).contiguous()

    def gather(self, q: Tensor, zero_point: int) -> Tensor:
        """Rows for the matrix product.

        Args:
            q: [B, C, H, W] uint8; padding is filled with `zero_point`, which stands for exactly 0.

        Returns:
            [B·H'·W', C·kernel²] uint8, or [B·H·W, C] for a transposed convolution.
        """
        if self.transposed:
            return q.permute(0, 2, 3, 1).flatten(0, 2)
        if self.padding:
            p, last = self.padding, q.is_contiguous(memory_format=torch.channels_last)
            size = (q.shape[0], q.shape[1], q.shape[2] + 2 * p, q.shape[3] + 2 * p)
            order = torch.channels_last if last else torch.contiguous_format
            padded = torch.empty(size, dtype=q.dtype, memory_format=order).fill_(zero_point)
            padded[:, :, p:-p, p:-p] = q
            q = padded
        patches = q.unfold(2, self.kernel, self.stride).unfold(3, self.kernel, self.stride)
        order_of_axes = (0, 2, 3, 4, 5, 1) if self.pixels_first else (0, 2, 3, 1, 4, 5)
        return patches.permute(order_of_axes).flatten(3).flatten(0, 2)

    def scatter(self, y: Tensor, batch: int, height: int, width: int) -> Tensor:
        """The product's rows as an image.

        Args:
            y: [B·H'·W', N] float, or [B·H·W, N·kernel²] for a transposed convolution.
            batch, height, width: of the layer's input.

        Returns:
            [B, N, H', W'] float.
        """
        out_h, out_w = self.output_side(height), self.output_side(width)
        if not self.transposed:
            return y.view(batch, out_h, out_w, -1).permute(0, 3, 1, 2)
        columns = y.view(batch, height * width, -1).transpose(1, 2)
        return F.fold(columns, (out_h, out_w), self.kernel, padding=self.padding, stride=self.stride)


@dataclass(frozen=True)
class QuantizedLayer:
    """Everything an integer kernel needs of one Linear or convolution.

    Attributes:
        weight: [N, K] int8, symmetric, within 2^weight_bits levels.
        weight_scale: [N] float32.
        bias: [N] float32, zeros where the layer has none.
        input_scale: > 0, of the activations, a float32 value.
        input_zero_point: 0 … 2^activation_bits − 1.
        geometry: None for a Linear.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    input_scale: float
    input_zero_point: int
    weight_bits: int
    activation_bits: int
    geometry: Geometry | None = None
