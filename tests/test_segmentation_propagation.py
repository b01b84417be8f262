"""Propagation with the embedded model on painted volumes, and its rules against slower, plainer ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from numpy.typing import NDArray

from monailabel_dfqsam.sam import build, read_checkpoint
from monailabel_dfqsam.segmentation.appearance import Appearance, shift
from monailabel_dfqsam.segmentation.following import Source
from monailabel_dfqsam.segmentation.propagation import BATCH, Propagation, Stop, propagate
from monailabel_dfqsam.segmentation.segmenter import Embedding, Prompts, Segmenter, full_precision_segmenter
from monailabel_dfqsam.segmentation.volume import Volume, Window, slice_rgb

SHAPE = (72, 56, 13)
MIDDLE = 6

Mask = NDArray[np.bool_]


def ellipsoid(
    shape: tuple[int, int, int] = SHAPE,
    centre: tuple[float, float, float] = (40, 24, 6),
    radii: tuple[float, float, float] = (15, 9, 4.5),
    lean: float = 0.0,
) -> Mask:
    """[I, J, K]; `lean` moves it along i from slice to slice."""
    i, j, k = np.indices(shape)
    away = (i - centre[0] - lean * (k - centre[2])) / radii[0], (j - centre[1]) / radii[1]
    inside: Mask = away[0] ** 2 + away[1] ** 2 + ((k - centre[2]) / radii[2]) ** 2 < 1
    return inside


def painted(*objects: Mask, values: Sequence[float] = (190, 190), seed: int = 0) -> Volume:
    """Objects on a darker ground, with noise; shown as they are."""
    noise = np.random.default_rng(seed).normal(0, 6, objects[0].shape)
    array = np.full(objects[0].shape, 80.0)
    for inside, value in zip(objects, values, strict=False):
        array[inside] = value
    grid = ((0.0,) * 3, (1.0,) * 3, tuple(np.eye(3).ravel()))
    return Volume((array + noise).astype(np.float32), *grid, modality=None, window=Window(0, 255))


def box(mask: Mask, k: int) -> Prompts:
    i, j = np.nonzero(mask[:, :, k])
    return Prompts(box=np.array([j.min(), i.min(), j.max() + 1, i.max() + 1], dtype=float))


def points(*xy: tuple[float, float], label: int = 1) -> Prompts:
    return Prompts(np.array(xy), np.full(len(xy), label))


def dice(a: Mask, b: Mask) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def slices(mask: Mask) -> list[int]:
    return [int(k) for k in np.flatnonzero(mask.any(axis=(0, 1)))]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return full_precision_segmenter(build(read_checkpoint("tiny")))


@pytest.fixture(scope="module")
def run(segmenter: Segmenter) -> Callable[..., Propagation]:
    """`propagate` with the embedded model."""

    @lru_cache(maxsize=300)
    def embedding(volume: Volume, k: int) -> Embedding:
        return segmenter.embed(slice_rgb(volume, k))

    def call(volume: Volume, prompts: dict[int, Prompts], **options: object) -> Propagation:
        def embed(ks: Sequence[int]) -> list[Embedding]:
            return [embedding(volume, k) for k in ks]

        return propagate(
            **{"embed": embed, **options}, predict=segmenter.predict, volume=volume, prompts=prompts
        )  # type: ignore[arg-type]

    return call


def test_one_box_gives_the_whole_object(run: Callable[..., Propagation]) -> None:
    truth = ellipsoid(lean=1.0)
    found = run(painted(truth), {MIDDLE: box(truth, MIDDLE)})
    assert dice(found.mask, truth) > 0.85
    assert abs(slices(found.mask)[0] - slices(truth)[0]) <= 1
    assert abs(slices(found.mask)[-1] - slices(truth)[-1]) <= 1
    kept = found.mask.any(axis=(0, 1))
    assert (np.isnan(found.scores) == ~kept).all()
    assert [(way.source, way.step) for way in found.fronts] == [(MIDDLE, -1), (MIDDLE, 1)]
    assert [way.last for way in found.fronts] == [slices(found.mask)[0], slices(found.mask)[-1]]


def test_wide_and_high_slices_alike(run: Callable[..., Propagation]) -> None:
    """The same object with i and j exchanged: another picture to the model, the same place for us."""
    truth = ellipsoid(lean=1.0).transpose(1, 0, 2)
    found = run(painted(truth), {MIDDLE: box(truth, MIDDLE)})
    assert found.mask.shape == (56, 72, 13)
    assert dice(found.mask, truth) > 0.85


def test_colour_will_do(run: Callable[..., Propagation]) -> None:
    truth = ellipsoid()
    grey = painted(truth).array.clip(0, 255).astype(np.uint8)
    volume = replace(painted(truth), array=np.stack([grey, grey, grey // 2], axis=3), window=None)
    assert dice(run(volume, {MIDDLE: box(truth, MIDDLE)}).mask, truth) > 0.75


def test_it_does_not_leak_into_the_object_beside(run: Callable[..., Propagation]) -> None:
    """The other one is as bright, as long, and two pixels away in places."""
    truth, other = ellipsoid(centre=(40, 16, 6)), ellipsoid(centre=(40, 37, 6), radii=(15, 10, 9))
    found = run(painted(truth, other), {MIDDLE: box(truth, MIDDLE)})
    assert dice(found.mask, truth) > 0.8
    assert (found.mask & other).sum() < 0.02 * other.sum()


def test_it_ends_where_the_object_ends(run: Callable[..., Propagation]) -> None:
    """A cylinder that ends abruptly, above it nothing, below it something darker of the same outline."""
    disc = ellipsoid(radii=(15, 9, 1e6))
    truth, below = disc.copy(), disc.copy()
    truth[:, :, [0, 1, 2, 9, 10, 11, 12]] = False
    below[:, :, 3:] = False
    found = run(painted(truth, below, values=(190, 130)), {MIDDLE: box(truth, MIDDLE)})
    assert slices(found.mask) == slices(truth)
    assert not {way.stop for way in found.fronts} & {Stop.END, Stop.MET, Stop.ROI}


def test_both_branches_are_followed(run: Callable[..., Propagation]) -> None:
    i, j, k = np.indices(SHAPE)
    apart = 2.2 * np.clip(k - 3, 0, None)
    truth = ((i - 36 - apart) ** 2 + (j - 26) ** 2 < 64) | ((i - 36 + apart) ** 2 + (j - 26) ** 2 < 64)
    truth[:, :, 9:] = False
    found = run(painted(truth), {3: box(truth, 3)})
    assert dice(found.mask, truth) > 0.7
    assert found.mask[36 + 9, 26, 7]
    assert found.mask[36 - 9, 26, 7]


def test_prompted_slices_are_left_as_answered(run: Callable[..., Propagation], segmenter: Segmenter) -> None:
    """Also where the correction contradicts what would have come from the neighbours."""
    truth, other = ellipsoid(radii=(15, 9, 20)), ellipsoid(centre=(12, 44, 6), radii=(8, 8, 20))
    volume = painted(truth, other)
    prompts = {
        2: Prompts(np.array([[24.5, 40.5], [44.5, 12.5]]), np.array([1, 0]), box(truth, 2).box),
        MIDDLE: box(other, MIDDLE),
        9: points((24.5, 44.5), (22.5, 36.5)),
    }
    found = run(volume, prompts)
    for k, given in prompts.items():
        alone = segmenter.predict(segmenter.embed(slice_rgb(volume, k)), given)
        assert (found.mask[:, :, k] == alone.mask).all()
        assert found.scores[k] == alone.score


@pytest.mark.parametrize("pair", [(2, 3), (3, 5), (2, 9), (3, 9), (0, 12)])
def test_between_two_slices_the_nearer_one_counts(
    run: Callable[..., Propagation], pair: tuple[int, int]
) -> None:
    """The plain way: each slice alone through all the volume, then one slice after the other is given out."""
    truth = ellipsoid(radii=(15, 9, 7.0), lean=-1.0)
    volume = painted(truth, seed=sum(pair))
    prompts = {k: box(truth if truth[:, :, k].any() else np.roll(truth, MIDDLE, 2), k) for k in pair}
    found = run(volume, prompts)
    alone = {k: run(volume, {k: prompts[k]}) for k in pair}
    low, high = pair
    for k in range(volume.shape[2]):
        near = [low] if k <= low else [high] if k >= high else list(pair)
        reached = [source for source in near if not np.isnan(alone[source].scores[k])]
        if not reached:
            assert np.isnan(found.scores[k])
            continue
        owner = min(reached, key=lambda source: (abs(source - k), -alone[source].scores[k]))
        assert (found.mask[:, :, k] == alone[owner].mask[:, :, k]).all()
        assert found.scores[k] == alone[owner].scores[k]


def test_a_background_point_is_obeyed(run: Callable[..., Propagation]) -> None:
    """On a slice without other prompts it refines, or ends the object; either way it is outside."""
    truth = ellipsoid(radii=(15, 9, 20))
    volume = painted(truth)
    before = run(volume, {MIDDLE: box(truth, MIDDLE)})
    assert before.mask[40, 24, 9]
    after = run(volume, {MIDDLE: box(truth, MIDDLE), 9: points((24.5, 40.5), (56.0, 72.0), label=0)})
    assert not after.mask[40, 24, 9]
    assert (after.mask[:, :, :9] == before.mask[:, :, :9]).all()
    beside = run(volume, {MIDDLE: box(truth, MIDDLE), 9: points((3.5, 3.5), label=0)})
    assert dice(beside.mask, truth) > 0.85


def test_the_roi_bounds_it(run: Callable[..., Propagation]) -> None:
    truth = ellipsoid(radii=(15, 9, 20))
    volume, prompts = painted(truth), {MIDDLE: box(truth, MIDDLE)}
    assert slices(run(volume, prompts).mask) == list(range(13))
    bounded = run(volume, prompts, roi=(4, 9))
    assert slices(bounded.mask) == list(range(4, 10))
    assert [way.stop for way in bounded.fronts] == [Stop.ROI, Stop.ROI]
    assert slices(run(volume, prompts, roi=(MIDDLE, MIDDLE)).mask) == [MIDDLE]
    assert [way.stop for way in run(volume, prompts, roi=(-3, 99)).fronts] == [Stop.END, Stop.END]


def test_an_image_of_one_slice(run: Callable[..., Propagation], segmenter: Segmenter) -> None:
    truth = ellipsoid((72, 56, 1), (40, 24, 0))
    volume = painted(truth)
    found = run(volume, {0: box(truth, 0)})
    assert (
        found.mask[:, :, 0] == segmenter.predict(segmenter.embed(slice_rgb(volume, 0)), box(truth, 0)).mask
    ).all()
    assert [way.stop for way in found.fronts] == [Stop.END, Stop.END]


def test_what_nothing_is_compared_with_is_not_looked_at(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To find out how an object looks takes ten times as long as to answer, on a slice of 12000×9000."""
    asked: list[int] = []
    original = Source.of

    def counted(*given: object) -> Source:
        asked.append(1)
        return original(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Source, "of", counted)

    def sides(volume: Volume, k: int, roi: tuple[int, int] | None = None) -> int:
        asked.clear()
        truth = volume.array > 120
        propagate(
            lambda ks: [segmenter.embed(slice_rgb(volume, k)) for k in ks],
            segmenter.predict, volume, {k: box(truth, k)}, roi=roi,
        )  # fmt: skip
        return len(asked)

    assert sides(painted(ellipsoid((72, 56, 1), (40, 24, 0))), 0) == 0
    whole = painted(ellipsoid(radii=(15, 9, 20)))
    assert sides(whole, MIDDLE, (MIDDLE, MIDDLE)) == 0
    assert sides(whole, 0) == sides(whole, MIDDLE) == 1


