"""Proposals: many points at once against one after another, and the choice of masks against a plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monailabel_dfqsam.sam import VARIANTS, build, read_checkpoint
from monailabel_dfqsam.sam.model import build_decoder
from monailabel_dfqsam.sam.preprocess import Frame, frame_of, to_image
from monailabel_dfqsam.segmentation.proposals import MOST, arrange, grid_points, propose, surest
from monailabel_dfqsam.segmentation.segmenter import Embedding, Prompts, Segmenter, full_precision_segmenter

ROUNDING = 1e-5  # of float32, relative to the largest logit
HEIGHT, WIDTH = 100, 140
SQUARE = Frame(256, 256, 256, 256, 256)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return full_precision_segmenter(build(read_checkpoint("tiny")))


def picture(seed: int = 0) -> np.ndarray:
    """Two bright discs on black."""
    y, x = np.indices((HEIGHT, WIDTH))
    grey = np.zeros((HEIGHT, WIDTH))
    for cy, cx, radius in ((30, 40, 9), (65, 100, 14)):
        grey[np.hypot(y - cy, x - cx) < radius] = 200
    noise = np.random.default_rng(seed).normal(0, 2, grey.shape)
    return np.repeat((grey + noise).clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("variant", ["tiny", "sam_b_256"])
def test_many_points_are_as_one_after_another(variant: str) -> None:
    torch.manual_seed(0)
    sizes = VARIANTS[variant]
    model = Segmenter("random", sizes, lambda images: images, *build_decoder(sizes))
    # Where it comes from does not matter to the decoder, and the larger encoder takes seconds.
    embedding = Embedding(
        torch.randn(1, sizes.embed_channels, sizes.grid, sizes.grid), frame_of(sizes, HEIGHT, WIDTH)
    )
    rng = np.random.default_rng(1)
    points = rng.uniform(0, 1, (37, 2)) * (WIDTH, HEIGHT)  # more than one batch, and not whole ones
    logits, scores = model.predict_points(embedding, points)
    assert logits.shape == (37, 1, 64, 64)
    for n, point in enumerate(points):
        alone = model.predict(embedding, Prompts(point[None], np.array([1])))
        tolerance = ROUNDING * float(alone.low_res_logits.abs().max())
        assert float((logits[n] - alone.low_res_logits[0]).abs().max()) < tolerance
        assert float(scores[n]) == pytest.approx(alone.score, abs=ROUNDING)


def test_points_that_cannot_be(segmenter: Segmenter) -> None:
    embedding = segmenter.embed(picture())
    logits, scores = segmenter.predict_points(embedding, np.zeros((0, 2)))
    assert (logits.shape, scores.shape) == ((0, 1, 64, 64), (0,))
    with pytest.raises(ValueError, match="outside"):
        segmenter.predict_points(embedding, np.array([[10.0, 10.0], [WIDTH + 1.0, 5.0]]))
    with pytest.raises(ValueError, match=r"\[N, 2\]"):
        segmenter.predict_points(embedding, np.array([1.0, 2.0]))


def test_points_lie_where_something_is() -> None:
    points = grid_points(picture())
    assert 0 < len(points) < 60
    for cx, cy in ((40, 30), (100, 65)):
        assert np.hypot(points[:, 0] - cx, points[:, 1] - cy).min() < 7
    # A cell's middle may lie beside the disc that reaches into it, but not further than the cell.
    away = np.minimum(
        np.hypot(points[:, 0] - 40, points[:, 1] - 30) - 9,
        np.hypot(points[:, 0] - 100, points[:, 1] - 65) - 14,
    )
    assert away.max() < np.hypot(WIDTH, HEIGHT) / 16
    assert grid_points(np.full((50, 50, 3), 7, dtype=np.uint8)).shape == (0, 2)
    everywhere = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert len(grid_points(everywhere)) == 256
    assert len(grid_points(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8))) == 128  # 1×2 pixels


def plainly_surest(logits: torch.Tensor, scores: torch.Tensor) -> list[int]:
    """`surest` for square images, mask by mask."""
    masks = [m.numpy() > 0 for m in logits[:, 0]]
    quality = []
    for mask, m, score in zip(masks, logits[:, 0].numpy(), scores.tolist(), strict=True):
        stable = (m > 1).sum() / max(1, (m > -1).sum())
        quality.append(score * stable if 0.001 <= mask.mean() <= 0.8 else 0.0)
    kept: list[int] = []
    for n in sorted(range(len(masks)), key=lambda n: -quality[n]):
        if quality[n] < 0.7 * max(quality) or quality[n] == 0 or len(kept) == MOST:
            continue
        same = [(masks[n] & masks[o]).sum() / (masks[n] | masks[o]).sum() for o in kept]
        if max(same, default=0) <= 0.5:
            kept.append(n)
    return kept


def test_the_surest_masks_are_kept() -> None:
    rng = np.random.default_rng(3)
    y, x = np.indices((64, 64))
    logits = np.stack(
        [
            rng.uniform(1, 12)
            * (rng.uniform(1, 20) - np.hypot(y - rng.uniform(0, 64), x - rng.uniform(0, 64)))
            for _ in range(150)
        ]
    )
    logits[0] = 5.0  # all of the picture: the background
    logits[1] = -5.0  # nothing
    scores = torch.from_numpy(rng.uniform(0.6, 0.9, 150)).float()
    scores[:2] = 1.0
    given = torch.from_numpy(logits).float()[:, None]
    kept = surest(given, scores, SQUARE)
    assert len(kept) == MOST
    assert kept == plainly_surest(given, scores)
    # The same scale for all changes nothing: small models rate themselves low.
    assert surest(given, scores * 0.3, SQUARE) == kept
    assert surest(given[:2], scores[:2], SQUARE) == []


def test_what_lies_beyond_the_image_does_not_count() -> None:
    frame = frame_of(VARIANTS["sam_b_1024"], 100, 200)  # the lower half of the model's input is padding
    logits = torch.full((1, 1, 256, 256), -5.0)
    logits[:, :, 128:] = 5.0
    assert surest(logits, torch.ones(1), frame) == []
    logits[:, :, 20:50, 20:50] = 5.0
    assert surest(logits, torch.ones(1), frame) == [0]


def test_smaller_objects_lie_on_larger_ones() -> None:
    large, small, hidden, other = (np.zeros((20, 30), dtype=bool) for _ in range(4))
    large[2:18, 2:20] = True
    small[5:9, 5:9] = True
    other[0:10, 22:30] = True
    hidden[5:9, 5:9] = True  # the same as small, which comes first and is then covered
    found = arrange([small, large, hidden, other], [0.9, 0.5, 1.7, 0.6], (20, 30))
    assert found.labels.dtype == np.uint8
    assert set(np.unique(found.labels)) == {0, 1, 2, 3}
    assert (found.labels == 1).sum() == 16 * 18 - 16
    assert (found.labels[other] == 2).all()
    assert (found.labels[small] == 3).all()
    assert found.confidences == (0.5, 0.6, 1.0)
    nothing = arrange([], [], (20, 30))
    assert (nothing.labels.shape, nothing.confidence) == ((20, 30), 0.0)


def test_proposals_of_a_picture(segmenter: Segmenter) -> None:
    rgb = picture()
    embedding = segmenter.embed(rgb)
    found = propose(segmenter, embedding, rgb)
    count = len(found.confidences)
    assert 0 < count <= MOST
    sizes = np.bincount(found.labels.ravel(), minlength=count + 1)[1:]
    assert len(sizes) == count
    assert (np.diff(sizes) <= 0).all()
    assert sizes[-1] > 0
    # Each is what a click somewhere finds, where nothing smaller lies on it.
    points = grid_points(rgb)
    logits, scores = segmenter.predict_points(embedding, points)
    clicked = to_image(logits, embedding.frame)[:, 0].numpy() > 0
    for value, confidence in enumerate(found.confidences, start=1):
        mask = found.labels == value
        assert any(
            (mask <= click).all() and float(score) == pytest.approx(confidence)
            for click, score in zip(clicked, scores, strict=True)
        )
    assert found.confidence == pytest.approx(np.mean(found.confidences))


def test_a_picture_of_nothing(segmenter: Segmenter) -> None:
    rgb = np.full((60, 50, 3), 30, dtype=np.uint8)
    found = propose(segmenter, segmenter.embed(rgb), rgb)
    assert not found.labels.any()
    assert (found.confidences, found.confidence) == ((), 0.0)
