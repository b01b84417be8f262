"""Frames: pixels to model input and back, for every family, against slow or obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monailabel_dfqsam.sam import VARIANTS, Variant
from monailabel_dfqsam.sam.preprocess import (
    PIXEL_MEAN,
    PIXEL_STD,
    area_resized,
    frame_of,
    input_range,
    to_image,
    to_input,
)
from monailabel_dfqsam.sam.variants import Preprocessing

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
quick = settings(relaxed, max_examples=12)

# One of each family; the large ones differ in weights alone.
NAMES = ("tiny", "sam_med2d_b", "sam_b_1024", "medsam", "lite_medsam", "efficient_sam_ti")
FLOAT = 1e-4
# Interpolation spreads an edge over a pixel of the coarser of the two grids, nearest neighbour shifts it.
EDGE = 1.5

sides = st.integers(1, 400)


def rectangle(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    rgb = np.zeros((height, width, 3), dtype=np.uint8)
    x0, y0, x1, y1 = box
    rgb[y0:y1, x0:x1] = 255
    return rgb


@relaxed
@given(st.sampled_from(sorted(VARIANTS)), st.integers(1, 5000), st.integers(1, 5000))
def test_a_frame_fits_the_input_and_sam_keeps_proportions(name: str, height: int, width: int) -> None:
    variant = VARIANTS[name]
    frame = frame_of(variant, height, width)
    size = variant.input_size
    assert 1 <= frame.resized_height <= size
    assert 1 <= frame.resized_width <= size
    assert max(frame.resized_height, frame.resized_width) == size
    if variant.preprocessing in (Preprocessing.SAM, Preprocessing.LITE_MEDSAM):
        exact = np.array([height, width]) * size / max(height, width)
        assert np.abs([frame.resized_height, frame.resized_width] - exact.clip(1)).max() <= 0.5
    # The image's far corner is the resized image's.
    sx, sy = frame.scale
    assert (width * sx, height * sy) == pytest.approx((frame.resized_width, frame.resized_height))


@quick
@given(st.sampled_from(NAMES), sides, sides, st.integers(0, 2**31))
def test_inputs_have_their_shape_and_stay_in_their_range(
    name: str, height: int, width: int, seed: int
) -> None:
    variant = VARIANTS[name]
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    x, _ = to_input(variant, rgb)
    low, high = input_range(variant)
    assert x.shape == (1, 3, variant.input_size, variant.input_size)
    assert x.dtype == torch.float32
    assert (x >= low.view(3, 1, 1) - FLOAT).all()
    assert (x <= high.view(3, 1, 1) + FLOAT).all()


@st.composite
def boxed(draw: st.DrawFn) -> tuple[int, int, tuple[int, int, int, int]]:
    """An image's height and width, and a box of at least 12 pixels a side in it."""
    height, width = draw(st.integers(60, 300)), draw(st.integers(60, 300))
    x0, y0 = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
    return height, width, (x0, y0, draw(st.integers(x0 + 12, width)), draw(st.integers(y0 + 12, height)))


@quick
@given(st.sampled_from(NAMES), boxed())
def test_a_box_lies_in_the_input_where_the_scale_says(
    name: str, case: tuple[int, int, tuple[int, int, int, int]]
) -> None:
    height, width, box = case
    x, frame = to_input(VARIANTS[name], rectangle(height, width, box))
    if box == (0, 0, width, height):
        return  # white all over: MedSAM's min-max makes it black
    low, high = input_range(VARIANTS[name])
    ys, xs = np.nonzero((x[0, 0] > (low[0] + high[0]) / 2).numpy())
    if VARIANTS[name].preprocessing is Preprocessing.SAM:
        # Zero padding is the mean's grey, brighter than black but not than half.
        assert ys.max() < frame.resized_height
        assert xs.max() < frame.resized_width
    found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    scale = np.array(frame.scale * 2)
    assert (np.abs(found - np.array(box) * scale) <= EDGE * np.maximum(scale, 1)).all()


@quick
@given(st.sampled_from(NAMES), boxed())
def test_a_mask_comes_back_where_it_was(name: str, case: tuple[int, int, tuple[int, int, int, int]]) -> None:
    height, width, box = case
    variant = VARIANTS[name]
    frame = frame_of(variant, height, width)
    low_size = variant.mask_side
    # Signed distance to the box at the centres of low-resolution pixels, the mask a perfect model would draw.
    sx, sy = (s / variant.mask_cell for s in frame.scale)
    x0, y0, x1, y1 = box
    centres = torch.arange(low_size) + 0.5
    dx = torch.minimum(centres - x0 * sx, x1 * sx - centres)
    dy = torch.minimum(centres - y0 * sy, y1 * sy - centres)
    logits = torch.minimum(dx[None, :], dy[:, None])[None, None]
    back = to_image(logits, frame)
    assert back.shape == (1, 1, height, width)
    ys, xs = np.nonzero((back[0, 0] > 0).numpy())
    found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    coarse = np.array([1 / sx, 1 / sy] * 2)
    # Half a low-resolution pixel, and half an image pixel for its own rounding; the image's edge is repeated.
    assert (np.abs(found - np.array(box)) <= 0.5 * coarse + 0.5 + FLOAT).all()


