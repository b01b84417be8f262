"""Quantized values and products in plain torch, exact: what every engine's kernels are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.ops.layer import CENTRE, GROUP, QuantizedLayer, Rows

# Of ranges found at run time: of a row of zeros.
SMALLEST_SCALE = 2.0**-100
_LARGEST_MULTIPLIER = 8
# Integers up to 2^24 are exact in float32; beyond, the reference multiplies in float64.
_FLOAT32_EXACT = 1 << 24


def quantized(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """q = clip(round(x / scale) + zero_point, 0, 2^bits − 1), ties to even; DFQ-SAM Eq. 1.

    Args:
        x: any shape, float32.
        scale: > 0.
        zero_point: 0 … 2^bits − 1.
        bits: 2 … 8.

    Returns:
        the shape of x, uint8.
    """
    q = (x * (1.0 / scale)).round_().add_(zero_point).clamp_(0, (1 << bits) - 1)
    return q.to(torch.uint8)


def row_quantized(x: Tensor, bits: int) -> Rows:
    """x as integers, each row in a range found from its own values, widened to hold 0.

    8 bit: scale = (high − low) / 255, zero_point = round(−low / scale), q as `quantized`.
    4 bit, in groups of 32 along the row: step = (high − low) / 15 of each group; unit = the largest step / 8;
    multiplier = ceil(step / unit), 1 … 8; the group's levels are `quantized` by multiplier·unit, and
    q = multiplier·(level − its zero_point) + 128, so that a row has one scale, unit, and zero_point 128.

    Args:
        x: [..., K] float32, finite.
        bits: 4 or 8.
    """
    if bits == 4:
        values, unit = _in_groups(x)
        return Rows((values + CENTRE).to(torch.uint8), unit.flatten())
    levels, scale, zero_point = _in_rows(x)
    return Rows(levels.to(torch.uint8), scale.flatten(), zero_point.flatten().to(torch.int32))


def row_rounded(x: Tensor, bits: int) -> Tensor:
    """x after a round trip through `row_quantized`, float32 of the same shape."""
    if bits == 4:
        values, unit = _in_groups(x)
        return values * unit
    levels, scale, zero_point = _in_rows(x)
    return (levels - zero_point) * scale


def _in_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels [..., K], scale and zero-point [..., 1], all float32."""
    step, low = _step(x, 255)
    scale = step.clamp_min(SMALLEST_SCALE)
    levels, zero_point = _levels(x, low, scale, 255)
    return levels, scale, zero_point


def _in_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """multiplier·(level − zero_point) [..., K], −120 … 120, and the unit [..., 1], both float32."""
    groups = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    step, low = _step(groups, 15)
    unit = (step.amax(-2, keepdim=True) / _LARGEST_MULTIPLIER).clamp_min(SMALLEST_SCALE)
    multiplier = (step / unit).ceil().clamp(1, _LARGEST_MULTIPLIER)
    levels, zero_point = _levels(groups, low, multiplier * unit, 15)
    values = multiplier * (levels - zero_point)
    return values.flatten(-2)[..., : x.shape[-1]], unit.squeeze(-1)


def _step(x: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """(high − low) / highest of each row, and low, both [..., 1]."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    return (high - low) / highest, low


def _levels(x: Tensor, low: Tensor, scale: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    inverse = 1 / scale
    zero_point = (-low * inverse).round()
    return ((x * inverse).round() + zero_point).clamp(0, highest), zero_point


def multiplied(rows: Rows, layer: QuantizedLayer) -> Tensor:
    """y[m, n] = Σ_k (q[m, k] − zero_point[m])·weight[n, k] · (scale[m]·weight_scale[n]) + bias[n].

    Args:
        rows: q [M, K] uint8, in the order of K that the layer's weight has.

    Returns:
        [M, N] float32.
    """
    sums = int_accumulate(rows.q, layer.weight)
    weights = layer.weight.sum(1, dtype=torch.int64)
    if layer.input_range is not None:
        scale, zero_point = layer.input_range
        sums -= zero_point * weights
        return sums.to(torch.float32).mul_(scale * layer.weight_scale).add_(layer.bias)
    return rescaled(sums - CENTRE * weights, rows, weights, layer)


def rescaled(sums: Tensor, rows: Rows, weights: Tensor, layer: QuantizedLayer) -> Tensor:
    """What rows with ranges found at run time give, out of Σ_k (q[m, k] − 128)·weight[n, k] [M, N].

    Args:
        sums: whole numbers, int64 or float32.
        weights: Σ_k weight[n, k], [N] int64.

    Returns:
        [M, N] float32.
    """
    assert rows.scale is not None
    if rows.zero_point is not None:
        sums = sums.to(torch.int64) + (CENTRE - rows.zero_point.to(torch.int64))[:, None] * weights
    scales = rows.scale[:, None] * layer.weight_scale
    return sums.to(torch.float32).mul(scales).add_(layer.bias)


def int_accumulate(x: Tensor, weight: Tensor) -> Tensor:
    """Σ_k x[m, k]·weight[n, k] for [M, K] uint8 and [N, K] int8: [M, N] int64, exact."""
    largest = x.shape[1] * int(x.max() if x.numel() else 0) * 128
    dtype = torch.float32 if largest < _FLOAT32_EXACT else torch.float64
    return (x.to(dtype) @ weight.to(dtype).T).to(torch.int64)
