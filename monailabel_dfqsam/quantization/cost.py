"""What an image costs: multiplications, and bit operations (MACs × weight bits × activation bits)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from monailabel_dfqsam.quantization.calibrate import products
from monailabel_dfqsam.sam.encoder import AttentionCore
from monailabel_dfqsam.sam.model import build_encoder
from monailabel_dfqsam.sam.variants import Variant

FLOAT_BITS = 32


@dataclass(frozen=True)
class Cost:
    """Of one image through the encoder; windows' padding counts in attention, not in Linears."""

    macs: int
    bops: int
    bops_float: int


def encoder_cost(variant: Variant, layer_bits: Mapping[str, int], attention_bits: int) -> Cost:
    """Counts by a run without numbers (torch's meta device).

    Args:
        layer_bits: bits of weights and activations by layer name; layers missing count as 32.
        attention_bits: of the attention products, 0 for floating point.
    """
    macs: dict[str, int] = {}

    def count_layer(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
            per_position = module.weight.numel()
            channels = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            axis = -1 if isinstance(module, nn.Linear) else 1
            macs[name] = per_position * (channels.numel() // channels.shape[axis])

        module.register_forward_hook(hook)

    def count_core(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            macs[name] = 2 * output.numel() * inputs[1].shape[-2]

        module.register_forward_hook(hook)

    with torch.device("meta"):
        encoder = build_encoder(variant)
        for name, module in products(encoder).items():
            count_layer(name, module)
        for name, module in encoder.named_modules():
            if isinstance(module, AttentionCore):
                count_core(name, module)
        encoder(torch.empty(1, 3, variant.input_size, variant.input_size))
    weighted = products(encoder)
    attention = attention_bits or FLOAT_BITS
    bits = {name: layer_bits.get(name, FLOAT_BITS if name in weighted else attention) for name in macs}
    total = sum(macs.values())
    bops = sum(count * bits[name] ** 2 for name, count in macs.items())
    return Cost(total, bops, total * FLOAT_BITS**2)
