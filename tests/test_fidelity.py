"""Agreement on phantoms: its ends, its yardstick, and which prompts count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from monailabel_dfqsam.agreement import one_grey_level_away
from monailabel_dfqsam.config import Policy, QuantizationConfig, Recipe, silent
from monailabel_dfqsam.engines import load_encoder
from monailabel_dfqsam.evaluation import evaluate
from monailabel_dfqsam.fidelity import FOUND, LEAST_MASK, PHANTOMS, SEED, FidelityTest, _phantoms
from monailabel_dfqsam.pipeline import PHANTOM_SEED, gaussian_images, pack, phantom_images
from monailabel_dfqsam.pipeline import PHANTOMS as LOOKED_AT
from monailabel_dfqsam.quantization.calibrate import calibrate
from monailabel_dfqsam.sam import Sam, build, read_checkpoint
from monailabel_dfqsam.sam.preprocess import to_input
from monailabel_dfqsam.segmentation.segmenter import Segmenter, full_precision_segmenter, load_segmenter
from tests.models import REALDATA, needs_realdata, seeded_sam


@pytest.fixture(scope="module")
def sam() -> Sam:
    return build(read_checkpoint("tiny"))


@pytest.fixture(scope="module")
def test(sam: Sam) -> FidelityTest:
    return FidelityTest(sam)


def test_full_precision_agrees_with_itself_wholly(sam: Sam, test: FidelityTest) -> None:
    found = test.measure(sam.image_encoder, "torch")
    assert (found["mean_iou"], found["median_iou"], found["engine"]) == (1, 1, "torch")
    assert found["n"] > 3 * PHANTOMS
    assert (found["grey_level"], found["as_near"]) == (test.grey_level, 1)


def test_the_yardstick_is_below_one_and_the_same_each_time(sam: Sam, test: FidelityTest) -> None:
    assert 0.9 < test.grey_level["mean_iou"] < 1
    assert test.grey_level["mean_iou"] < test.grey_level["median_iou"] < 1
    assert FidelityTest(sam).grey_level == test.grey_level


def test_one_grey_level_away_is_as_near_as_itself(sam: Sam, test: FidelityTest) -> None:
    moved = [one_grey_level_away(rgb, number) for number, (rgb, _) in enumerate(_phantoms(256))]
    away = iter([to_input(sam.variant, rgb)[0] for rgb in moved])
    found = test.measure(lambda _: sam.image_encoder(next(away)))
    assert (found["as_near"], found["mean_iou"]) == (1, pytest.approx(test.grey_level["mean_iou"]))


def test_a_destroyed_encoder_is_seen(sam: Sam, test: FidelityTest) -> None:
    """A box says much by itself, a click nothing."""

    def noise(images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(sam.image_encoder(images).shape, generator=generator)

    found = test.measure(noise)
    assert found["mean_iou"] < 0.65
    assert found["as_near"] < 0.1


def test_damage_is_seen_in_its_order(sam: Sam, test: FidelityTest) -> None:
    def damaged(share: float) -> float:
        def embed(images: Tensor) -> Tensor:
            exact = sam.image_encoder(images)
            noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
            return exact + share * exact.std() * noise

        return test.measure(embed)["mean_iou"]

    found = [damaged(share) for share in (0.01, 0.1, 0.5, 2.0)]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)


def test_only_prompts_by_which_full_precision_finds_the_object_count(test: FidelityTest) -> None:
    phantoms = _phantoms(256)
    for one in test._asked:
        masks = phantoms[one.number][1]
        overlaps = [(one.expected & mask).sum() / (one.expected | mask).sum() for mask in masks]
        assert max(overlaps) >= FOUND
        assert one.expected.sum() >= LEAST_MASK * 16
    assert len(test._asked) < 2 * sum(len(masks) for _, masks in phantoms)


def test_a_model_that_finds_nothing_has_no_fidelity() -> None:
    blind = seeded_sam("tiny")
    for parameter in blind.mask_decoder.parameters():
        parameter.zero_()
    found = FidelityTest(blind).measure(blind.image_encoder)
    assert (found["n"], found["mean_iou"], found["grey_level"]["mean_iou"], found["as_near"]) == (0, 0, 0, 0)


def test_its_phantoms_are_no_others_and_go_the_way_of_images(sam: Sam, test: FidelityTest) -> None:
    assert not set(range(SEED, SEED + PHANTOMS)) & set(range(PHANTOM_SEED, PHANTOM_SEED + LOOKED_AT))
    for image, (rgb, masks) in zip(test.images, _phantoms(256), strict=True):
        assert torch.equal(image[None], to_input(sam.variant, rgb)[0])
        assert len({mask.tobytes() for mask in masks}) == len(masks)


@pytest.mark.slow
def test_a_model_that_never_saw_clicks_is_asked_by_boxes(lite_medsam: Path) -> None:
    test = FidelityTest(build(read_checkpoint(lite_medsam)))
    assert {one.prompts.box is None for one in test._asked} == {False}
    noise = test.measure(lambda images: torch.randn(len(images), 256, 64, 64))
    assert noise["mean_iou"] < 0.05
    assert noise["mean_iou"] < test.grey_level["mean_iou"] < test.grey_level["median_iou"] < 1


@needs_realdata
@pytest.mark.slow
def test_agreement_on_phantoms_is_near_that_on_real_images(
    sam: Sam, test: FidelityTest, tmp_path: Path
) -> None:
    """Of encoders calibrated well and badly; on every third real image, box and click alike."""
    rows = [json.loads(line) for line in (REALDATA / "manifest.jsonl").read_text().splitlines()][::3]
    for row in rows:
        row.update({name: str(REALDATA / row[name]) for name in ("image", "mask")})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    full, pairs = full_precision_segmenter(sam), []
    for images in (phantom_images(sam.variant, range(4)), gaussian_images(sam.variant, 1, 0)):
        quantized = calibrate(sam.image_encoder, images, 4, Policy.DEPLOY, Recipe(), silent)
        artifact = pack(read_checkpoint("tiny"), QuantizationConfig(), sam, quantized, images)
        segmenter: Segmenter = load_segmenter(artifact)
        real = [
            row["agreement"]
            for row in evaluate(tmp_path, [(segmenter, {})], full)
            if row["modality"] == "all"
        ]
        pairs.append((test.measure(load_encoder(artifact).embed)["mean_iou"], float(np.mean(real))))
    (good, really_good), (bad, really_bad) = pairs
    assert good > bad
    assert really_good > really_bad
    assert good == pytest.approx(really_good, abs=0.03)
