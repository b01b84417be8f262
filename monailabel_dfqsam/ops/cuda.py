"""The GPU ops: schema, fake and CPU reference side by side; on CUDA they call `libdfqsam_cuda.so`.

`dfqsam_cuda::quantize_rows`         float rows to quantized rows
`dfqsam_cuda::layer_norm_quantize`   the same after a LayerNorm
`dfqsam_cuda::linear`                quantized rows times a quantized weight, dequantized, residual added
`dfqsam_cuda::linear_gelu_quantize`  the same without residual, through GELU into quantized rows
`dfqsam_cuda::unpack_signed`         4-bit weights to a byte each

Attention's ops are in `cuda_attention`. Quantized rows are [M, K'] uint8, K' being K rounded up to a multiple
of 32 and the columns from K on 0; packed, they are [M, K'/2], low nibble first. Weights are [N, K'] int8 or,
packed, [N, K'/2] uint8. The layout is drawn in `kernels/cuda/layout.cuh`. On CUDA floats are float16 but for
scales, norms and images; the references take any float type, so that an engine's arithmetic can be followed
in float32 without a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.ops.cuda_library import run
from monailabel_dfqsam.ops.integer import int_accumulate
from monailabel_dfqsam.ops.packing import unpack_int4

ROW_MULTIPLE = 32


def padded(width: int) -> int:
    """Columns of a quantized row that holds `width` values."""
    return -(-width // ROW_MULTIPLE) * ROW_MULTIPLE


@torch.library.custom_op("dfqsam_cuda::quantize_rows", mutates_args=(), device_types="cpu")
def quantize_rows(x: Tensor, scale: float, zero_point: int, bits: int, packed: bool) -> Tensor:
    """q = clip(round(x / scale) + zero_point, 0, 2^bits − 1), ties to even.

    Args:
        x: [M, K] float, the last dimension contiguous.
        packed: two values a byte; bits at most 4.

    Returns:
        quantized rows [M, K'] or [M, K'/2] uint8.
    """
    q = (x.float() * (1.0 / scale)).round_().add_(zero_point).clamp_(0, (1 << bits) - 1)
    q = F.pad(q.to(torch.uint8), (0, padded(x.shape[1]) - x.shape[1]))
    return q[:, 0::2] | (q[:, 1::2] << 4) if packed else q


@quantize_rows.register_fake
def _(x: Tensor, scale: float, zero_point: int, bits: int, packed: bool) -> Tensor:
    return empty_rows(x, x.shape[0], x.shape[1], packed)


@quantize_rows.register_kernel("cuda")
def launch_quantize_rows(x: Tensor, scale: float, zero_point: int, bits: int, packed: bool) -> Tensor:
    check(x.stride(1) == 1 and x.dtype in (torch.float16, torch.float32), "x", x)
    out = empty_rows(x, x.shape[0], x.shape[1], packed)
    run(
        "dfqsam_quantize_rows", x, x.dtype == torch.float16, x.shape[0], x.shape[1], x.stride(0),
        1.0 / scale, zero_point, bits, padded(x.shape[1]), packed, out,
    )  # fmt: skip
    return out


@torch.library.custom_op("dfqsam_cuda::layer_norm_quantize", mutates_args=(), device_types="cpu")
def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    scale: float,
    zero_point: int,
    bits: int,
    packed: bool,
) -> Tensor:
    """LayerNorm over the last dimension with statistics in float32, then `quantize_rows`.

    Args:
        x: [M, C] float, contiguous, C a multiple of 8 and at most 2048.
        weight, bias: [C] float32.
    """
    normed = F.layer_norm(x.float(), weight.shape, weight, bias, epsilon)
    rows: Tensor = quantize_rows(normed, scale, zero_point, bits, packed)
    return rows


@layer_norm_quantize.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    scale: float,
    zero_point: int,
    bits: int,
    packed: bool,
) -> Tensor:
    return empty_rows(x, x.shape[0], x.shape[1], packed)


@layer_norm_quantize.register_kernel("cuda")
def launch_layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    scale: float,
    zero_point: int,
    bits: int,
    packed: bool,
) -> Tensor:
    check(x.is_contiguous() and x.dtype in (torch.float16, torch.float32), "x", x)
    _check_floats(x.shape[1], weight=weight, bias=bias)
    out = empty_rows(x, x.shape[0], x.shape[1], packed)
    run(
        "dfqsam_layer_norm_quantize", x, x.dtype == torch.float16, weight,
        bias, epsilon, x.shape[0], x.shape[1], 1.0 / scale, zero_point, bits, padded(x.shape[1]),
        packed, out,
    )  # fmt: skip
    return out


@torch.library.custom_op("dfqsam_cuda::linear", mutates_args=(), device_types="cpu")
def linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y[m, n] = (Σ_k x[m, k]·weight[n, k])·scale[n] + bias[n] + residual[m, n].

    Args:
        x: quantized rows, packed exactly when the weight is.
        weight: [N, K'] int8, or [N, K'/2] uint8 packed; N a multiple of 8.
        scale: [N] float32, of input times weight.
        bias: [N] float32, less the input's zero-point times scale[n]·Σ_k weight[n, k].
        residual: [M, N] of `dtype`, or None.
        dtype: of the result; float16 on CUDA.
    """
    y = _accumulate(x, weight).mul_(scale).add_(bias)
    return (y if residual is None else y.add_(residual)).to(dtype)


