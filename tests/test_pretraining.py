"""Phantoms, targets and a few steps of training."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from monailabel_dfqsam.pretraining import prompting
from monailabel_dfqsam.pretraining.loop import PretrainConfig, learning_rate
from monailabel_dfqsam.pretraining.losses import contrastive_loss, mask_losses
from monailabel_dfqsam.pretraining.phantoms import PhantomClass, label_map, render
from monailabel_dfqsam.pretraining.prompting import Prompted, corrected, decode, first_prompts
from monailabel_dfqsam.pretraining.targets import GROUP, MASKS_PER_IMAGE, MIN_AREA, SHOWN, PhantomDataset
from monailabel_dfqsam.pretraining.train import train_sam
from monailabel_dfqsam.sam import VARIANTS, Sam, build, read_checkpoint
from monailabel_dfqsam.sam.prompt_maps import BACKGROUND, BOTTOM_RIGHT, FOREGROUND, NOTHING, TOP_LEFT


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
        assert all(abs(a - b) <= max(0.201 * side, 5) for a, b, side in zip(box, tight, sides, strict=True))
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
    """One object at a time through segment-anything's own modules, which only know whole images."""
    answers = []
    side = embedding.shape[-1]
    for i in range(len(prompts.kinds)):
        x, y = prompts.corners[i].tolist()

        def seen(whole: torch.Tensor, x: int = x, y: int = y) -> torch.Tensor:
            return whole[..., y : y + side, x : x + side]

        # Its prompt encoder moves places by half a pixel.
        places, kinds = prompts.places[i : i + 1] + prompts.corners[i] * 16 - 0.5, prompts.kinds[i : i + 1]
        clicks = ~((kinds[0] == TOP_LEFT) | (kinds[0] == BOTTOM_RIGHT))
        if not prompts.boxed[i]:  # it ends points with an empty place itself
            clicks[kinds[0].tolist().index(NOTHING)] = False
        mask = None
        if prompts.masks is not None:
            mask = torch.zeros(1, 1, 64, 64)
            mask[..., 4 * y : 4 * (y + side), 4 * x : 4 * (x + side)] = prompts.masks[i]
        sparse, dense = sam.prompt_encoder(
            (places[:, clicks], kinds[:, clicks]) if clicks.any() else None,
            places[:, :2].reshape(1, 4) if prompts.boxed[i] else None,
            mask,
        )
        answers.append(
            sam.mask_decoder.predict_masks(
                image_embeddings=embedding[i : i + 1],
                image_pe=seen(sam.prompt_encoder.get_dense_pe()),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=seen(dense),
            )
        )
    return tuple(torch.cat(parts) for parts in zip(*answers, strict=True))


@pytest.mark.parametrize("strokes", [0.0, 1.0], ids=["clicks", "strokes"])
@pytest.mark.parametrize("side", [16, 8], ids=["whole", "part"])
@pytest.mark.parametrize("said", [0.0, 0.5])
def test_batched_decoding_is_segment_anythings(
    said: float, side: int, strokes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompting, "STROKE_SHARE", strokes)
    checkpoint = read_checkpoint("tiny")
    sam = build(replace(checkpoint, variant=replace(checkpoint.variant, said=said)))
    torch.manual_seed(2)
    embedding = torch.randn(6, 128, side, side)
    boxes, points = torch.tensor([[10.0, 20, 100, 120]]).repeat(6, 1), torch.rand(6, 2) * 16 * side
    target = torch.zeros(6, 4 * side, 4 * side)
    target[:, 10:30, 10:30] = 1
    corners = torch.randint(17 - side, (6, 2))
    prompts = first_prompts(boxes, points, target, corners, 16 * side)
    assert (0 < int(prompts.boxed.sum()) < 6) == (not strokes)
    for _ in range(3):
        logits, iou = decode(sam, embedding, prompts)
        expected_logits, expected_iou = _by_segment_anything(sam, embedding, prompts)
        assert torch.allclose(logits, expected_logits, atol=1e-4)
        assert torch.allclose(iou, expected_iou, atol=1e-5)
        answer = logits[:, 0]
        before, prompts = prompts, corrected(prompts, answer, target, 16 * side)
        told = before.kinds.shape[1]
        assert torch.equal(prompts.places[:, :told], before.places)
        for i in range(6):
            for place, kind in zip(prompts.places[i, told:], prompts.kinds[i, told:].tolist(), strict=True):
                column, row = (place / 4).long().tolist()
                if kind != NOTHING:
                    assert kind == int(target[i, row, column])
                    assert (float(answer[i, row, column]) > 0) != bool(target[i, row, column])


