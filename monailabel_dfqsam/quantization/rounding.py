"""Rounding of weights that makes up, in the columns still to come, for the error of those already rounded.

GPTQ (arXiv 2210.17323) after Optimal Brain Quantization: columns are rounded one after another, those with
the largest inputs first, and each one's error is spread over the rest so that the layer's output on the
calibration inputs changes least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monailabel_dfqsam.quantization.quantizer import round_weight

DAMPING = 0.01  # of the mean of the Gram matrix' diagonal, added to it
_COLUMNS = 128  # between two corrections of all columns to the right


def round_compensating(weight: Tensor, gram: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integers whose scaled products with the inputs come near to the weight's.

    They are never farther from them, in any output, than the nearest integers are.

    Args:
        weight: [N, K] float.
        gram: [K, K] float, XᵀX of the layer's inputs X [T, K].
        scale: [N] float, > 0, of each output channel.
        bits: 2 … 8.

    Returns:
        [N, K] int8 within −2^(bits−1) … 2^(bits−1) − 1.
    """
    order, spread = _spread(gram, weight.dtype)
    left = weight[:, order].clone()
    rounded = torch.empty_like(left)
    for first in range(0, len(gram), _COLUMNS):
        last = min(first + _COLUMNS, len(gram))
        errors = torch.empty_like(left[:, first:last])
        for column in range(first, last):
            own = left[:, column]
            rounded[:, column] = round_weight(own[:, None], scale, bits)[:, 0]
            error = (own - rounded[:, column] * scale) / spread[column, column]
            left[:, column + 1 : last] -= error[:, None] * spread[column, column + 1 : last]
            errors[:, column - first] = error
        left[:, last:] -= errors @ spread[first:last, last:]
    compensated, nearest = torch.empty_like(rounded), round_weight(weight, scale, bits)
    compensated[:, order] = rounded
    better = _error(weight, compensated, scale, gram) < _error(weight, nearest, scale, gram)
    return torch.where(better[:, None], compensated, nearest).to(torch.int8)


def _spread(gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The order of columns, and U [K, K], upper triangular, with UᵀU the inverse of the matrix so ordered.

    With LLᵀ the matrix in the opposite order, L⁻¹ turned around is U: one factor where the definition takes
    an inverse and two, and few matrices at once, each of which takes much memory in float64.
    """
    damping = _damping(gram)
    order = torch.argsort(gram.diagonal().double() + damping, descending=True)
    opposite = order.flip(0)
    matrix = gram[opposite][:, opposite].double()
    matrix.diagonal().add_(damping)
    matrix = torch.linalg.cholesky(matrix)
    unit = torch.eye(len(gram), dtype=torch.float64)
    return order, torch.linalg.solve_triangular(matrix, unit, upper=False).to(dtype).flip(0, 1)


def _error(weight: Tensor, integers: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """[N], the squared error of each output over all inputs."""
    off = weight - integers * scale[:, None]
    return ((off @ gram.to(off.dtype)) * off).sum(1)


def _damping(gram: Tensor) -> float:
    return max(DAMPING * float(gram.diagonal().mean()), torch.finfo(torch.float32).tiny)
