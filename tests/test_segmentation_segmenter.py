"""Embedding and prompting, against segment-anything's own way of calling the same modules."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from monailabel_dfqsam.artifact import Artifact, ArtifactError, stored
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.sam import VARIANTS, Sam
from monailabel_dfqsam.sam.preprocess import to_image, to_input, to_low_res
from monailabel_dfqsam.sam.variants import Preprocessing
from monailabel_dfqsam.segmentation.segmenter import (
    Embedding,
    Prompts,
    Segmenter,
    full_precision_segmenter,
    load_segmenter,
)
from monailabel_dfqsam.segmentation.volume import Volume

HEIGHT, WIDTH = 90, 140
EXACT = 1e-5
# The artifact keeps matrices in float16.
HALF = 2e-2


@pytest.fixture(scope="module")
def sam() -> Sam:
    torch.manual_seed(0)
    return Sam(VARIANTS["tiny"]).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def segmenter(sam: Sam) -> Segmenter:
    return full_precision_segmenter(sam)


@pytest.fixture(scope="module")
def embedding(segmenter: Segmenter, rgb: np.ndarray) -> Embedding:
    return segmenter.embed(rgb)


def click(x: float = 20.5, y: float = 30.5) -> Prompts:
    return Prompts(points=np.array([[x, y]]), labels=np.array([1]))


def published(
    sam: Sam, rgb: np.ndarray, multimask: bool, pixels: list[list[float]] | None, box: list[float] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks and scores as segment-anything's predictor makes them: whole pixel indices, scaled."""
    x, frame = to_input(sam.variant, rgb)
    scale = torch.tensor(frame.scale)
    points = boxes = None
    if pixels:
        # The predictor adds half an input pixel to a scaled index; the centre of the image's pixel is meant.
        index = (torch.tensor(pixels) + 0.5) * scale - 0.5
        points = (index[None], torch.ones(1, len(pixels)))
    if box:
        boxes = torch.tensor(box)[None] * scale.repeat(2) - 0.5
    sparse, dense = sam.prompt_encoder(points, boxes, None)
    masks, scores = sam.mask_decoder(
        image_embeddings=sam.image_encoder(x),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )
    return to_image(masks, frame)[0], scores[0]


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize(
    ("pixels", "box"),
    [([[20, 30]], None), (None, [10.0, 5.0, 80.0, 60.0]), ([[20, 30], [70, 50]], [10.0, 5.0, 80.0, 60.0])],
)
def test_it_answers_as_segment_anything_does(
    sam: Sam,
    segmenter: Segmenter,
    embedding: Embedding,
    rgb: np.ndarray,
    multimask: bool,
    pixels: list[list[float]] | None,
    box: list[float] | None,
) -> None:
    logits, scores = published(sam, rgb, multimask and box is not None, pixels, box)
    best = int(scores.argmax())
    prompts = Prompts(
        points=np.array(pixels) + 0.5 if pixels else np.zeros((0, 2)),
        labels=np.ones(len(pixels or []), dtype=int),
        box=np.array(box) if box else None,
    )
    found = segmenter.predict(embedding, prompts, multimask)
    assert found.score == pytest.approx(float(scores[best]), abs=EXACT)
    assert found.mask.shape == (HEIGHT, WIDTH)
    assert found.mask.dtype == bool
    clear = logits[best].abs().numpy() > EXACT
    assert (found.mask == (logits[best] > 0).numpy())[clear].all()


def test_where_one_mask_alone_was_trained_it_is_the_answer(
    sam: Sam, segmenter: Segmenter, embedding: Embedding
) -> None:
    one, foreign = full_precision_segmenter(sam), full_precision_segmenter(sam)
    one.variant = replace(one.variant, one_mask=True, taught_here=False)
    foreign.variant = replace(foreign.variant, taught_here=False)
    found, expected = one.predict(embedding, click(), True), segmenter.predict(embedding, click(), False)
    assert torch.equal(found.low_res_logits, expected.low_res_logits)
    assert not torch.equal(found.low_res_logits, foreign.predict(embedding, click()).low_res_logits)
    logits, scores = one.predict_points(embedding, np.concatenate([click().points, [[40.5, 10.5]]]))
    assert logits.shape == (2, 1, 64, 64)
    assert torch.allclose(logits[:1], expected.low_res_logits, atol=EXACT)
    assert float(scores[0]) == pytest.approx(expected.score, abs=EXACT)