def test_strokes_lie_in_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their places outside it, where it is not convex, say nothing."""
    monkeypatch.setattr(prompting, "STROKE_SHARE", 1.0)
    target = torch.zeros(3, 32, 32)
    target[:, 4:28, 4:8] = 1
    target[:, 4:8, 4:28] = 1
    torch.manual_seed(0)
    none = torch.zeros(3, 2, dtype=torch.int64)
    prompts = first_prompts(torch.zeros(3, 4), torch.zeros(3, 2), target, none, 128)
    inside = target.flatten(1).gather(1, ((prompts.places / 4).long() * torch.tensor([1, 32])).sum(2))
    assert torch.equal(prompts.kinds[:, :-1], torch.where(inside > 0, FOREGROUND, NOTHING)[:, :-1])
    assert (prompts.kinds[:, -1] == NOTHING).all()
    assert not prompts.boxed.any()
    assert {FOREGROUND, NOTHING} == set(prompts.kinds.flatten().tolist())
    # What is wrong more, inside or outside, is what a stroke corrects.
    answer = torch.full_like(target, -1.0)
    answer[:, 20:24, 20:24] = 1
    after = corrected(prompts, answer, target, 128)
    assert set(after.kinds[:, prompting.STROKE + 1 :].flatten().tolist()) <= {FOREGROUND, NOTHING}
    answer = torch.where(target > 0, 1.0, -1.0)
    answer[:, 12:28, 12:28] = 1
    after = corrected(prompts, answer, target, 128)
    kinds = after.kinds[:, prompting.STROKE + 1 :]
    assert set(kinds.flatten().tolist()) == {BACKGROUND}


MISSING = {"large": (slice(8, 20), slice(8, 20)), "small": (slice(8, 12), slice(30, 34))}
TOO_MUCH = (slice(40, 44), slice(40, 60))  # touches what is missing of nothing


@pytest.mark.parametrize("deep", [0.0, 1.0])
@pytest.mark.parametrize("strokes", [0.0, 1.0])
def test_a_correction_points_at_the_wrong_regions_that_it_lies_in(
    deep: float, strokes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("DEEP_SHARE", deep), ("STROKE_SHARE", strokes), ("SILENT_SHARE", 0.0)):
        monkeypatch.setattr(prompting, name, value)
    torch.manual_seed(3)
    target, regions = torch.zeros(8, 64, 64), torch.zeros(3, 64, 64, dtype=torch.bool)
    for region, place in zip(regions, (*MISSING.values(), TOO_MUCH), strict=True):
        region[place] = True
    target[:, regions[0] | regions[1]] = 1
    answer = torch.full_like(target, -1.0)
    answer[:, regions[2]] = 1
    places = torch.zeros(8, 1, 2)
    before = Prompted(
        places, torch.full((8, 1), FOREGROUND), torch.zeros(8, dtype=torch.bool), places[:, 0].long()
    )
    after = corrected(before, answer, target, 256)
    assert after.pointed is not None
    seen = set()
    for where, kinds, pointed in zip(after.places[:, 1:], after.kinds[:, 1:], after.pointed, strict=True):
        hit = {
            index
            for (x, y), kind in zip((where / 4).long().tolist(), kinds.tolist(), strict=True)
            for index, region in enumerate(regions)
            if kind != NOTHING and region[y, x]
        }
        assert hit
        assert torch.equal(pointed, regions[sorted(hit)].any(0))
        seen |= hit
        if deep and not strokes:
            assert hit == {0}
            assert (where / 4 - 14).abs().max() < 1  # its middle
    assert seen > {0} or deep or strokes


def test_nothing_is_pointed_at_where_nothing_is_wrong_or_said(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.zeros(2, 16, 16)
    target[:, 4:8, 4:8] = 1
    places = torch.zeros(2, 1, 2)
    prompts = Prompted(
        places, torch.full((2, 1), FOREGROUND), torch.zeros(2, dtype=torch.bool), places[:, 0].long()
    )
    monkeypatch.setattr(prompting, "SILENT_SHARE", 0.0)
    right = corrected(prompts, target - 0.5, target, 64)
    assert right.pointed is not None
    assert not right.pointed.any()
    monkeypatch.setattr(prompting, "SILENT_SHARE", 1.0)
    assert corrected(prompts, 0.5 - target, target, 64).pointed is None


def test_errors_count_once_more_where_a_correction_points() -> None:
    target = torch.zeros(1, 1, 64, 64)
    target[..., 20:40, 10:30] = 1
    pointed = torch.zeros(1, 64, 64, dtype=torch.bool)
    pointed[:, 20:30, 10:20] = True
    logits = torch.where(pointed[:, None], -3.0, (target - 0.5) * 6)
    elsewhere = pointed.roll(10, 1)
    plain, iou = mask_losses(logits, target)
    there, same = mask_losses(logits, target, pointed)
    beside, _ = mask_losses(logits, target, elsewhere)
    assert torch.equal(iou, same)
    assert there > beside > plain
    wrong = math.log1p(math.exp(3.0))
    assert float(there - plain) == pytest.approx(2 * wrong * 100 / 150, rel=1e-4)  # BCE counts twice


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


def test_learning_rate_rises_stays_and_falls() -> None:
    config = PretrainConfig(steps=100, warmup=10, lr=1.0, cooldown=0.25)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert set(rates[10:75]) == {1.0}
    assert rates[76:] == sorted(rates[76:], reverse=True)
    assert rates[-1] == pytest.approx(0.04)


def test_training_begins_with_weights(tmp_path: Path) -> None:
    """The rate of the first step is small: what comes out is nearly what went in."""
    start = read_checkpoint("tiny")
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
