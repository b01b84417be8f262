"""Engines against each other and against plain arithmetic; artifacts made of seeded models and noise."""

from __future__ import annotations

import resource
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from monailabel_dfqsam.artifact import Artifact, ArtifactError, decode_layer, encode_layer, stored
from monailabel_dfqsam.config import EngineKind, Policy, QuantizationConfig, Recipe, silent
from monailabel_dfqsam.engines import encoder as encoder_module
from monailabel_dfqsam.engines import load_encoder, onednn, select, why_not
from monailabel_dfqsam.engines.encoder import IntegerLinear
from monailabel_dfqsam.ops import Rows, compiled
from monailabel_dfqsam.pipeline import gaussian_images
from monailabel_dfqsam.quantization.calibrate import calibrate
from monailabel_dfqsam.sam import VARIANTS
from monailabel_dfqsam.sam.preprocess import frame_of
from monailabel_dfqsam.segmentation.segmenter import Embedding, Prompts, full_precision_segmenter
from tests.models import header, relative_error, seeded_sam

LAYER_TOLERANCE = 1e-5
EMBEDDING_TOLERANCE = 1e-2
PLAIN_8_BIT_TOLERANCE = 0.05
MASK_AGREEMENT = 0.998

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN quantized linear")


def make_artifact(
    variant: str, bits: int = 4, policy: Policy = Policy.DEPLOY, recipe: Recipe | None = None
) -> Artifact:
    """An artifact of a seeded model calibrated on noise, header entries that engines read only."""
    sam = seeded_sam(variant)
    images = gaussian_images(sam.variant, 1, seed=3)
    quantized = calibrate(sam.image_encoder, images, bits, policy, recipe or Recipe(), silent)
    layers, tensors = {}, {}
    for name, layer in quantized.layers.items():
        layers[name], parts = encode_layer(name, layer)
        tensors.update(parts)
    tensors.update({f"image_encoder.{key}": stored(value) for key, value in quantized.float_tensors.items()})
    tensors.update({f"image_encoder.{key}.ranges": value for key, value in quantized.attention.items()})
    config, attention_bits = asdict(QuantizationConfig(bits=bits, policy=policy)), quantized.attention_bits
    return Artifact(
        header(variant=variant, layers=layers, attention_bits=attention_bits, config=config), tensors
    )


@pytest.fixture(scope="module", params=["tiny", "sam_b_256"])
def artifact(request: pytest.FixtureRequest) -> Artifact:
    return make_artifact(request.param)


@pytest.fixture(params=[EngineKind.NATIVE, EngineKind.ONEDNN])
def kind(request: pytest.FixtureRequest) -> EngineKind:
    """A fast engine of the CPU that works here."""
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param  # type: ignore[no-any-return]


def _image(artifact: Artifact, seed: int = 8) -> Tensor:
    return gaussian_images(VARIANTS[artifact.header["variant"]], 1, seed)


def test_same_integers_give_the_same_accumulators(kind: EngineKind, artifact: Artifact) -> None:
    reference = load_encoder(artifact, EngineKind.REFERENCE)
    fast = load_encoder(artifact, kind)
    for name, entry in artifact.header["layers"].items():
        integers = torch.randint(0, 2 ** entry["activation_bits"], (17, entry["shape"][1]), dtype=torch.uint8)
        rows = Rows(integers)
        expected = reference.encoder.get_submodule(name).kernel(rows)
        actual = fast.encoder.get_submodule(name).kernel(rows)
        assert relative_error(actual, expected) <= LAYER_TOLERANCE, name


def test_whole_encoder_and_its_masks_agree(kind: EngineKind, artifact: Artifact) -> None:
    reference = load_encoder(artifact, EngineKind.REFERENCE)
    fast = load_encoder(artifact, kind)
    image = _image(artifact)
    expected, actual = reference.embed(image), fast.embed(image)
    assert relative_error(actual, expected) <= EMBEDDING_TOLERANCE
    sam = seeded_sam(artifact.header["variant"])
    segmenter = full_precision_segmenter(sam)
    frame = frame_of(sam.variant, 256, 256)
    prompts = Prompts(box=torch.tensor([50.0, 76.0, 180.0, 205.0]).numpy())
    a, b = (segmenter.predict(Embedding(e, frame), prompts).mask for e in (expected, actual))
    union = (a | b).sum()
    assert union == 0 or (a & b).sum() / union >= MASK_AGREEMENT


def test_same_output_twice_and_in_a_batch(kind: EngineKind, artifact: Artifact) -> None:
    encoder = load_encoder(artifact, kind)
    images = torch.cat([_image(artifact, 8), _image(artifact, 9)])
    batch = encoder.embed(images)
    assert torch.equal(batch, encoder.embed(images))
    for row, image in zip(batch, images, strict=True):
        assert relative_error(encoder.embed(image[None])[0], row) <= EMBEDDING_TOLERANCE


