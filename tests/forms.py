"""Quantized layers and artifacts of every form, by rounding to the nearest and without any recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.artifact import FORMAT_VERSION, Artifact, encode_layer, stored
from monailabel_dfqsam.ops import GROUP, Geometry, Groups, QuantizedLayer, Rows, StaticRange
from monailabel_dfqsam.pipeline import gaussian_images
from monailabel_dfqsam.quantization.calibrate import quantizable
from monailabel_dfqsam.quantization.modules import run
from monailabel_dfqsam.quantization.reparameterize import keep_padding
from monailabel_dfqsam.sam import VARIANTS
from tests.models import header, seeded_sam

# The families' own, with as little as shows all of their operations.
_TINY = replace(VARIANTS["tiny"], depth=3)
_LITE = VARIANTS["lite_medsam"]
_MED2D = replace(
    VARIANTS["sam_med2d_b"], embed_dim=96, num_heads=3, depth=2, global_blocks=(1,), input_size=128
)
_EFFICIENT = replace(
    next(v for v in VARIANTS.values() if v.name.startswith("efficient_sam")), depth=2, input_size=128
)
SMALL = {
    "tiny": _TINY,
    "lite_medsam": replace(_LITE, input_size=64, stages=tuple(replace(s, depth=2) for s in _LITE.stages)),
    "sam_med2d_b": _MED2D,
    _EFFICIENT.name: _EFFICIENT,
}


class Kind(NamedTuple):
    """How a layer is quantized."""

    weight_bits: int
    activation_bits: int
    grouped: bool = False
    static: bool = False


W8A8, W4A8, W4A4 = Kind(8, 8), Kind(4, 8, grouped=True), Kind(4, 4, grouped=True)
KINDS = (W8A8, W4A8, W4A4, Kind(4, 8), Kind(8, 4), Kind(4, 8, True, True), Kind(8, 8, False, True))


def nearest(
    weight: Tensor,
    bias: Tensor,
    kind: Kind,
    geometry: Geometry | None = None,
    input_range: StaticRange | None = None,
) -> QuantizedLayer:
    """A layer whose weight [N, K] float is rounded to the nearest."""
    groups = None
    if kind.grouped:
        effective, scale, groups = _grouped(weight)
    else:
        largest = (1 << (kind.weight_bits - 1)) - 1
        scale = (weight.abs().amax(1) / largest).clamp_min(1e-8)
        effective = (weight / scale[:, None]).round().clamp(-largest - 1, largest).to(torch.int8)
    return QuantizedLayer(
        effective, scale, bias, input_range, kind.weight_bits, kind.activation_bits, geometry, groups
    )


def _grouped(weight: Tensor) -> tuple[Tensor, Tensor, Groups]:
    """Weights that engines multiply, their scale, and groups; multipliers up to 8 keep them within ±120."""
    count = weight.shape[1]
    values = F.pad(weight, (0, -count % GROUP)).unflatten(1, (-1, GROUP))
    low, high = values.amin(2).clamp_max(0), values.amax(2).clamp_min(0)
    step = (high - low) / 15
    unit = (step.amax(1) / 8).clamp_min(1e-8)
    multiplier = (step / unit[:, None]).ceil().clamp(1, 8)
    real = multiplier * unit[:, None]
    zero_point = (-low / real).round().clamp(0, 15)
    q = ((values / real[..., None]).round() + zero_point[..., None]).clamp(0, 15)
    groups = Groups(multiplier.to(torch.uint8), zero_point.to(torch.uint8))
    return groups.weight(q.flatten(1)[:, :count].to(torch.uint8)), unit, groups


def artifact_of(variant: str, kind_of: Callable[[str, nn.Module], Kind | None]) -> Artifact:
    """An artifact of a seeded model.

    Args:
        kind_of: a layer's kind by its name and module; None leaves it as floats. What a kind cannot be for a
            convolution of several pixels becomes 8 bit.
    """
    sam = seeded_sam(variant)
    encoder = sam.image_encoder
    encoder.fold()
    keep_padding(encoder)
    modules = quantizable(encoder)
    with torch.inference_mode():
        _, calls = run(encoder, modules, gaussian_images(sam.variant, 1, seed=3))
    layers, tensors, taken = {}, {}, set()
    for name, module in modules.items():
        kind = kind_of(name, module)
        if kind is not None:
            layer = _quantized(module, kind, calls[name].inputs[0].clone())
            layers[name], parts = encode_layer(name, layer)
            tensors.update(parts)
            taken |= {f"{name}.weight", f"{name}.bias"}
    for name, value in (*encoder.named_parameters(), *encoder.named_buffers()):
        if name not in taken:
            tensors[f"image_encoder.{name}"] = stored(value.detach())
    return Artifact(header(variant=variant, format_version=FORMAT_VERSION, layers=layers), tensors)


def _quantized(module: nn.Module, kind: Kind, seen: Tensor) -> QuantizedLayer:
    assert isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
    weight, geometry = module.weight.detach(), None
    if not isinstance(module, nn.Linear):
        transposed = isinstance(module, nn.ConvTranspose2d)
        geometry = Geometry(module.kernel_size[0], module.stride[0], int(module.padding[0]), transposed)
        weight = weight.flatten(1).T if transposed else weight.flatten(1)
        if geometry.kernel > 1 and not kind.static:
            kind = W8A8
        elif geometry.kernel > 1:
            kind = Kind(8, 8, False, True)
    bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach().clone()
    return nearest(weight, bias, kind, geometry, static_range(seen, kind) if kind.static else None)


def static_range(x: Tensor, kind: Kind) -> StaticRange:
    """From the least to the largest value."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = float(torch.tensor((high - low) / ((1 << kind.activation_bits) - 1)))
    return StaticRange(scale, round(-low / scale))


def same_rows(a: Rows, b: Rows) -> bool:
    """Whether all of their numbers are equal."""
    return all(x is y is None or (x is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True))


def run_time_reader(bits: int, geometry: Geometry | None = None) -> QuantizedLayer:
    """A layer of which only how it reads matters."""
    nothing = torch.empty(0)
    return QuantizedLayer(nothing, nothing, nothing, None, 8, bits, geometry)


def hard_rows(seed: int, count: int, columns: int) -> Tensor:
    """[count, columns]: rows of anything, and of what is at the edge of it, in turn."""
    x = torch.randn((count, columns), generator=torch.Generator().manual_seed(seed)) * 3
    x[1::9] = 0
    x[2::9] = 1.7
    x[3::9] = -0.2
    x[4::9] = x[4::9].abs()
    x[5::9] = -x[5::9].abs()
    x[6::9, :1] = 1e30
    x[7::9] *= 1e-38
    x[8::9, columns // 2 :] *= 1e-6
    return x
