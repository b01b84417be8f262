"""The decoder as a model of OpenVINO, against the torch modules that it is made of."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monailabel_dfqsam.export.decoder import decoder_model
from monailabel_dfqsam.ops.openvino_library import openvino, why_unavailable
from monailabel_dfqsam.sam import VARIANTS, build, read_checkpoint
from monailabel_dfqsam.sam.model import build_decoder
from tests.test_segmentation_mask_decoding import lively

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"{why_unavailable()}")

ROUNDING = 1e-5  # of float32, relative to the largest value
GRID = 16  # tokens along a side of the input, also of models that have more

# Places as parts of the input's side, and what each means.
PROMPTS = {
    "box": ([[0.2, 0.3], [0.6, 0.8]], [2, 3]),
    "point": ([[0.4, 0.5]], [1]),
    "points": ([[0.4, 0.5], [0.1, 0.9], [0.7, 0.2]], [1, 0, 1]),
    "box and points": ([[0.2, 0.3], [0.6, 0.8], [0.4, 0.5], [0.5, 0.7]], [2, 3, 1, 0]),
    "seven points": ([[n / 8, 0.5] for n in range(1, 8)], [1, 0, 1, 0, 1, 1, 1]),
}


@pytest.fixture(scope="module", params=["tiny", "sam_med2d_b", "lite_medsam", "lite", "efficient_sam_ti"])
def both(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Any]:
    """Prompt encoder, mask decoder, and both compiled; the trained weights of 'tiny', else lively ones."""
    if request.param == "tiny":
        sam = build(read_checkpoint("tiny"))
        prompt_encoder, decoder = sam.prompt_encoder, sam.mask_decoder
    else:
        variant = VARIANTS[request.param]
        variant = replace(variant, input_size=GRID * variant.patch_size)
        prompt_encoder, decoder = (lively(module) for module in build_decoder(variant))
    model = decoder_model(prompt_encoder, decoder)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return prompt_encoder, decoder, openvino().Core().compile_model(model, "CPU", options)


def side(prompt_encoder: Any) -> int:
    """Of the model's input in pixels."""
    return int(getattr(prompt_encoder, "size", None) or prompt_encoder.input_image_size[0])


@torch.inference_mode()
def slow(
    prompt_encoder: Any, decoder: Any, embedding: Tensor, points: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Masks and IoUs by the modules themselves."""
    corner = labels > 1
    clicks = (points[None, ~corner], labels[None, ~corner]) if (~corner).any() else None
    sparse, dense = prompt_encoder(clicks, points[corner].reshape(1, 4) if corner.any() else None, None)
    masks, iou = decoder.predict_masks(embedding, prompt_encoder.get_dense_pe(), sparse, dense)
    return masks, iou


@pytest.mark.parametrize("prompt", PROMPTS)
def test_its_masks_are_torchs(both: tuple[nn.Module, nn.Module, Any], prompt: str) -> None:
    prompt_encoder, decoder, compiled = both
    shape = prompt_encoder.get_dense_pe().shape
    embedding = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    places, kinds = PROMPTS[prompt]
    points, labels = torch.tensor(places) * side(prompt_encoder), torch.tensor(kinds)
    expected = slow(prompt_encoder, decoder, embedding, points, labels)
    found = compiled([embedding.numpy(), points[None].numpy(), labels[None].float().numpy()])
    for name, value in zip(("masks", "iou"), expected, strict=True):
        actual = torch.from_numpy(found[name])
        assert actual.shape == value.shape
        assert float((actual - value).abs().max()) <= ROUNDING * float(value.abs().max()), name


def test_other_prompts_give_other_masks(both: tuple[nn.Module, nn.Module, Any]) -> None:
    """So that agreement above means something."""
    prompt_encoder, _, compiled = both
    embedding = torch.randn(prompt_encoder.get_dense_pe().shape, generator=torch.Generator().manual_seed(1))
    answers = []
    for places, kinds in PROMPTS.values():
        points, labels = torch.tensor([places]) * side(prompt_encoder), torch.tensor([kinds]).float()
        answers.append(
            torch.from_numpy(compiled([embedding.numpy(), points.numpy(), labels.numpy()])["masks"])
        )
    largest = max(float(answer.abs().max()) for answer in answers)
    for first, second in pairwise(answers):
        assert float((first - second).abs().max()) > 100 * ROUNDING * largest


def test_nothing_can_report_the_use_of_openvino() -> None:
    openvino()
    with pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401