@needs_onednn
def test_plain_torch_takes_the_place_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_artifact("tiny")
    expected = load_encoder(artifact, EngineKind.REFERENCE).embed(_image(artifact))
    monkeypatch.setattr(compiled, "library", lambda: None)
    actual = load_encoder(artifact, EngineKind.ONEDNN).embed(_image(artifact))
    assert torch.equal(actual, expected)


@pytest.mark.skipif(compiled.library() is None, reason="the CPU library was not built")
def test_steady_state_asks_the_system_for_no_memory(kind: EngineKind, artifact: Artifact) -> None:
    encoder, image = load_encoder(artifact, kind), _image(artifact)
    for _ in range(3):
        encoder.embed(image)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        encoder.embed(image)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    # One tensor of a ViT-B's hidden layer alone has 768 pages.
    assert faults / 5 < 100


def test_long_inputs_go_through_the_mlp_in_parts(kind: EngineKind, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_artifact("tiny")
    whole = load_encoder(artifact, kind).embed(_image(artifact))
    monkeypatch.setattr(encoder_module, "_MLP_ROWS", 100)
    assert torch.equal(load_encoder(artifact, kind).embed(_image(artifact)), whole)


def test_reference_layer_is_the_dequantized_product() -> None:
    artifact = make_artifact("tiny")
    layer = load_encoder(artifact, EngineKind.REFERENCE).encoder.get_submodule("blocks.0.attn.qkv")
    assert isinstance(layer, IntegerLinear)
    entry = artifact.header["layers"]["blocks.0.attn.qkv"]
    x = torch.randn(5, 144)
    q = (x.double() / entry["input_scale"]).round() + entry["input_zero_point"]
    dequantized = (q.clamp(0, 15) - entry["input_zero_point"]) * entry["input_scale"]
    stored_layer = decode_layer(artifact, "blocks.0.attn.qkv")
    weight = stored_layer.weight.double() * stored_layer.weight_scale.double()[:, None]
    expected = dequantized @ weight.T + stored_layer.bias.double()
    assert relative_error(layer(x), expected) <= LAYER_TOLERANCE


def test_eight_bits_are_closer_to_float_than_four() -> None:
    image = gaussian_images(VARIANTS["tiny"], 1, seed=8)
    expected = seeded_sam("tiny")(image)
    errors = {
        bits: relative_error(load_encoder(make_artifact("tiny", bits)).embed(image), expected)
        for bits in (4, 6, 8)
    }
    assert errors[8] < errors[6] < errors[4] < 0.5


def test_paper_policy_runs_on_the_reference_alone() -> None:
    artifact = make_artifact("tiny", policy=Policy.PAPER)
    assert select(artifact) is EngineKind.REFERENCE
    image = gaussian_images(VARIANTS["tiny"], 1, seed=8)
    error = relative_error(load_encoder(artifact).embed(image), seeded_sam("tiny")(image))
    assert 0 < error < 1
    with pytest.raises(ArtifactError, match="only the reference engine"):
        load_encoder(artifact, EngineKind.ONEDNN)


def test_windows_and_adapters_are_quantized_too(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(
        VARIANTS["tiny"], name="small", adapters=True, window_size=14, global_blocks=(2,), depth=3
    )
    monkeypatch.setitem(VARIANTS, "small", small)
    artifact = make_artifact("small")
    image = gaussian_images(small, 1, seed=8)
    actual = load_encoder(artifact).embed(image)
    assert relative_error(actual, seeded_sam("small")(image)) < 0.5
    expected = load_encoder(artifact, EngineKind.REFERENCE).embed(image)
    assert relative_error(actual, expected) <= EMBEDDING_TOLERANCE
    assert artifact.header["layers"]["blocks.0.Adapter.channel.0"]["weight_bits"] == 4
    assert artifact.header["layers"]["blocks.0.Adapter.spatial.2"]["weight_bits"] == 8


def test_missing_tensor_and_unknown_model_are_named() -> None:
    artifact = make_artifact("tiny")
    tensors = {k: v for k, v in artifact.tensors.items() if k != "image_encoder.neck.1.weight"}
    with pytest.raises(ArtifactError, match=r"neck\.1\.weight"):
        load_encoder(replace(artifact, tensors=tensors))
    with pytest.raises(ArtifactError, match="unknown here: 'huge'"):
        load_encoder(replace(artifact, header={**artifact.header, "variant": "huge"}))


def test_without_reparameterization_norms_stay_and_padding_is_kept() -> None:
    sam = seeded_sam("sam_b_256")
    image = gaussian_images(sam.variant, 1, seed=3)
    plain = Recipe(reparameterize=False)
    artifact = make_artifact("sam_b_256", bits=8, recipe=plain)
    norm = "image_encoder.blocks.0.norm1.weight"
    assert torch.equal(artifact.tensors[norm], sam.state_dict()[norm])
    with torch.inference_mode():
        expected = sam.image_encoder(image)
    assert relative_error(load_encoder(artifact).embed(image), expected) < PLAIN_8_BIT_TOLERANCE
