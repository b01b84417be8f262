"""Layers that make up for what was lost before them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monailabel_dfqsam.config import Policy, Recipe, silent
from monailabel_dfqsam.ops import QuantizedLayer, multiplied, plain
from monailabel_dfqsam.quantization.calibrate import calibrate, quantize_layer
from monailabel_dfqsam.quantization.compensate import Simulated, Wish, compensated
from monailabel_dfqsam.quantization.quantizer import Affine, RunTime, search_affine
from tests.models import seeded_sam


def _output(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """As engines multiply."""
    return multiplied(plain.quantize_input(x, layer), layer)


class Case:
    """A Linear, what it reads in full precision, what earlier layers made of it, and how it is quantized."""

    def __init__(self, kind: str) -> None:
        g = torch.Generator().manual_seed(0)
        linear = nn.Linear(48, 10)
        nn.init.normal_(linear.weight, generator=g)
        self.linear = linear.requires_grad_(False)
        self.exact = torch.randn(800, 48, generator=g) @ torch.randn(48, 48, generator=g) * 0.3
        self.actual = self.exact + 0.2 * torch.randn(800, 48, generator=g) + 0.1
        self.inputs: Affine | RunTime = search_affine(self.actual, 4, False)
        if kind != "static":
            self.inputs = RunTime(int(kind))
        self.wanted = self.linear(self.exact)

    def compensated(self) -> QuantizedLayer:
        wish = Wish(4, self.inputs)
        return compensated(self.linear, wish, self.wanted.clone(), self.inputs.fake(self.actual))

    def nearest(self) -> QuantizedLayer:
        return quantize_layer(self.linear, self.inputs, 4)


@pytest.fixture(scope="module", params=["static", "4", "8"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_no_output_is_off_on_average(case: Case) -> None:
    off, nearest = (
        _output(layer, case.actual) - case.wanted for layer in (case.compensated(), case.nearest())
    )
    assert float(off.mean(0).abs().max()) < 1e-4
    assert float(nearest.mean(0).abs().max()) > 0.1


def test_each_output_is_nearer_to_full_precision(case: Case) -> None:
    layers = (case.compensated(), case.nearest())
    ours, nearest = ((_output(layer, case.actual) - case.wanted).square().mean(0) for layer in layers)
    assert (ours < nearest).all()


def test_what_is_simulated_is_what_engines_multiply(case: Case) -> None:
    layer = case.compensated()
    exact, simulated = _output(layer, case.actual), Simulated(layer)(case.actual)
    assert float((simulated - exact).norm() / exact.norm()) < 1e-6


def test_a_block_s_linears_are_replaced_and_nothing_else() -> None:
    encoder = seeded_sam("tiny").image_encoder
    images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    simple, ours = (
        calibrate(encoder, images, 4, Policy.DEPLOY, Recipe(compensate=chosen), silent)
        for chosen in (False, True)
    )
    assert list(simple.layers) == list(ours.layers)
    for name, layer in ours.layers.items():
        other = simple.layers[name]
        assert layer.input_range == other.input_range
        assert (layer.weight_bits, layer.activation_bits) == (other.weight_bits, other.activation_bits)
        assert torch.equal(layer.weight, other.weight) != name.startswith("blocks."), name
    assert all(torch.equal(value, simple.float_tensors[name]) for name, value in ours.float_tensors.items())
