"""Quantized values and products in plain torch, exact: what every engine's kernels are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

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


def multiplied(
    x: Tensor, weight: Tensor, scale: float, zero_point: int, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """y[m, n] = Σ_k (x[m, k] − zero_point)·weight[n, k] · (scale·weight_scale[n]) + bias[n].

    Args:
        x: [M, K] uint8.
        weight: [N, K] int8.
        scale: of x, > 0.
        zero_point: of x.
        weight_scale: [N] float32.
        bias: [N] float32.

    Returns:
        [M, N] float32.
    """
    accumulator = int_accumulate(x, weight) - zero_point * weight.sum(1, dtype=torch.int64)
    return accumulator.to(torch.float32).mul_(scale * weight_scale).add_(bias)


def int_accumulate(x: Tensor, weight: Tensor) -> Tensor:
    """Σ_k x[m, k]·weight[n, k] for [M, K] uint8 and [N, K] int8: [M, N] int64, exact."""
    largest = x.shape[1] * int(x.max() if x.numel() else 0) * 128
    dtype = torch.float32 if largest < _FLOAT32_EXACT else torch.float64
    return (x.to(dtype) @ weight.to(dtype).T).to(torch.int64)
