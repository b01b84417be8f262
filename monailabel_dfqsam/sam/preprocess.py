"""Pixels to model input and back, as each family's own evaluation does it.

Two frames occur: the image, H×W pixels, and the model input, S×S pixels. `Frame` maps between them; points
are (x, y) with pixel centres at +0.5, so that a frame change is a plain multiplication.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from monailabel_dfqsam.sam.variants import Preprocessing, Variant

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
MASK_LOGIT = 10.0
"""About what a mask decoder puts out where it is sure."""


@dataclass(frozen=True)
class Frame:
    """Where an image lies in the model input: its size and the size it was resized to, in pixels.

    Attributes:
        height, width: of the image as the model sees it.
        mask_cell: side of a mask prompt's pixel, and of the decoder's masks', in pixels of the input.
        transposed: the model sees the image's rows as columns: a volume's slice [I, J] as people see it.
    """

    height: int
    width: int
    resized_height: int
    resized_width: int
    input_size: int
    mask_cell: int = 4
    transposed: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) model-input pixels per image pixel, as the model sees them."""
        return self.resized_width / self.width, self.resized_height / self.height

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of the image, as the caller has it."""
        return (self.height, self.width) if self.transposed else (self.width, self.height)

    def places(self, xy: NDArray[Any]) -> NDArray[np.float64]:
        """[N, 2] (x, y) in pixels of the image to pixels of the model input."""
        seen = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
        moved: NDArray[np.float64] = (seen[:, ::-1] if self.transposed else seen) * np.array(self.scale)
        return moved


def frame_of(variant: Variant, height: int, width: int, transposed: bool = False) -> Frame:
    """The frame of an image that a variant's model sees as H×W."""
    size = rows = columns = variant.input_size
    if variant.preprocessing in (Preprocessing.SAM, Preprocessing.LITE_MEDSAM):
        scale = size / max(height, width)
        # A side that is shorter than half a pixel of the input still gets one.
        rows, columns = (max(1, int(side * scale + 0.5)) for side in (height, width))
    return Frame(height, width, rows, columns, size, variant.mask_cell, transposed)


def normalize(rgb: Tensor) -> Tensor:
    """(rgb − mean) / std for [..., 3, H, W] float in [0, 255]."""
    mean = rgb.new_tensor(PIXEL_MEAN).view(3, 1, 1)
    std = rgb.new_tensor(PIXEL_STD).view(3, 1, 1)
    return (rgb - mean) / std


def input_range(variant: Variant) -> tuple[Tensor, Tensor]:
    """Lowest and highest value a model input can take, each [3] float: black and white, preprocessed."""
    black, white = torch.zeros(3, 1, 1), torch.full((3, 1, 1), 255.0)
    if variant.preprocessing in (Preprocessing.MEDSAM, Preprocessing.LITE_MEDSAM):
        return torch.zeros(3), torch.ones(3)
    return normalize(black).flatten(), normalize(white).flatten()


def to_input(variant: Variant, rgb: NDArray[np.uint8], transposed: bool = False) -> tuple[Tensor, Frame]:
    """An image as the model takes it.

    Args:
        rgb: [H, W, 3] uint8.
        transposed: as in `Frame`.

    Returns:
        [1, 3, S, S] float32 and the frame.

    Raises:
        ValueError: when the array is not [H, W, 3] uint8 or is empty.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or rgb.size == 0:
        raise ValueError(f"an image must be [H, W, 3] uint8 and not empty, not {list(rgb.shape)} {rgb.dtype}")
    rgb = rgb.transpose(1, 0, 2) if transposed else rgb
    frame = frame_of(variant, rgb.shape[0], rgb.shape[1], transposed)
    x = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None].float()
    target = (frame.resized_height, frame.resized_width)
    kind = variant.preprocessing
    if kind is Preprocessing.SAM_MED2D:
        return F.interpolate(normalize(x), size=target, mode="nearest"), frame
    if kind is Preprocessing.MEDSAM:
        # Cubics overshoot at edges; unclipped, that would narrow the contrast of everything else.
        darkest, brightest = x.min(), x.max()
        x = F.interpolate(x, size=target, mode="bicubic", align_corners=False, antialias=True)
        return _min_max(x.clamp(darkest, brightest)), frame
    if kind is Preprocessing.LITE_MEDSAM:
        # Of a grey image, which CT and MR are, one colour tells all.
        x = x[:, :1] if bool((rgb == rgb[:, :, :1]).all()) else x
        # Its evaluation resizes images of 8 bit to such, halves up where sides are halved.
        x = area_resized(area_resized(x, target[0], 2), target[1], 3)
        x = _min_max((x + 0.5).floor()).expand(-1, 3, -1, -1).contiguous()
    else:
        smooth = kind is not Preprocessing.EFFICIENT_SAM
        x = normalize(F.interpolate(x, size=target, mode="bilinear", align_corners=False, antialias=smooth))
    size = frame.input_size
    return F.pad(x, (0, size - target[1], 0, size - target[0])), frame


def _min_max(x: Tensor) -> Tensor:
    low, high = x.min(), x.max()
    return (x - low) / (high - low).clamp_min(1e-8)


def area_resized(x: Tensor, size: int, axis: int) -> Tensor:
    """Resized along an axis: each new pixel is the mean of what it covers, parts of pixels by their share.

    `torch.nn.functional.interpolate` with 'area' counts every pixel touched as a whole one.

    Args:
        x: float of any shape.
        size: new pixels along the axis.
    """
    x = x.movedim(axis, -1)
    length = x.shape[-1]
    before = F.pad(x.double().cumsum(-1), (1, 0))
    edges = torch.linspace(0, length, size + 1, dtype=torch.float64)
    whole = edges.long().clamp_max(length - 1)
    sums = before[..., whole] + (edges - whole) * x[..., whole]
    return (sums.diff(dim=-1) * (size / length)).to(x.dtype).movedim(-1, axis)


def to_image(low_res_masks: Tensor, frame: Frame) -> Tensor:
    """Mask logits in the image's frame.

    Args:
        low_res_masks: [B, K, M, M] float logits, M = S / `frame.mask_cell`.

    Returns:
        [B, K, H, W] float logits, bilinear.
    """
    size = frame.input_size
    full = F.interpolate(low_res_masks, size=(size, size), mode="bilinear", align_corners=False)
    full = full[..., : frame.resized_height, : frame.resized_width]
    seen = F.interpolate(full, size=(frame.height, frame.width), mode="bilinear", align_corners=False)
    return seen.mT if frame.transposed else seen


def to_low_res(mask: NDArray[np.bool_], frame: Frame) -> Tensor:
    """A mask of the image as the mask prompt that a model of this frame takes; `to_image` leads back.

    Args:
        mask: [H, W] bool.

    Returns:
        [1, 1, M, M] float32 logits, M = S / `frame.mask_cell`, `MASK_LOGIT` well inside and minus that well
        outside.
    """
    seen = mask.T if frame.transposed else mask
    signed = torch.from_numpy(np.where(seen, MASK_LOGIT, -MASK_LOGIT)).float()[None, None]
    inner = F.interpolate(
        signed, size=(frame.resized_height, frame.resized_width), mode="bilinear", antialias=True
    )
    size = frame.input_size
    padding = (0, size - frame.resized_width, 0, size - frame.resized_height)
    full = F.pad(inner, padding, value=-MASK_LOGIT)
    side = size // frame.mask_cell
    return F.interpolate(full, size=(side, side), mode="bilinear", antialias=True)
