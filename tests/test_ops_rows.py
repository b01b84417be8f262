"""Ranges found at run time: integers by their definition in float64."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monailabel_dfqsam.ops import (
    GROUP,
    QuantizedLayer,
    multiplied,
    row_rounded,
)
from monailabel_dfqsam.ops.integer import row_quantized
from tests.forms import hard_rows

PRODUCT_TOLERANCE = 1e-6


def by_definition(x: np.ndarray, highest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels, scale and zero-point of rows in float64, scales rounded to float32."""
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    scale = np.maximum((high - low) / highest, 2.0**-100)
    zero_point = np.round(-low / scale)
    return np.clip(np.round(x / scale[..., None]) + zero_point[..., None], 0, highest), scale, zero_point


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 200))
def test_8_bit_rows_are_their_definition(seed: int, count: int, columns: int) -> None:
    x = hard_rows(seed, count, columns)
    rows = row_quantized(x, 8)
    levels, scale, zero_point = by_definition(x.double().numpy(), 255)
    assert rows.scale is not None
    assert rows.zero_point is not None
    np.testing.assert_allclose(rows.scale.numpy(), scale, rtol=1e-6)
    # A value halfway between two levels may fall on either side in float32.
    assert (np.abs(rows.zero_point.numpy() - zero_point) <= 1).all()
    assert (np.abs(rows.q.numpy() - levels) <= 1).all()
    assert (rows.q.numpy() != levels).mean() < 0.02 + 1 / columns
    back = (rows.q.float() - rows.zero_point[:, None]) * rows.scale[:, None]
    assert torch.equal(back, row_rounded(x, 8))
    assert ((back.double() - x).abs() <= 1.01 * rows.scale[:, None]).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 200))
def test_4_bit_rows_are_within_half_a_level_of_their_group(seed: int, count: int, columns: int) -> None:
    x = hard_rows(seed, count, columns)
    rows = row_quantized(x, 4)
    assert rows.scale is not None
    assert rows.zero_point is None
    values = (rows.q.double() - 128).numpy()
    unit = rows.scale.double().numpy()
    steps = []
    for first in range(0, columns, GROUP):
        part = x[:, first : first + GROUP].double().numpy()
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        steps.append((high - low) / 15)
    np.testing.assert_allclose(unit, np.maximum(np.max(steps, 0) / 8, 2.0**-100), rtol=1e-6)
    for index, step in enumerate(steps):
        group = slice(index * GROUP, (index + 1) * GROUP)
        multiplier = np.clip(np.ceil(step / unit * (1 - 1e-6)), 1, 8)
        levels = values[:, group] / multiplier[:, None]
        assert (levels == np.round(levels)).all()
        assert (levels.max(1) - levels.min(1) <= 15).all()
        error = np.abs(values[:, group] * unit[:, None] - x[:, group].double().numpy())
        assert (error <= 1.01 * (multiplier * unit)[:, None]).all()
    assert torch.equal(row_rounded(x, 4), (rows.q.float() - 128) * rows.scale[:, None])


def test_rows_of_zeros_stay_zeros() -> None:
    for bits in (4, 8):
        assert torch.equal(row_rounded(torch.zeros(3, 40), bits), torch.zeros(3, 40))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 300), st.sampled_from([4, 8]))
def test_product_is_that_of_the_rounded_rows(seed: int, count: int, columns: int, bits: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=g) * 3
    weight = torch.randint(-128, 128, (7, columns), generator=g, dtype=torch.int8)
    scale, bias = torch.rand(7, generator=g), torch.randn(7, generator=g)
    layer = QuantizedLayer(weight, scale, bias, None, 8, bits)
    rows = row_quantized(x, bits)
    zero_point = 128 if rows.zero_point is None else rows.zero_point.numpy()[:, None]
    assert rows.scale is not None
    inputs = (rows.q.double().numpy() - zero_point) * rows.scale.double().numpy()[:, None]
    weights = weight.double().numpy() * scale.double().numpy()[:, None]
    expected = inputs @ weights.T + bias.double().numpy()
    error = np.abs(multiplied(rows, layer).numpy() - expected).max()
    assert error <= PRODUCT_TOLERANCE * max(1.0, np.abs(expected).max())
