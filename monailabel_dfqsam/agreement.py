"""How near two models' masks are, and how near is near enough: what is said of a quantized model's fidelity.

The yardstick is full precision itself, when every pixel of an image moves by at most one grey level of 256:
a difference that nobody sees, and after which a mean agreement of 1 is nothing to ask for.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict


class Agreement(TypedDict):
    """IoU of two models' masks by the same prompts, 0 … 1: mean and median."""

    mean_iou: float
    median_iou: float


class Fidelity(Agreement):
    """Agreement with full precision over `n` masks by an engine, 0 of none; NaN where not measured.

    Attributes:
        grey_level: full precision's with itself, one grey level away.
        as_near: share of the masks, 0 … 1, that are at least as near to full precision's as its own are then.
    """

    n: int
    engine: str
    grey_level: Agreement
    as_near: float


def agreement(ious: Sequence[float]) -> Agreement:
    """Mean and median; 0 of none."""
    if not ious:
        return {"mean_iou": 0.0, "median_iou": 0.0}
    return {"mean_iou": statistics.fmean(ious), "median_iou": statistics.median(ious)}


_UNKNOWN = "unknown, for full precision itself finds none of the objects it is measured on"


def shortfall(fidelity: Fidelity, least: float) -> str:
    """Why a model is not faithful enough, a sentence without its end; "" where it is.

    Args:
        least: share of what full precision agrees with itself one grey level away, at least 0; 0 asks for
            nothing.
    """
    mean, itself = fidelity["mean_iou"], fidelity["grey_level"]["mean_iou"]
    # Written so that NaN is too little.
    if least == 0 or (fidelity["n"] > 0 and mean >= least * itself):
        return ""
    if fidelity["n"] == 0:
        return f"fidelity is {_UNKNOWN}"
    return (
        f"fidelity {mean:.3f} is below {least * itself:.3f}, which is {least:g} of what full precision "
        f"agrees with itself one grey level away, {itself:.3f}"
    )


def in_words(fidelity: Fidelity) -> str:
    """Fidelity beside its yardstick, in words."""
    if fidelity["n"] == 0:
        return _UNKNOWN
    itself = fidelity["grey_level"]
    return (
        f"{fidelity['mean_iou']:.3f} (median {fidelity['median_iou']:.3f}) mean IoU with full precision on "
        f"{fidelity['n']} masks; full precision one grey level away {itself['mean_iou']:.3f} "
        f"(median {itself['median_iou']:.3f}), no nearer on {fidelity['as_near']:.0%} of them"
    )


def one_grey_level_away(rgb: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """An image [H, W, 3], every pixel moved by −1, 0 or +1 at random, all colours alike, within 0 … 255."""
    steps = np.random.default_rng(seed).integers(-1, 2, (*rgb.shape[:2], 1), dtype=np.int16)
    moved: NDArray[Any] = (rgb + steps).clip(0, 255).astype(np.uint8)
    return moved
