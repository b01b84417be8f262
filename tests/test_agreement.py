"""What is said of fidelity, and the gate: relative to full precision one grey level away."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from monailabel_dfqsam.agreement import Fidelity, agreement, in_words, one_grey_level_away, shortfall
from tests.models import FIDELITY


def fidelity(mean: float, itself: float, n: int = 7) -> Fidelity:
    yardstick: Any = {"mean_iou": itself, "median_iou": itself}
    return {**FIDELITY, "mean_iou": mean, "n": n, "grey_level": yardstick}


def test_mean_and_median() -> None:
    assert agreement([0.1, 0.2, 0.9]) == {"mean_iou": pytest.approx(0.4), "median_iou": 0.2}
    assert agreement([]) == {"mean_iou": 0, "median_iou": 0}


@pytest.mark.parametrize(
    ("mean", "itself", "least", "enough"),
    [
        (0.9, 1.0, 0.9, True), (0.89, 1.0, 0.9, False),
        (0.46, 0.5, 0.9, True), (0.44, 0.5, 0.9, False),
        (0.6, 0.5, 1.0, True), (0.0, 0.5, 0.0, True),
        (math.nan, 0.9, 0.9, False), (0.9, math.nan, 0.9, False), (math.nan, math.nan, 0.0, True),
    ],
)  # fmt: skip
def test_the_gate_is_a_share_of_the_yardstick(mean: float, itself: float, least: float, enough: bool) -> None:
    assert (shortfall(fidelity(mean, itself), least) == "") == enough


def test_it_says_both_figures() -> None:
    said = shortfall(fidelity(0.785, 0.934), 0.9)
    assert "0.785 is below 0.841" in said
    assert "0.9 of what" in said
    assert said.endswith("0.934")


def test_without_a_mask_nothing_is_known() -> None:
    assert "unknown" in shortfall(fidelity(0.0, 0.0, n=0), 0.9)
    assert shortfall(fidelity(0.0, 0.0, n=0), 0) == ""


def test_the_words_hold_every_figure() -> None:
    for figure in ("0.930", "0.970", "7 masks", "0.950", "0.990", "40%"):
        assert figure in in_words(FIDELITY)
    assert "0.0" not in in_words(fidelity(0.0, 0.0, n=0))
    assert "finds none" in in_words(fidelity(0.0, 0.0, n=0))


def test_one_grey_level_moves_every_pixel_by_at_most_one() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    rgb[:10], rgb[10:20] = 0, 255
    moved = one_grey_level_away(rgb, 3)
    steps = moved.astype(int) - rgb
    assert moved.dtype == np.uint8
    assert {int(step) for step in np.unique(steps)} == {-1, 0, 1}
    assert (steps[:10] >= 0).all()
    assert (steps[10:20] <= 0).all()
    inside = (rgb > 0) & (rgb < 255)
    assert all(0.3 < (steps[inside] == step).mean() < 0.37 for step in (-1, 0, 1))
    assert (moved == one_grey_level_away(rgb, 3)).all()
    assert (moved != one_grey_level_away(rgb, 4)).any()


def test_a_grey_image_stays_grey() -> None:
    moved = one_grey_level_away(np.full((20, 20, 3), 90, dtype=np.uint8), 0)
    assert (moved == moved[..., :1]).all()
    assert moved.min() < moved.max()
