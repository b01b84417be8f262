"""Views of images to calibrate on."""

from __future__ import annotations

import torch

from monailabel_dfqsam.quantization.views import views


def _images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 4 - 2


def test_no_views_are_the_images_themselves() -> None:
    assert torch.equal(views(_images(), 0), _images())


def test_views_are_many_different_and_repeatable() -> None:
    found = views(_images(), 4)
    assert found.shape == (8, 3, 64, 64)
    assert torch.equal(found, views(_images(), 4))
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])


def test_views_stay_between_black_and_white_and_every_second_one_is_cut_out() -> None:
    images = _images()
    found = views(images, 6)
    low, high = images.amin((0, 2, 3)).view(3, 1, 1), images.amax((0, 2, 3)).view(3, 1, 1)
    assert ((found >= low - 1e-5) & (found <= high + 1e-5)).all()
    black = ((found - low) / (high - low) < 0.01).all(1).float().mean((1, 2))
    assert float(black[1::2].min()) > 0
    assert float(black[1::2].mean()) > 0.1
    assert float(black[::2].mean()) < 0.1


def test_one_grey_image_gives_grey_views() -> None:
    found = views(torch.full((1, 3, 32, 32), 0.5), 2)
    assert torch.allclose(found, torch.full_like(found, 0.5))