@pytest.mark.parametrize("count", [1, 2])
def test_what_was_taught_here_answers_clicks_with_its_single_answer(
    sam: Sam, segmenter: Segmenter, embedding: Embedding, count: int
) -> None:
    clicks = Prompts(np.array([[20.5, 30.5], [70.5, 50.5]])[:count], np.array([1, 0])[:count])
    single = segmenter.predict(embedding, clicks, multimask=False)
    assert torch.equal(segmenter.predict(embedding, clicks).low_res_logits, single.low_res_logits)
    foreign = full_precision_segmenter(sam)
    foreign.variant = replace(foreign.variant, taught_here=False)
    answers = [foreign.predict(embedding, clicks, multimask).low_res_logits for multimask in (False, True)]
    assert not torch.equal(*answers)


def test_the_previous_mask_changes_the_answer(segmenter: Segmenter, embedding: Embedding) -> None:
    first = segmenter.predict(embedding, click())
    assert first.low_res_logits.shape == (1, 1, 64, 64)
    again = Prompts(click().points, click().labels, mask_logits=first.low_res_logits)
    assert segmenter.predict(embedding, again).score != first.score


def test_sam_med2d_takes_the_previous_mask_as_probabilities(sam: Sam, rgb: np.ndarray) -> None:
    """As its training and evaluation feed it; a tiny model stands in, with that family's preprocessing."""
    variant = replace(sam.variant, preprocessing=Preprocessing.SAM_MED2D)
    known = full_precision_segmenter(sam)
    med2d = Segmenter("", variant, lambda x: sam.image_encoder(x), sam.prompt_encoder, sam.mask_decoder)
    logits = torch.linspace(-8, 8, 64 * 64).view(1, 1, 64, 64)
    embedding = known.embed(rgb)
    given = Prompts(click().points, click().labels, mask_logits=logits)
    found = med2d.predict(embedding, given)
    expected = known.predict(embedding, replace(given, mask_logits=1 / (1 + torch.exp(-logits))))
    torch.testing.assert_close(found.low_res_logits, expected.low_res_logits, atol=EXACT, rtol=EXACT)
    assert found.score != known.predict(embedding, given).score


def test_labels_tell_inside_from_outside(segmenter: Segmenter, embedding: Embedding) -> None:
    outside = Prompts(click().points, np.array([0]))
    assert segmenter.predict(embedding, outside).score != segmenter.predict(embedding, click()).score


def test_many_images_are_embedded_as_each_alone(segmenter: Segmenter, rgb: np.ndarray) -> None:
    images = [rgb, rgb[:, :70], rgb[::-1]] * 3  # more than go at a time
    for image, found in zip(images, segmenter.embed_many(images), strict=True):
        alone = segmenter.embed(image)
        assert found.frame == alone.frame
        torch.testing.assert_close(found.tensor, alone.tensor, atol=EXACT, rtol=EXACT)
        assert found.tensor.untyped_storage().nbytes() == found.nbytes, "it keeps the others in memory"


