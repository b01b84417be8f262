from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monailabel_dfqsam.sam import Sam
from monailabel_dfqsam.synthesis.auxiliary import Auxiliary
from monailabel_dfqsam.synthesis.measures import TAIL, class_response, mean_overlap, measure, overlap
from monailabel_dfqsam.synthesis.patch_similarity import encoder_patch_entropies
from tests.models import seeded_sam

TOLERANCE = 1e-4
SCORE_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def sam() -> Sam:
    return seeded_sam("tiny")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))


class Halves(torch.nn.Module):
    """Class 1 left and class 2 right with a probability of 0.8, whatever the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probability = x.new_full((1, 3, 64, 64), 0.1)
        probability[:, 1, :, :32] = probability[:, 2, :, 32:] = 0.8
        return probability.log()


def nearest_ends(x: torch.Tensor) -> np.ndarray:
    return np.quantile(x.numpy(), [TAIL, 1 - TAIL], method="nearest")


def test_ranges_are_the_percentiles_of_what_a_layer_reads(sam: Sam, images: torch.Tensor) -> None:
    names = ("blocks.1.mlp.lin2", "patch_embed.proj", "neck.2")
    expected: dict[str, list[np.ndarray]] = {name: [] for name in names}
    handles = [
        sam.image_encoder.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: expected[name].append(nearest_ends(args[0]))
        )
        for name in names
    ]
    for image in images:
        sam.image_encoder(image[None])
    for handle in handles:
        handle.remove()
    found = measure(sam, images, None)
    assert len(found.ranges) == 6 * 4 + 3
    for name in names:
        assert found.ranges[name] == pytest.approx(np.mean(expected[name], axis=0), abs=TOLERANCE)
    assert not any(module._forward_pre_hooks for module in sam.image_encoder.modules())


def test_rare_outliers_do_not_make_a_range_and_every_channel_counts(sam: Sam) -> None:
    spiked = torch.zeros(1, 3, 256, 256)
    spiked[0, :, 0, :40] = 1000.0
    spiked[0, 2, 128:] = 5.0
    assert measure(sam, spiked, None).ranges["patch_embed.proj"] == pytest.approx((0.0, 5.0))


def test_entropies_are_those_of_the_blocks(sam: Sam, images: torch.Tensor) -> None:
    expected = encoder_patch_entropies(sam.image_encoder, images).mean(0)
    assert measure(sam, images, None).entropies == pytest.approx(expected.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 4), (1, 3), 0.5),
        ((1, 3), (0, 4), 0.5),
        ((0, 1), (2, 3), 0.0),
        ((0, 2), (1, 3), 1 / 3),
        ((1, 1), (1, 1), 1.0),
    ],
)
def test_overlap_of_ranges(one: tuple[float, float], other: tuple[float, float], expected: float) -> None:
    assert overlap(one, other) == pytest.approx(expected)


def test_mean_overlap_is_over_the_layers() -> None:
    assert mean_overlap({"a": (0, 1), "b": (0, 4)}, {"a": (0, 1), "b": (1, 3)}) == pytest.approx(0.75)


def test_class_response_is_the_score_inside_what_is_segmented(sam: Sam, images: torch.Tensor) -> None:
    """A decoder that draws the left half for one click and a speck, which does not count, for the others."""
    logits = torch.full((16, 4, 64, 64), -1.0)
    logits[:, 2, :2, :2] = 1.0
    logits[5, 2, :, :32] = 1.0
    rating = torch.tensor([1.0, 0.0, 0.5, 0.1]).expand(16, 4)

    class Drawn(torch.nn.Module):
        def predict_masks(self, **_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return logits, rating

    drawn = Sam(sam.variant)
    drawn.mask_decoder = Drawn()
    embedding = torch.zeros(1, sam.variant.embed_channels, 16, 16)
    assert class_response(drawn, images[0], embedding, Auxiliary(Halves())) == pytest.approx(
        0.8, abs=SCORE_TOLERANCE
    )
    logits[5, 2] = F.pad(torch.ones(64, 48), (16, 0))
    assert class_response(drawn, images[0], embedding, Auxiliary(Halves())) == pytest.approx(
        (16 * 0.1 + 32 * 0.8) / 48, abs=SCORE_TOLERANCE
    )
    logits[5, 2] = -1.0
    assert math.isnan(class_response(drawn, images[0], embedding, Auxiliary(Halves())))


def test_without_an_auxiliary_model_there_is_no_response(sam: Sam, images: torch.Tensor) -> None:
    assert math.isnan(measure(sam, images[:1], None).response)
    assert 0 < measure(sam, images[:1], Auxiliary(Halves())).response < 1
