"""Parts of the `cutlass` engine: a quantized layer made ready for its kernels, and how windows are cut."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.ops import QuantizedLayer, pack_int4
from monailabel_dfqsam.ops.cuda import linear, padded, quantize_rows, unpack_signed

_COLUMN_MULTIPLE = 8  # of N, so that a row of results is a whole number of 16-byte vectors


class Layer:
    """A quantized Linear or convolution on a device, padded to the sizes that kernels take.

    4-bit weights travel to the device packed. They stay so where the device multiplies 4-bit values
    (`native`); elsewhere they are unpacked there, once.

    Attributes:
        weight: [N', K'] int8 or [N', K'/2] uint8, zeros in the padding.
        scale: [N'] float32, input scale times weight scale.
        bias: [N'] float32, the input's zero-point folded in.
        container: (input scale, zero-point, bits, packed), the end of the quantizing ops' arguments.
    """

    def __init__(self, layer: QuantizedLayer, device: torch.device, native: bool) -> None:
        n, k = layer.weight.shape
        four_bit = layer.weight_bits == 4 and layer.activation_bits == 4 and layer.geometry is None
        rows = -n % _COLUMN_MULTIPLE
        ordered = layer.weight if layer.geometry is None else layer.geometry.arrange(layer.weight)
        weight = F.pad(ordered, (0, padded(k) - k, 0, rows))
        if four_bit:
            packed_weight = pack_int4(weight).to(device)
            self.weight = packed_weight if native else unpack_signed(packed_weight)
        else:
            self.weight = weight.contiguous().to(device)
        assert layer.input_range is not None
        input_scale, input_zero_point = layer.input_range
        scale = input_scale * layer.weight_scale.double()
        zero = input_zero_point * layer.weight.sum(1, dtype=torch.int64)
        bias = layer.bias.double() - zero * scale
        self.scale, self.bias = (F.pad(x, (0, rows)).float().to(device) for x in (scale, bias))
        self.columns, self.inputs, self.geometry = n, k, layer.geometry
        self.container = (
            input_scale,
            input_zero_point,
            layer.activation_bits,
            four_bit and native,
        )
        # Patches are gathered from single bytes; a convolution's rows are never packed.
        self.container_8bit = (*self.container[:3], False)

    def quantize(self, x: Tensor) -> Tensor:
        """[M, K] float to the rows that `product` takes."""
        rows: Tensor = quantize_rows(x, *self.container)
        return rows

    def product(self, rows: Tensor, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        """Quantized rows to [M, N] of `dtype`, contiguous; `residual` [M, N] is added."""
        y: Tensor = linear(rows, self.weight, self.scale, self.bias, residual, dtype)
        return y if y.shape[1] == self.columns else y[:, : self.columns].contiguous()

    def convolve(self, rows: Tensor, batch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """A convolution of pixels as rows, to pixels as rows.

        Args:
            rows: [B·H·W, C'] uint8, quantized with `container_8bit`; columns beyond the layer's are ignored.

        Returns:
            [B·H'·W', N] of `dtype`.
        """
        assert self.geometry is not None
        channels = self.inputs if self.geometry.transposed else self.inputs // self.geometry.kernel**2
        image = rows[:, :channels].view(batch, height, width, channels).permute(0, 3, 1, 2)
        y = self.convolve_image(image, dtype)
        if not self.geometry.transposed:
            return y
        # Overlapping patches are summed, in float32 so that the sum is rounded once.
        image = self.geometry.scatter(y.float(), batch, height, width)
        return image.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)

    def convolve_image(self, q: Tensor, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        """[B, C, H, W] uint8, any strides, to the matrix product's rows [M, N] of `dtype`."""
        assert self.geometry is not None
        rows = self.geometry.gather(q, self.container[1])
        rows = F.pad(rows, (0, padded(self.inputs) - self.inputs)).contiguous()
        return self.product(rows, dtype, residual)


class WindowGroup(NamedTuple):
    """Windows with the same number of slots for queries.

    Attributes:
        query: [W, Q] int32, token of each query, -1 for an empty slot.
        place: [W, Q] int32, row·side + column of the query in its window, 0 for an empty slot.
        key: [W, side²] int32, token of each key, -1 for padding.
    """

    query: Tensor
    place: Tensor
    key: Tensor


class Windows(NamedTuple):
    """How a grid of tokens is cut into windows.

    Attributes:
        side: of a window, in tokens.
        groups: the whole windows, then those that stick out of the grid; at most two, without empty ones.
        slot: [T] int32, of each token, its place among the groups' queries laid end to end.
    """

    side: int
    groups: list[WindowGroup]
    slot: Tensor


def window_tables(grid: int, side: int, device: torch.device) -> Windows:
    """Windows of side² tokens on a grid of grid² tokens, padded to the right and at the bottom as SAM does.

    Padding is attended to, since the published encoder does so, but asks nothing: windows that stick out have
    queries for their real tokens alone, and slots for as many as the fullest of them.
    """
    count = -(-grid // side)
    canvas = torch.full((count * side, count * side), -1, dtype=torch.int32)
    canvas[:grid, :grid] = torch.arange(grid * grid, dtype=torch.int32).view(grid, grid)
    keys = canvas.view(count, side, count, side).transpose(1, 2).reshape(-1, side * side)
    whole = (keys >= 0).all(1)
    groups = [_group(part) for part in (keys[whole], keys[~whole]) if len(part)]
    slots = torch.cat([group.query.flatten() for group in groups])
    slot = torch.empty(grid * grid, dtype=torch.int32)
    real = slots >= 0
    slot[slots[real].long()] = torch.arange(len(slots), dtype=torch.int32)[real]
    on_device = [WindowGroup(*(table.contiguous().to(device) for table in group)) for group in groups]
    return Windows(side, on_device, slot.to(device))


def _group(keys: Tensor) -> WindowGroup:
    real = keys >= 0
    queries = int(real.sum(1).max())
    # A stable sort brings the real tokens to the front, in their order.
    place = torch.argsort((~real).to(torch.int8), dim=1, stable=True)[:, :queries]
    query = keys.gather(1, place)
    return WindowGroup(query, place.masked_fill(query < 0, 0).to(torch.int32), keys)