def test_the_same_again(run: Callable[..., Propagation]) -> None:
    truth = ellipsoid(lean=1.0)
    prompts = {4: box(truth, 4), 8: box(truth, 8)}
    first, second = (run(painted(truth), prompts) for _ in range(2))
    assert (first.mask == second.mask).all()
    assert np.array_equal(first.scores, second.scores, equal_nan=True)
    assert first.fronts == second.fronts


def test_embeddings_are_asked_for_in_batches_and_only_as_far_as_needed(
    segmenter: Segmenter, run: Callable[..., Propagation]
) -> None:
    truth = ellipsoid((72, 56, 60), (40, 24, 20))
    volume, asked = painted(truth), []

    def embed(ks: Sequence[int]) -> list[Embedding]:
        asked.append(list(ks))
        return segmenter.embed_many([slice_rgb(volume, k) for k in ks])

    found = run(volume, {18: box(truth, 18), 22: box(truth, 22)}, embed=embed)
    assert asked[0] == [18, 22]
    assert max(map(len, asked)) == BATCH
    flat = [k for ks in asked for k in ks]
    assert len(flat) == len(set(flat))
    assert set(slices(found.mask)) <= set(flat)
    assert max(flat) <= slices(found.mask)[-1] + BATCH
    assert min(flat) >= slices(found.mask)[0] - BATCH


