"""Phantoms, targets and a few steps of training."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from monailabel_dfqsam.pretraining.auxiliary_network import schedule
from monailabel_dfqsam.pretraining.phantoms import PhantomClass, label_map, render
from monailabel_dfqsam.pretraining.prompting import Prompted, corrected, decode, first_prompts
from monailabel_dfqsam.pretraining.targets import GROUP, MASKS_PER_IMAGE, MIN_AREA, SHOWN, PhantomDataset
from monailabel_dfqsam.pretraining.train import PretrainConfig, contrastive_loss, mask_losses, train_sam
from monailabel_dfqsam.sam import VARIANTS, Sam, build, read_checkpoint
from monailabel_dfqsam.sam.prompt_maps import BACKGROUND, FOREGROUND


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
def test_phantoms_are_images_with_labels(seed: int) -> None:
    labels = label_map(_generator(seed))
    image = render(_generator(seed), labels)
    assert image.shape == (3, 256, 256)
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert image.std() > 0.01
    assert set(labels.regions.unique().tolist()) == set(range(len(labels.classes)))
    assert set(labels.semantic.unique().tolist()) <= {int(kind) for kind in PhantomClass}


def test_every_class_occurs() -> None:
    seen = {int(kind) for seed in range(12) for kind in label_map(_generator(seed)).classes}
    assert seen == {int(kind) for kind in PhantomClass}


def test_parts_belong_to_regions_that_are_there() -> None:
    found = [label_map(_generator(seed)) for seed in range(12)]
    for labels in found:
        assert torch.equal(labels.parents[labels.parents], labels.parents)
        assert labels.wholes.shape == labels.regions.shape
    assert any((labels.wholes != labels.regions).any() for labels in found)


@pytest.mark.parametrize("index", range(6))
def test_prompts_fit_their_objects(index: int) -> None:
    example = next(iter(PhantomDataset(seed=0, start=index)))
    assert example["masks"].shape == (MASKS_PER_IMAGE, 256, 256)
    assert example["points"].shape == (MASKS_PER_IMAGE, 2)
    for mask, box, (x, y) in zip(
        example["masks"], example["boxes"].tolist(), example["points"].tolist(), strict=True
    ):
        assert mask.sum() >= MIN_AREA
        assert mask[int(y), int(x)] == 1
        ys, xs = torch.nonzero(mask, as_tuple=True)
        tight = [float(xs.min()), float(ys.min()), float(xs.max()) + 1, float(ys.max()) + 1]
        sides = [tight[2] - tight[0], tight[3] - tight[1]] * 2
        assert all(abs(a - b) <= 0.051 * side for a, b, side in zip(box, tight, sides, strict=True))
        assert min(box) >= 0
        assert max(box) <= 256


def test_stream_is_the_same_wherever_it_starts() -> None:
    views = list(islice(PhantomDataset(0, size=64), GROUP * SHOWN + 2))
    for start in (5, GROUP * SHOWN + 1):
        again = next(iter(PhantomDataset(0, start, size=64)))
        assert all(torch.equal(again[key], views[start][key]) for key in again)
    other = next(iter(PhantomDataset(1, size=64)))
    assert not torch.equal(other["image"], views[0]["image"])


def _by_segment_anything(sam: Sam, embedding: torch.Tensor, prompts: Prompted) -> tuple[torch.Tensor, ...]:
    """One object at a time through segment-anything's own modules."""
    answers = []
    for i in range(len(prompts.kinds)):
        # Its prompt encoder moves places by half a pixel.
        places, kinds = prompts.places[i : i + 1] - 0.5, prompts.kinds[i : i + 1]
        clicks = (kinds[0] == BACKGROUND) | (kinds[0] == FOREGROUND)
        sparse, dense = sam.prompt_encoder(
            (places[:, clicks], kinds[:, clicks]) if clicks.any() else None,
            places[:, :2].reshape(1, 4) if prompts.boxed[i] else None,
            None if prompts.masks is None else prompts.masks[i : i + 1],
        )
        answers.append(
            sam.mask_decoder.predict_masks(
                image_embeddings=embedding[i : i + 1],
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
            )
        )
    return tuple(torch.cat(parts) for parts in zip(*answers, strict=True))


