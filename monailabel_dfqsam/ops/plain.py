"""What an integer encoder does between its matrix products, in plain torch: the definition of each op.

`ops.compiled` holds the same functions in C++; both round at the same places, so that they agree bit for bit.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.ops.integer import quantized, rescaled, row_quantized
from monailabel_dfqsam.ops.layer import QuantizedLayer, Rows


def quantize_input(x: Tensor, layer: QuantizedLayer) -> Rows:
    """x as the integers that a layer multiplies.

    Args:
        x: float32; with a static range of any shape, else [..., K], or [B, C, H, W] where a row takes more
            than a pixel.
    """
    if layer.input_range is not None:
        return Rows(quantized(x, *layer.input_range, layer.activation_bits))
    if not layer.by_image:
        return row_quantized(x, layer.activation_bits)
    rows = row_quantized(x.flatten(1), layer.activation_bits)
    return rows._replace(q=rows.q.view(x.shape))


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, layer: QuantizedLayer, keep: bool
) -> tuple[Rows, Tensor | None]:
    """LayerNorm over rows, as the integers that the layer behind it multiplies.

    Mean and variance are taken in float64 and rounded to float32 once, so that the integers do not depend on
    the order of summation.

    Args:
        x: [M, C] float32.
        weight: [C] float32.
        bias: [C] float32.
        layer: whose input range is used.
        keep: whether the normalised floats are wanted too.

    Returns:
        [M, C] integers, and [M, C] float32 if kept.
    """
    doubles = x.double()
    mean = doubles.mean(-1, keepdim=True)
    variance = (doubles - mean).square_().mean(-1, keepdim=True)
    factor = (1.0 / (variance + epsilon).sqrt()).float()
    normed = (x - mean.float()).mul_(factor).mul_(weight).add_(bias)
    return quantize_input(normed, layer), normed if keep else None


def gelu_quantize(x: Tensor, layer: QuantizedLayer) -> Rows:
    """GELU of [M, C] float32, as the integers that the layer behind it multiplies."""
    return quantize_input(F.gelu(x), layer)


def rescale(
    sums: Tensor, rows: Rows, weights: Tensor, layer: QuantizedLayer, residual: Tensor | None
) -> Tensor:
    """What follows a product of rows whose ranges were found at run time: `integer.rescaled`.

    Args:
        sums: [M, N] float32, Σ_k (q[m, k] − 128)·weight[n, k]; may be overwritten.
        weights: Σ_k weight[n, k], [N] int64.
        residual: what the result is added to, in place.
    """
    result = rescaled(sums, rows, weights, layer)
    return result if residual is None else residual.add_(result)
