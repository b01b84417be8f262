"""Integer ops against slow, obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monailabel_dfqsam.ops import (
    Geometry,
    QuantizedLayer,
    Rows,
    StaticRange,
    int_accumulate,
    multiplied,
    pack_int4,
    quantized,
    unpack_int4,
)

FLOAT_TOLERANCE = 1e-6


@given(
    st.lists(st.lists(st.integers(-8, 7), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 5)
)
def test_packing_round_trips(rows: list[list[int]], width: int) -> None:
    values = torch.tensor(rows, dtype=torch.int8)[:, :width]
    packed = pack_int4(values)
    assert packed.shape == (len(rows), (width + 1) // 2)
    assert torch.equal(unpack_int4(packed, width), values)


def test_packing_holds_every_pair_low_nibble_first() -> None:
    pairs = torch.tensor([[a, b] for a in range(-8, 8) for b in range(-8, 8)], dtype=torch.int8)
    packed = pack_int4(pairs)
    assert packed.flatten().tolist() == [(a & 15) | ((b & 15) << 4) for a, b in pairs.tolist()]
    assert torch.equal(unpack_int4(packed, 2), pairs)


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="outside"):
        pack_int4(torch.tensor([8], dtype=torch.int8))
    with pytest.raises(ValueError, match="takes int8"):
        pack_int4(torch.tensor([1]))
    with pytest.raises(ValueError, match="do not lie in"):
        unpack_int4(torch.zeros(2, 3, dtype=torch.uint8), 9)


@settings(max_examples=50)
@given(st.integers(2, 8), st.integers(0, 255), st.floats(1e-3, 10), st.integers(0, 2**31 - 1))
def test_quantize_is_equation_1(bits: int, zero_point: int, scale: float, seed: int) -> None:
    zero_point %= 1 << bits
    x = torch.randn(37, generator=torch.Generator().manual_seed(seed)) * 5
    expected = np.clip(np.round(x.double().numpy() / scale) + zero_point, 0, 2**bits - 1)
    difference = np.abs(quantized(x, scale, zero_point, bits).numpy() - expected)
    # Only a value on the edge between two levels may round the other way in float32.
    on_edge = np.abs(x.double().numpy() / scale % 1 - 0.5) < 1e-4
    assert (difference[~on_edge] == 0).all()
    assert (difference <= 1).all()


@pytest.mark.parametrize("top", [15, 255])
def test_multiplied_is_exact_arithmetic(top: int) -> None:
    g = torch.Generator().manual_seed(top)
    x = torch.randint(0, top + 1, (9, 3072), generator=g, dtype=torch.uint8)
    weight = torch.randint(-8, 8, (33, 3072), generator=g, dtype=torch.int8)
    scale, bias = torch.rand(33, generator=g), torch.randn(33, generator=g)
    exact = (x.numpy().astype(np.int64) - 7) @ weight.numpy().astype(np.int64).T
    accumulated = int_accumulate(x, weight).numpy() - 7 * weight.numpy().astype(np.int64).sum(1)
    assert (accumulated == exact).all()
    expected = exact * 0.25 * scale.double().numpy() + bias.double().numpy()
    layer = QuantizedLayer(weight, scale, bias, StaticRange(0.25, 7), 8, 8)
    actual = multiplied(Rows(x), layer)
    assert np.abs(actual.numpy() - expected).max() <= FLOAT_TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(3, 5, 4, stride=4, bias=False),
        torch.nn.Conv2d(3, 5, 3, padding=1, bias=False),
        torch.nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
        torch.nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1, bias=False),
    ],
    ids=["patches", "same", "strided", "transposed"],
)
def test_geometry_turns_convolutions_into_products(layer: torch.nn.Module) -> None:
    assert isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))
    transposed = isinstance(layer, torch.nn.ConvTranspose2d)
    geometry = Geometry(layer.kernel_size[0], layer.stride[0], int(layer.padding[0]), transposed)
    q = torch.randint(0, 16, (2, 3, 8, 12), dtype=torch.uint8)
    zero_point = 5
    rows = geometry.gather(q, zero_point).float() - zero_point
    matrix = layer.weight.flatten(1).T if transposed else geometry.arrange(layer.weight.flatten(1))
    actual = geometry.scatter(rows @ matrix.T, 2, 8, 12)
    expected = layer(q.float() - zero_point)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, atol=1e-4)
