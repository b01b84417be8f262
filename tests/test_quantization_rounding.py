"""Compensating rounding against its definition solved slowly, every rounding there is, and the nearest."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monailabel_dfqsam.ops.layer import spread
from monailabel_dfqsam.quantization.quantizer import round_weight, weight_scale
from monailabel_dfqsam.quantization.rounding import (
    _GROUP_DAMPING,
    DAMPING,
    round_compensating,
    round_in_groups,
)


def _layer(outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(400, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)
    return torch.randn(outputs, inputs, generator=g), mixed.T @ mixed


def _error(weight: Tensor, gram: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """Squared error of each output over the inputs."""
    off = (weight - integers * scale[:, None]).double()
    return ((off @ gram.double()) * off).sum(1)


def test_every_column_meets_weights_that_are_optimal_for_those_already_rounded() -> None:
    weight, gram = _layer(3, 140, seed=0)
    weight, gram = weight.double(), gram.double()
    scale = weight_scale(weight, 4).double()
    held = gram + torch.eye(140, dtype=gram.dtype) * DAMPING * gram.diagonal().mean()
    expected, left = torch.zeros_like(weight), weight.clone()
    order = torch.argsort(held.diagonal(), descending=True)
    for step, column in enumerate(order):
        expected[:, column] = round_weight(left[:, [column]], scale, 4)[:, 0]
        done, free = order[: step + 1], order[step + 1 :]
        error = weight[:, done] - expected[:, done] * scale[:, None]
        left[:, free] = (
            weight[:, free] + torch.linalg.solve(held[free][:, free], held[free][:, done] @ error.T).T
        )
    assert torch.equal(round_compensating(weight, gram, scale, 4), expected.to(torch.int8))


def test_lies_between_the_best_of_all_roundings_and_the_nearest() -> None:
    levels = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)), dtype=torch.float32)
    gained = []
    for seed in range(8):
        weight, gram = _layer(8, 6, seed)
        scale = weight_scale(weight, 2)
        best = torch.stack(
            [
                _error(row.expand(len(levels), -1), gram, levels, s.expand(len(levels))).min()
                for row, s in zip(weight, scale, strict=True)
            ]
        )
        nearest = _error(weight, gram, round_weight(weight, scale, 2), scale)
        found = _error(weight, gram, round_compensating(weight, gram, scale, 2), scale)
        assert (found >= best * (1 - 1e-6)).all()
        assert (found <= nearest * (1 + 1e-6)).all()
        gained.append(float((nearest.sum() - found.sum()) / (nearest.sum() - best.sum())))
    # Of what the best of all roundings gains over the nearest.
    assert sum(gained) / len(gained) > 0.5


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight, _ = _layer(5, 130, seed=3)
    scale = weight_scale(weight, 4)
    integers = round_compensating(weight, torch.diag(torch.rand(130) + 0.1), scale, 4)
    assert torch.equal(integers, round_weight(weight, scale, 4).to(torch.int8))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, gram = _layer(5, 12, seed=4)
    gram[:, 7] = gram[7] = 0.0
    scale = weight_scale(weight, 4)
    assert torch.isfinite(round_compensating(weight, gram, scale, 4).float()).all()
    zeros = round_compensating(weight, torch.zeros(12, 12), scale, 4)
    assert torch.equal(zeros, round_weight(weight, scale, 4).to(torch.int8))
    # In groups too, of inputs that are zero in part and throughout.
    simple, _, _ = round_in_groups(weight, torch.eye(12))
    integers, scale, groups = round_in_groups(weight, torch.zeros(12, 12))
    assert torch.equal(integers, simple)
    integers, scale, groups = round_in_groups(weight, gram)
    step = spread(groups.multiplier, 12) * scale[:, None]
    assert bool(((integers * scale[:, None] - weight)[:, 7].abs() <= 2 * step[:, 7]).all())


@settings(deadline=None, max_examples=25)
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 100), seed=st.integers(0, 1000))
def test_groups_hold_what_4_bits_can(outputs: int, inputs: int, seed: int) -> None:
    weight, gram = _layer(outputs, inputs, seed)
    integers, scale, groups = round_in_groups(weight, gram)
    assert integers.dtype == torch.int8
    assert int(groups.multiplier.min()) >= 1
    assert int(groups.multiplier.max()) <= 16
    levels = groups.levels(integers)
    assert int(levels.max()) <= 15
    assert torch.equal(groups.weight(levels), integers)
    # With independent inputs there is nothing to make up for: within half a step, or cut off at the ends.
    integers, scale, groups = round_in_groups(weight, torch.eye(inputs))
    step = spread(groups.multiplier, inputs) * scale[:, None]
    inner = (
        (groups.levels(integers) > 0) & (groups.levels(integers) < 15) & (integers > -112) & (integers < 112)
    )
    off = (integers * scale[:, None] - weight).abs()
    assert bool((off <= step * 0.5001)[inner].all())


def test_groups_are_nearer_than_one_scale_a_channel() -> None:
    weight, gram = _layer(40, 128, seed=1)
    weight[:, 5] *= 20  # an outlier in one group of each channel
    integers, scale, _ = round_in_groups(weight, gram)
    channel = weight_scale(weight, 4)
    ours = _error(weight, gram, integers, scale).sum()
    assert ours < 0.5 * _error(weight, gram, round_compensating(weight, gram, channel, 4), channel).sum()
    simple, scale, _ = round_in_groups(weight, torch.eye(128))
    assert ours < 0.5 * _error(weight, gram, simple, scale).sum()


def test_in_groups_no_column_alone_could_be_rounded_better() -> None:
    """By the definition: each weight is tried at all its levels."""
    weight, gram = _layer(6, 70, seed=2)
    integers, scale, groups = round_in_groups(weight, gram)
    held = gram + torch.eye(70) * _GROUP_DAMPING * gram.diagonal().mean()
    least = _error(weight, held, integers, scale)
    low, high = groups.bounds
    bounds = list(zip(low.T, high.T, strict=True))
    better = 0
    for column in range(70):
        for level in range(16):
            tried = groups.levels(integers)
            tried[:, column] = torch.full_like(low[:, 0], level).clamp(*bounds[column // 32])
            found = _error(weight, held, groups.weight(tried), scale)
            better += int((found < least * (1 - 1e-5)).sum())
    assert better < 3  # of 6720 changes; once less over the columns, 7, and never again, 20
