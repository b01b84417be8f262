"""The cheapest forms of an encoder's layers that keep a fidelity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from monailabel_dfqsam.agreement import Fidelity
from monailabel_dfqsam.config import AUTO, Progress
from monailabel_dfqsam.engines.rates import seconds
from monailabel_dfqsam.ops import Form
from monailabel_dfqsam.quantization.calibrate import QuantizedEncoder
from monailabel_dfqsam.quantization.cost import KEPT, encoder_cost, layer_costs
from monailabel_dfqsam.quantization.mixed import harm, possible_forms, quantize_mixed
from monailabel_dfqsam.quantization.precision import chosen, farthest, ladder
from monailabel_dfqsam.sam.encoder import ImageEncoder
from monailabel_dfqsam.sam.variants import Variant

Measured = TypeVar("Measured")


HARM_IMAGES = 2
AMPLE = 40e9
"""Multiplications of an image, up to which a model sees as many images as are asked for."""
TRIES = 6
"""Quantizations at most; each halves how far the cheapest forms may go."""


def quantize_faithfully(
    encoder: ImageEncoder,
    variant: Variant,
    images: Tensor,
    target: float | str,
    measure: Callable[[QuantizedEncoder], tuple[Measured, Fidelity]],
    progress: Progress,
) -> tuple[Measured, Fidelity]:
    """Quantizes as cheaply as stays faithful; where nothing else does, layers stay floats.

    Cheap is the sum of three shares of what all layers take as 16-bit floats: of the bytes kept, of this
    machine's time, and of the weights' bits that are multiplied.

    Args:
        encoder: in full precision; left as it is.
        images: [N, 3, S, S] float32, normalised, N at least 1, to calibrate on.
        target: as `QuantizationConfig.fidelity`.
        measure: the fidelity of a quantized encoder, and what is made of it.
        progress: called with the stages 'precision' and 'search'.

    Returns:
        what `measure` gave of the encoder chosen.
    """
    forms = possible_forms(encoder)
    cost = _costs(variant, forms)
    worthwhile = {name: tuple(cost[name]) for name in forms}
    few = images[:: -(-len(images) // affordable(HARM_IMAGES, 1, variant))]
    steps = ladder(harm(encoder, few, worthwhile, progress), cost)
    start = dict.fromkeys(forms, KEPT)

    tried = 0

    def made(count: int) -> tuple[Measured, Fidelity]:
        nonlocal tried

        def searched(_: str, done: int, total: int, before: int = tried) -> None:
            progress("search", before * total + done, (TRIES + 1) * total)

        tried += 1
        return measure(quantize_mixed(encoder, images, chosen(start, steps[:count]), searched))

    def reach(count: int) -> tuple[Measured, Fidelity] | None:
        found = made(count)
        return found if _reached(found[1], target) else None

    found = farthest(len(steps), reach, TRIES)
    return made(0) if found is None else found


def affordable(count: int, least: int, variant: Variant) -> int:
    """How many images a model is calibrated on in a time that does not grow with it beyond `AMPLE`.

    Args:
        count: of images for a small model.
        least: of images for the largest.
    """
    return min(count, max(least, round(count * AMPLE / encoder_cost(variant, {}, 0).macs)))


def _reached(fidelity: Fidelity, target: float | str) -> bool:
    if target != AUTO:
        return fidelity["mean_iou"] >= float(target)
    # Mask by mask: the median of both is nearly 1, and what lies between two such says little.
    means = round(fidelity["mean_iou"], 3) >= round(fidelity["grey_level"]["mean_iou"], 3)
    return means and fidelity["as_near"] >= 0.5


def _costs(variant: Variant, forms: Mapping[str, tuple[Form, ...]]) -> dict[str, dict[Form, float]]:
    """Of each layer's forms but those that are no cheaper than a more precise one."""
    kept = layer_costs(variant, {})
    all_bytes = sum(layer.bytes for layer in kept.values())
    all_macs = sum(layer.macs for layer in kept.values())
    found: dict[str, dict[Form, float]] = {}
    for name, possible in forms.items():
        found[name] = {}
        for form in possible:
            size = layer_costs(variant, {name: form})[name].bytes if form != KEPT else kept[name].bytes
            work = seconds(form) / seconds(KEPT) + form.weight_bits / KEPT.weight_bits
            own = size / all_bytes + work * kept[name].macs / all_macs
            if own < min(found[name].values(), default=float("inf")):
                found[name][form] = own
    return found
