"""Encoders and decoders against the outputs of the families' own code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from monailabel_dfqsam.sam import VARIANTS, Sam, build, read_checkpoint
from monailabel_dfqsam.sam.variants import Preprocessing, detect
from tests.models import (
    REFERENCE,
    golden_tensor,
    needs_reference,
    relative_error,
    seeded_checkpoint,
    seeded_sam,
)

GOLDEN_TOLERANCE = 1e-4

UNUSED = {
    "mobile_sam": [
        f"image_encoder.{part}.{kind}" for part in ("head", "norm_head") for kind in ("weight", "bias")
    ],
    "efficient_sam_ti": ["image_encoder.pos_embed[:, 0]"],
}


@needs_reference
@pytest.mark.parametrize("variant", ["sam_b_256", "sam_med2d_b"])
def test_outputs_agree_with_the_original_code(variant: str) -> None:
    sam, golden = seeded_sam(variant), np.load(REFERENCE / f"{variant}.npz")
    size = sam.variant.input_size
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[[0.4, 0.5], [0.1, 0.9]]]) * size
    prompts = {
        "box": (None, torch.tensor([[0.2, 0.3, 0.7, 0.8]]) * size),
        "point": ((points, torch.tensor([[1, 0]])), None),
    }
    with torch.inference_mode():
        embedding = sam.image_encoder(image)
        assert relative_error(embedding, torch.from_numpy(golden["embedding"])) < GOLDEN_TOLERANCE
        for kind, (given_points, boxes) in prompts.items():
            sparse, dense = sam.prompt_encoder(points=given_points, boxes=boxes, masks=None)
            masks, iou = sam.mask_decoder(
                image_embeddings=embedding,
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )
            assert (
                relative_error(masks, torch.from_numpy(golden[f"{kind}_low_res_logits"])) < GOLDEN_TOLERANCE
            )
            assert relative_error(iou, torch.from_numpy(golden[f"{kind}_iou"])) < GOLDEN_TOLERANCE


@needs_reference
@pytest.mark.parametrize("name", sorted(path.name.split(".")[0] for path in REFERENCE.glob("*.keys.json")))
def test_published_keys_load_strictly(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = json.loads((REFERENCE / f"{name}.keys.json").read_text())
    # One number each, so that the file is small.
    tensors = {
        key: torch.zeros((), dtype=getattr(torch, dtype)).expand(shape)
        for key, (shape, dtype) in keys.items()
    }
    torch.save(tensors, tmp_path / f"{name}.pth")
    with caplog.at_level("INFO"):
        checkpoint = read_checkpoint(tmp_path / f"{name}.pth")
    assert checkpoint.variant.name == name
    with torch.device("meta"):
        sam = Sam(checkpoint.variant)
    sam.load_state_dict(checkpoint.state_dict, strict=True, assign=True)
    for key in set(UNUSED.get(name, ())):
        assert key in caplog.text
    assert ("not used" in caplog.text) == (name in UNUSED)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_is_told_from_its_shapes(name: str) -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Sam(VARIANTS[name]).state_dict().items()}
    assert detect(shapes, hint=f"{name}.pth") is VARIANTS[name]


def test_medsam_is_told_by_name_only() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Sam(VARIANTS["medsam"]).state_dict().items()}
    assert detect(shapes, hint="sam_vit_b_01ec64.pth").preprocessing is Preprocessing.SAM
    assert detect(shapes, hint="MedSAM_vit_b.pth").preprocessing is Preprocessing.MEDSAM


def test_tiny_matches_its_published_sizes() -> None:
    sam = seeded_sam("tiny")
    assert sum(p.numel() for p in sam.parameters()) < 3_000_000
    assert sam(torch.zeros(2, 3, 256, 256)).shape == (2, 128, 16, 16)


def test_wrong_input_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, 256, 256\], not \[1, 3, 128, 128\]"):
        seeded_sam("tiny").image_encoder(torch.zeros(1, 3, 128, 128))


def test_checkpoint_with_a_missing_tensor_is_refused() -> None:
    checkpoint = seeded_checkpoint("tiny")
    del checkpoint.state_dict["image_encoder.neck.0.weight"]
    with pytest.raises(ValueError, match=r"image_encoder.neck.0.weight"):
        build(checkpoint)


def test_golden_weights_are_named_not_drawn() -> None:
    assert torch.equal(golden_tensor("a.weight", [3]), golden_tensor("a.weight", [3]))
    assert not torch.equal(golden_tensor("a.weight", [3]), golden_tensor("b.weight", [3]))