def test_threads_share_it(segmenter: Segmenter, rgb: np.ndarray) -> None:
    alone = [segmenter.predict(segmenter.embed(rgb), click(x)).score for x in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: segmenter.predict(segmenter.embed(rgb), click(x)).score, range(8)))
    assert together == pytest.approx(alone, abs=EXACT)


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (Prompts(), "at least one point or a box"),
        (Prompts(mask_logits=torch.zeros(1, 1, 64, 64)), "at least one point or a box"),
        (click(x=WIDTH + 0.1), f"outside the image of {WIDTH}×{HEIGHT}"),
        (click(y=-0.1), "outside the image"),
        (click(y=float("nan")), "outside the image"),
        (Prompts(points=np.zeros((1, 3)), labels=np.ones(1, dtype=int)), r"must be \[N, 2\]"),
        (Prompts(points=np.zeros((1, 2))), "needs a label"),
        (Prompts(points=np.zeros((1, 2)), labels=np.array([2])), "needs a label"),
        (Prompts(box=np.array([5, 5, 5, 9.0])), "x0 < x1"),
        (Prompts(box=np.array([5, 5, 9, HEIGHT + 1.0])), "inside the image"),
        (Prompts(box=np.array([5, 5, 9, np.nan])), "x0 < x1"),
        (Prompts(box=np.zeros((2, 2))), "a box must be"),
    ],
)
def test_prompts_it_cannot_answer_are_refused(
    segmenter: Segmenter, embedding: Embedding, prompts: Prompts, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        segmenter.predict(embedding, prompts)


def unquantized_artifact(sam: Sam) -> Artifact:
    """An artifact with no layer quantized: what is left is the storage in float16."""
    header = {"variant": "tiny", "config": {"bits": 4}, "layers": {}, "attention_bits": None}
    return Artifact(header, {key: stored(value) for key, value in sam.state_dict().items()})


def test_an_artifact_brings_its_own_decoder(
    sam: Sam, segmenter: Segmenter, embedding: Embedding, rgb: np.ndarray
) -> None:
    loaded = load_segmenter(unquantized_artifact(sam), EngineKind.REFERENCE)
    assert loaded.name == "W16A16 (reference)"
    assert loaded.variant is sam.variant
    found, expected = (s.predict(s.embed(rgb), click()) for s in (loaded, segmenter))
    span = float(expected.low_res_logits.abs().max())
    assert float((found.low_res_logits - expected.low_res_logits).abs().max()) < HALF * span
    assert found.score == pytest.approx(expected.score, abs=HALF)


def test_a_decoder_that_does_not_fit_is_named(sam: Sam) -> None:
    artifact = unquantized_artifact(sam)
    del artifact.tensors["mask_decoder.iou_token.weight"]
    with pytest.raises(ValueError, match=r"mask_decoder is not that of 'tiny'.*iou_token"):
        load_segmenter(artifact, EngineKind.REFERENCE)
    with pytest.raises(ArtifactError):
        load_segmenter(Artifact({**artifact.header, "variant": "unheard-of"}, artifact.tensors))


def test_of_a_volume_the_model_sees_slices_as_people_do(segmenter: Segmenter, rgb: np.ndarray) -> None:
    """Prompts and masks stay in the order of the array, [I, J] with x along j, and mean the same picture."""
    grid = ((0.0,) * 3, (1.0,) * 3, (1.0, 0, 0, 0, 1, 0, 0, 0, 1))
    volume = Volume(np.ascontiguousarray(rgb.transpose(1, 0, 2))[:, :, None], *grid, None, None)
    seen, (embedding,) = segmenter.embed(rgb), segmenter.embed_slices(volume, [0], None)
    assert torch.equal(embedding.tensor, seen.tensor)
    points, labels = np.array([[20.5, 30.5], [70.0, 12.5]]), np.array([1, 0])
    box = np.array([10.0, 5, 80, 60])
    expected = segmenter.predict(seen, Prompts(points, labels, box))
    found = segmenter.predict(embedding, Prompts(points[:, ::-1], labels, box[[1, 0, 3, 2]]))
    assert found.mask.shape == (WIDTH, HEIGHT)
    assert np.array_equal(found.mask, expected.mask.T)
    assert 0 < expected.mask.sum() < expected.mask.size
    assert torch.equal(
        segmenter.predict_points(embedding, points[:, ::-1])[0], segmenter.predict_points(seen, points)[0]
    )
    assert torch.equal(to_low_res(found.mask, embedding.frame), to_low_res(expected.mask, seen.frame))
    outside = Prompts(np.array([[HEIGHT + 1.0, 1.0]]), np.array([1]))
    with pytest.raises(ValueError, match=f"{HEIGHT}×{WIDTH}"):
        segmenter.predict(embedding, outside)
