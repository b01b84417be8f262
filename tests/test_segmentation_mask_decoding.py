"""One mask of the decoder, against segment-anything's own forward pass of the same modules."""

from __future__ import annotations

import pytest
import torch

from monailabel_dfqsam.sam import VARIANTS
from monailabel_dfqsam.sam.model import build_decoder
from monailabel_dfqsam.segmentation.mask_decoding import OneMaskDecoder, channels_last

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
@pytest.mark.parametrize("name", ["tiny", "sam_b_256"])
def test_it_is_segment_anythings_mask(name: str, prompt: str, best: int) -> None:
    variant = VARIANTS[name]
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
    one = OneMaskDecoder(decoder, positions)
    for layout in (channels_last(image), image):
        found, score = one(layout, sparse, dense, multimask)
        assert found.shape == (1, 1, 4 * variant.grid, 4 * variant.grid)
        assert found.is_contiguous()
        error = float((found - logits[:, chosen : chosen + 1]).abs().max())
        assert error < ROUNDING * float(logits.abs().max())
        assert score == pytest.approx(float(scores[0, chosen]), abs=1e-3)  # about 100
