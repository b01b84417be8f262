"""What an ideal person, or SAM's or SAM-Med2D's evaluation, says to a model about an object.

All of it follows from the true mask and, for corrections, from the model's own answers: the same data gives
the same prompts, whatever else is in the data and in whatever order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from monailabel_dfqsam.evaluation.items import EvaluationError
from monailabel_dfqsam.masks import Mask, interior_pixel, tight_box
from monailabel_dfqsam.segmentation.segmenter import Prediction, Prompts

Predict = Callable[[Prompts], Prediction]
"""`Segmenter.predict` on one embedding."""

# SAM-Med2D's frame, in whose pixels it moves its boxes, and by how many at most.
_FRAME = 256
_MOST_JITTER = 5
_JITTER_OF_SIDE = 0.5


def wrong_pixel(wrong: Mask, truth: Mask, number: int) -> tuple[int, int]:
    """(row, column) of the pixel that the correction of this number points at.

    It is one of the wrong pixels [H, W], each as likely as any other, as SAM-Med2D draws it. All pixels of
    the image are drawn an order, and the first wrong one in it is taken: so two models whose errors are
    nearly the same get the same click nearly always, and the agreement of their masks compares the models
    and not two draws.
    """
    order = _random(truth, number).random(truth.shape)
    row, column = np.unravel_index(int(np.where(wrong, order, -1.0).argmax()), truth.shape)
    return int(row), int(column)


def middle_of_wrong(wrong: Mask, truth: Mask, number: int) -> tuple[int, int]:
    """(row, column) of the wrong pixel farthest from all that is right, or wrong the other way.

    Of what is missing and what is too much, [H, W] together, it is the middle of where either is widest.
    """
    return interior_pixel(wrong & truth, wrong & ~truth)


@dataclass(frozen=True)
class Dialogue:
    """How a kind of prompt goes: the first one by the true mask [H, W], then so many corrective points.

    Each lies where `corrected_at` says, of the wrong pixels, the true mask and the correction's number.
    """

    first: Callable[[Mask], Prompts]
    corrections: int = 0
    corrected_at: Callable[[Mask, Mask, int], tuple[int, int]] = wrong_pixel


def box_prompt(truth: Mask) -> Prompts:
    """The tight box."""
    return Prompts(box=tight_box(truth))


def jittered_prompt(truth: Mask) -> Prompts:
    """The tight box moved at random as SAM-Med2D moves its boxes, cut to the image.

    In a frame of 256 × 256 pixels both axes move by a whole number m of pixels, −M ≤ m < M, where M is 5 or,
    if that is less, half the box's shorter side; its size stays (SAM-Med2D `get_boxes_from_mask` with its
    defaults, which are those of its training; its published box figures are of tight boxes).
    """
    height, width = truth.shape
    scale = np.array([width, height, width, height]) / _FRAME
    box = tight_box(truth) / scale
    most = min(_MOST_JITTER, int(_JITTER_OF_SIDE * min(box[2] - box[0], box[3] - box[1])))
    if most:
        box += np.tile(_random(truth, 0).integers(-most, most, size=2), 2)
    return Prompts(box=np.clip(box * scale, 0, [width, height, width, height]))


def point_prompt(truth: Mask) -> Prompts:
    """One click in the object's middle, on the pixel farthest from its border."""
    row, column = interior_pixel(truth)
    return Prompts(points=np.array([[column + 0.5, row + 0.5]]), labels=np.array([1]))


PROMPTS: dict[str, Dialogue] = {
    "box": Dialogue(box_prompt),
    "jittered": Dialogue(jittered_prompt),
    "point": Dialogue(point_prompt),
    "points5": Dialogue(point_prompt, corrections=4),
    "clicks5": Dialogue(point_prompt, corrections=4, corrected_at=middle_of_wrong),
}
"""By name: the tight box, the box moved at random, one click, and five: that one and four corrective ones, on
any wrong pixel as SAM-Med2D draws them, or in the middle of what is wrong, as SAM's evaluation and people do.
"""


def dialogues(names: list[str]) -> dict[str, Dialogue]:
    """The dialogues of these names.

    Raises:
        EvaluationError: when one is not known, or there is none.
    """
    unknown = [name for name in names if name not in PROMPTS]
    if unknown or not names:
        raise EvaluationError(f"prompts must be of {', '.join(PROMPTS)}, not '{','.join(unknown)}'")
    return {name: PROMPTS[name] for name in names}


def converse(predict: Predict, dialogue: Dialogue, truth: Mask) -> tuple[Mask, Prompts]:
    """A model's last answer in a dialogue about an object, and all that it was told.

    Each corrective point lies on a pixel that the answer before has wrong, inside the object or outside it as
    the truth is there; all points so far and the answer's own logits are the next prompt. It ends early when
    an answer is right in every pixel.

    Args:
        predict: what answers.
        truth: [H, W] bool, not empty.

    Returns:
        [H, W] bool, and the last prompts without the mask prompt.
    """
    prompts = dialogue.first(truth)
    answer = predict(prompts)
    for number in range(1, dialogue.corrections + 1):
        wrong = answer.mask != truth
        if not wrong.any():
            break
        row, column = dialogue.corrected_at(wrong, truth, number)
        prompts = replace(
            prompts,
            points=np.concatenate([prompts.points, [[column + 0.5, row + 0.5]]]),
            labels=np.append(prompts.labels, int(truth[row, column])),
        )
        answer = predict(replace(prompts, mask_logits=answer.low_res_logits))
    return answer.mask, prompts


def _random(truth: Mask, number: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(np.packbits(truth).tobytes()), *truth.shape, number])
