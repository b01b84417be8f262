"""Range search and quantizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monailabel_dfqsam.quantization.quantizer import (
    Affine,
    channel_affine,
    fake_log_sqrt2,
    quantize_weight,
    search_affine,
    tensor_affine,
)

# The search tries eleven scales, the test a hundred.
SEARCH_SLACK = 1.1


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_range_ends_are_kept_within_half_a_step(bits: int) -> None:
    x = torch.linspace(-1.3, 2.9, 1001)[:, None]
    found = tensor_affine(x.min()[None], x.max()[None], bits)
    assert float((found.fake(x) - x).abs().max()) <= float(found.scale) * 0.5 + 1e-5
    assert found.fake(torch.zeros(1, 1)).item() == 0


def test_search_prefers_clipping_one_far_outlier() -> None:
    x = torch.cat([torch.rand(200_000) * 2 - 1, torch.tensor([40.0])])[:, None]
    assert float(search_affine(x, 4, per_channel=False).scale) < 0.2


def test_search_is_never_worse_than_the_plain_range() -> None:
    x = torch.randn(5000, 6) * torch.tensor([0.1, 1, 2, 5, 10, 100])
    found = search_affine(x, 4, per_channel=True)
    plain = channel_affine(x.amin(0), x.amax(0), 4)
    assert ((found.fake(x) - x).square().mean(0) <= (plain.fake(x) - x).square().mean(0) * (1 + 1e-6)).all()


def test_constant_channel_gives_numbers() -> None:
    x = torch.randn(100, 4)
    x[:, 2] = 3.25
    found = search_affine(x, 4, per_channel=True)
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    assert torch.isfinite(found.fake(x)).all()
    assert float((found.fake(x)[:, 2] - 3.25).abs().max()) <= float(found.scale[2])
    constant = search_affine(torch.zeros(10, 1), 4, per_channel=False)
    assert constant.fake(torch.zeros(3, 1)).tolist() == [[0.0]] * 3


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_weight_scale_is_near_the_best_of_a_fine_grid(bits: int) -> None:
    weight = torch.randn(16, 768, generator=torch.Generator().manual_seed(bits))
    q, scale = quantize_weight(weight, bits)
    top = 2 ** (bits - 1) - 1
    assert q.min() >= -top - 1
    assert q.max() <= top
    error = (q * scale[:, None] - weight).square().sum(1).numpy()
    for row, row_error in zip(weight.double().numpy(), error, strict=True):
        full = np.abs(row).max() / top
        errors = [_squared_error(row, full * shrink, top) for shrink in np.linspace(0.5, 1, 100)]
        assert row_error <= errors[-1] * (1 + 1e-5)
        assert row_error <= SEARCH_SLACK * min(errors)


def _squared_error(row: np.ndarray, scale: float, top: int) -> float:
    return float(((np.clip(np.round(row / scale), -top - 1, top) * scale - row) ** 2).sum())


def test_zero_weights_stay_zero() -> None:
    q, scale = quantize_weight(torch.zeros(3, 8), 4)
    assert not q.any()
    assert (scale > 0).all()


def test_log_sqrt2_levels() -> None:
    delta, bits = 0.9, 4
    levels = torch.tensor([delta * 2 ** (-q / 2) for q in range(16)])
    assert torch.allclose(fake_log_sqrt2(levels, delta, bits), levels, rtol=1e-5)
    assert fake_log_sqrt2(torch.tensor([0.0, delta * 2**-9.0]), delta, bits).tolist() == [0.0, 0.0]


def test_affine_clips() -> None:
    grid = Affine(torch.tensor([0.5]), torch.tensor([2.0]), 4)
    assert grid.fake(torch.tensor([[-9.0], [0.0], [99.0]])).flatten().tolist() == [-1.0, 0.0, 6.5]
