"""EfficientSAM against a second, slow implementation under the published names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from monailabel_dfqsam.config import EngineKind, silent
from monailabel_dfqsam.engines import load_encoder, onednn
from monailabel_dfqsam.quantization.calibrate import observe
from monailabel_dfqsam.quantization.quantizer import search_affine
from monailabel_dfqsam.quantization.reparameterize import after_norms, reparameterize
from monailabel_dfqsam.sam import VARIANTS
from monailabel_dfqsam.sam.efficient_sam import adopted
from monailabel_dfqsam.sam.model import Sam
from tests.models import REFERENCE, golden_tensor, needs_reference, relative_error, seeded_sam
from tests.slow_efficient_sam import SlowEfficientSam
from tests.test_engines import make_artifact

TOLERANCE = 1e-5
SIZE, DEPTH = 128, 2

PROMPTS: dict[str, list[tuple[float, float, int]]] = {
    "a click": [(50.0, 60.0, 1)],
    "clicks in and out": [(50.0, 60.0, 1), (20.0, 100.0, 0)],
    "a box": [(10.0, 20.0, 2), (90.0, 100.0, 3)],
    "a click and a box": [(50.0, 60.0, 1), (10.0, 20.0, 2), (90.0, 100.0, 3)],
}


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """A state dict as published, of fewer blocks."""
    keys = json.loads((REFERENCE / "efficient_sam_ti.keys.json").read_text())
    wanted = [key for key in keys if "encoder.blocks." not in key or int(key.split(".")[2]) < DEPTH]
    # Three times the usual, so that attention is no mean and a norm in a wrong place shows.
    return {key: 3 * golden_tensor(key, keys[key][0]) for key in wanted}


@pytest.fixture(scope="module")
def sam(published: dict[str, Tensor]) -> Sam:
    made = Sam(replace(VARIANTS["efficient_sam_ti"], input_size=SIZE, depth=DEPTH))
    made.load_state_dict(adopted(published, SIZE), strict=True)
    return made.eval().requires_grad_(False)


@needs_reference
def test_embeddings_agree_with_the_slow_form(published: dict[str, Tensor], sam: Sam) -> None:
    image = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    expected = SlowEfficientSam(published, SIZE, heads=3).embed(image, DEPTH)
    assert relative_error(sam.image_encoder(image), expected) < TOLERANCE


@needs_reference
@pytest.mark.parametrize("name", list(PROMPTS))
def test_masks_agree_with_the_slow_form(published: dict[str, Tensor], sam: Sam, name: str) -> None:
    embedding = torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(1))
    logits, iou = SlowEfficientSam(published, SIZE, heads=3).masks(embedding, PROMPTS[name])
    clicks = [(x, y, label) for x, y, label in PROMPTS[name] if label < 2]
    corners = [(x, y) for x, y, label in PROMPTS[name] if label >= 2]
    points = None
    if clicks:
        points = (
            torch.tensor([[click[:2] for click in clicks]]),
            torch.tensor([[label for *_, label in clicks]]),
        )
    boxes = torch.tensor(corners).view(1, 4) if corners else None
    sparse, dense = sam.prompt_encoder(points, boxes, None)
    found, found_iou = sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )
    assert relative_error(found[0], logits[1:]) < TOLERANCE
    assert relative_error(found_iou[0], iou[1:]) < TOLERANCE


@needs_reference
def test_other_families_are_left_as_they_are() -> None:
    keys = json.loads((REFERENCE / "sam_b_256.keys.json").read_text())
    tensors = {key: torch.zeros(()).expand(shape) for key, (shape, _) in keys.items()}
    assert adopted(tensors) == tensors


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a variant of fewer tokens and blocks."""
    name = "small_efficient_sam"
    made = replace(VARIANTS["efficient_sam_ti"], name=name, input_size=SIZE, depth=DEPTH)
    monkeypatch.setitem(VARIANTS, name, made)
    return name


def test_reparameterized_equals_original(small: str) -> None:
    encoder = seeded_sam(small).image_encoder
    image = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    samples = {
        name: rows for part, _ in observe(encoder, image, False, silent) for name, rows in part.items()
    }
    ranges = {name: search_affine(samples[name], 4, per_channel=True) for name in after_norms(encoder)}
    assert len(ranges) == 2 * DEPTH
    with torch.inference_mode():
        expected = encoder(image)
        before = encoder.get_submodule("blocks.0.norm1").weight
        reparameterize(encoder, ranges)
        assert not torch.allclose(encoder.get_submodule("blocks.0.norm1").weight, before)
        assert relative_error(encoder(image), expected) < TOLERANCE


@pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN quantized linear")
def test_engines_agree_in_w4a4(small: str) -> None:
    artifact = make_artifact(small)
    assert {layer["weight_bits"] for layer in artifact.header["layers"].values()} == {4, 8}
    image = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    slow, fast = (
        load_encoder(artifact, kind).embed(image) for kind in (EngineKind.REFERENCE, EngineKind.ONEDNN)
    )
    assert relative_error(fast, slow) < 1e-3