def test_batched_decoding_is_segment_anythings() -> None:
    sam = build(read_checkpoint())
    torch.manual_seed(0)
    embedding = torch.randn(6, 128, 16, 16)
    boxes, points = torch.tensor([[10.0, 20, 100, 120]]).repeat(6, 1), torch.rand(6, 2) * 256
    prompts = first_prompts(boxes, points)
    assert 0 < int(prompts.boxed.sum()) < 6
    target = torch.zeros(6, 64, 64)
    target[:, 10:30, 10:30] = 1
    for _ in range(3):
        logits, iou = decode(sam, embedding, prompts)
        expected_logits, expected_iou = _by_segment_anything(sam, embedding, prompts)
        assert torch.allclose(logits, expected_logits, atol=1e-4)
        assert torch.allclose(iou, expected_iou, atol=1e-5)
        answer = logits[:, 0]
        before, prompts = prompts, corrected(prompts, answer, target, 256)
        assert torch.equal(prompts.places[:, :-1], before.places)
        for i in range(6):
            column, row = (prompts.places[i, -1] / 4).long().tolist()
            assert int(prompts.kinds[i, -1]) == int(target[i, row, column])
            assert (float(answer[i, row, column]) > 0) != bool(target[i, row, column])


def test_mask_loss_is_least_for_the_target() -> None:
    target = torch.zeros(1, 1, 64, 64)
    target[..., 20:40, 10:30] = 1
    perfect = (target - 0.5) * 40
    candidates = torch.cat([perfect, -perfect, torch.full_like(perfect, -20)], dim=1)
    loss, iou = mask_losses(candidates, target)
    assert loss[0].argmin() == 0
    assert float(loss[0, 0]) < 0.01
    assert iou[0].tolist() == [1.0, 0.0, 0.0]


def test_contrast_prefers_features_that_follow_regions() -> None:
    regions = torch.zeros(1, 16, 16, dtype=torch.long)
    regions[:, 8:] = 1
    aligned = torch.stack([regions.float(), 1 - regions.float()], dim=1)
    torch.manual_seed(0)
    mixed = torch.nn.functional.normalize(torch.randn(1, 2, 16, 16), dim=1)
    assert contrastive_loss(aligned, regions) < contrastive_loss(mixed, regions)


def test_learning_rate_rises_then_falls() -> None:
    config = PretrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [schedule(step, config) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] < 0.03


def test_training_begins_with_weights(tmp_path: Path) -> None:
    """The rate of the first step is small: what comes out is nearly what went in."""
    start = read_checkpoint()
    config = PretrainConfig(steps=1, batch=1, lr=1e-6)
    weights = train_sam(tmp_path, config, torch.device("cpu"), lambda *_: None, start)
    trained = read_checkpoint(weights).state_dict
    for name, value in start.state_dict.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-3)
    other = replace(start, variant=VARIANTS["sam_b_256"])
    with pytest.raises(ValueError, match="sam_b_256"):
        train_sam(tmp_path / "other", config, torch.device("cpu"), lambda *_: None, other)


def test_training_stops_resumes_and_exports(tmp_path: Path) -> None:
    short = PretrainConfig(steps=1, batch=1, save_every=1)
    lines: list[int] = []
    train_sam(tmp_path, short, torch.device("cpu"), lambda step, *_: lines.append(step))
    first = read_checkpoint(tmp_path / "dfqsam-tiny.safetensors")
    weights = train_sam(
        tmp_path,
        PretrainConfig(steps=2, batch=1, save_every=1),
        torch.device("cpu"),
        lambda *_: None,
    )
    second = read_checkpoint(weights)
    build(second)
    assert first.sha256 != second.sha256
    assert torch.load(tmp_path / "sam.pt", weights_only=True)["step"] == 2
    changed = time.time_ns()
    train_sam(tmp_path, PretrainConfig(steps=2, batch=1), torch.device("cpu"), lambda *_: None)
    assert (tmp_path / "sam.pt").stat().st_mtime_ns < changed
