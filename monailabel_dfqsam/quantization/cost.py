"""What an image costs: multiplications, and bit operations (MACs × weight bits × activation bits)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from monailabel_dfqsam.ops import GROUP, Form
from monailabel_dfqsam.quantization.calibrate import products, quantizable
from monailabel_dfqsam.sam.encoder import AttentionCore
from monailabel_dfqsam.sam.model import build_encoder
from monailabel_dfqsam.sam.variants import Variant

FLOAT_BITS = 32
KEPT = Form(16, 16)  # of layers that could be quantized and are not


class LayerCost(NamedTuple):
    """Of one layer that can be quantized: its multiplications for an image, form, and bytes in a file."""

    macs: int
    form: Form
    bytes: int


@dataclass(frozen=True)
class Cost:
    """Of one image through the encoder; windows' padding counts in attention, not in Linears.

    Attributes:
        four_bit: share of the multiplications whose weights have 4 bits, 0 … 1.
    """

    macs: int
    bops: int
    bops_float: int
    four_bit: float


class _Product(NamedTuple):
    """What multiplies in an encoder: `rows` × `columns` weights, none in attention, and `biases`."""

    macs: int
    rows: int = 0
    columns: int = 0
    biases: int = 0
    quantizable: bool = False


def encoder_cost(variant: Variant, forms: Mapping[str, Form], attention_bits: int) -> Cost:
    """Of all products; those by weights that are never quantized, as depthwise ones, have 32 bits.

    Args:
        forms: of quantized layers by name.
        attention_bits: of the attention products, 0 for floating point.
    """
    layers = layer_costs(variant, forms).values()
    rest = [product for product in _products(variant).values() if not product.quantizable]
    bops = sum(layer.macs * layer.form.weight_bits * layer.form.activation_bits for layer in layers)
    for product in rest:
        bops += product.macs * (FLOAT_BITS if product.rows else attention_bits or FLOAT_BITS) ** 2
    total = sum(layer.macs for layer in layers) + sum(product.macs for product in rest)
    four_bit = sum(layer.macs for layer in layers if layer.form.weight_bits == 4)
    return Cost(total, bops, total * FLOAT_BITS**2, four_bit / total)


def layer_costs(variant: Variant, forms: Mapping[str, Form]) -> dict[str, LayerCost]:
    """Of every layer that can be quantized, by name, in the order of the encoder's modules.

    Args:
        forms: of quantized layers by name; others are `KEPT`.
    """
    costs = {}
    for name, product in _products(variant).items():
        if product.quantizable:
            form = forms.get(name, KEPT)
            costs[name] = LayerCost(product.macs, form, _bytes(form, product))
    return costs


@functools.lru_cache(maxsize=16)
def linears(variant: Variant) -> frozenset[str]:
    """Names of the encoder's Linears."""
    with torch.device("meta"):
        encoder = build_encoder(variant)
    return frozenset(name for name, module in products(encoder).items() if isinstance(module, nn.Linear))


def _bytes(form: Form, product: _Product) -> int:
    """Of a weight, its scales and the bias as an artifact holds them; quantized layers always have one."""
    rows, columns = product.rows, product.columns
    if form == KEPT:
        return 2 * rows * columns + 4 * product.biases
    groups = -(-columns // GROUP) if form.grouped else 0
    return rows * ((-(-columns // 2) if form.weight_bits == 4 else columns) + groups + 8)


@functools.lru_cache(maxsize=16)
def _products(variant: Variant) -> dict[str, _Product]:
    """By name, counted in a run without numbers (torch's meta device)."""
    found: dict[str, _Product] = {}
    with torch.device("meta"):
        encoder = build_encoder(variant)
        encoder.fold()
        layers = quantizable(encoder)

        def count_layer(name: str, module: nn.Module) -> None:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                assert isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
                weights, transposed = module.weight.numel(), isinstance(module, nn.ConvTranspose2d)
                channels = inputs[0] if transposed else output
                axis = -1 if isinstance(module, nn.Linear) else 1
                positions = channels.numel() // channels.shape[axis]
                columns = inputs[0].shape[axis] if transposed else weights // output.shape[axis]
                biases = 0 if module.bias is None else module.bias.numel()
                sizes = (weights // columns, columns, biases)
                found[name] = _Product(weights * positions, *sizes, name in layers)

            module.register_forward_hook(hook)

        def count_core(name: str, module: nn.Module) -> None:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                found[name] = _Product(2 * output.numel() * inputs[1].shape[-2])

            module.register_forward_hook(hook)

        for name, module in products(encoder).items():
            count_layer(name, module)
        for name, module in encoder.named_modules():
            if isinstance(module, AttentionCore):
                count_core(name, module)
        encoder(torch.empty(1, 3, variant.input_size, variant.input_size))
    return found
