"""What an integer encoder does between its matrix products, in plain torch: the definition of each op.

`ops.compiled` holds the same functions in C++; both round at the same places, so that they agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monailabel_dfqsam.ops.integer import quantized, rescaled, row_quantized
from monailabel_dfqsam.ops.layer import QuantizedLayer, Rows

_ROOT_OF_HALF = 0.70710678
# erf(t) = t·P(t²) / Q(t²) up to |t| = 4, fitted to within 6e-8; the highest power first.
_ERF_RANGE = 4.0
_ERF_ABOVE = (
    1.92139851e-08, -1.98997373e-06, 0.000155503905, 0.00429217424, 0.0524312332, 0.213927448, 1.12837863,
)  # fmt: skip
_ERF_BELOW = (0.00109778228, 0.0155495424, 0.120792486, 0.522915959, 1.0)


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


def gelu(x: Tensor) -> Tensor:
    """GELU of float32 by steps whose every rounding is defined; within 3e-7·max(1, |x|) of the exact one."""
    t = (x * _ROOT_OF_HALF).clamp_(-_ERF_RANGE, _ERF_RANGE)
    z = t * t
    above, below = (_polynomial(z, coefficients) for coefficients in (_ERF_ABOVE, _ERF_BELOW))
    return (x * 0.5).mul_(above.mul_(t).div_(below).add_(1.0))


def _polynomial(z: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    found = torch.full_like(z, coefficients[0])
    for coefficient in coefficients[1:]:
        found.mul_(z).add_(coefficient)
    return found


def gelu_quantize(x: Tensor, layer: QuantizedLayer) -> Rows:
    """GELU of [M, C] float32, as the integers that the layer behind it multiplies."""
    return quantize_input(gelu(x), layer)


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
