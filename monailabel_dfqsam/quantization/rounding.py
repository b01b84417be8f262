"""Rounding of weights that makes up, in the columns still to come, for the error of those already rounded.

GPTQ (arXiv 2210.17323) after Optimal Brain Quantization: columns are rounded one after another, those with
the largest inputs first, and each one's error is spread over the rest so that the layer's output on the
calibration inputs changes least.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monailabel_dfqsam.ops import GROUP, Groups
from monailabel_dfqsam.quantization.quantizer import MIN_SCALE, round_weight

DAMPING = 0.01  # of the mean of the Gram matrix' diagonal, added to it
# Where 4 bits are all there are, inputs seen seldom are worth more.
_GROUP_DAMPING = 0.1
_SWEEPS = 2  # over all columns, after which little changes
_COLUMNS = 128  # between two corrections of all columns to the right
# A channel's scale times this is its largest weight: below 127, so that what columns make up for has room.
_LARGEST = 119
_LARGEST_MULTIPLIER = 16
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's range, of which the best is taken


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
    rounded = torch.empty_like(weight)

    def nearest(column: int, value: Tensor) -> Tensor:
        rounded[:, column] = round_weight(value[:, None], scale, bits)[:, 0]
        return rounded[:, column] * scale

    _compensate(weight, gram, nearest)
    simple = round_weight(weight, scale, bits)
    better = _error(weight, rounded, scale, gram) < _error(weight, simple, scale, gram)
    return torch.where(better[:, None], rounded, simple).to(torch.int8)


def round_in_groups(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Groups]:
    """The same at 4 bit, each group of `GROUP` inputs with a multiplier and a zero-point of its own.

    Once all columns are rounded, each is looked at again beside all others (QuantEase, arXiv 2309.01885).

    Args:
        weight: [N, K] float.
        gram: [K, K] float, XᵀX of the layer's inputs X [T, K].

    Returns:
        the integers [N, K] int8 that engines multiply, their scale [N] float32, and the groups.
    """
    outputs, inputs = weight.shape
    scale = (weight.abs().amax(1) / _LARGEST).clamp_min(MIN_SCALE)
    importance = gram.diagonal() + _damping(gram)
    found = [
        _group(members / scale[:, None], own)
        for members, own in zip(weight.split(GROUP, 1), importance.split(GROUP), strict=True)
    ]
    groups = Groups(*(torch.stack(numbers, 1) for numbers in zip(*found, strict=True)))
    q = torch.empty(outputs, inputs, dtype=torch.uint8)

    def nearest(column: int, value: Tensor) -> Tensor:
        group = column // GROUP
        own = Groups(groups.multiplier[:, group, None], groups.zero_point[:, group, None])
        levels = _levels(value[:, None] / scale[:, None], own)
        q[:, column] = levels[:, 0]
        return own.weight(levels)[:, 0] * scale

    damped = gram.clone()
    damped.diagonal().add_(_damping(gram, _GROUP_DAMPING))
    _compensate(weight, damped, nearest)
    for _ in range(_SWEEPS):
        _refine(weight, groups.weight(q) * scale[:, None], damped, nearest)
    return groups.weight(q), scale, groups


def _group(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The multiplier and the zero-point [N] of one group of weights [N, GROUP], in units of their scale."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    best: tuple[Tensor, Tensor] | None = None
    least = torch.full_like(low, torch.inf)
    for shrink in _SHRINK:
        multiplier = ((high - low) * (shrink / 15)).round().clamp(1, _LARGEST_MULTIPLIER)
        zero_point = (-low * shrink / multiplier).round().clamp(0, 15)
        found = (multiplier.to(torch.uint8), zero_point.to(torch.uint8))
        own = Groups(found[0][:, None], found[1][:, None])
        error = ((own.weight(_levels(weight, own)) - weight).square() * importance).sum(1)
        better = error < least
        if best is not None:
            found = (torch.where(better, found[0], best[0]), torch.where(better, found[1], best[1]))
        best = found
        least = torch.where(better, error, least)
    assert best is not None
    return best


def _levels(weight: Tensor, group: Groups) -> Tensor:
    """The levels of one group, uint8, nearest to weights [N, k] in units of their scale."""
    q = (weight / group.multiplier).round() + group.zero_point
    low, high = group.bounds
    levels: Tensor = torch.minimum(torch.maximum(q, low.to(q.dtype)), high.to(q.dtype)).to(torch.uint8)
    return levels


def _compensate(weight: Tensor, gram: Tensor, nearest: Callable[[int, Tensor], Tensor]) -> None:
    """Rounds column after column, the largest inputs' first; what each is off, later ones make up for.

    Args:
        weight: [N, K] float.
        gram: [K, K] float.
        nearest: from a column's number, and what it would best be [N], to the column rounded.
    """
    order = torch.argsort(gram.diagonal().double(), descending=True)
    spread, left = _spread(gram, order, weight.dtype), weight[:, order]
    for first in range(0, weight.shape[1], _COLUMNS):
        last = min(first + _COLUMNS, weight.shape[1])
        errors = torch.empty_like(left[:, first:last])
        for column in range(first, last):
            rounded = nearest(int(order[column]), left[:, column])
            error = (left[:, column] - rounded) / spread[column, column]
            left[:, column + 1 : last] -= error[:, None] * spread[column, column + 1 : last]
            errors[:, column - first] = error
        left[:, last:] -= errors @ spread[first:last, last:]


def _refine(weight: Tensor, rounded: Tensor, gram: Tensor, nearest: Callable[[int, Tensor], Tensor]) -> None:
    """Rounds each column once more, to the best that it can be beside all others as they are rounded by then.

    Args:
        weight: [N, K] float.
        rounded: [N, K] float, the weight as rounded; overwritten.
        gram: [K, K] float, positive definite.
        nearest: as for `_compensate`.
    """
    slope = (rounded - weight) @ gram
    for first in range(0, weight.shape[1], _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        before, inner = rounded[:, columns].clone(), slope[:, columns].clone()
        for column, row in enumerate(gram[columns, columns], first):
            best = rounded[:, column] - inner[:, column - first] / gram[column, column]
            found = nearest(column, best)
            inner += (found - rounded[:, column])[:, None] * row
            rounded[:, column] = found
        slope += (rounded[:, columns] - before) @ gram[columns]


def _spread(gram: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """U [K, K], upper triangular, with UᵀU the inverse of the matrix so ordered.

    With LLᵀ the matrix in the opposite order, L⁻¹ turned around is U: one factor where the definition takes
    an inverse and two, and few matrices at once, each of which takes much memory in float64.
    """
    opposite = order.flip(0)
    matrix = gram[opposite][:, opposite].double()
    matrix.diagonal().add_(_damping(gram))
    matrix = torch.linalg.cholesky(matrix)
    unit = torch.eye(len(gram), dtype=torch.float64)
    spread: Tensor = torch.linalg.solve_triangular(matrix, unit, upper=False).to(dtype).flip(0, 1)
    return spread


def _error(weight: Tensor, integers: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """[N], the squared error of each output over all inputs."""
    off = weight - integers * scale[:, None]
    return ((off @ gram.to(off.dtype)) * off).sum(1)


def _damping(gram: Tensor, share: float = DAMPING) -> float:
    return max(share * float(gram.diagonal().mean()), torch.finfo(torch.float32).tiny)
