"""One mask of the decoder, against segment-anything's own forward pass of the same modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from monailabel_dfqsam.masks import tight_box
from monailabel_dfqsam.pipeline import phantom_images
from monailabel_dfqsam.sam import VARIANTS, build, read_checkpoint
from monailabel_dfqsam.sam.model import build_decoder
from monailabel_dfqsam.segmentation.mask_decoding import OneMaskDecoder, box_fits, channels_last, product
from tests.models import relative_error

ROUNDING = 1e-5  # of float32, relative to the largest logit


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every part of the module shows in its output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("best", [0, 1, 2, 3])
@pytest.mark.parametrize("prompt", ["point", "box", "point and mask"])
@pytest.mark.parametrize("name", ["tiny", "sam_b_256", "lite", "efficient_sam_ti"])
def test_it_is_segment_anythings_mask(name: str, prompt: str, best: int) -> None:
    variant = replace(VARIANTS[name], input_size=256)
    prompt_encoder, decoder = (lively(module) for module in build_decoder(variant))
    # Output 0 is asked for alone; of the others, this decides which one wins.
    decoder.iou_prediction_head.layers[-1].bias.data[best] += 100.0
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, variant.embed_channels, variant.grid, variant.grid, generator=generator)
    mask = torch.randn(1, 1, 4 * variant.grid, 4 * variant.grid, generator=generator)
    points = (torch.tensor([[[40.0, 170.0], [90.0, 30.0]]]), torch.tensor([[1, 0]]))
    sparse, dense = prompt_encoder(
        points if prompt != "box" else None,
        torch.tensor([[20.0, 30.0, 90.0, 200.0]]) if prompt == "box" else None,
        mask if prompt == "point and mask" else None,
    )
    positions, multimask = prompt_encoder.get_dense_pe(), best > 0
    logits, scores = decoder(
        image_embeddings=image,
        image_pe=positions,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )
    chosen = max(0, best - 1)
    one = OneMaskDecoder(decoder, positions, 256)
    for layout in (channels_last(image), image):
        found, score = one(layout, sparse, dense, multimask)
        assert found.shape == (1, 1, 4 * variant.grid, 4 * variant.grid)
        assert found.is_contiguous()
        error = float((found - logits[:, chosen : chosen + 1]).abs().max())
        assert error < ROUNDING * float(logits.abs().max())
        assert score == pytest.approx(float(scores[0, chosen]), abs=1e-3)  # about 100


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_products_are_torchs(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((1, 40, rows), (24, 40), (24,)))
    x = x.transpose(1, 2)  # not contiguous
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert relative_error(product(x, weight, bias), expected) < 1e-6


def test_the_decoder_that_is_given_stays_segment_anythings() -> None:
    prompt_encoder, decoder = build_decoder(VARIANTS["tiny"])
    tensors = {name: value.data_ptr() for name, value in decoder.state_dict().items()}
    kinds = [type(module) for module in decoder.modules()]
    one = OneMaskDecoder(decoder.eval(), prompt_encoder.get_dense_pe(), 256)
    assert [type(module) for module in decoder.modules()] == kinds
    own = {name: value.data_ptr() for name, value in one._decoder.state_dict().items()}
    assert own == tensors


def test_a_box_chooses_the_mask_that_fits_it() -> None:
    """The embedded model on a phantom, with boxes of all sizes and places."""
    sam = build(read_checkpoint("tiny"))
    with torch.inference_mode():
        image = sam.image_encoder(phantom_images(sam.variant, [900_000]))
        one = OneMaskDecoder(sam.mask_decoder, sam.prompt_encoder.get_dense_pe(), 256)
        generator = torch.Generator().manual_seed(0)
        by_box = 0
        for _ in range(40):
            corners = 256 * torch.rand(2, 2, generator=generator).sort(0).values
            box = corners.flatten() + torch.tensor([0.0, 0.0, 4.0, 4.0])
            logits, scores = sam.predict(image, boxes=box[None])
            fits = torch.tensor([overlap(mask, box) for mask in logits[0]])
            torch.testing.assert_close(box_fits(logits[0], box, 256), fits)
            best = int((scores[0] + fits).argmax())
            by_box += best != int(scores[0].argmax())
            found, score = one(image, *sam.prompt_encoder(None, box[None], None), True, box)
            torch.testing.assert_close(found[0, 0], logits[0, best], rtol=0, atol=1e-3)
            assert found.is_contiguous()
            assert score == pytest.approx(float(scores[0, best]), abs=1e-4)
    assert by_box > 5


def test_an_empty_mask_fits_no_box() -> None:
    logits = torch.full((2, 8, 8), -1.0)
    logits[1, 2:4, 2:6] = 1.0
    assert box_fits(logits, torch.tensor([8.0, 8.0, 24.0, 16.0]), 32).tolist() == [0.0, 1.0]


def overlap(logits: torch.Tensor, box: torch.Tensor) -> float:
    """IoU of a box and of the tight box of a mask [h, w], four times enlarged; 0 without a mask."""
    mask = F.interpolate(logits[None, None], scale_factor=4.0, mode="bilinear")[0, 0] > 0
    if not mask.any():
        return 0.0
    x0, y0, x1, y1 = tight_box(mask.numpy())
    width, height = min(x1, box[2]) - max(x0, box[0]), min(y1, box[3]) - max(y0, box[1])
    shared = float(max(width, 0) * max(height, 0))
    return shared / float((x1 - x0) * (y1 - y0) + (box[2] - box[0]) * (box[3] - box[1]) - shared)
