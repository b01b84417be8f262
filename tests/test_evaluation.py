"""Measures against slow versions, rows against figures worked out by hand, and the published baselines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.extra import numpy as hnp
from PIL import Image

from monailabel_dfqsam import evaluation
from monailabel_dfqsam.evaluation import (
    BASELINES,
    NSD_TOLERANCE,
    EvaluationError,
    Item,
    dice,
    evaluate,
    iou,
    read_items,
    surface_dice,
)
from monailabel_dfqsam.evaluation.models import beside_yardstick, load_groups
from monailabel_dfqsam.evaluation.scoring import OneGreyLevelAway
from monailabel_dfqsam.evaluation.table import print_rows
from monailabel_dfqsam.phantom_study import write_phantom_study
from monailabel_dfqsam.sam import VARIANTS, Sam
from monailabel_dfqsam.segmentation.segmenter import (
    Embedding,
    Prediction,
    Prompts,
    Segmenter,
    full_precision_segmenter,
)
from tests.fresh import printed

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
KEYS = {
    "model", "engine", "policy", "prompt", "modality", "n", "iou", "dice", "nsd", "drop", "drop_ci",
    "agreement", "agreement_median", "embed_ms", "predict_ms", "baseline_box", "baseline_ellipse",
    "baseline_otsu",
}  # fmt: skip
FLOAT = 1e-6

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
masks = hnp.arrays(bool, (6, 5))


@relaxed
@given(masks, masks)
def test_overlaps_are_those_of_sets(a: np.ndarray, b: np.ndarray) -> None:
    first, second = ({tuple(p) for p in np.argwhere(m)} for m in (a, b))
    union = first | second
    assert iou(a, b) == (len(first & second) / len(union) if union else 1)
    sizes = len(first) + len(second)
    assert dice(a, b) == (2 * len(first & second) / sizes if sizes else 1)


def outline(mask: np.ndarray) -> list[tuple[int, int]]:
    """Pixels of a mask that have a neighbour outside it; the image's surroundings are outside."""
    padded = np.pad(mask, 1)
    return [
        (y, x)
        for y, x in np.argwhere(mask)
        if not (padded[y, x + 1] and padded[y + 2, x + 1] and padded[y + 1, x] and padded[y + 1, x + 2])
    ]


@settings(relaxed, max_examples=25)
@given(hnp.arrays(bool, (12, 9)), hnp.arrays(bool, (12, 9)))
def test_surface_dice_counts_the_outlines_near_each_other(predicted: np.ndarray, truth: np.ndarray) -> None:
    truth[4:9, 3:8] = True
    first, second = outline(predicted), outline(truth)
    near = [
        any((y - v) ** 2 + (x - u) ** 2 <= NSD_TOLERANCE**2 for v, u in other)
        for one, other in ((first, second), (second, first))
        for y, x in one
    ]
    expected = sum(near) / len(near) if first else 0.0
    assert surface_dice(predicted, truth) == pytest.approx(expected, abs=FLOAT)


def bright_square() -> Item:
    """A square of 8 in a picture of 20 by 30, brighter than its surroundings."""
    mask = np.zeros((20, 30), dtype=bool)
    mask[6:14, 10:18] = True
    return Item(np.where(mask, 200, 50).astype(np.uint8)[..., None].repeat(3, 2), mask, "toy")


def test_baselines_of_a_square() -> None:
    item = bright_square()
    assert iou(BASELINES["baseline_box"](item), item.mask) == 1
    inside = sum((x - 3.5) ** 2 + (y - 3.5) ** 2 <= 16 for x in range(8) for y in range(8))
    assert iou(BASELINES["baseline_ellipse"](item), item.mask) == inside / 64
    assert iou(BASELINES["baseline_otsu"](item), item.mask) == 1  # one grey in the box


