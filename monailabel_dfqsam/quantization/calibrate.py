"""From a float encoder and calibration images to a quantized encoder (DFQ-SAM stage 2, and beyond it)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from monailabel_dfqsam.config import Policy, Progress, Recipe
from monailabel_dfqsam.ops import Geometry, QuantizedLayer
from monailabel_dfqsam.quantization.compensate import compensate
from monailabel_dfqsam.quantization.quantizer import Affine, quantize_weight, search_affine
from monailabel_dfqsam.quantization.reparameterize import after_norms, keep_padding, reparameterize
from monailabel_dfqsam.quantization.views import views
from monailabel_dfqsam.sam.encoder import AttentionCore, ImageEncoder

CONVOLUTION_BITS = 8
# Rows of an activation kept from each image for the range search.
MAX_ROWS = 4096


@dataclass(frozen=True)
class QuantizedEncoder:
    """A calibrated encoder as numbers.

    Attributes:
        layers: by module name within the encoder.
        attention: per attention core, policy `paper` alone: the ranges of q, k and v and the largest
            probability, as [scale_q, zero_q, scale_k, zero_k, scale_v, zero_v, delta] float32.
        attention_bits: of those, 0 where attention stays in floating point.
        float_tensors: everything else, by state-dict name within the encoder, reparameterized.
    """

    layers: dict[str, QuantizedLayer]
    attention: dict[str, Tensor]
    attention_bits: int
    float_tensors: dict[str, Tensor]


def quantizable(encoder: ImageEncoder) -> dict[str, nn.Module]:
    """Every Linear and convolution of the encoder, by name, but for depthwise convolutions.

    Those stay in floating point: they have next to no weights and multiplications, and in a TinyViT's blocks
    all that later layers see goes through them.
    """
    return {name: module for name, module in products(encoder).items() if not is_depthwise(module)}


def products(encoder: ImageEncoder) -> dict[str, nn.Module]:
    """Every module of the encoder that multiplies by weights, by name."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return {name: module for name, module in encoder.named_modules() if isinstance(module, kinds)}


def is_depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution of each channel by itself."""
    return isinstance(module, nn.Conv2d) and module.groups > 1


def calibrate(
    encoder: ImageEncoder, images: Tensor, bits: int, policy: Policy, recipe: Recipe, progress: Progress
) -> QuantizedEncoder:
    """Finds ranges, reparameterizes, and quantizes weights.

    Args:
        encoder: in full precision; left as it is, while what is quantized has its batch norms folded.
        images: [N, 3, S, S] float32, normalised.
        bits: of Linears; `deploy` keeps convolutions at 8 and attention in floating point.
        recipe: what is done beside finding ranges.
    """
    encoder = copy.deepcopy(encoder)
    encoder.fold()
    modules = quantizable(encoder)
    images = views(images, recipe.views)
    samples, attention_samples = observe(encoder, images, policy is Policy.PAPER, progress)
    keep_padding(encoder)
    ranges: dict[str, Affine] = {}
    if recipe.reparameterize:
        channels = {name: search_affine(samples[name], bits, True) for name in after_norms(encoder)}
        ranges = reparameterize(encoder, channels)
    for name, module in modules.items():
        if name not in ranges:
            ranges[name] = search_affine(samples.pop(name), _bits(module, bits, policy), False)
    compensated = compensate(encoder, ranges, images, bits, progress) if recipe.compensate else {}
    layers = {}
    for step, (name, module) in enumerate(modules.items()):
        if name in compensated:
            layers[name] = compensated[name]
        else:
            layers[name] = quantize_layer(module, ranges[name], _bits(module, bits, policy))
        progress("quantization", step + 1, len(modules))
    quantized = {f"{name}.{part}" for name in modules for part in ("weight", "bias")}
    floats = {key: value for key, value in _all_tensors(encoder).items() if key not in quantized}
    attention = {name: _attention_ranges(parts, bits) for name, parts in attention_samples.items()}
    return QuantizedEncoder(layers, attention, bits if attention else 0, floats)


def _bits(module: nn.Module, bits: int, policy: Policy) -> int:
    return bits if policy is Policy.PAPER or isinstance(module, nn.Linear) else CONVOLUTION_BITS


def observe(
    encoder: ImageEncoder, images: Tensor, attention: bool, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Samples of what every layer reads while the encoder sees the images one by one.

    Returns:
        rows [T, C] by layer name, images [., C, H, W] as rows too; and, if asked for, of q, k, v and the
        probabilities of each attention core, flattened.
    """
    rows: dict[str, list[Tensor]] = {}
    parts: dict[str, list[list[Tensor]]] = {}

    def keep(x: Tensor) -> Tensor:
        return x[:: -(-x.shape[0] // MAX_ROWS)].clone()

    def record(name: str) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            x = x.permute(0, 2, 3, 1) if isinstance(modules[name], (nn.Conv2d, nn.ConvTranspose2d)) else x
            rows.setdefault(name, []).append(keep(x.flatten(0, -2)))

        handles.append(modules[name].register_forward_pre_hook(hook))

    def record_attention(name: str, core: AttentionCore) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            q, k, v, bias = inputs
            logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            probabilities = (logits if bias is None else logits + bias).softmax(-1)
            kept = [keep(x.reshape(-1, 1)) for x in (q, k, v)] + [probabilities.amax().view(1, 1)]
            parts.setdefault(name, []).append(kept)

        handles.append(core.register_forward_pre_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    modules = quantizable(encoder)
    for name in modules:
        record(name)
    if attention:
        for name, module in encoder.named_modules():
            if isinstance(module, AttentionCore):
                record_attention(name, module)
    try:
        with torch.inference_mode():
            for index, image in enumerate(images):
                encoder(image[None])
                progress("calibration", index + 1, len(images))
    finally:
        for handle in handles:
            handle.remove()
    joined = {name: torch.cat(chunks) for name, chunks in rows.items()}
    return joined, {name: [torch.cat(p) for p in zip(*chunks, strict=True)] for name, chunks in parts.items()}


def quantize_layer(module: nn.Module, inputs: Affine, bits: int) -> QuantizedLayer:
    """The integers of one Linear or convolution whose input has the given range."""
    assert isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
    weight = module.weight.detach()
    geometry = None
    if isinstance(module, nn.ConvTranspose2d):
        geometry = Geometry(module.kernel_size[0], module.stride[0], int(module.padding[0]), transposed=True)
        weight = weight.flatten(1).T
    elif isinstance(module, nn.Conv2d):
        geometry = Geometry(module.kernel_size[0], module.stride[0], int(module.padding[0]))
        weight = weight.flatten(1)
    integers, scale = quantize_weight(weight, bits)
    bias = torch.zeros(weight.shape[0]) if module.bias is None else module.bias.detach().clone()
    return QuantizedLayer(
        integers, scale, bias, float(inputs.scale), int(inputs.zero_point), bits, bits, geometry
    )


def _attention_ranges(parts: list[Tensor], bits: int) -> Tensor:
    numbers: list[float] = []
    for part in parts[:3]:
        found = search_affine(part, bits, False)
        numbers += [float(found.scale), float(found.zero_point)]
    return torch.tensor([*numbers, float(parts[3].max())])


def _all_tensors(encoder: ImageEncoder) -> dict[str, Tensor]:
    """State dict and the buffers that reparameterization leaves, which checkpoints do not have."""
    return {k: v.detach().clone() for k, v in (*encoder.named_parameters(), *encoder.named_buffers())}
