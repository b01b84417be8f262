"""From a float encoder and calibration images to a quantized encoder (DFQ-SAM stage 2, and beyond it)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from monailabel_dfqsam.config import Policy, Progress, Recipe
from monailabel_dfqsam.ops import Geometry, QuantizedLayer, StaticRange
from monailabel_dfqsam.quantization.compensate import Wish, compensate
from monailabel_dfqsam.quantization.modules import run, shared_copy
from monailabel_dfqsam.quantization.quantizer import Affine, RunTime, quantize_weight, search_affine
from monailabel_dfqsam.quantization.reparameterize import after_norms, keep_padding, reparameterize
from monailabel_dfqsam.quantization.rounding import round_in_groups
from monailabel_dfqsam.quantization.views import views
from monailabel_dfqsam.sam.encoder import AttentionCore, ImageEncoder

CONVOLUTION_BITS = 8
# Rows of an activation kept from each image for the range search, and its values from all of them.
MAX_ROWS = 4096
MAX_SAMPLES = 1 << 22


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


def quantizable(encoder: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and convolution of the encoder, or of a part of it, by name, but the depthwise ones.

    Those stay in floating point: they have next to no weights and multiplications, and in a TinyViT's blocks
    all that later layers see goes through them.
    """
    return {
        name: module
        for name, module in products(encoder).items()
        if not (isinstance(module, nn.Conv2d) and module.groups > 1)
    }


def products(encoder: nn.Module) -> dict[str, nn.Module]:
    """Every module of the encoder, or of a part of it, that multiplies by weights, by name."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return {name: module for name, module in encoder.named_modules() if isinstance(module, kinds)}


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
    images = views(images, recipe.views)
    encoder = shared_copy(encoder)
    encoder.fold()
    ranges, attention = _search(encoder, images, bits, policy, recipe.reparameterize, progress)
    keep_padding(encoder)
    if recipe.reparameterize:
        ranges |= reparameterize(encoder, ranges)
    layers: dict[str, QuantizedLayer] = {}
    if recipe.compensate:
        blocks = encoder.attention_blocks()
        names = [f"{place}.{part}" for place, block in blocks.items() for part in block.linears]
        layers = compensate(encoder, {name: Wish(bits, ranges[name]) for name in names}, images, progress)
    layers = {
        name: layers.get(name) or quantize_layer(module, ranges[name], _bits(module, bits, policy))
        for name, module in quantizable(encoder).items()
    }
    return QuantizedEncoder(layers, attention, bits if attention else 0, float_tensors(encoder, layers))


def float_tensors(encoder: ImageEncoder, quantized: Iterable[str]) -> dict[str, Tensor]:
    """The encoder's tensors by name, but for the weights and biases of quantized layers."""
    taken = {f"{name}.{part}" for name in quantized for part in ("weight", "bias")}
    # Buffers too: reparameterization leaves some that checkpoints do not have.
    tensors = (*encoder.named_parameters(), *encoder.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors if name not in taken}


def _bits(module: nn.Module, bits: int, policy: Policy) -> int:
    return bits if policy is Policy.PAPER or isinstance(module, nn.Linear) else CONVOLUTION_BITS


def _search(
    encoder: ImageEncoder, images: Tensor, bits: int, policy: Policy, by_channel: bool, progress: Progress
) -> tuple[dict[str, Affine], dict[str, Tensor]]:
    """Ranges of what layers read, by name, and those of attention cores as `QuantizedEncoder` has them.

    Args:
        by_channel: layers after a norm get a range for each channel, to reparameterize by.
    """
    modules = quantizable(encoder)
    to_reparameterize = set(after_norms(encoder)) if by_channel else set()
    ranges: dict[str, Affine] = {}
    attention: dict[str, Tensor] = {}
    for rows, parts in observe(encoder, images, policy is Policy.PAPER, progress):
        for name in list(rows):
            bits_of_it = _bits(modules[name], bits, policy)
            ranges[name] = search_affine(rows.pop(name), bits_of_it, name in to_reparameterize)
        attention.update({name: _attention_ranges(samples, bits) for name, samples in parts.items()})
    return ranges, attention