def test_otsu_takes_the_side_that_fills_the_middle() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    yy, xx = np.indices(mask.shape)
    mask[(yy - 10) ** 2 + (xx - 10) ** 2 < 36] = True
    for inside, outside in ((30, 180), (180, 30)):
        rgb = np.where(mask, inside, outside).astype(np.uint8)[..., None].repeat(3, 2)
        assert iou(BASELINES["baseline_otsu"](Item(rgb, mask, "toy")), mask) == 1


class Oracle(Segmenter):
    """Answers from the prompts alone: a box with itself, less `cut` rows; a point with its pixel."""

    def __init__(self, cut: int = 0) -> None:
        self.cut = cut

    def embed(self, rgb: np.ndarray) -> Embedding:
        return Embedding(torch.from_numpy(rgb), None)  # type: ignore[arg-type]

    def predict(self, embedding: Embedding, prompts: Prompts, multimask: bool = True) -> Prediction:
        mask = np.zeros(embedding.tensor.shape[:2], dtype=bool)
        if prompts.box is not None:
            x0, y0, x1, y1 = prompts.box.astype(int)
            mask[y0 + self.cut : y1, x0:x1] = True
        for x, y in prompts.points.astype(int):
            mask[y, x] = True
        return Prediction(mask, 1.0, torch.zeros(1, 1, 1, 1))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures: an 8 × 8 square in 'A', a 4 × 6 (rows × columns) rectangle in 'B'."""
    rows = []
    for name, modality, box in (("a", "A", (6, 14, 10, 18)), ("b", "B", (2, 6, 3, 9))):
        mask = np.zeros((20, 30), dtype=np.uint8)
        mask[box[0] : box[1], box[2] : box[3]] = 255
        Image.fromarray(mask // 2 + 60).save(tmp_path / f"{name}.png")
        Image.fromarray(mask).convert("1").save(tmp_path / f"{name}_mask.png")
        rows.append({"image": f"{name}.png", "mask": f"{name}_mask.png", "modality": modality, "more": 1})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_rows_are_those_worked_out_by_hand(pictures: Path) -> None:
    reference, cut = Oracle(), Oracle(cut=1)
    named = [
        (reference, {"model": "m", "engine": "e", "policy": None}),
        (cut, {"model": "m", "engine": "e", "policy": "deploy"}),
    ]
    rows = evaluate(pictures, named, reference)
    assert all(set(row) == KEYS for row in rows)
    assert [(r["policy"], r["prompt"], r["modality"], r["n"]) for r in rows] == [
        (policy, prompt, modality, n)
        for policy in (None, "deploy")
        for prompt in ("box", "point")
        for modality, n in (("all", 2), ("A", 1), ("B", 1))
    ]
    full, _, _, point, point_a, _, quantized, quantized_a, quantized_b, same, _, _ = rows
    assert (full["iou"], full["dice"], full["nsd"], full["drop"], full["agreement"]) == (1, 1, 1, 0, 1)
    assert full["drop_ci"] == [0, 0]
    assert (quantized_a["iou"], quantized_b["iou"]) == (7 / 8, 3 / 4)
    assert quantized["iou"] == quantized["agreement"] == pytest.approx((7 / 8 + 3 / 4) / 2)
    assert quantized["agreement_median"] == quantized["agreement"]  # of two
    assert quantized["dice"] == pytest.approx((14 / 15 + 6 / 7) / 2)
    assert quantized["drop"] == pytest.approx((1 / 8 + 1 / 4) / 2)
    assert quantized["drop_ci"] == pytest.approx([1 / 8, 1 / 4])
    assert (point_a["iou"], point["baseline_box"]) == (1 / 64, 1)
    assert (same["iou"], same["drop"]) == (point["iou"], 0)
    json.dumps(rows)


class Brightness(Oracle):
    """Its mask is what is brighter than a level."""

    def predict(self, embedding: Embedding, prompts: Prompts, multimask: bool = True) -> Prediction:
        return Prediction(embedding.tensor.numpy()[..., 0] > 60, 1.0, torch.zeros(1, 1, 1, 1))


def test_the_yardstick_sees_every_image_one_grey_level_away(pictures: Path) -> None:
    """The pictures' background is 60: a third of it becomes brighter, and that is all."""
    full = Brightness()
    named = [(OneGreyLevelAway(full, seed), {"model": seed}) for seed in (0, 0, 1)]
    first, same, other = evaluate(pictures, named, full, ["box"])[::3]
    assert first["agreement"] == same["agreement"] != other["agreement"]
    square, area = 64, 600
    assert evaluate(pictures, named, full, ["box"])[1]["agreement"] == pytest.approx(
        square / (square + (area - square) / 3), rel=0.1
    )