def test_progress_only_rises_and_ends_at_all(run: Callable[..., Propagation]) -> None:
    truth, seen = ellipsoid(), []
    run(
        painted(truth),
        {4: box(truth, 4), 8: box(truth, 8)},
        progress=lambda *now: seen.append(now),
        roi=(0, 11),
    )
    assert [total for _, total in seen] == [12] * len(seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0][0] == 2
    assert seen[-1] == (12, 12)


@pytest.mark.parametrize(
    ("prompts", "roi", "sentence"),
    [
        ({}, None, "nothing to propagate"),
        ({3: points((5, 5), label=0)}, None, "nothing to propagate"),
        ({13: points((5, 5))}, None, "no slice 13"),
        ({-1: points((5, 5))}, None, "no slice -1"),
        ({3: points((5, 5))}, (4, 9), "slice 3 is prompted, but the ROI goes from slice 4 to 9"),
        ({3: points((5, 500))}, None, "outside the image"),
        ({3: points((5, 5)), 4: points((5, 500), label=0)}, None, "outside the image"),
    ],
)
def test_what_it_cannot_answer_is_refused(
    run: Callable[..., Propagation], prompts: dict[int, Prompts], roi: tuple[int, int] | None, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(painted(ellipsoid()), prompts, roi=roi)


def test_a_shift_is_the_best_of_all() -> None:
    """By trying each; the object has moved by (2, −1), part of it out of the image."""
    rng = np.random.default_rng(0)
    mask = np.zeros((30, 24), dtype=bool)
    mask[20:30, 2:16] = np.indices((10, 14)).sum(0) > 5
    likeness = np.where(np.roll(mask, (2, -1), (0, 1)), 1.0, -1.0) + rng.normal(0, 0.3, mask.shape)
    likeness[:2] = -1
    assert shift(likeness, mask) == (2, -1)
    assert shift(np.zeros_like(likeness), mask) == (0, 0)
    reach = round(0.25 * 140**0.5)
    wide = np.pad(likeness, reach)

    def worth(dy: int, dx: int) -> float:
        part = wide[reach + dy : reach + dy + 30, reach + dx : reach + dx + 24]
        return float(part[mask].mean()) - 0.15 * (dx**2 + dy**2) / reach**2

    span = range(-reach, reach + 1)
    best = max(((dy, dx) for dy in span for dx in span), key=lambda move: worth(*move))
    assert shift(likeness, mask) == best


def test_looks_tell_inside_from_around() -> None:
    truth = ellipsoid()
    volume = painted(truth)
    rgb = slice_rgb(volume, MIDDLE)
    likeness = Appearance.of(rgb, truth[:, :, MIDDLE]).of_slice(rgb)
    assert likeness[truth[:, :, MIDDLE]].mean() > 1
    assert likeness[~truth[:, :, MIDDLE]].mean() < -1
    assert not Appearance.of(rgb, np.ones(SHAPE[:2], dtype=bool)).ratios.any()
