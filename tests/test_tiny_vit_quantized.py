"""TinyViT from the norms' reparameterization to an artifact on both engines, on small forms of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monailabel_dfqsam.artifact import Artifact, ArtifactError, layer_forms, read_artifact, write_artifact
from monailabel_dfqsam.config import EngineKind, Policy, QuantizationConfig, Recipe, SynthesisConfig, silent
from monailabel_dfqsam.engines import (
    candidates,
    cutlass,
    load_encoder,
    onednn,
    why_not,
)
from monailabel_dfqsam.engines.cutlass import GraphlessForward
from monailabel_dfqsam.engines.encoder import IntegerBlock
from monailabel_dfqsam.ops import compiled
from monailabel_dfqsam.pipeline import QuantizationResult, gaussian_images, quantize
from monailabel_dfqsam.quantization.calibrate import observe
from monailabel_dfqsam.quantization.cost import encoder_cost, layer_costs
from monailabel_dfqsam.quantization.quantizer import Affine, search_affine
from monailabel_dfqsam.quantization.reparameterize import after_norms, keep_padding, reparameterize
from monailabel_dfqsam.sam import VARIANTS, Sam
from monailabel_dfqsam.sam.encoder import ImageEncoder
from monailabel_dfqsam.sam.tiny_vit import Block
from monailabel_dfqsam.segmentation.segmenter import load_segmenter
from monailabel_dfqsam.synthesis.patch_similarity import attention_outputs
from tests.models import relative_error, seeded_checkpoint, seeded_sam
from tests.test_engines import make_artifact

FAMILIES = ("small_lite_medsam", "small_mobile_sam")
UNCHANGED = 1e-5
BROKEN = 1e-3
ROUNDINGS = 0.05  # that fall the other way are passed on from layer to layer

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN quantized linear")


@pytest.fixture(scope="module", autouse=True)
def _variants() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(FAMILIES, (64, 256), strict=True):
            published = VARIANTS[name.removeprefix("small_")]
            patch.setitem(VARIANTS, name, replace(published, name=name, input_size=size))
        yield


@functools.cache
def made(name: str) -> Artifact:
    """W4A4 of a seeded model, calibrated on noise."""
    return make_artifact(name)


def _image(name: str, seed: int) -> Tensor:
    return gaussian_images(VARIANTS[name], 1, seed)


@pytest.fixture(scope="module")
def pair() -> tuple[ImageEncoder, ImageEncoder, Tensor, Tensor]:
    """An encoder, its reparameterized copy, an image, and the original's output."""
    original, x = seeded_sam(FAMILIES[0]).image_encoder, _image(FAMILIES[0], 1)
    samples = {name: rows for part, _ in observe(original, x, False, silent) for name, rows in part.items()}
    ranges = {name: search_affine(samples[name], 4, per_channel=True) for name in after_norms(original)}
    assert len(ranges) == 20
    changed = copy.deepcopy(original)
    keep_padding(changed)
    common = reparameterize(changed, ranges)
    assert common.keys() == ranges.keys()
    assert all(isinstance(found, Affine) and found.scale.numel() == 1 for found in common.values())
    with torch.inference_mode():
        return original, changed, x, original(x)


def test_reparameterized_equals_original(pair: tuple[ImageEncoder, ImageEncoder, Tensor, Tensor]) -> None:
    original, changed, x, expected = pair
    for name in ("attn.norm", "mlp.norm"):
        norms = [e.get_submodule(f"layers.1.blocks.0.{name}").weight for e in (original, changed)]
        assert not torch.allclose(*norms)
    with torch.inference_mode():
        assert relative_error(changed(x), expected) < UNCHANGED


def test_padding_follows_the_norm_into_reparameterization(
    pair: tuple[ImageEncoder, ImageEncoder, Tensor, Tensor],
) -> None:
    """The norm lies behind the padding: computing it anew gives the same, as long as nothing is rounded."""
    _, changed, x, expected = pair
    anew, broken = copy.deepcopy(changed), copy.deepcopy(changed)
    for block in anew.attention_blocks().values():
        block.attn.pad_qkv = None
    for block in broken.attention_blocks().values():
        block.attn.pad_qkv = block.attn.qkv.bias
    with torch.inference_mode():
        assert relative_error(anew(x), expected) < UNCHANGED
        assert relative_error(broken(x), expected) > BROKEN


