"""The `cutlass` engine: its arithmetic on the CPU through the ops' references, and itself where a GPU is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monailabel_dfqsam.artifact import Artifact, ArtifactError, decode_layer
from monailabel_dfqsam.config import (
    Calibration,
    EngineKind,
    Policy,
    QuantizationConfig,
    SynthesisConfig,
)
from monailabel_dfqsam.engines import cutlass, load_encoder
from monailabel_dfqsam.engines.cutlass import CutlassEncoder, GraphlessForward
from monailabel_dfqsam.engines.cutlass_layers import Layer, window_tables
from monailabel_dfqsam.ops import cuda_library, int_linear
from monailabel_dfqsam.pipeline import gaussian_images, quantize
from monailabel_dfqsam.sam import VARIANTS, Sam, build, read_checkpoint
from monailabel_dfqsam.sam.preprocess import frame_of
from monailabel_dfqsam.sam.vit import window_partition
from monailabel_dfqsam.segmentation.segmenter import Embedding, Prompts, full_precision_segmenter
from tests.models import relative_error, seeded_sam
from tests.test_engines import make_artifact

LAYER_TOLERANCE = 1e-5
# A whole block in float32; a value on the edge between two levels may fall to the other side, and one of 16
# levels of one activation of lin2 or proj moves a block's output by about 1e-4.
BLOCK_TOLERANCE = 1e-3
EMBEDDING_TOLERANCE = 1e-2
# Weights by seed amplify a flipped level from block to block.
SEEDED_EMBEDDING_TOLERANCE = 5e-2
# A block of fp16 between products of 4-bit integers: one flipped level is some 1e-3 of its output.
HALF_EMBEDDING_TOLERANCE = 0.25
MASK_AGREEMENT = 0.998

CPU = torch.device("cpu")
reason = cuda_library.why_unavailable()
needs_gpu = pytest.mark.skipif(reason is not None, reason=f"the engine cannot run here: {reason}")


def on_cpu(artifact: Artifact, native: bool = True) -> GraphlessForward:
    return GraphlessForward(artifact, CPU, torch.float32, native)


def reference(artifact: Artifact, images: Tensor) -> Tensor:
    return load_encoder(artifact, EngineKind.REFERENCE).embed(images)


def images_for(artifact: Artifact, count: int = 1) -> Tensor:
    return gaussian_images(VARIANTS[artifact.header["variant"]], count, seed=8)


def mask_agreement(sam: Sam, a: Tensor, b: Tensor) -> float:
    """IoU of the masks that two embeddings give for a box."""
    segmenter = full_precision_segmenter(sam)
    frame = frame_of(sam.variant, 256, 256)
    prompts = Prompts(box=torch.tensor([50.0, 76.0, 180.0, 205.0]).numpy())
    first, second = (segmenter.predict(Embedding(e, frame), prompts).mask for e in (a, b))
    union = (first | second).sum()
    return 1.0 if union == 0 else float((first & second).sum() / union)


@pytest.fixture(scope="module")
def tiny() -> Artifact:
    return make_artifact("tiny")


@pytest.fixture(scope="module")
def base() -> Artifact:
    return make_artifact("sam_b_256")


@pytest.fixture(scope="module")
def real() -> tuple[Sam, Artifact]:
    """The embedded model, trained, calibrated on noise."""
    checkpoint = read_checkpoint()
    config = QuantizationConfig(calibration=Calibration.GAUSSIAN, synthesis=SynthesisConfig(iterations=1))
    return build(checkpoint), quantize(checkpoint, config).artifact


@pytest.mark.parametrize("native", [True, False], ids=["packed", "bytes"])
def test_every_layer_is_the_references(tiny: Artifact, base: Artifact, native: bool) -> None:
    for artifact in (tiny, base):
        # The first two blocks hold every kind of layer, and what stands outside blocks is all there.
        for name in (n for n in artifact.header["layers"] if not re.match(r"blocks\.([2-9]|1\d)", n)):
            stored = decode_layer(artifact, name)
            layer = Layer(stored, CPU, native)
            n, k = stored.weight.shape
            integers = torch.randint(0, 2**stored.activation_bits, (5, k), dtype=torch.uint8)
            scaled = (integers.float() - stored.input_zero_point) * stored.input_scale
            rows = layer.quantize(scaled)
            expected = int_linear(
                integers, stored.weight, stored.input_scale, stored.input_zero_point, stored.weight_scale,
                stored.bias,
            )  # fmt: skip
            actual = layer.product(rows, torch.float32)
            assert actual.shape == (5, n)
            assert relative_error(actual, expected) <= LAYER_TOLERANCE, name


def test_blocks_are_the_references(base: Artifact) -> None:
    """Each block is given what the reference's has been given, so that flips do not add up."""
    encoder = load_encoder(base, EngineKind.REFERENCE).encoder
    forward = on_cpu(base)
    with torch.inference_mode():
        x = encoder.patch_embed(images_for(base)) + encoder.pos_embed
        assert relative_error(forward._patches(images_for(base)).view_as(x), x) <= BLOCK_TOLERANCE
        for index, block in enumerate(encoder.blocks[:3]):  # two with windows, one without
            expected = block(x)
            actual = forward._block(x.flatten(0, 2).contiguous(), index, 1)
            assert relative_error(actual.view_as(expected), expected) <= BLOCK_TOLERANCE, index
            x = expected


@pytest.mark.parametrize("native", [True, False], ids=["packed", "bytes"])
def test_whole_encoder_of_the_embedded_model(real: tuple[Sam, Artifact], native: bool) -> None:
    sam, artifact = real
    images = images_for(artifact)
    expected, actual = reference(artifact, images), on_cpu(artifact, native)(images)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= EMBEDDING_TOLERANCE
    assert mask_agreement(sam, actual, expected) >= MASK_AGREEMENT


