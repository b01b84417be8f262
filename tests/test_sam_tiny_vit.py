"""TinyViT against a second, slow implementation, and against timm's where it is installed."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from monailabel_dfqsam.sam import VARIANTS, Variant
from monailabel_dfqsam.sam.model import build_encoder
from monailabel_dfqsam.sam.tiny_vit import ImageEncoderTinyViT, distances
from tests.models import golden_tensor, relative_error
from tests.slow_tiny_vit import SlowTinyViT

TOLERANCE = 1e-5

# Sides of 64 and 32 tokens, and twice 16, as TinyViT's windows of 7 and 14 do not divide them.
SMALL = {"lite_medsam": 64, "mobile_sam": 256}


def small(family: str) -> Variant:
    return replace(VARIANTS[family], input_size=SMALL[family])


def seeded(variant: Variant) -> ImageEncoderTinyViT:
    encoder = build_encoder(variant)
    assert isinstance(encoder, ImageEncoderTinyViT)
    encoder.load_state_dict({k: golden_tensor(k, list(v.shape)) for k, v in encoder.state_dict().items()})
    with torch.no_grad():
        # Larger than by their names, so that a bias in a wrong place shows.
        for name, value in encoder.named_parameters():
            if name.endswith("attention_biases"):
                value.mul_(50)
    return encoder.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=list(SMALL))
def case(request: pytest.FixtureRequest) -> tuple[ImageEncoderTinyViT, Tensor, Tensor]:
    """An encoder, an image, and what the slow form makes of it."""
    variant = small(request.param)
    encoder = seeded(variant)
    size = variant.input_size
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return encoder, image, SlowTinyViT(variant, encoder.state_dict())(image)


def test_it_agrees_with_the_slow_form(case: tuple[ImageEncoderTinyViT, Tensor, Tensor]) -> None:
    encoder, image, expected = case
    with torch.inference_mode():
        found = encoder(image)
    assert found.shape == (1, 256, 16, 16)
    assert relative_error(found, expected) < TOLERANCE


def test_folded_batch_norms_change_nothing(case: tuple[ImageEncoderTinyViT, Tensor, Tensor]) -> None:
    encoder, image, expected = case
    folded = copy.deepcopy(encoder)
    folded.fold()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    folded.fold()
    with torch.inference_mode():
        assert relative_error(folded(image), expected) < TOLERANCE


def test_padding_s_q_k_and_v_are_a_constant(case: tuple[ImageEncoderTinyViT, Tensor, Tensor]) -> None:
    encoder, image, expected = case
    kept = copy.deepcopy(encoder)
    for block in kept.attention_blocks().values():
        block.attn.keep_padding()
    with torch.inference_mode():
        assert relative_error(kept(image), expected) < TOLERANCE
        for block in kept.attention_blocks().values():
            assert block.attn.pad_qkv is not None
            block.attn.pad_qkv.zero_()
        assert relative_error(kept(image), expected) > 100 * TOLERANCE


def test_it_can_be_trained_after_it_was_used(case: tuple[ImageEncoderTinyViT, Tensor, Tensor]) -> None:
    """What is remembered between calls must not come from inference mode."""
    encoder, image, _ = case
    distances.cache_clear()
    with torch.inference_mode():
        encoder(image)
    trained = copy.deepcopy(encoder).requires_grad_(True)
    trained(image).square().mean().backward()
    for name, value in trained.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name


def test_it_agrees_with_timm() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm to compare with it")
    encoder = seeded(replace(VARIANTS["mobile_sam"], input_size=128))
    other = timm.create_model("tiny_vit_5m_224", pretrained=False, num_classes=0).eval()
    # The one difference: in a SAM the last merging keeps the resolution.
    other.stages[3].downsample.conv2.conv.stride = (1, 1)
    missing, left = other.load_state_dict(
        {
            _timm_name(key): value
            for key, value in encoder.state_dict().items()
            if key.split(".")[0] != "neck"
        },
        strict=False,
    )
    assert not left
    assert all(key.startswith("head.") for key in missing)
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x = other.patch_embed(image)
        for stage in other.stages:
            x = stage(x)
        assert relative_error(encoder(image), encoder.neck(x.permute(0, 2, 3, 1))) < TOLERANCE


def _timm_name(key: str) -> str:
    key = re.sub(r"\.c\.", ".conv.", key)
    key = key.replace("patch_embed.seq.0", "patch_embed.conv1").replace(
        "patch_embed.seq.2", "patch_embed.conv2"
    )
    key = re.sub(r"^layers\.(\d)\.downsample", lambda found: f"stages.{int(found[1]) + 1}.downsample", key)
    return re.sub(r"^layers", "stages", key)
