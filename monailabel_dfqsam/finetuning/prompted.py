"""What is learned: masks for prompts that follow from the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.transforms import (
    Compose,
    RandAffined,
    RandFlipd,
    Randomizable,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Transform,
)
from numpy.typing import NDArray
from torch import Tensor

from monailabel_dfqsam.finetuning.samples import LEAST_PIXELS
from monailabel_dfqsam.masks import tight_box
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.preprocess import Frame, to_input
from monailabel_dfqsam.sam.variants import Variant

CLICKS = 3
"""Into an object, each asked for by itself, beside one box."""
JITTER = 0.05
"""By how much of its side each edge of a box may lie off, as people draw it."""
_KEYS = ("image", "mask")


@dataclass(frozen=True)
class Asked:
    """An object as the model is asked for it, P times; S is the side of its input and M of its masks.

    Attributes:
        image: [1, 3, S, S] float32.
        target: [1, 1, M, M] float32, how much of each pixel the object covers.
        boxes: [P, 4] float32 (x0, y0, x1, y1) in pixels of the input, or None.
        points: [P, 2] float32 (x, y) likewise, or None.
    """

    image: Tensor
    target: Tensor
    boxes: Tensor | None
    points: Tensor | None

    def to(self, device: torch.device) -> Asked:
        """The same on a device."""
        moved = (None if part is None else part.to(device) for part in (self.boxes, self.points))
        return Asked(self.image.to(device), self.target.to(device), *moved)


class Ask(Randomizable, Transform):  # type: ignore[misc]
    """A sample turned, mirrored, moved a little, shown brighter or darker, and prompted, all at random.

    {image, mask} as `samples.Reader` reads them to `Asked`; what lost its object on the way stays as it was.
    """

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._augment = Compose(
            [
                RandFlipd(_KEYS, prob=0.5, spatial_axis=0),
                RandFlipd(_KEYS, prob=0.5, spatial_axis=1),
                RandRotate90d(_KEYS, prob=0.5, max_k=1),
                RandAffined(
                    _KEYS, prob=0.5, rotate_range=0.26, scale_range=(0.15, 0.15),
                    mode=("bilinear", "nearest"), padding_mode="zeros",
                ),
                RandScaleIntensityd(("image",), factors=0.2, prob=0.5),
                RandShiftIntensityd(("image",), offsets=20.0, prob=0.5),
            ]
        )  # fmt: skip

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Ask:
        """As MONAI's; the same state draws the same."""
        super().set_random_state(seed, state)
        self._augment.set_random_state(state=self.R)
        return self

    def __call__(self, data: Mapping[str, NDArray[np.float32]]) -> list[Asked]:
        changed = self._augment(dict(data))
        if int((changed["mask"] > 0.5).sum()) < LEAST_PIXELS:
            changed = data
        return asked(self._variant, changed["image"], changed["mask"], self.R)


def asked(
    variant: Variant, image: NDArray[np.float32], mask: NDArray[np.float32], draw: np.random.RandomState
) -> list[Asked]:
    """Prompts for an object at random: a box drawn roughly, and `CLICKS` anywhere in the object.

    Args:
        image: [3, H, W] in 0 … 255.
        mask: [1, H, W], more than 0 in the object, which is not empty.
    """
    inside = np.asarray(mask)[0] > 0.5
    rgb = np.ascontiguousarray(np.asarray(image).clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0))
    x, frame = to_input(variant, rgb)
    target = _target(inside, frame)
    box = tight_box(inside)
    off = draw.uniform(-JITTER, JITTER, 4) * np.tile(box[2:] - box[:2], 2)
    height, width = inside.shape
    box = np.clip(box + off, 0, [width, height, width, height])
    clicks = random_pixels(inside, CLICKS, draw)
    return [
        Asked(x, target, _scaled(box, frame).view(1, 4), None),
        Asked(x, target, None, _scaled(clicks, frame)),
    ]


def random_pixels(inside: NDArray[np.bool_], count: int, draw: np.random.RandomState) -> NDArray[np.float64]:
    """[count, 2] (x, y), middles of pixels of a mask [H, W] that is not empty, each as likely as another."""
    rows, columns = np.nonzero(inside)
    at = draw.randint(len(rows), size=count)
    return np.stack([columns[at] + 0.5, rows[at] + 0.5], axis=1)


def answer(sam: Sam, embedding: Tensor, one: Asked) -> tuple[Tensor, Tensor]:
    """The masks that count, for each of P prompts.

    Args:
        embedding: [1, C, G, G] float32 of `one.image`.

    Returns:
        logits [P, K, M, M] and predicted IoUs [P, K]: the single answer, then the three candidates where the
        model has them.
    """
    logits, scores = sam.predict(embedding, points=one.points, boxes=one.boxes)
    count = 1 if sam.variant.one_mask else logits.shape[1]
    return logits[:, :count], scores[:, :count]


class PromptLoss:
    """Dice and cross entropy (MONAI's) of the single answer and of the best candidate; their predicted IoUs'
    squared error.

    One click may mean a part or the whole: a candidate that is not the best is left in peace.
    """

    def __init__(self) -> None:
        self._loss = DiceCELoss(sigmoid=True)

    def __call__(self, logits: Tensor, scores: Tensor, target: Tensor) -> Tensor:
        """A number, the mean over prompts; arguments as `answer` and `Asked` have them."""
        reached = ious(logits.detach(), target)
        target = target.expand(len(logits), -1, -1, -1)
        loss: Tensor = self._loss(logits[:, :1], target)
        if logits.shape[1] > 1:
            best = 1 + reached[:, 1:].argmax(1)
            loss = loss + self._loss(logits[torch.arange(len(best)), best][:, None], target)
        return loss + F.mse_loss(scores, reached)


def ious(logits: Tensor, target: Tensor) -> Tensor:
    """[P, K] float32, IoU of each of [P, K, M, M] logits with [1, 1, M, M]."""
    hit, truth = logits > 0, target > 0.5
    both, either = (hit & truth).flatten(2).sum(2), (hit | truth).flatten(2).sum(2)
    return both / either.clamp_min(1)


def _target(inside: NDArray[np.bool_], frame: Frame) -> Tensor:
    mask = torch.from_numpy(inside)[None, None].float()
    size = (frame.resized_height, frame.resized_width)
    mask = F.interpolate(mask, size, mode="bilinear", antialias=True)
    side = frame.input_size
    mask = F.pad(mask, (0, side - size[1], 0, side - size[0]))
    return F.avg_pool2d(mask, frame.mask_cell)


def _scaled(places: Any, frame: Frame) -> Tensor:
    """[N, 2] (x, y) of the image in the input, less what the prompt encoder adds to reach pixels' centres."""
    return torch.from_numpy(frame.places(places) - 0.5).float()
