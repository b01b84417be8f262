"""From a float encoder to one whose layers each multiply in a form of their own, ranges found at run time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from monailabel_dfqsam.config import Progress
from monailabel_dfqsam.ops import Form
from monailabel_dfqsam.quantization.calibrate import (
    QuantizedEncoder,
    float_tensors,
    quantizable,
    quantize_layer,
)
from monailabel_dfqsam.quantization.compensate import (
    Samples,
    Simulated,
    Wish,
    compensate,
    compensated,
)
from monailabel_dfqsam.quantization.cost import KEPT
from monailabel_dfqsam.quantization.modules import Call, put_module, run, shared_copy
from monailabel_dfqsam.quantization.quantizer import RunTime
from monailabel_dfqsam.quantization.reparameterize import keep_padding
from monailabel_dfqsam.sam.encoder import ImageEncoder

W8A8 = Form(8, 8)
W4A8 = Form(4, 8, grouped=True)
W4A4 = Form(4, 4, grouped=True)


def linear_form(weight_bits: int, activation_bits: int) -> Form:
    """The form of so many bits with ranges at run time."""
    return Form(weight_bits, activation_bits, grouped=weight_bits == 4)


def possible_forms(encoder: ImageEncoder) -> dict[str, tuple[Form, ...]]:
    """The forms that each layer of an encoder may have, by name, the most precise first."""
    return {
        name: (KEPT, W8A8, W4A8, W4A4) if _by_pixel(module) else (KEPT, W8A8)
        for name, module in quantizable(encoder).items()
    }


def uniform_forms(encoder: ImageEncoder, linear: Form) -> dict[str, Form]:
    """One form for all Linears; convolutions multiply in 8 bit."""
    return {
        name: linear if isinstance(module, nn.Linear) else W8A8
        for name, module in quantizable(encoder).items()
    }


def quantize_mixed(
    encoder: ImageEncoder, images: Tensor, forms: Mapping[str, Form], progress: Progress
) -> QuantizedEncoder:
    """Quantizes each layer in its form.

    Args:
        encoder: in full precision; left as it is.
        images: [N, 3, S, S] float32, normalised, on which layers make up for the error of those before them;
            none, [0, 3, S, S], rounds every weight by itself to the nearest.
        forms: by name of the layers of `quantizable`; those that are missing or `KEPT` stay floats.
    """
    encoder = _prepared(encoder)
    modules = quantizable(encoder)
    wishes = {
        name: Wish(form.weight_bits, RunTime(form.activation_bits))
        for name, form in forms.items()
        if form != KEPT and _by_pixel(modules[name])
    }
    layers = compensate(encoder, wishes, images, progress) if len(images) else {}
    layers = {
        name: layers.get(name)
        or quantize_layer(modules[name], RunTime(form.activation_bits), form.weight_bits)
        for name, form in forms.items()
        if form != KEPT
    }
    return QuantizedEncoder(layers, {}, 0, float_tensors(encoder, layers))


@torch.inference_mode()
def harm(
    encoder: ImageEncoder, images: Tensor, forms: Mapping[str, tuple[Form, ...]], progress: Progress
) -> dict[str, dict[Form, float]]:
    """What each layer's forms do to the embedding, that layer alone quantized: squared relative error.

    Args:
        encoder, images: as for `quantize_mixed`; at least one image.
        forms: by layer's name.
    """
    encoder = _prepared(encoder)
    found: dict[str, dict[Form, float]] = {name: {KEPT: 0.0} for name in forms}
    exact = [encoder(image) for image in images.split(1)]
    flow, steps = list(images.split(1)), encoder.steps()
    for place, (step_name, step) in enumerate(steps):
        parts = [part for part, _ in step.named_modules() if f"{step_name}.{part}" in forms]
        calls = []
        for x in flow:
            y, seen = run(step, parts, x)
            calls.append((y, seen))
        for part in parts:
            name = f"{step_name}.{part}"
            for form in forms[name]:
                if form == KEPT:
                    continue
                changed = shared_copy(step)
                put_module(changed, part, _alone(step.get_submodule(part), form, [c[part] for _, c in calls]))
                found[name][form] = sum(
                    _relative(_rest(encoder, place, encoder.after(step_name, changed(x))), wanted)
                    for x, wanted in zip(flow, exact, strict=True)
                ) / len(flow)
        flow = [encoder.after(step_name, y) for y, _ in calls]
        progress("precision", place + 1, len(steps))
    return found


def _prepared(encoder: ImageEncoder) -> ImageEncoder:
    """A copy with batch norms folded and windows' padding fixed, so that layers can be replaced."""
    encoder = shared_copy(encoder)
    encoder.fold()
    keep_padding(encoder)
    return encoder


def _by_pixel(module: nn.Module) -> bool:
    """Whether a layer is a Linear or multiplies each pixel by itself."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride == (1, 1)
    )


def _alone(module: nn.Module, form: Form, calls: list[Call]) -> Simulated:
    """A layer as it would be quantized if nothing else were, by what it read and gave in full precision."""
    inputs = RunTime(form.activation_bits)
    if not _by_pixel(module):
        return Simulated(quantize_layer(module, inputs, form.weight_bits))
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    image = isinstance(module, nn.Conv2d)
    seen, wanted = Samples(len(calls)), Samples(len(calls))
    for index, call in enumerate(calls):
        seen.put(index, call.inputs[0], image)
        wanted.put(index, call.output, image)
    wish = Wish(form.weight_bits, inputs)
    return Simulated(compensated(module, wish, wanted.joined(), inputs.fake(seen.joined())))


def _rest(encoder: ImageEncoder, place: int, x: Tensor) -> Tensor:
    """What the steps behind one make of what the next of them reads."""
    for name, step in encoder.steps()[place + 1 :]:
        x = encoder.after(name, step(x))
    return x


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())