@linear.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@linear.register_kernel("cuda")
def launch_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    m, n, k, packed = _product_sizes(x, weight)
    _check_floats(n, scale=scale, bias=bias)
    if dtype != torch.float16:
        raise ValueError(f"on CUDA the result is float16, not {dtype}")
    if residual is not None:
        fits = residual.is_contiguous() and residual.shape == (m, n) and residual.dtype == dtype
        check(fits, "residual", residual)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    run(
        "dfqsam_linear", x, weight, scale, bias,
        residual, out, m, n, k, packed,
    )  # fmt: skip
    return out


@torch.library.custom_op("dfqsam_cuda::linear_gelu_quantize", mutates_args=(), device_types="cpu")
def linear_gelu_quantize(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, out_scale: float, out_zero_point: int, bits: int
) -> Tensor:
    """quantize(GELU(linear(x))), for lin1: quantized rows [M, N] or, packed as x is, [M, N/2].

    Args:
        x, weight, scale, bias: as `linear` takes them, N a multiple of 32.
        out_scale, out_zero_point, bits: of the result.
    """
    y = F.gelu(_accumulate(x, weight).mul_(scale).add_(bias))
    rows: Tensor = quantize_rows(y, out_scale, out_zero_point, bits, weight.dtype == torch.uint8)
    return rows


@linear_gelu_quantize.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, out_scale: float, out_zero_point: int, bits: int
) -> Tensor:
    return empty_rows(x, x.shape[0], weight.shape[0], weight.dtype == torch.uint8)


@linear_gelu_quantize.register_kernel("cuda")
def launch_linear_gelu_quantize(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, out_scale: float, out_zero_point: int, bits: int
) -> Tensor:
    m, n, k, packed = _product_sizes(x, weight)
    _check_floats(n, scale=scale, bias=bias)
    out = empty_rows(x, m, n, packed)
    run(
        "dfqsam_linear_gelu_quantize", x, weight, scale, bias,
        1.0 / out_scale, out_zero_point, bits, out, m, n, k, packed,
    )  # fmt: skip
    return out


@torch.library.custom_op("dfqsam_cuda::unpack_signed", mutates_args=(), device_types="cpu")
def unpack_signed(packed: Tensor) -> Tensor:
    """[N, K/2] uint8, two's complement 4-bit values, to [N, K] int8."""
    return unpack_int4(packed, 2 * packed.shape[1])


@unpack_signed.register_fake
def _(packed: Tensor) -> Tensor:
    return packed.new_empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.int8)


@unpack_signed.register_kernel("cuda")
def launch_unpack_signed(packed: Tensor) -> Tensor:
    check(packed.is_contiguous() and packed.dtype == torch.uint8, "packed", packed)
    out = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.int8, device=packed.device)
    run("dfqsam_unpack_signed", packed, out, packed.numel())
    return out


def _accumulate(x: Tensor, weight: Tensor) -> Tensor:
    """[M, N] float32 of the exact integer product."""
    if weight.dtype == torch.uint8:
        x = torch.stack((x & 15, x >> 4), dim=-1).flatten(1)
        weight = unpack_int4(weight, x.shape[1])
    return int_accumulate(x, weight).to(torch.float32)


def empty_rows(like: Tensor, rows: int, width: int, packed: bool) -> Tensor:
    """Quantized rows yet to be filled, on the device of `like`."""
    columns = padded(width)
    return like.new_empty(rows, columns // 2 if packed else columns, dtype=torch.uint8)


def _product_sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int, bool]:
    packed = weight.dtype == torch.uint8
    check(x.is_contiguous() and x.dtype == torch.uint8 and x.shape[1] == weight.shape[1], "x", x)
    check(weight.is_contiguous() and weight.dtype in (torch.uint8, torch.int8), "weight", weight)
    return x.shape[0], weight.shape[0], x.shape[1] * (2 if packed else 1), packed


def _check_floats(length: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        fits = tensor.is_contiguous() and tensor.dtype == torch.float32 and tensor.shape == (length,)
        check(fits, name, tensor)


def check(fits: bool, name: str, tensor: Tensor) -> None:
    """Raises ValueError, naming the argument, where it does not fit."""
    if not fits:
        shape, stride = list(tensor.shape), list(tensor.stride())
        raise ValueError(f"the kernels take no '{name}' of {shape}, strides {stride}, {tensor.dtype}")
