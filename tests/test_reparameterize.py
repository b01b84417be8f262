"""Reparameterization leaves the network as it was, and each known trap breaks it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from monailabel_dfqsam.config import silent
from monailabel_dfqsam.quantization.calibrate import observe
from monailabel_dfqsam.quantization.quantizer import MIN_CHANNEL_SCALE, Affine, search_affine
from monailabel_dfqsam.quantization.reparameterize import keep_padding, reparameterize
from monailabel_dfqsam.sam.vit import Block, ImageEncoderViT
from tests.models import relative_error, seeded_sam

TOLERANCE = 1e-5
# What a fallen trap costs at the least; the worst measured exceeds it by far.
BROKEN = 1e-3


def _ranges(encoder: ImageEncoderViT, images: Tensor) -> dict[str, Affine]:
    samples = _samples(encoder, images)
    names = [name for name in samples if name.endswith(("attn.qkv", "mlp.lin1"))]
    return {name: search_affine(samples[name], 4, per_channel=True) for name in names}


def _samples(encoder: ImageEncoderViT, images: Tensor) -> dict[str, Tensor]:
    """Rows [T, C] by layer name."""
    return {name: rows for part, _ in observe(encoder, images, False, silent) for name, rows in part.items()}


def _images(variant_size: int) -> Tensor:
    return torch.randn(1, 3, variant_size, variant_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["tiny", "sam_b_256", "sam_med2d_b"])
def pair(request: pytest.FixtureRequest) -> tuple[ImageEncoderViT, ImageEncoderViT, Tensor, Tensor]:
    """An encoder, its reparameterized copy, an image, and the original's output."""
    few = {} if request.param == "tiny" else {"depth": 3, "global_blocks": (2,)}
    original = seeded_sam(request.param, **few).image_encoder
    changed = copy.deepcopy(original)
    x = _images(256)
    keep_padding(changed)
    reparameterize(changed, _ranges(original, x))
    with torch.inference_mode():
        return original, changed, x, original(x)


def _error(encoder: ImageEncoderViT, x: Tensor, expected: Tensor) -> float:
    with torch.inference_mode():
        return relative_error(encoder(x), expected)


def test_network_is_unchanged_in_float32(
    pair: tuple[ImageEncoderViT, ImageEncoderViT, Tensor, Tensor],
) -> None:
    original, changed, x, expected = pair
    assert not torch.equal(original.blocks[0].norm1.weight, changed.blocks[0].norm1.weight)
    assert _error(changed, x, expected) < TOLERANCE


def test_channels_share_one_range_afterwards(
    pair: tuple[ImageEncoderViT, ImageEncoderViT, Tensor, Tensor],
) -> None:
    original, changed, x, _ = pair
    before, after = (_samples(e, x)["blocks.1.attn.qkv"] for e in (original, changed))

    def spread(rows: Tensor) -> float:
        width = rows.amax(0) - rows.amin(0)
        return float(width.std() / width.mean())

    assert spread(after) < spread(before)


def test_trap_window_padding(pair: tuple[ImageEncoderViT, ImageEncoderViT, Tensor, Tensor]) -> None:
    _, changed, x, expected = pair
    if not any(block.attn.window for block in changed.blocks):
        pytest.skip("this variant has no windows, so nothing is padded")
    broken = copy.deepcopy(changed)
    for block in broken.blocks:
        assert isinstance(block, Block)
        block.attn.pad_qkv = None  # padding then is the new qkv's bias, as zeros after norm1 would give
    assert _error(broken, x, expected) > BROKEN


def test_trap_norm2_has_two_readers(pair: tuple[ImageEncoderViT, ImageEncoderViT, Tensor, Tensor]) -> None:
    _, changed, x, expected = pair
    if changed.blocks[0].Adapter is None:
        pytest.skip("this variant has no adapter, so norm2 has one reader")
    broken = copy.deepcopy(changed)
    for block in broken.blocks:
        block.restore_scale = block.restore_shift = None
    assert _error(broken, x, expected) > BROKEN


def test_trap_constant_channel() -> None:
    original = seeded_sam("tiny").image_encoder
    with torch.no_grad():
        original.blocks[2].norm1.weight[5] = 0.0
    changed, x = copy.deepcopy(original), _images(256)
    ranges = _ranges(original, x)
    with torch.inference_mode():
        expected = original(x)
    reparameterize(changed, ranges)
    assert _error(changed, x, expected) < TOLERANCE
    # Without the floor the scale is 0 and the network is lost.
    found = ranges["blocks.2.attn.qkv"]
    assert float(found.scale[5]) >= MIN_CHANNEL_SCALE * float(found.scale.median()) * 0.99
    scale = found.scale.clone()
    scale[5] = 0.0
    broken = copy.deepcopy(original)
    reparameterize(broken, {**ranges, "blocks.2.attn.qkv": Affine(scale, found.zero_point, 4)})
    with torch.inference_mode():
        assert not torch.isfinite(broken(x)).all()


def test_common_zero_point_is_an_integer_within_the_levels() -> None:
    encoder = seeded_sam("tiny").image_encoder
    common = reparameterize(encoder, _ranges(encoder, _images(256)))
    assert len(common) == 2 * len(encoder.blocks)
    for found in common.values():
        assert 0 <= float(found.zero_point) <= 15
        assert float(found.zero_point) == int(found.zero_point)
