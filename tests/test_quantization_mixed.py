"""Layers in forms of their own, of every family, and the harm that each does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monailabel_dfqsam.config import silent
from monailabel_dfqsam.quantization.compensate import Simulated
from monailabel_dfqsam.quantization.cost import KEPT
from monailabel_dfqsam.quantization.mixed import (
    W4A4,
    W4A8,
    W8A8,
    harm,
    possible_forms,
    quantize_mixed,
    uniform_forms,
)
from monailabel_dfqsam.quantization.modules import put_module, shared_copy
from monailabel_dfqsam.sam.encoder import ImageEncoder
from tests.models import seeded_sam


def _images(encoder: ImageEncoder, count: int) -> Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, encoder.img_size, encoder.img_size, generator=g)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return seeded_sam("tiny").image_encoder


def test_each_layer_has_the_form_asked_for(encoder: ImageEncoder) -> None:
    forms = dict(zip(possible_forms(encoder), (KEPT, W8A8, W4A8, W4A4) * 100, strict=False))
    possible = possible_forms(encoder)
    forms = {name: form if form in possible[name] else W8A8 for name, form in forms.items()}
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    quantized = quantize_mixed(encoder, _images(encoder, 2), forms, silent)
    assert {name: layer.form for name, layer in quantized.layers.items()} == {
        name: form for name, form in forms.items() if form != KEPT
    }
    assert all(layer.input_range is None for layer in quantized.layers.values())
    kept = next(name for name, form in forms.items() if form == KEPT)
    assert torch.equal(quantized.float_tensors[f"{kept}.weight"], encoder.state_dict()[f"{kept}.weight"])
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_without_images_weights_are_rounded_to_the_nearest(encoder: ImageEncoder) -> None:
    forms = uniform_forms(encoder, W4A8)
    quantized = quantize_mixed(encoder, _images(encoder, 0), forms, silent)
    modules = dict(encoder.named_modules())
    for name, layer in quantized.layers.items():
        module = modules[name]
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        assert layer.form == (W4A8 if isinstance(module, nn.Linear) else W8A8)
        weight = module.weight.flatten(1)
        error = (layer.weight * layer.weight_scale[:, None] - weight).norm() / weight.norm()
        assert float(error) < (0.12 if layer.weight_bits == 4 else 0.01), name


def test_harm_is_that_of_one_layer_alone(encoder: ImageEncoder) -> None:
    images = _images(encoder, 2)
    names = ("blocks.1.mlp.lin2", "neck.0")
    found = harm(encoder, images, dict.fromkeys(names, (KEPT, W8A8, W4A8)), silent)
    for name in names:
        assert found[name][KEPT] == 0
        assert 0 < found[name][W8A8] < found[name][W4A8]
        alone = shared_copy(encoder)
        alone.fold()
        layer = quantize_mixed(encoder, images, {name: W4A8}, silent).layers[name]
        put_module(alone, name, Simulated(layer))
        with torch.inference_mode():
            exact = [encoder(image) for image in images.split(1)]
            moved = [alone(image) for image in images.split(1)]
        errors = [float((a - b).square().sum() / b.square().sum()) for a, b in zip(moved, exact, strict=True)]
        assert found[name][W4A8] == pytest.approx(sum(errors) / len(errors), rel=1e-3)
