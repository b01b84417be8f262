"""Phantoms of other kinds, for training."""

from __future__ import annotations

import pytest
import torch

from monailabel_dfqsam.pretraining import scenes
from monailabel_dfqsam.pretraining.phantoms import PhantomClass
from monailabel_dfqsam.pretraining.scenes import scene
from monailabel_dfqsam.pretraining.targets import MASKS_PER_IMAGE, MIN_AREA, example_of


@pytest.mark.parametrize("draw", [draw for _, draw, _ in scenes._SCENES])
@pytest.mark.parametrize("seed", range(4))
def test_every_kind_has_objects_to_point_at(draw: object, seed: int) -> None:
    assert callable(draw)
    labels = draw(torch.Generator().manual_seed(seed), 256)
    assert set(labels.regions.unique().tolist()) == set(range(len(labels.classes)))
    assert torch.equal(labels.parents[labels.parents], labels.parents)
    assert set(labels.semantic.unique().tolist()) - {int(PhantomClass.BACKGROUND)}
    example = example_of(torch.Generator().manual_seed(seed), labels, torch.zeros(3, 256, 256))
    assert example.masks.shape == (MASKS_PER_IMAGE, 256, 256)
    assert (example.masks.sum((1, 2)) >= MIN_AREA).all()


def test_scenes_are_images_some_in_colour() -> None:
    coloured = 0
    for seed in range(24):
        labels, image = scene(torch.Generator().manual_seed(seed))
        again = scene(torch.Generator().manual_seed(seed))
        assert torch.equal(image, again[1])
        assert torch.equal(labels.regions, again[0].regions)
        assert image.shape == (3, 256, 256)
        assert image.min() >= 0
        assert image.max() <= 1
        assert image.std() > 0.01
        coloured += bool((image[0] != image[2]).any())
    assert 2 < coloured < 18


def test_vessels_branch_and_are_thin() -> None:
    for seed in range(6):
        labels = scenes._vessels(torch.Generator().manual_seed(seed), 256)
        tree = labels.semantic == int(PhantomClass.TUBE)
        grown = torch.nn.functional.max_pool2d((~tree)[None].float(), 15, stride=1, padding=7)[0] > 0
        assert tree.sum() > 200
        assert grown[tree].float().mean() > 0.95  # hardly a place farther than 7 pixels from the outside


def test_what_lies_over_an_image_leaves_most_of_it_as_it_was() -> None:
    image = torch.full((3, 128, 128), 0.5)
    for seed in range(8):
        seen = scenes._overlaid(torch.Generator().manual_seed(seed), image)
        changed = (seen - image).abs()
        assert 0 < float(changed.max()) <= 0.5
        assert float(changed.median()) < 0.15
        assert torch.equal(seen[0], seen[2])


def test_depth_shows_within_regions_and_not_in_what_is_flat() -> None:
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        labels = scenes._chest(g, 128)
        image = torch.full((3, 128, 128), 0.5)
        seen = scenes._shaded(g, image, labels)
        assert torch.equal(seen[0], seen[1])
        assert float(seen.min()) >= 0
        assert float(seen.max()) <= 1
        assert float((seen - image).abs().max()) > 0