def test_masks_of_a_windowed_encoder_agree(base: Artifact) -> None:
    images = images_for(base)
    agreement = mask_agreement(seeded_sam("sam_b_256"), on_cpu(base)(images), reference(base, images))
    assert agreement >= MASK_AGREEMENT


def test_images_of_a_batch_do_not_mix(tiny: Artifact) -> None:
    forward, images = on_cpu(tiny), images_for(tiny, 3)
    batch = forward(images)
    for row, image in zip(batch, images, strict=True):
        assert relative_error(forward(image[None])[0], row) <= SEEDED_EMBEDDING_TOLERANCE


@pytest.mark.parametrize("bits", [6, 8])
def test_more_bits_go_through_8_bit_products(bits: int) -> None:
    artifact = make_artifact("tiny", bits)
    images = images_for(artifact)
    error = relative_error(on_cpu(artifact)(images), reference(artifact, images))
    assert error <= SEEDED_EMBEDDING_TOLERANCE


def test_windows_and_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows without relative position, a global block among them, and adapters of an awkward width."""
    small = replace(
        VARIANTS["tiny"], name="small", adapters=True, window_size=14, global_blocks=(2,), depth=3
    )
    monkeypatch.setitem(VARIANTS, "small", small)
    artifact = make_artifact("small")
    images = images_for(artifact, 2)
    error = relative_error(on_cpu(artifact)(images), reference(artifact, images))
    assert error <= SEEDED_EMBEDDING_TOLERANCE


@pytest.mark.parametrize(("grid", "side"), [(16, 14), (64, 14), (28, 14), (16, 16), (4, 5)])
def test_windows_are_those_of_the_published_padding(grid: int, side: int) -> None:
    tokens = torch.arange(grid * grid).view(1, grid, grid, 1)
    expected = window_partition(tokens, side, torch.tensor([-1])).flatten(1)
    windows = window_tables(grid, side, CPU)
    keys = torch.cat([group.key for group in windows.groups])
    assert sorted(keys.tolist()) == sorted(expected.tolist())
    queries = torch.cat([group.query.flatten() for group in windows.groups])
    assert torch.equal(queries[windows.slot.long()], torch.arange(grid * grid, dtype=torch.int32))
    for group in windows.groups:
        real = group.query >= 0
        assert torch.equal(group.key.gather(1, group.place.long())[real], group.query[real])
        assert real.any(0).all(), "a slot that no window uses"


def test_paper_policy_and_foreign_artifacts_are_refused(tiny: Artifact) -> None:
    with pytest.raises(ArtifactError, match="only the reference engine"):
        on_cpu(make_artifact("tiny", policy=Policy.PAPER))
    with pytest.raises(ArtifactError, match="unknown here: 'huge'"):
        on_cpu(replace(tiny, header={**tiny.header, "variant": "huge"}))
    tensors = {k: v for k, v in tiny.tensors.items() if k != "image_encoder.neck.1.weight"}
    with pytest.raises(ArtifactError, match=r"neck\.1\.weight"):
        on_cpu(replace(tiny, tensors=tensors))


def test_an_absent_library_is_a_reason_and_a_broken_one_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Artifact
) -> None:
    library = tmp_path / "libdfqsam_cuda.so"
    monkeypatch.setattr(cuda_library, "LIBRARY", library)
    cuda_library.library.cache_clear()
    assert cuda_library.why_unavailable() == "libdfqsam_cuda.so is not built"
    assert not cutlass.available()
    with pytest.raises(ArtifactError, match="not built"):
        CutlassEncoder(tiny)
    library.write_bytes(b"no library")
    with pytest.raises(RuntimeError, match="there, but broken"):
        cuda_library.why_unavailable()
    cuda_library.library.cache_clear()


@needs_gpu
@pytest.mark.parametrize("variant", ["tiny", "sam_b_256", "sam_med2d_b"])
def test_gpu_agrees_with_the_reference(variant: str, record_property: Callable[[str, object], None]) -> None:
    artifact = make_artifact(variant)
    images = images_for(artifact, 2)
    encoder = CutlassEncoder(artifact)
    expected, actual = reference(artifact, images), encoder.embed(images)
    error = relative_error(actual, expected)
    agreement = mask_agreement(seeded_sam(variant), actual[:1], expected[:1])
    record_property("arithmetic", encoder.arithmetic)
    record_property("embedding_error", error)
    record_property("mask_agreement", agreement)
    assert error <= HALF_EMBEDDING_TOLERANCE
    assert agreement >= MASK_AGREEMENT


@needs_gpu
def test_gpu_agrees_on_the_embedded_model(
    real: tuple[Sam, Artifact], record_property: Callable[[str, object], None]
) -> None:
    sam, artifact = real
    images = images_for(artifact)
    expected, actual = reference(artifact, images), CutlassEncoder(artifact).embed(images)
    agreement = mask_agreement(sam, actual, expected)
    record_property("embedding_error", relative_error(actual, expected))
    record_property("mask_agreement", agreement)
    assert agreement >= MASK_AGREEMENT


@needs_gpu
def test_gpu_gives_the_same_twice_and_graphs_do_not_mix(base: Artifact) -> None:
    encoder = CutlassEncoder(base)
    images = images_for(base, 4)
    first = encoder.embed(images)
    single = encoder.embed(images[:1])
    assert torch.equal(first, encoder.embed(images))
    assert torch.equal(single, encoder.embed(images[:1]))
    assert not torch.equal(encoder.embed(images[1:2]), single)
    with pytest.raises(ValueError, match="the encoder takes"):
        encoder.embed(images[:, :2])
