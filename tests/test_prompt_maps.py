"""What prompts say about each place, against a version that asks one pixel at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monailabel_dfqsam.sam import Sam, build, read_checkpoint
from monailabel_dfqsam.sam.prompt_maps import (
    BACKGROUND,
    BOTTOM_RIGHT,
    CERTAIN,
    FOREGROUND,
    LIKELY,
    NOTHING,
    TOP_LEFT,
    prompt_map,
)
from monailabel_dfqsam.sam.variants import VARIANTS

SIZE = 64
PLACE = st.tuples(st.floats(0, SIZE), st.floats(0, SIZE))


def _one_pixel(
    x: float,
    y: float,
    box: tuple[float, ...] | None,
    clicks: list[tuple[float, float, int]],
    before: float | None,
    cell: int,
) -> float:
    said = 0.0
    if before is not None:
        said = min(max(before, -LIKELY), LIKELY)
    if box is not None:
        x0, y0, x1, y1 = box
        wide, tall = max((x1 - x0) / 2, cell / 2), max((y1 - y0) / 2, cell / 2)
        across, down = abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)
        if before is None:
            said = max(LIKELY * (1 - (across / wide) ** 2 - (down / tall) ** 2), -LIKELY)
        outside = min(max(max(across - wide, down - tall) / cell + 0.5, 0), 1)
        said = (1 - outside) * said - outside * CERTAIN
    for kind, value in ((FOREGROUND, CERTAIN), (BACKGROUND, -CERTAIN)):
        radius = {4: 8.0, 1: 3.5}[cell]
        near = [
            min(max((radius - math.hypot(x - cx, y - cy)) / cell, 0), 1) for cx, cy, k in clicks if k == kind
        ]
        share = max(near, default=0)
        said = (1 - share) * said + share * value
    return said


@settings(max_examples=25, deadline=None)
@given(
    box=st.none() | st.tuples(PLACE, PLACE),
    clicks=st.lists(st.tuples(PLACE, st.sampled_from((FOREGROUND, BACKGROUND))), min_size=1, max_size=3),
    answered=st.booleans(),
    cell=st.sampled_from((1, 4)),
)
def test_map_is_what_each_pixel_says(
    box: tuple[tuple[float, float], ...] | None,
    clicks: list[tuple[tuple[float, float], int]],
    answered: bool,
    cell: int,
) -> None:
    places = [place for place, _ in clicks] + [(0.0, 0.0)]
    kinds = [kind for _, kind in clicks] + [NOTHING]
    corners = None
    if box is not None:
        (xa, ya), (xb, yb) = box
        corners = (min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb))
        places += [corners[:2], corners[2:]]
        kinds += [TOP_LEFT, BOTTOM_RIGHT]
    side = SIZE // cell
    before = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(0)) * 4
    found = prompt_map(
        torch.tensor([places]), torch.tensor([kinds]), before if answered else None, SIZE, side
    )
    flat = [(x, y, kind) for (x, y), kind in clicks]
    for row in range(side):
        for column in range(side):
            earlier = float(before[0, 0, row, column]) if answered else None
            expected = _one_pixel((column + 0.5) * cell, (row + 0.5) * cell, corners, flat, earlier, cell)
            assert float(found[0, 0, row, column]) == pytest.approx(expected, abs=2e-4)


def test_objects_do_not_see_each_others_prompts() -> None:
    places = torch.tensor([[[10.0, 12], [40, 50]], [[30.0, 20], [0, 0]]])
    kinds = torch.tensor([[TOP_LEFT, BOTTOM_RIGHT], [FOREGROUND, NOTHING]])
    together = prompt_map(places, kinds, None, SIZE, SIZE // 4)
    for i in range(2):
        assert torch.equal(
            prompt_map(places[i : i + 1], kinds[i : i + 1], None, SIZE, SIZE // 4)[0], together[i]
        )


def test_only_our_own_models_draw_maps() -> None:
    torch.manual_seed(0)
    sam = Sam(VARIANTS["tiny"]).eval()
    boxes = torch.tensor([[40.0, 60, 120, 200]])
    places, kinds = boxes.view(1, 2, 2) + 0.5, torch.tensor([[TOP_LEFT, BOTTOM_RIGHT]])
    _, dense = sam.prompt_encoder(None, boxes, None)
    expected = sam.prompt_encoder.mask_downscaling(prompt_map(places, kinds, None, 256, 64))  # type: ignore[operator]
    assert torch.equal(dense, expected)
    assert {name for name, variant in VARIANTS.items() if variant.taught_here} == {"tiny", "lite"}


def test_answers_begin_as_said() -> None:
    """Of the same weights, with and without: the difference is the share of the map."""
    checkpoint = read_checkpoint("tiny")
    plain, begun = (
        build(replace(checkpoint, variant=replace(checkpoint.variant, said=said))) for said in (0.0, 0.5)
    )
    image = torch.randn(1, 128, 16, 16, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[40.0, 60, 120, 200]])
    said = prompt_map(
        boxes.view(1, 2, 2) + 0.5, torch.tensor([[TOP_LEFT, BOTTOM_RIGHT]]), None, 256, 64
    ).expand(1, 4, 64, 64)
    masks, scores = begun.predict(image, boxes=boxes)
    without, same_scores = plain.predict(image, boxes=boxes)
    torch.testing.assert_close(masks - without, 0.5 * said, rtol=0, atol=1e-4)
    assert torch.equal(scores, same_scores)
    no_prompt = begun.prompt_encoder(None, None, None)
    positions = begun.prompt_encoder.get_dense_pe()  # type: ignore[operator]
    assert torch.equal(
        begun.mask_decoder.predict_masks(image, positions, *no_prompt)[0],  # type: ignore[operator]
        plain.mask_decoder.predict_masks(image, positions, *no_prompt)[0],  # type: ignore[operator]
    )


def test_nothing_said_is_no_map() -> None:
    torch.manual_seed(0)
    sam = Sam(VARIANTS["tiny"]).eval()
    _, dense = sam.prompt_encoder(None, None, None)
    assert torch.equal(dense, sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand_as(dense))  # type: ignore[union-attr, operator]
