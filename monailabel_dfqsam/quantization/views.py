"""More to calibrate on out of few images: each seen shifted, enlarged, blurred, cut out.

A synthesized image shows what the model knows, but all of it at once: everywhere texture, nowhere the flat
dark surroundings and the soft edges that most images have. Ranges found on it alone are those of no image
that comes later. Views make up for it, and need no more than the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Generator, Tensor

MAX_ZOOM = 4.0
MAX_BLUR = 4 / 256  # standard deviation, as a share of the side
CUT_OUT_CELLS = 4  # of the random field whose sign says what stays
CUT_OUT_BIAS = 0.5  # in its standard deviations: most stays
CUT_OUT_EDGE = 20.0  # steepness of the transition


def views(images: Tensor, count: int) -> Tensor:
    """Several views of each image; the same for the same images.

    Args:
        images: [N, 3, S, S] float32, normalised; their darkest and brightest values count as black and white.
        count: views of each image, the image itself not among them; 0 gives the images as they are.

    Returns:
        [N·count, 3, S, S] float32, or [N, 3, S, S] for no views.
    """
    if count == 0 or len(images) == 0:
        return images
    generator = torch.Generator().manual_seed(0)
    low, high = images.amin((0, 2, 3)).view(3, 1, 1), images.amax((0, 2, 3)).view(3, 1, 1)
    width = (high - low).clamp_min(torch.finfo(images.dtype).tiny)
    found = images.new_empty(len(images) * count, *images.shape[1:])
    for index in range(len(found)):
        unit = (images[index // count] - low) / width
        found[index] = low + _view(unit, generator, cut_out=bool(index % count % 2))[0] * width
    return found


def _view(unit: Tensor, generator: Generator, cut_out: bool) -> Tensor:
    """One view [1, 3, S, S] of an image [3, S, S]; both float32 within 0 … 1."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    size = unit.shape[-1]
    down, right, flip = (int(uniform(0, limit)) for limit in (size, size, 2))
    view = torch.roll(unit, (down, right), (-2, -1))[None]
    view = view.flip(-1) if flip else view
    part = int(size / uniform(1.0, MAX_ZOOM))
    top, left = (int(uniform(0, size - part + 1)) for _ in range(2))
    view = F.interpolate(view[..., top : top + part, left : left + part], (size, size), mode="bilinear")
    sigma = uniform(0.0, MAX_BLUR) * size
    view = torch.from_numpy(ndimage.gaussian_filter(view.numpy(), sigma, axes=(-2, -1), mode="nearest"))
    if cut_out:
        field = torch.randn(1, 1, CUT_OUT_CELLS, CUT_OUT_CELLS, generator=generator) + CUT_OUT_BIAS
        view = view * torch.sigmoid(CUT_OUT_EDGE * F.interpolate(field, (size, size), mode="bicubic"))
    return view
