"""TinyViT's convolutions on integers, by rows of the image against the whole image at once."""

from __future__ import annotations

import pytest
import torch

from monailabel_dfqsam.engines import tiny_vit
from monailabel_dfqsam.engines.encoder import IntegerLinear
from monailabel_dfqsam.engines.reference import _KERNELS
from monailabel_dfqsam.engines.tiny_vit import IntegerConvolutions
from monailabel_dfqsam.quantization.calibrate import quantize_layer
from monailabel_dfqsam.quantization.quantizer import tensor_affine
from monailabel_dfqsam.sam.tiny_vit import Bottleneck, ConvNorm, Merging
from tests.models import golden_tensor, relative_error

HEIGHT, WIDTH = 13, 10
STEPS = {
    "bottleneck": lambda: Bottleneck(16),
    "merging": lambda: Merging(16, 24, 2),
    "merging that keeps the resolution": lambda: Merging(16, 24, 1),
}


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("name", list(STEPS))
def test_convolutions_by_rows_are_those_of_the_whole(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = STEPS[name]()
    step.load_state_dict({k: 5 * golden_tensor(k, list(v.shape)) for k, v in step.state_dict().items()})
    step.eval().requires_grad_(False)
    inputs = tensor_affine(torch.tensor([-3.0]), torch.tensor([3.0]), 8)
    for part in (step.conv1, step.conv2, step.conv3):
        assert isinstance(part, ConvNorm)
        part.fold()
        if part is not step.conv2:
            part.c = IntegerLinear(quantize_layer(part.c, inputs, 8), _KERNELS)  # type: ignore[assignment]
    middle = step.conv2.c
    monkeypatch.setattr(tiny_vit, "_HIDDEN", rows * WIDTH * middle.in_channels * middle.stride[0])
    x = torch.randn(2, HEIGHT, WIDTH, 16, generator=torch.Generator().manual_seed(2))
    expected, given = step(x), x.clone()
    found = IntegerConvolutions(step, _KERNELS)(x)
    assert found.shape == expected.shape
    assert torch.equal(x, given)
    # But for the rounding of float32, and another choice where a value lies halfway between two integers.
    assert relative_error(found, expected) < 1e-3
