from __future__ import annotations

import math

import pytest
import torch

from monailabel_dfqsam.synthesis.losses import (
    class_loss,
    jitter_boxes,
    mask_loss,
    similarity_loss,
    total_variation,
)


def test_mask_loss_is_one_minus_soft_iou() -> None:
    probability = torch.tensor([[[0.9, 0.2], [0.5, 0.1]]])
    mask = torch.tensor([[[True, False], [True, False]]])
    overlap = 0.9 + 0.5
    union = 0.9 + 0.2 + 0.5 + 0.1 + 2 - overlap
    assert float(mask_loss(probability.logit(), mask)) == pytest.approx(1 - overlap / union)


def test_mask_loss_spans_zero_to_one() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:5, 2:5] = True
    sure = torch.where(mask, 50.0, -50.0)
    assert float(mask_loss(sure, mask)) == pytest.approx(0)
    assert float(mask_loss(-sure, mask)) == pytest.approx(1)


def test_class_loss_looks_only_at_labelled_cells() -> None:
    scores = torch.tensor([[[0.2, 0.5]], [[0.8, 0.5]]]).requires_grad_()
    loss = class_loss(scores, torch.tensor([[2, 0]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-math.log(0.8))
    assert scores.grad is not None
    assert scores.grad.flatten().tolist() == pytest.approx([0, 0, -1 / 0.8, 0])


def test_class_loss_without_labels_is_zero_and_without_probability_finite() -> None:
    scores = torch.zeros(2, 3, 3, requires_grad=True)
    assert float(class_loss(scores, torch.zeros(3, 3, dtype=torch.int64)).detach()) == 0
    assert math.isfinite(class_loss(scores, torch.ones(3, 3, dtype=torch.int64)).detach())


def test_entropy_beyond_the_ceiling_earns_nothing_and_pulls_nowhere() -> None:
    entropies = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    loss = similarity_loss(entropies, torch.tensor([0.0, 0.0, 1.0]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-(-1.0 + 0.0 + 1.0))
    assert entropies.grad is not None
    assert entropies.grad.tolist() == [-1, 0, 0]
    assert float(similarity_loss(entropies.detach(), None)) == pytest.approx(-1.5)


def test_total_variation_by_loops() -> None:
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    down = [
        abs(float(x[0, c, i + 1, j] - x[0, c, i, j])) for c in range(2) for i in range(2) for j in range(4)
    ]
    right = [
        abs(float(x[0, c, i, j + 1] - x[0, c, i, j])) for c in range(2) for i in range(3) for j in range(3)
    ]
    expected = 0.5 * (sum(down) / len(down) + sum(right) / len(right))
    assert float(total_variation(x)) == pytest.approx(expected, rel=1e-5)


def test_jitter_moves_sides_by_a_share_of_the_extent_within_the_image() -> None:
    boxes = torch.tensor([[100.0, 50.0, 120.0, 90.0], [0.0, 0.0, 256.0, 256.0]]).repeat(50, 1)
    moved = jitter_boxes(boxes, 0.1, 256, torch.Generator().manual_seed(0))
    offset = (moved - boxes).abs()
    assert bool((offset[::2] <= torch.tensor([2.0, 4.0, 2.0, 4.0])).all())
    assert bool((offset[::2].amax(0) > torch.tensor([1.5, 3.0, 1.5, 3.0])).all())
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 256