@torch.inference_mode()
def observe(
    encoder: ImageEncoder, images: Tensor, attention: bool, progress: Progress
) -> Iterator[tuple[dict[str, Tensor], dict[str, list[Tensor]]]]:
    """Samples of what every layer reads while the encoder sees the images, a step of the encoder at a time.

    All images run through one step before any runs through the next, so that only its samples are held.

    Yields:
        of each step: rows [T, C] by layer name, images
        [., C, H, W] as rows too, about `MAX_SAMPLES` values at most; and, if asked for, of q, k, v and the
        probabilities of each attention core, flattened.
    """
    flow = list(images.split(1))
    parts = encoder.steps()
    for step, (part, module) in enumerate(parts):
        layers = quantizable(module)
        cores = [n for n, m in module.named_modules() if attention and isinstance(m, AttentionCore)]
        rows: dict[str, list[Tensor]] = {name: [] for name in layers}
        samples: dict[str, list[list[Tensor]]] = {name: [] for name in cores}
        for index, x in enumerate(flow):
            x, calls = run(module, (*layers, *cores), x)
            flow[index] = encoder.after(part, x)
            for name, layer in layers.items():
                rows[name].append(_thinned(_rows(layer, calls[name].inputs[0]), index, len(flow)))
            for name in cores:
                kept = _attention_samples(*calls[name].inputs)
                samples[name].append([_thinned(values, index, len(flow)) for values in kept])
        progress("calibration", step + 1, len(parts))
        yield (
            {f"{part}.{name}": torch.cat(rows.pop(name)) for name in layers},
            {f"{part}.{name}": [torch.cat(p) for p in zip(*samples[name], strict=True)] for name in cores},
        )


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as rows [T, C]."""
    x = x.permute(0, 2, 3, 1) if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else x
    return x.flatten(0, -2)


def _thinned(rows: Tensor, index: int, images: int) -> Tensor:
    """Some of the rows [T, C] of one of several images, evenly spaced over the rows of all of them."""
    rows = rows[:: -(-len(rows) // MAX_ROWS)]
    step = -(-images * rows.numel() // MAX_SAMPLES)
    return rows[-index * len(rows) % step :: step].clone()


def _attention_samples(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> list[Tensor]:
    """What an attention core reads as columns [., 1]: q, k, v, and its largest probability."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    probabilities = (logits if bias is None else logits + bias).softmax(-1)
    return [*(x.reshape(-1, 1) for x in (q, k, v)), probabilities.amax().view(1, 1)]


def quantize_layer(module: nn.Module, inputs: Affine | RunTime, bits: int) -> QuantizedLayer:
    """The integers of one Linear or convolution, each weight rounded to the nearest.

    Args:
        inputs: the range of what it reads.
        bits: of weights; with ranges at run time 4 are in groups.
    """
    assert isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
    weight = module.weight.detach()
    geometry = None
    if isinstance(module, nn.ConvTranspose2d):
        geometry = Geometry(module.kernel_size[0], module.stride[0], int(module.padding[0]), transposed=True)
        weight = weight.flatten(1).T
    elif isinstance(module, nn.Conv2d):
        geometry = Geometry(module.kernel_size[0], module.stride[0], int(module.padding[0]))
        weight = weight.flatten(1)
    static, groups = None, None
    if isinstance(inputs, Affine):
        static = StaticRange(float(inputs.scale), int(inputs.zero_point))
    if static is None and bits == 4:
        integers, scale, groups = round_in_groups(weight, torch.eye(weight.shape[1]))
    else:
        integers, scale = quantize_weight(weight, bits)
    bias = torch.zeros(weight.shape[0]) if module.bias is None else module.bias.detach().clone()
    return QuantizedLayer(integers, scale, bias, static, bits, inputs.bits, geometry, groups)


def _attention_ranges(parts: list[Tensor], bits: int) -> Tensor:
    numbers: list[float] = []
    for part in parts[:3]:
        found = search_affine(part, bits, False)
        numbers += [float(found.scale), float(found.zero_point)]
    return torch.tensor([*numbers, float(parts[3].max())])
