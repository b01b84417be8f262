"""Calibration of what the embedded model lacks: adapters, windows cut off at the edge, relative positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from monailabel_dfqsam.config import QuantizationConfig, Recipe, silent
from monailabel_dfqsam.pipeline import gaussian_images, layer_errors, pack
from monailabel_dfqsam.quantization import calibrate as calibration
from monailabel_dfqsam.quantization.calibrate import calibrate, observe, quantizable
from monailabel_dfqsam.quantization.modules import shared_copy
from monailabel_dfqsam.sam import VARIANTS, Sam, build
from monailabel_dfqsam.sam.checkpoint import Checkpoint
from monailabel_dfqsam.sam.vit import Block
from tests.models import seeded_checkpoint

SMALL = replace(
    VARIANTS["sam_med2d_b"],
    name="small",
    input_size=96,
    embed_dim=48,
    depth=3,
    num_heads=3,
    global_blocks=(1,),
    window_size=4,
)
COMPENSATED = QuantizationConfig(recipe=Recipe(compensate=True))


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """Of a model of its own name, its blocks' matrices large enough for attention to choose."""
    monkeypatch.setitem(VARIANTS, "small", SMALL)
    made = seeded_checkpoint("small")
    for name, value in made.state_dict.items():
        if name.startswith("image_encoder.blocks") and value.ndim > 1:
            value.mul_(5)
    return made


@pytest.fixture
def sam(checkpoint: Checkpoint) -> Sam:
    return build(checkpoint)


def test_compensation_brings_every_kind_of_layer_nearer_on_images_not_seen(
    checkpoint: Checkpoint, sam: Sam
) -> None:
    images, unseen = gaussian_images(SMALL, 24, seed=0), gaussian_images(SMALL, 4, seed=99)
    plain = replace(COMPENSATED, recipe=Recipe())
    nearest, ours = (_errors(checkpoint, sam, config, images, unseen) for config in (plain, COMPENSATED))
    for part in Block.linears:
        means = [sum(e[f"blocks.{i}.{part}"] for i in range(3)) for e in (ours, nearest)]
        assert means[0] < means[1], part
    assert ours["neck.2"] < 0.95 * nearest["neck.2"]


def _errors(
    checkpoint: Checkpoint, sam: Sam, config: QuantizationConfig, images: Tensor, unseen: Tensor
) -> dict[str, float]:
    quantized = calibrate(sam.image_encoder, images, config.bits, config.policy, config.recipe, silent)
    return layer_errors(sam.image_encoder, pack(checkpoint, config, sam, quantized, images), unseen)


def test_the_encoder_stays_as_it_is(sam: Sam) -> None:
    before = {name: value.clone() for name, value in sam.image_encoder.state_dict().items()}
    places = {name: value.data_ptr() for name, value in sam.image_encoder.state_dict().items()}
    images = gaussian_images(SMALL, 2, seed=0)
    calibrate(sam.image_encoder, images, 4, COMPENSATED.policy, COMPENSATED.recipe, silent)
    after = sam.image_encoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert {name: value.data_ptr() for name, value in after.items()} == places
    assert not any(module._forward_hooks for module in sam.image_encoder.modules())


def test_a_shared_copy_has_the_same_tensors_until_it_is_given_others(sam: Sam) -> None:
    copied = shared_copy(sam.image_encoder)
    assert copied.blocks[0] is not sam.image_encoder.blocks[0]
    for name, value in sam.image_encoder.named_parameters():
        assert copied.get_parameter(name) is value
    old = copied.neck[0].weight
    copied.neck[0].weight = nn.Parameter(torch.zeros_like(old))
    assert sam.image_encoder.neck[0].weight is old


@pytest.mark.parametrize("samples", [500, 1 << 22])
def test_rows_are_evenly_spaced_ones_of_what_layers_read(
    sam: Sam, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MAX_SAMPLES", samples)
    monkeypatch.setattr(calibration, "MAX_ROWS", 20)
    images = gaussian_images(SMALL, 5, seed=0)
    found = {
        name: rows
        for part, _ in observe(sam.image_encoder, images, False, silent)
        for name, rows in part.items()
    }
    expected = _everything(sam.image_encoder, images, most=20)
    assert list(found) == list(expected)
    for name, rows in expected.items():
        assert torch.equal(found[name], rows[:: -(-rows.numel() // samples)]), name
        assert found[name].numel() <= samples + rows.shape[1]


def _everything(encoder: nn.Module, images: Tensor, most: int) -> dict[str, Tensor]:
    """Each image by itself through the whole encoder: every so manieth row, `most` of each image."""
    rows: dict[str, list[Tensor]] = {}
    for name, module in quantizable(encoder).items():

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0] if isinstance(module, nn.Linear) else inputs[0].movedim(1, -1)
            x = x.reshape(-1, x.shape[-1])
            rows.setdefault(name, []).append(x[:: -(-len(x) // most)])

        module.register_forward_pre_hook(keep)
    with torch.inference_mode():
        for image in images:
            encoder(image[None])
    return {name: torch.cat(rows[name]) for name in quantizable(encoder)}