def test_sam_pads_right_and_bottom_with_the_mean() -> None:
    rgb = np.full((100, 200, 3), 255, dtype=np.uint8)
    x, frame = to_input(VARIANTS["sam_b_1024"], rgb)
    assert (frame.resized_height, frame.resized_width) == (512, 1024)
    white = (255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    assert torch.allclose(x[0, :, :512], white.view(3, 1, 1).expand(3, 512, 1024), atol=FLOAT)
    assert (x[0, :, 512:] == 0).all()


def test_sam_med2d_takes_nearest_pixels() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (97, 301, 3), dtype=np.uint8)
    x, _ = to_input(VARIANTS["sam_med2d_b"], rgb)
    rows = [y * 97 // 256 for y in range(256)]
    columns = [c * 301 // 256 for c in range(256)]
    expected = (rgb[rows][:, columns].astype(np.float64) - PIXEL_MEAN) / PIXEL_STD
    assert np.abs(x[0].permute(1, 2, 0).numpy() - expected).max() < FLOAT


def test_medsam_spans_zero_to_one_and_an_edge_costs_no_contrast() -> None:
    """Cubics overshoot beside an edge; black and white areas must still be 0 and 1."""
    x, _ = to_input(VARIANTS["medsam"], rectangle(64, 64, (0, 0, 32, 64)))
    assert float(x.min()) == 0
    assert float(x.max()) == 1
    assert torch.allclose(x[..., :400], torch.ones(()), atol=FLOAT)
    assert (to_input(VARIANTS["medsam"], np.full((8, 8, 3), 9, dtype=np.uint8))[0] == 0).all()


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_area_means_are_weighted_by_what_is_covered(length: int, size: int, seed: int) -> None:
    x = np.random.default_rng(seed).random((2, length))
    found = area_resized(torch.from_numpy(x), size, 1).numpy()
    for target in range(size):
        low, high = target * length / size, (target + 1) * length / size
        shares = np.array([max(0.0, min(high, i + 1) - max(low, i)) for i in range(length)])
        assert found[:, target] == pytest.approx(x @ shares / shares.sum())


@pytest.mark.parametrize("colours", [1, 3])
def test_lite_medsam_spans_zero_to_one_and_pads_with_zeros(colours: int) -> None:
    """Longest side to 256 by areas' means, in 8 bit; least to 0, greatest to 1; zeros below or right."""
    rgb = np.random.default_rng(0).integers(100, 151, (512, 300, colours), dtype=np.uint8)
    rgb = np.repeat(rgb, 3 // colours, axis=2)
    x, frame = to_input(VARIANTS["lite_medsam"], rgb)
    assert (frame.resized_height, frame.resized_width, frame.mask_cell) == (256, 150, 1)
    means = rgb.reshape(256, 2, 150, 2, 3).mean((1, 3))
    means = np.floor(means + 0.5)
    expected = (means - means.min()) / (means.max() - means.min())
    assert np.abs(x[0, :, :, :150].permute(1, 2, 0).numpy() - expected).max() < FLOAT
    assert (x[..., 150:] == 0).all()


def test_efficient_sam_squashes_without_smoothing() -> None:
    rgb = np.zeros((4096, 16, 3), dtype=np.uint8)
    rgb[1::4] = 200  # of four rows, the middle two count
    x, _ = to_input(VARIANTS["efficient_sam_ti"], rgb)
    expected = (100 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    assert torch.allclose(x, expected.view(1, 3, 1, 1).expand_as(x), atol=FLOAT)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_the_inputs_own_size_is_only_normalised(name: str) -> None:
    variant: Variant = VARIANTS[name]
    rgb = np.random.default_rng(1).integers(0, 256, (variant.input_size,) * 2 + (3,), dtype=np.uint8)
    rgb[0, 0], rgb[0, 1] = 0, 255
    x, frame = to_input(variant, rgb)
    if variant.preprocessing in (Preprocessing.MEDSAM, Preprocessing.LITE_MEDSAM):
        expected = rgb / 255
    else:
        expected = (rgb - np.array(PIXEL_MEAN)) / PIXEL_STD
    assert np.abs(x[0].permute(1, 2, 0).numpy() - expected).max() < FLOAT
    assert frame.scale == (1.0, 1.0)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_other_arrays_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 and not empty"):
        to_input(VARIANTS["tiny"], bad)
