"""How faithful a quantized model is, measured without data: do both models draw the same masks of phantoms?

Phantoms are drawn, of seeds that nothing is trained or calibrated on, and go the way of any image; prompts
are each object's box and a click in its middle. One counts where full precision itself finds the object by
it: what a model was never taught, it does not answer alike twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from monailabel_dfqsam.agreement import Agreement, Fidelity, agreement, one_grey_level_away
from monailabel_dfqsam.config import Progress, silent
from monailabel_dfqsam.masks import interior_pixel, tight_box
from monailabel_dfqsam.pretraining.phantoms import eight_bit
from monailabel_dfqsam.pretraining.targets import make_example
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.preprocess import Frame, frame_of, to_input
from monailabel_dfqsam.segmentation.mask_decoding import channels_last
from monailabel_dfqsam.segmentation.segmenter import Embedding, Prompts, Segmenter, full_precision_segmenter

PHANTOMS = 16
# Far from the seeds of the phantoms that models are trained on, and of those that synthesis looks at.
SEED = 1 << 41
# Full precision finds an object by a mask of this IoU with it, and of so many pixels of the decoder's.
FOUND = 0.5
LEAST_MASK = 12

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Asked:
    """One prompt on the phantom of a number, full precision's mask [S, S] bool, and its IoU with its mask one
    grey level away.
    """

    number: int
    prompts: Prompts
    expected: Mask
    grey_level: float


class FidelityTest:
    """Made once of a model in full precision, it measures the fidelity of any number of quantized ones.

    Attributes:
        images: [N, 3, S, S] float32, the phantoms as the model takes them.
        grey_level: how full precision agrees with itself one grey level away.
        masks: how many are compared; 0 when full precision itself finds nothing.
    """

    def __init__(self, sam: Sam, progress: Progress = silent) -> None:
        """Asks full precision, on the device it is on.

        Args:
            progress: called with stage 'fidelity'.
        """
        self._full = full_precision_segmenter(sam)
        size = sam.variant.input_size
        self._frame: Frame = frame_of(sam.variant, size, size)
        phantoms = _phantoms(size)
        self.images = torch.cat([to_input(sam.variant, rgb)[0] for rgb, _ in phantoms])
        least = LEAST_MASK * sam.variant.mask_cell**2
        self._asked: list[_Asked] = []
        for number, (rgb, masks) in enumerate(phantoms):
            progress("fidelity", number, len(phantoms))
            seen = (self._full.embed(rgb), self._full.embed(one_grey_level_away(rgb, number)))
            self._asked += _found(self._full, number, seen, masks, least)
        progress("fidelity", len(phantoms), len(phantoms))
        self.masks = len(self._asked)
        self.grey_level: Agreement = agreement([one.grey_level for one in self._asked])

    def measure(
        self, embed: Callable[[Tensor], Tensor], engine: str = "", decoder: Segmenter | None = None
    ) -> Fidelity:
        """The fidelity of an image encoder.

        Args:
            embed: normalised images [B, 3, S, S] float32 to embeddings [B, C, G, G] float32.
            engine: what runs it.
            decoder: draws masks out of its embeddings, where that is not full precision's own.
        """
        ious: list[float] = []
        for number in sorted({one.number for one in self._asked}):
            with torch.inference_mode():
                tensor = channels_last(embed(self.images[number : number + 1]))
            embedding = Embedding(tensor, self._frame)
            for one in self._asked:
                if one.number == number:
                    drawn = (decoder or self._full).predict(embedding, one.prompts).mask
                    ious.append(_iou(drawn, one.expected))
        # To the decimals that are told: a small model's masks often differ by less.
        near = [round(iou, 3) >= round(one.grey_level, 3) for iou, one in zip(ious, self._asked, strict=True)]
        return {
            **agreement(ious),
            "n": len(ious),
            "engine": engine,
            "grey_level": self.grey_level,
            "as_near": sum(near) / max(len(near), 1),
        }


@functools.cache
def _phantoms(size: int) -> tuple[tuple[NDArray[np.uint8], tuple[Mask, ...]], ...]:
    """Images [S, S, 3] and their objects' masks, [S, S] bool each."""
    drawn = []
    for seed in range(SEED, SEED + PHANTOMS):
        example = make_example(Generator().manual_seed(seed), size)
        # Where there are few objects, an example has some of them several times.
        masks = {mask.tobytes(): mask.astype(bool) for mask in example.masks.numpy()}
        drawn.append((eight_bit(example.image), tuple(masks.values())))
    return tuple(drawn)


def _found(
    full: Segmenter, number: int, seen: tuple[Embedding, Embedding], masks: tuple[Mask, ...], least: int
) -> list[_Asked]:
    """The prompts by which full precision finds the objects of a phantom, by masks of `least` pixels.

    Args:
        seen: the phantom, and the same one grey level away.
    """
    exact, away = seen
    asked = []
    for mask in masks:
        row, column = interior_pixel(mask)
        click = Prompts(points=np.array([[column + 0.5, row + 0.5]]), labels=np.array([1]))
        for prompts in (Prompts(box=tight_box(mask)), click):
            expected = full.predict(exact, prompts).mask
            if expected.sum() >= least and _iou(expected, mask) >= FOUND:
                moved = full.predict(away, prompts).mask
                asked.append(_Asked(number, prompts, expected, _iou(moved, expected)))
    return asked


def _iou(a: Mask, b: Mask) -> float:
    """Of masks of which one at least is not empty."""
    return int((a & b).sum()) / int((a | b).sum())
