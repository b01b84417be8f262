"""What an integer encoder does between its matrix products, in plain torch: the definition of each op.

`ops.compiled` holds the same functions in C++; both round at the same places, so that they agree bit for bit.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.ops.integer import quantized
from monailabel_dfqsam.ops.layer import QuantizedLayer


def quantize_input(x: Tensor, layer: QuantizedLayer) -> Tensor:
    """x as the integers that a layer multiplies: any shape float32 to the same shape uint8."""
    return quantized(x, layer.input_scale, layer.input_zero_point, layer.activation_bits)


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, layer: QuantizedLayer, keep: bool
) -> tuple[Tensor, Tensor | None]:
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
        [M, C] uint8, and [M, C] float32 if kept.
    """
    doubles = x.double()
    mean = doubles.mean(-1, keepdim=True)
    variance = (doubles - mean).square_().mean(-1, keepdim=True)
    factor = (1.0 / (variance + epsilon).sqrt()).float()
    normed = (x - mean.float()).mul_(factor).mul_(weight).add_(bias)
    return quantize_input(normed, layer), normed if keep else None


def gelu_quantize(x: Tensor, layer: QuantizedLayer) -> Tensor:
    """GELU, as the integers that the layer behind it multiplies: [M, C] float32 to [M, C] uint8."""
    return quantize_input(F.gelu(x), layer)
