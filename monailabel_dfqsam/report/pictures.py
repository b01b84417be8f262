"""Pictures as PNG data URIs: what the model was calibrated on, and the labels that evolved in it."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from monailabel_dfqsam.config import Calibration
from monailabel_dfqsam.pretraining.phantoms import PhantomClass
from monailabel_dfqsam.report.charts import spread
from monailabel_dfqsam.sam.preprocess import input_range
from monailabel_dfqsam.synthesis.label_evolution import regions

if TYPE_CHECKING:
    from monailabel_dfqsam.sam.variants import Variant
    from monailabel_dfqsam.synthesis.label_evolution import EvolutionStep
    from monailabel_dfqsam.synthesis.synthesize import Synthesis

MAX_IMAGES = 8
MAX_DRAWN = 5
MAX_STRIPS = 4
MAX_STEPS = 6  # of one row of the page
PICTURE_SIDE = 448  # pixels, twice what the page shows, for dense screens
STRIP_SIDE = 256
TINT = 0.35  # of a label's colour over the image; its outline is the colour itself


def calibration_pictures(
    images: Tensor, drawn: int, variant: Variant, calibration: Calibration
) -> list[dict[str, str]]:
    """{src, caption} of the first of some images [N, 3, S, S], the last `drawn` of which were drawn.

    None is of a folder, which may show a patient.
    """
    count = len(images) - drawn
    kinds = {Calibration.SYNTHETIC: "synthetic image", Calibration.GAUSSIAN: "noise image"}
    shown = [(kinds[calibration], images[:count], MAX_IMAGES)] if calibration in kinds else []
    shown.append(("drawn picture", images[count:], MAX_DRAWN))
    return [
        {"src": _png(pixels), "caption": f"{kind} {index} of {len(own)}"}
        for kind, own, most in shown
        for index, pixels in enumerate(_to_rgb(own[:most], variant), start=1)
    ]


def label_colours(count: int) -> NDArray[np.uint8]:
    """[count + 1, 3] uint8: black for no label, then well separated hues."""
    golden = 0.618034
    hues = [(0.52 + golden * index) % 1.0 for index in range(count)]
    colours = [(0.0, 0.0, 0.0), *(colorsys.hsv_to_rgb(hue, 0.6, 0.95) for hue in hues)]
    return (np.array(colours) * 255).astype(np.uint8)


def evolution_strips(synthesis: Synthesis, classes: Sequence[str]) -> list[dict[str, Any]]:
    """{title, steps} of the first images, a step {src, iteration, score, words}.

    Args:
        classes: names by class; a class without one is just counted.
    """
    strips = []
    total = len(synthesis.evolution)
    for index, steps in enumerate(synthesis.evolution[:MAX_STRIPS], start=1):
        if steps:
            chosen = [steps[i] for i in spread(len(steps), MAX_STEPS)]
            strips.append(
                {"title": f"Image {index} of {total}", "steps": [_step(step, classes) for step in chosen]}
            )
    return strips


def class_key(synthesis: Synthesis, classes: Sequence[str]) -> list[dict[str, str]]:
    """{name, colour} of each class that some label map of the evolution holds; empty without names."""
    present = sorted(
        {int(v) for steps in synthesis.evolution for step in steps for v in step.labels.unique()} - {0}
    )
    if not classes:
        return []
    colours = label_colours(max(present, default=0))
    return [{"name": classes[v - 1], "colour": "#" + colours[v].tobytes().hex()} for v in present]


def class_names(variant: Variant) -> list[str]:
    """Names of the auxiliary network's classes, which the embedded model alone has; else empty."""
    return [kind.name.lower() for kind in PhantomClass] if variant.name == "tiny" else []


def drawn_over(image: Tensor, labels: Tensor) -> NDArray[np.uint8]:
    """Labels over an image: each region tinted and outlined in its class's colour.

    Args:
        image: [3, s, s] uint8.
        labels: [g, g] int64, 0 for none, else class + 1; g divides `STRIP_SIDE`.

    Returns:
        [STRIP_SIDE, STRIP_SIDE, 3] uint8.
    """
    size = (STRIP_SIDE, STRIP_SIDE)
    below = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)
    shown = below[0].permute(1, 2, 0).round().byte().numpy()
    index = F.interpolate(labels[None, None].float(), size, mode="nearest")[0, 0]
    # Inside is where all neighbours within two pixels are of the same label.
    highest = F.max_pool2d(index[None, None], 5, 1, 2)[0, 0]
    lowest = -F.max_pool2d(-index[None, None], 5, 1, 2)[0, 0]
    inside = (highest == lowest).numpy()
    kind = index.long().numpy()
    colour = label_colours(int(labels.max()))[kind]
    weight = np.where(kind == 0, 0.0, np.where(inside, TINT, 1.0))[..., None]
    mixed: NDArray[np.uint8] = np.rint((1 - weight) * shown + weight * colour).astype(np.uint8)
    return mixed


def _step(step: EvolutionStep, classes: Sequence[str]) -> dict[str, str]:
    labels = step.labels.detach().cpu()
    found = regions(labels)
    share = float((labels > 0).float().mean())
    return {
        "src": _png(drawn_over(step.image, labels)),
        "iteration": str(step.iteration),
        "score": f"{step.score:.2f}",
        "words": f"{len(found)} region{'s' if len(found) != 1 else ''}, {share:.0%}",
    }


def _png(pixels: NDArray[np.uint8]) -> str:
    """[H, W, 3] uint8 as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_rgb(images: Tensor, variant: Variant) -> NDArray[np.uint8]:
    """Model inputs [N, 3, S, S] as [N, H, W, 3] uint8, at most `PICTURE_SIDE` pixels a side."""
    low, high = (limit.view(3, 1, 1) for limit in input_range(variant))
    unit = ((images.detach().cpu().float() - low) / (high - low)).clamp(0, 1)
    if unit.shape[-1] > PICTURE_SIDE:
        unit = F.interpolate(unit, size=(PICTURE_SIDE, PICTURE_SIDE), mode="area")
    pixels: NDArray[np.uint8] = (unit * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels
