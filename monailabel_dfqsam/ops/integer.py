"""The integer ops, each with schema, fake and reference together; engines may bring faster kernels.

`dfqsam::quantize`   float to unsigned integers, DFQ-SAM Eq. 1
`dfqsam::int_linear` unsigned activations times signed weights, accumulated exactly, dequantized

The functions of plain torch that define them are there to be called too: torch loads its compiler, for
seconds, when a custom op is called for the first time.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Integers up to 2^24 are exact in float32; beyond, the reference multiplies in float64.
_FLOAT32_EXACT = 1 << 24


def quantized(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """q = clip(round(x / scale) + zero_point, 0, 2^bits − 1), ties to even.

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


@torch.library.custom_op("dfqsam::quantize", mutates_args=())
def quantize(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """`quantized`."""
    return quantized(x, scale, zero_point, bits)


@quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


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


@torch.library.custom_op("dfqsam::int_linear", mutates_args=())
def int_linear(
    x: Tensor, weight: Tensor, scale: float, zero_point: int, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """`multiplied`."""
    return multiplied(x, weight, scale, zero_point, weight_scale, bias)


@int_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: float, zero_point: int, weight_scale: Tensor, bias: Tensor) -> Tensor:
    return weight_scale.new_empty(x.shape[0], weight.shape[0])


def int_accumulate(x: Tensor, weight: Tensor) -> Tensor:
    """Σ_k x[m, k]·weight[n, k] for [M, K] uint8 and [N, K] int8: [M, N] int64, exact."""
    largest = x.shape[1] * int(x.max() if x.numel() else 0) * 128
    dtype = torch.float32 if largest < _FLOAT32_EXACT else torch.float64
    return (x.to(dtype) @ weight.to(dtype).T).to(torch.int64)