def test_agreement_stands_beside_its_yardstick() -> None:
    ((reference, scored),) = load_groups([Path("tiny")], ())
    quantized = full_precision_segmenter(Sam(VARIANTS["tiny"])), {"model": "tiny W4A4"}
    names = [names["model"] for _, names in beside_yardstick(reference, [*scored, quantized])]
    assert names == ["tiny", "tiny ±1 grey level", "tiny W4A4"]
    assert [names["model"] for _, names in beside_yardstick(reference, [quantized])] == names[1:]


def test_only_the_prompts_asked_for_are_scored_and_progress_is_told(pictures: Path) -> None:
    told: list[tuple[str, int, int]] = []
    rows = evaluate(pictures, [(Oracle(), {})], Oracle(), ["point"], lambda *step: told.append(step))
    assert {row["prompt"] for row in rows} == {"point"}
    assert told == [("evaluation", done, 2) for done in (0, 1, 2)]
    with pytest.raises(EvaluationError, match="clicks5, not 'scribble'"):
        evaluate(pictures, [], Oracle(), ["box", "scribble"])


def test_volumes_with_masks_are_scored_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_phantom_study(tmp_path)
    torch.manual_seed(0)
    segmenter = full_precision_segmenter(Sam(VARIANTS["tiny"]))
    rows = evaluate(tmp_path, [(segmenter, {"model": "random"})], segmenter)
    assert {(row["modality"], row["n"]) for row in rows} == {("all", 3), ("CT", 1), ("other", 2)}
    print_rows(rows)
    printed = capsys.readouterr().out
    assert "random, box prompts" in printed
    assert "random, point prompts" in printed
    for row in rows:
        assert f"{row['iou']:.3f}" in printed
        assert f"{row['baseline_otsu']:.3f}" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, monailabel_dfqsam.evaluation\n"
        "print([name for name in ('monai', 'skimage', 'monailabel') if name in sys.modules])"
    )
    assert printed(code) == "[]"


@pytest.mark.skipif(not REALDATA.is_dir(), reason="../shared/realdata is absent")
def test_baselines_on_real_images_are_the_recorded_ones() -> None:
    items = [read() for read in read_items(REALDATA)]
    assert len(items) == 169
    found = {name: np.mean([iou(make(i), i.mask) for i in items]) for name, make in BASELINES.items()}
    assert {name: round(float(value), 3) for name, value in found.items()} == {
        "baseline_box": 0.711,
        "baseline_ellipse": 0.792,
        "baseline_otsu": 0.709,
    }
    ellipse = evaluation.ellipse_baseline
    by_modality = {
        modality: round(float(np.mean([iou(ellipse(i), i.mask) for i in items if i.modality == modality])), 3)
        for modality in ("CT", "MR", "US", "X-ray", "microscopy")
    }
    assert by_modality == {"CT": 0.762, "MR": 0.756, "US": 0.883, "X-ray": 0.635, "microscopy": 0.839}


def test_the_published_lite_medsam_is_known_by_its_name(lite_medsam: Path) -> None:
    (reference, scored), *others = load_groups([Path("lite-medsam")], ())
    assert not others
    assert scored[0][0] is reference
    assert scored[0][1] == {"model": "lite_medsam", "engine": "torch", "policy": None}
