"""Layers that make up for what was lost before them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monailabel_dfqsam.config import Policy, Recipe, silent
from monailabel_dfqsam.ops import QuantizedLayer
from monailabel_dfqsam.quantization.calibrate import calibrate, quantize_layer
from monailabel_dfqsam.quantization.compensate import compensated
from monailabel_dfqsam.quantization.quantizer import Affine, search_affine
from tests.models import seeded_sam


def _output(layer: QuantizedLayer, x: Tensor) -> Tensor:
    inputs = Affine(*(torch.tensor([part]) for part in layer.input_range), 4)
    return inputs.fake(x) @ (layer.weight * layer.weight_scale[:, None]).T + layer.bias


@pytest.fixture(scope="module")
def case() -> tuple[nn.Linear, Affine, Tensor, Tensor]:
    """A Linear, its input's range, its input in full precision, and what earlier layers made of it."""
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 10)
    nn.init.normal_(linear.weight, generator=g)
    exact = torch.randn(800, 24, generator=g) @ torch.randn(24, 24, generator=g) * 0.3
    actual = exact + 0.2 * torch.randn(800, 24, generator=g) + 0.1
    return linear.requires_grad_(False), search_affine(actual, 4, False), exact, actual


def test_no_output_is_off_on_average(case: tuple[nn.Linear, Affine, Tensor, Tensor]) -> None:
    linear, inputs, exact, actual = case
    off = _output(compensated(linear.weight, inputs, linear(exact), inputs.fake(actual), 4), actual) - linear(
        exact
    )
    nearest = _output(quantize_layer(linear, inputs, 4), actual) - linear(exact)
    assert float(off.mean(0).abs().max()) < 1e-4
    assert float(nearest.mean(0).abs().max()) > 0.1


def test_each_output_is_nearer_to_full_precision(case: tuple[nn.Linear, Affine, Tensor, Tensor]) -> None:
    linear, inputs, exact, actual = case
    layers = (
        compensated(linear.weight, inputs, linear(exact), inputs.fake(actual), 4),
        quantize_layer(linear, inputs, 4),
    )
    ours, nearest = ((_output(layer, actual) - linear(exact)).square().mean(0) for layer in layers)
    assert (ours < nearest).all()


def test_a_block_s_linears_are_replaced_and_nothing_else() -> None:
    encoder = seeded_sam("tiny").image_encoder
    images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    plain, ours = (
        calibrate(encoder, images, 4, Policy.DEPLOY, Recipe(compensate=chosen), silent)
        for chosen in (False, True)
    )
    assert list(plain.layers) == list(ours.layers)
    for name, layer in ours.layers.items():
        other = plain.layers[name]
        assert layer.input_range == other.input_range
        assert (layer.weight_bits, layer.activation_bits) == (other.weight_bits, other.activation_bits)
        assert torch.equal(layer.weight, other.weight) != name.startswith("blocks."), name
    assert all(torch.equal(value, plain.float_tensors[name]) for name, value in ours.float_tensors.items())
