"""Phantoms, targets and a few steps of training."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from monailabel_dfqsam.pretraining.phantoms import PhantomClass, label_map, render
from monailabel_dfqsam.pretraining.targets import MASKS_PER_IMAGE, MAX_POINTS, MIN_AREA, PhantomDataset
from monailabel_dfqsam.pretraining.train import (
    PretrainConfig,
    contrastive_loss,
    mask_losses,
    schedule,
    train_sam,
)
from monailabel_dfqsam.sam import build, read_checkpoint


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


@pytest.mark.parametrize("index", range(6))
def test_prompts_fit_their_objects(index: int) -> None:
    example = PhantomDataset(seed=0, start=index, count=1)[0]
    assert example["masks"].shape == (MASKS_PER_IMAGE, 256, 256)
    assert example["points"].shape == (MASKS_PER_IMAGE, MAX_POINTS, 2)
    for mask, box, points, labels in zip(
        *(example[name] for name in ("masks", "boxes", "points", "labels")), strict=True
    ):
        assert mask.sum() >= MIN_AREA
        x0, y0, x1, y1 = box.tolist()
        assert 0 <= x0 < x1 <= 256
        assert 0 <= y0 < y1 <= 256
        assert labels[0] == 1
        for (x, y), label in zip(points.tolist(), labels.tolist(), strict=True):
            assert int(mask[int(y), int(x)]) == label


def test_same_index_gives_the_same_example_wherever_it_starts() -> None:
    a, b = PhantomDataset(0, 5, 1)[0], PhantomDataset(0, 3, 9)[2]
    assert all(torch.equal(a[key], b[key]) for key in a)
    c = PhantomDataset(1, 5, 1)[0]
    assert not torch.equal(a["image"], c["image"])


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


def test_training_stops_resumes_and_exports(tmp_path: Path) -> None:
    short = PretrainConfig(steps=1, batch=1, save_every=1, workers=0)
    lines: list[int] = []
    train_sam(tmp_path, short, torch.device("cpu"), lambda step, *_: lines.append(step))
    first = read_checkpoint(tmp_path / "dfqsam-tiny.safetensors")
    weights = train_sam(
        tmp_path,
        PretrainConfig(steps=2, batch=1, save_every=1, workers=0),
        torch.device("cpu"),
        lambda *_: None,
    )
    second = read_checkpoint(weights)
    build(second)
    assert first.sha256 != second.sha256
    assert torch.load(tmp_path / "sam.pt", weights_only=True)["step"] == 2
    changed = time.time_ns()
    train_sam(tmp_path, PretrainConfig(steps=2, batch=1, workers=0), torch.device("cpu"), lambda *_: None)
    assert (tmp_path / "sam.pt").stat().st_mtime_ns < changed
