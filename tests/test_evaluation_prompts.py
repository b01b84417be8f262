"""Prompts that follow from the truth, and corrections that follow from a model's errors."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from monailabel_dfqsam.evaluation.items import EvaluationError
from monailabel_dfqsam.evaluation.prompts import (
    PROMPTS,
    converse,
    dialogues,
    jittered_prompt,
    middle_of_wrong,
    wrong_pixel,
)
from monailabel_dfqsam.segmentation.segmenter import Prediction, Prompts

FRAME, MOST = 256, 5


def disc(height: int, width: int, radius: float, row: float = 0.5, column: float = 0.5) -> np.ndarray:
    y, x = np.indices((height, width)) + 0.5
    found: np.ndarray = (y - row * height) ** 2 + (x - column * width) ** 2 <= radius**2
    return found


class Painter:
    """Answers with a mask of its own, put right at each point it is told; remembers what it was told."""

    def __init__(self, mask: np.ndarray, brush: int = 0) -> None:
        self.mask = mask
        self.brush = brush
        self.told: list[Prompts] = []
        self.answers: list[Prediction] = []

    def __call__(self, prompts: Prompts) -> Prediction:
        self.told.append(prompts)
        mask = self.mask.copy()
        for (x, y), label in zip(prompts.points.astype(int), prompts.labels, strict=True):
            mask[max(0, y - self.brush) : y + self.brush + 1, max(0, x - self.brush) : x + self.brush + 1] = (
                label
            )
        self.answers.append(Prediction(mask, 1.0, torch.full((1, 1, 4, 4), float(len(self.told)))))
        return self.answers[-1]


@pytest.mark.parametrize("kind", ["points5", "clicks5"])
def test_five_points_are_one_click_and_four_on_errors(kind: str) -> None:
    truth, first_guess = disc(40, 60, 12), disc(40, 60, 9, column=0.6)
    model = Painter(first_guess)
    mask, prompts = converse(model, PROMPTS[kind], truth)
    assert [len(told.points) for told in model.told] == [1, 2, 3, 4, 5]
    assert model.told[0].points.tolist() == [[29.5, 19.5]]
    assert model.told[0].mask_logits is None
    for before, told in zip(model.answers, model.told[1:], strict=False):
        x, y = told.points[-1].astype(int)
        assert before.mask[y, x] != truth[y, x]
        assert told.labels[-1] == truth[y, x]
        assert told.mask_logits is before.low_res_logits
        assert (told.points[:-1] == model.told[len(told.points) - 2].points).all()
    assert (mask == model.answers[-1].mask).all()
    assert (prompts.points == model.told[-1].points).all()
    assert {0, 1} >= set(prompts.labels.tolist())


def test_it_ends_when_nothing_is_wrong() -> None:
    truth = disc(30, 30, 8)
    model = Painter(truth)
    mask, prompts = converse(model, PROMPTS["points5"], truth)
    assert (mask == truth).all()
    assert len(model.told) == len(prompts.points) == 1


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_same_truth_and_answers_give_the_same_prompts(kind: str) -> None:
    truth, guess = disc(50, 70, 14), disc(50, 70, 10)
    one, other = (converse(Painter(guess), PROMPTS[kind], truth)[1] for _ in range(2))
    assert (one.points == other.points).all()
    assert (one.labels == other.labels).all()
    assert one.box is other.box is None or (one.box == other.box).all()  # type: ignore[index]


def test_every_wrong_pixel_is_as_likely() -> None:
    """Over the clicks of many images."""
    wrong = np.zeros((9, 9), dtype=bool)
    wrong[2, 3:5] = wrong[7, 1] = True
    counts: Counter[tuple[int, int]] = Counter()
    for image in range(900):
        truth = (
            np.unpackbits(np.array([image], dtype=">u2").view(np.uint8), count=81).reshape(9, 9).astype(bool)
        )
        counts[wrong_pixel(wrong, truth, 1)] += 1
    assert set(counts) == {(2, 3), (2, 4), (7, 1)}
    assert min(counts.values()) > 240  # 300 expected, deviation 14


def test_nearly_the_same_errors_get_the_same_click() -> None:
    """Two draws apart would agree once in a hundred times."""
    same = 0
    for number in range(1, 101):
        truth = disc(40, 40, 12)
        wrong = truth ^ disc(40, 40, 9)
        more = wrong.copy()
        more[0, : wrong.sum() // 20] = True  # a twentieth of errors more
        same += wrong_pixel(wrong, truth, number) == wrong_pixel(more, truth, number)
    assert same > 85


def test_people_click_in_the_middle_of_what_is_wrong() -> None:
    """The widest of what is missing or too much; where they touch, each by itself."""
    truth = np.zeros((60, 80), dtype=bool)
    truth[10:31, 10:31] = True
    answer = np.roll(truth, 21, axis=1)  # all of it is missing, and as much too much beside it
    answer[40:43, 40:60] = True
    row, column = middle_of_wrong(answer != truth, truth, 1)
    assert (row, column) in {(20, 20), (20, 41)}
    small = truth.copy()
    small[12:17, 12:17] = False
    assert middle_of_wrong(small != truth, truth, 1) == (14, 14)
    model = Painter(~truth)
    converse(model, PROMPTS["clicks5"], truth)
    assert len(model.told) == 5


@pytest.mark.parametrize(("height", "width", "radius"), [(256, 256, 30), (512, 128, 20), (90, 140, 3)])
def test_a_box_is_moved_as_sam_med2d_moves_it(height: int, width: int, radius: float) -> None:
    sx, sy = width / FRAME, height / FRAME
    moves = set()
    for shift in range(40):
        truth = np.roll(disc(height, width, radius), shift // 8, axis=shift % 2)
        rows, columns = np.nonzero(truth)
        tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        box = jittered_prompt(truth).box
        assert box is not None
        moved = (box - tight) / [sx, sy, sx, sy]
        assert moved[:2] == pytest.approx(moved[2:], abs=1e-9)
        assert moved == pytest.approx(np.rint(moved), abs=1e-9)
        sides = (tight[2] - tight[0]) / sx, (tight[3] - tight[1]) / sy
        most = min(MOST, int(min(sides) / 2))
        assert -most <= np.rint(moved).min()
        assert np.rint(moved).max() < most
        moves.add(tuple(np.rint(moved[:2])))
    assert len(moves) > 5


def test_a_moved_box_stays_in_the_image_and_a_small_one_where_it_is() -> None:
    for row in range(6):
        truth = np.zeros((256, 256), dtype=bool)
        truth[row : row + 20, 236:] = True
        x0, y0, x1, y1 = jittered_prompt(truth).box  # type: ignore[misc]
        assert 0 <= y0 < y1
        assert x0 < x1 <= 256
    dot = np.zeros((256, 256), dtype=bool)
    dot[9, 7] = True
    assert jittered_prompt(dot).box.tolist() == [7, 9, 8, 10]  # type: ignore[union-attr]


@pytest.mark.parametrize("names", [["scribble"], ["box", "scribble"], []])
def test_an_unknown_prompt_is_refused(names: list[str]) -> None:
    with pytest.raises(EvaluationError, match="box, jittered, point, points5, clicks5"):
        dialogues(names)


@pytest.mark.parametrize("kind", ["box", "jittered", "point"])
def test_single_prompts_are_not_corrected(kind: str) -> None:
    truth = disc(30, 40, 9)
    model = Painter(~truth)
    converse(model, PROMPTS[kind], truth)
    assert len(model.told) == 1
