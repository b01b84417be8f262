"""Groups of 4-bit weights: what engines multiply, and the 4 bits again out of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monailabel_dfqsam.ops import GROUP, Geometry, Groups, QuantizedLayer, StaticRange


def groups_of(seed: int, rows: int, columns: int) -> tuple[Groups, torch.Tensor]:
    """Groups by chance, and levels [rows, columns] that they make 8-bit weights of."""
    g = torch.Generator().manual_seed(seed)
    shape = (rows, -(-columns // GROUP))
    groups = Groups(
        torch.randint(1, 17, shape, generator=g, dtype=torch.uint8),
        torch.randint(0, 16, shape, generator=g, dtype=torch.uint8),
    )
    low, high = (part.repeat_interleave(GROUP, 1)[:, :columns].float() for part in groups.bounds)
    levels = torch.randint(0, 16, (rows, columns), generator=g).float().clamp(low, high)
    return groups, levels.to(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 130))
def test_levels_come_back_from_the_weights(seed: int, rows: int, columns: int) -> None:
    groups, levels = groups_of(seed, rows, columns)
    weight = groups.weight(levels)
    for n in range(rows):
        for k in range(columns):
            multiplier, zero_point = (
                int(groups.multiplier[n, k // GROUP]),
                int(groups.zero_point[n, k // GROUP]),
            )
            assert int(weight[n, k]) == multiplier * (int(levels[n, k]) - zero_point)
    assert torch.equal(groups.levels(weight), levels)


def test_bounds_are_the_levels_that_8_bits_hold() -> None:
    multiplier, zero_point = torch.meshgrid(torch.arange(1, 17), torch.arange(16), indexing="ij")
    low, high = Groups(multiplier.to(torch.uint8), zero_point.to(torch.uint8)).bounds
    q = torch.arange(16)[:, None, None]
    fits = ((multiplier * (q - zero_point)).abs() <= 127) | (multiplier * (q - zero_point) == -128)
    assert torch.equal(fits, (low <= q) & (q <= high))


def test_what_8_bits_do_not_hold_is_refused() -> None:
    groups = Groups(torch.tensor([[16]], dtype=torch.uint8), torch.tensor([[0]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiplier is too large"):
        groups.weight(torch.tensor([[8]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="0 … 15"):
        groups.weight(torch.tensor([[16]], dtype=torch.uint8))


@pytest.mark.parametrize("geometry", [None, Geometry(1, 1, 0), Geometry(3, 1, 1)])
def test_forms_that_no_engine_runs_are_refused(geometry: Geometry | None) -> None:
    weight, one = torch.zeros(1, 9, dtype=torch.int8), torch.ones(1)
    groups, _ = groups_of(0, 1, 9)
    wide = geometry is not None and geometry.kernel > 1
    forms = [(None, 8, 8, None, False), (None, 8, 4, None, wide), (None, 8, 6, None, True)]
    forms += [(StaticRange(1.0, 0), 4, 4, groups, wide), (None, 8, 8, groups, True)]
    for input_range, weight_bits, activation_bits, some, refused in forms:
        arguments = (weight, one, one, input_range, weight_bits, activation_bits, geometry, some)
        if refused:
            with pytest.raises(ValueError, match=r"at run time is for|groups of weights are for"):
                QuantizedLayer(*arguments)
        else:
            assert str(QuantizedLayer(*arguments).form) == f"W{weight_bits}A{activation_bits}"
