"""One quantized layer as numbers: a matrix of integers and what turns them back into floats.

A convolution is a matrix product over gathered patches, a transposed one a product whose result is
scattered; `Geometry` says how, so that every engine needs one integer kernel only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # values along K that share a multiplier and a zero-point
CENTRE = 128  # zero-point of 4-bit inputs whose groups have zero-points of their own


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

    def gather(self, q: Tensor, zero_point: int | Tensor) -> Tensor:
        """Rows for the matrix product.

        Args:
            q: [B, C, H, W] uint8; padding is filled with `zero_point`, which stands for exactly 0.
            zero_point: of all images, or [B] of each.

        Returns:
            [B·H'·W', C·kernel²] uint8, or [B·H·W, C] for a transposed convolution.
        """
        if self.transposed:
            return q.permute(0, 2, 3, 1).flatten(0, 2)
        if self.padding:
            p, last = self.padding, q.is_contiguous(memory_format=torch.channels_last)
            size = (q.shape[0], q.shape[1], q.shape[2] + 2 * p, q.shape[3] + 2 * p)
            order = torch.channels_last if last else torch.contiguous_format
            padded = torch.empty(size, dtype=q.dtype, memory_format=order)
            padded.copy_(torch.as_tensor(zero_point).view(-1, 1, 1, 1))
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


class StaticRange(NamedTuple):
    """The range of a layer's whole input, fixed when it was quantized: x ≈ scale·(q − zero_point).

    Attributes:
        scale: > 0, a float32 value.
        zero_point: 0 … 2^activation_bits − 1.
    """

    scale: float
    zero_point: int


class Rows(NamedTuple):
    """What a layer multiplies: integers, and where ranges are found at run time that of each row.

    Attributes:
        q: [..., K] uint8, or [B, C, H, W] for a convolution that reads more than a pixel at a time.
        scale: [M] float32, > 0, of the M rows of q, or of its B images; None where the range is static.
        zero_point: [M] int32, 0 … 255; None where it is static, or `CENTRE` for all rows.
        multiplier: [M, groups] int32 of rows of 4 bit whose groups are told apart, the same number in both
            halves: q is then a level less its zero-point, −15 … 15, as int8. `ops.product` alone takes them.
        term: [M] int32, with multipliers: −128·Σ multiplier·q.
    """

    q: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    multiplier: Tensor | None = None
    term: Tensor | None = None

    def flat(self) -> Rows:
        """The same with q as [M, K]."""
        return self._replace(q=self.q.flatten(0, -2))

    def split(self, count: int) -> Iterator[Rows]:
        """At most `count` rows at a time, of q as [M, K]."""
        for first in range(0, len(self.q), count):
            some = slice(first, first + count)
            yield Rows(*(None if part is None else part[some] for part in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Groups:
    """How 4-bit weights in groups of `GROUP` along K become 8-bit ones: multiplier·(q − zero_point).

    Attributes:
        multiplier: [N, ceil(K / GROUP)] uint8, 1 … 16.
        zero_point: of the same shape, uint8, 0 … 15.
    """

    multiplier: Tensor
    zero_point: Tensor

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the largest q whose weights are −128 … 127, uint8, of the shape of the others."""
        multiplier, zero_point = self.multiplier.to(torch.int16), self.zero_point.to(torch.int16)
        low = (zero_point - 128 // multiplier).clamp_min(0)
        high = (zero_point + 127 // multiplier).clamp_max(15)
        return low.to(torch.uint8), high.to(torch.uint8)

    def weight(self, q: Tensor) -> Tensor:
        """The weights that engines multiply: q [N, K] of 0 … 15 to int8.

        Raises:
            ValueError: when one would lie outside −128 … 127, or q outside 0 … 15.
        """
        if q.numel() and not (int(q.min()) >= 0 and int(q.max()) <= 15):
            raise ValueError("4-bit weights in groups are 0 … 15")
        multiplier, zero_point = self._by_weight(q)
        weight = multiplier * (q.to(torch.int16) - zero_point)
        if weight.numel() and not (int(weight.min()) >= -128 and int(weight.max()) <= 127):
            raise ValueError("a multiplier is too large: multiplier·(q − zero_point) must be −128 … 127")
        return weight.to(torch.int8)

    def levels(self, weight: Tensor) -> Tensor:
        """The inverse of `weight`: [N, K] uint8, 0 … 15."""
        multiplier, zero_point = self._by_weight(weight)
        quotient = torch.div(weight.to(torch.int16), multiplier, rounding_mode="trunc")
        return (quotient + zero_point).to(torch.uint8)

    def _by_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Multipliers and zero-points as [N, K] int16."""
        parts = (self.multiplier, self.zero_point)
        multiplier, zero_point = (
            spread(part, weight.shape[1]).to(weight.device, torch.int16) for part in parts
        )
        return multiplier, zero_point


def spread(groups: Tensor, columns: int) -> Tensor:
    """What groups have, [N, G], as what each of K columns has, [N, columns]."""
    return groups.repeat_interleave(GROUP, 1)[:, :columns]


class Form(NamedTuple):
    """In how many bits a layer multiplies, 'W4A8' in words.

    Attributes:
        grouped: 4-bit weights have multipliers and zero-points for groups.
    """

    weight_bits: int
    activation_bits: int
    grouped: bool = False

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits}"


@dataclass(frozen=True)
class QuantizedLayer:
    """Everything an integer kernel needs of one Linear or convolution.

    Its input has one static range, or, where it has none, ranges found at run time: of each row of the
    product, by `integer.row_quantized`; of each image where a row takes more than a pixel.

    Attributes:
        weight: [N, K] int8, symmetric, within 2^weight_bits levels; with groups what they make of 4 bits.
        weight_scale: [N] float32.
        bias: [N] float32, zeros where the layer has none.
        input_range: None where it is found at run time.
        geometry: None for a Linear.
        groups: of 4-bit weights that have some, in the stored order of K.

    Raises:
        ValueError: for a form that no engine runs.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    input_range: StaticRange | None
    weight_bits: int
    activation_bits: int
    geometry: Geometry | None = None
    groups: Groups | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and (self.weight_bits != 4 or self.by_image):
            raise ValueError("groups of weights are for 4 bit, and for Linears and 1×1 convolutions")
        if self.input_range is None and self.activation_bits not in ((8,) if self.by_image else (4, 8)):
            raise ValueError(
                f"a range at run time is for 4 or 8 bit, for convolutions of several pixels for 8, not for "
                f"{self.activation_bits}"
            )

    @property
    def by_image(self) -> bool:
        """Whether a row of its product takes more than one pixel."""
        return self.geometry is not None and self.geometry.kernel > 1

    @property
    def largest_input(self) -> int:
        """Of the integers it multiplies."""
        return 255 if self.input_range is None else (1 << self.activation_bits) - 1

    @property
    def form(self) -> Form:
        return Form(self.weight_bits, self.activation_bits, self.groups is not None)


def float_product(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """What a layer gives in floating point.

    Args:
        x: [..., K] float of a Linear, whose geometry is None; [B, C, H, W] of a convolution.
        weight: [N, K] float, as a `QuantizedLayer` holds its integers.
        bias: [N], which no transposed convolution has.

    Returns:
        [..., N], or [B, N, H', W'].
    """
    if geometry is None:
        return F.linear(x, weight, bias)
    sides = (geometry.kernel, geometry.kernel)
    if geometry.transposed:
        weight = weight.T.unflatten(1, (-1, *sides))
        return F.conv_transpose2d(x, weight, None, geometry.stride, geometry.padding)
    return F.conv2d(x, weight.unflatten(1, (-1, *sides)), bias, geometry.stride, geometry.padding)