@needs_onednn
@pytest.mark.parametrize("name", FAMILIES)
def test_engines_agree_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what the library computes in floats, which may round an integer the other way."""
    artifact = made(name)
    with_library = load_encoder(artifact, EngineKind.ONEDNN).embed(_image(name, 8))
    monkeypatch.setattr(compiled, "library", lambda: None)
    image = _image(name, 8)
    slow, fast = (load_encoder(artifact, kind) for kind in (EngineKind.REFERENCE, EngineKind.ONEDNN))
    blocks = [m for m in fast.encoder.modules() if isinstance(m, IntegerBlock)]  # type: ignore[attr-defined]
    assert len(blocks) == 10
    expected = slow.embed(image)
    assert torch.equal(fast.embed(image), expected)
    assert relative_error(with_library, expected) < ROUNDINGS
    assert relative_error(expected, seeded_sam(name)(image)) < 0.5
    both = torch.cat([image, _image(name, 9)])
    assert relative_error(fast.embed(both)[:1], expected) < 0.01


def test_eight_bits_are_closer_to_float_than_four() -> None:
    name = FAMILIES[0]
    image = _image(name, 8)
    expected = seeded_sam(name)(image)
    artifacts = {4: made(name), 8: make_artifact(name, 8)}
    errors = {bits: relative_error(load_encoder(a).embed(image), expected) for bits, a in artifacts.items()}
    assert errors[8] < errors[4]
    assert errors[8] < 0.05


def test_what_is_quantized_and_what_is_not() -> None:
    layers = made(FAMILIES[0]).header["layers"]
    bits = {name: entry["weight_bits"] for name, entry in layers.items()}
    assert {bits[f"layers.2.blocks.5.{part}"] for part in Block.linears} == {4}
    pointwise = ("patch_embed.seq.0.c", "layers.0.blocks.1.conv3.c", "layers.1.downsample.conv1.c", "neck.2")
    assert {bits[name] for name in pointwise} == {8}
    assert not any(name.endswith(("conv2.c", "local_conv.c")) for name in bits)
    variant = VARIANTS[FAMILIES[0]]
    forms = layer_forms(made(FAMILIES[0]).header)
    cost, counted = encoder_cost(variant, forms, 0), layer_costs(variant, forms).values()
    depthwise = 2 * 256 * 64**2 + 128 * 32**2 + 160 * 16**2 + 320 * 16**2  # in bottlenecks and mergings
    depthwise += 2 * 128 * 32**2 + 6 * 160 * 16**2 + 2 * 320 * 16**2  # in blocks
    attention = (cost.bops - encoder_cost(variant, forms, 8).bops) // (32**2 - 8**2)
    floats = 9 * depthwise + attention
    assert cost.macs == sum(layer.macs for layer in counted) + floats
    assert cost.bops == sum(layer.macs * layer.form.weight_bits**2 for layer in counted) + floats * 32**2


def test_paper_policy_runs_on_the_reference_alone() -> None:
    artifact = make_artifact(FAMILIES[0], policy=Policy.PAPER)
    assert candidates(artifact) == [EngineKind.REFERENCE]
    image = _image(FAMILIES[0], 8)
    error = relative_error(load_encoder(artifact).embed(image), seeded_sam(FAMILIES[0])(image))
    assert 0 < error < 1


def test_the_gpu_engine_says_that_it_has_no_tiny_vit() -> None:
    artifact = made(FAMILIES[0])
    assert why_not(EngineKind.CUTLASS, artifact) == cutlass.NO_TINY_VIT
    with pytest.raises(ArtifactError, match="TinyViT"):
        GraphlessForward(artifact, torch.device("cpu"), torch.float32, False)


@pytest.fixture(scope="module")
def result() -> QuantizationResult:
    """W4A4 without data, as the presets do it but for the number of iterations and views."""
    config = QuantizationConfig(
        recipe=Recipe(views=2, compensate=True), synthesis=SynthesisConfig(iterations=2)
    )
    return quantize(seeded_checkpoint(FAMILIES[0]), config)


def test_quantizes_without_data_to_one_file(
    result: QuantizationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = result.artifact.header
    assert header["variant"] == FAMILIES[0]
    assert len(header["images_sha256"]) == 1
    assert set(result.layer_errors) == set(header["layers"])
    assert all(0 < error < 1 for error in result.layer_errors.values())
    assert result.calibration_images.min() >= 0
    assert result.calibration_images.max() <= 1
    path = tmp_path / "a.safetensors"
    write_artifact(result.artifact, path)
    read: Artifact = read_artifact(path)
    monkeypatch.setattr(compiled, "library", lambda: None)  # whose floats round otherwise than torch's
    exact = [kind for kind in candidates(read) if kind is not EngineKind.OPENVINO]
    embeddings = [load_encoder(read, kind).embed(_image(FAMILIES[0], 8)) for kind in exact]
    assert all(torch.equal(embedding, embeddings[0]) for embedding in embeddings)
    assert load_segmenter(read).variant.one_mask


def test_synthesis_sees_every_transformer_block_over_the_whole_image(result: QuantizationResult) -> None:
    assert result.synthesis is not None
    assert result.synthesis.evolution[0][0].labels.shape == (64, 64)  # a mask pixel is an input pixel
    sam = Sam(VARIANTS[FAMILIES[0]])
    with torch.no_grad(), attention_outputs(sam.image_encoder.eval()) as outputs:
        sam.image_encoder(_image(FAMILIES[0], 8))
    shapes = [tuple(tokens.shape) for tokens in outputs]
    assert shapes == [(1, 1024, 32)] * 2 + [(1, 256, 32)] * 8
    assert len(result.measures["synthetic"].entropies) == 10
