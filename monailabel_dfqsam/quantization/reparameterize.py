"""Scale reparameterization: per-channel ranges after a LayerNorm become one range a tensor, exactly.

DFQ-SAM Eq. 10 and 12–16. With per-channel scales s and zero-points z, s̃ = mean(s), z̃ = round(mean(z)),
r1 = s / s̃ and r2 = z − z̃, the norm becomes γ̃ = γ / r1, β̃ = (β + s⊙r2) / r1 and the linear map behind it
W̃ = W·diag(r1), b̃ = b − W·(s⊙r2). In floating point the network is unchanged.

Two consumers must not see the changed norm: windows' padding, which in SAM stands for zeros *after* norm1,
and SAM-Med2D's adapter, which reads norm2 beside lin1. The encoder has a place for each: its attention's
`pad_qkv` and `TransformerBlock.beside`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from monailabel_dfqsam.quantization.quantizer import Affine
from monailabel_dfqsam.sam.encoder import ImageEncoder


def reparameterize_norm(
    norm: nn.LayerNorm, linear: nn.Linear, channels: Affine
) -> tuple[Affine, Tensor, Tensor]:
    """Gives one LayerNorm and the Linear behind it new tensors; the old ones, which others may share, stay.

    Args:
        channels: the ranges of the norm's output, one a channel.

    Returns:
        the common range of the new output, and r1 [C] and s⊙r2 [C], with which the old output is
        new·r1 − s⊙r2.
    """
    s, z = channels.scale, channels.zero_point
    scale = s.mean()
    # Any integer keeps the network exact; one within the levels suits every engine.
    zero_point = torch.round(z.mean()).clamp(0, (1 << channels.bits) - 1)
    r1, shift = s / scale, s * (z - zero_point)
    with torch.no_grad():
        linear.bias = _fixed(linear.bias - linear.weight @ shift)
        linear.weight = _fixed(linear.weight * r1)
        norm.bias = _fixed((norm.bias + shift) / r1)
        norm.weight = _fixed(norm.weight / r1)
    return Affine(scale[None], zero_point[None], channels.bits), r1, shift


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def keep_padding(encoder: ImageEncoder) -> None:
    """Fixes what q, k and v of windows' padding are, before anything changes or replaces qkv; in place."""
    for block in encoder.attention_blocks().values():
        block.attn.keep_padding()


def after_norms(encoder: ImageEncoder) -> list[str]:
    """The Linears that read a LayerNorm's output, by name: 'blocks.0.attn.qkv' …"""
    blocks = encoder.attention_blocks()
    return [f"{name}.{linear}" for name, block in blocks.items() for linear in block.norms]


def reparameterize(encoder: ImageEncoder, ranges: Mapping[str, Affine]) -> dict[str, Affine]:
    """Reparameterizes the two LayerNorms of every transformer block and the Linears behind them.

    Args:
        encoder: given new tensors so that its output stays the same in floating point; `keep_padding` was
            called on it.
        ranges: per-channel ranges by the name of the Linear that reads them, those of `after_norms`.

    Returns:
        the common ranges under the same names.
    """
    common: dict[str, Affine] = {}
    for place, block in encoder.attention_blocks().items():
        for linear, norm in block.norms.items():
            name = f"{place}.{linear}"
            before, behind = block.get_submodule(norm), block.get_submodule(linear)
            assert isinstance(before, nn.LayerNorm)
            assert isinstance(behind, nn.Linear)
            common[name], r1, shift = reparameterize_norm(before, behind, ranges[name])
            block.reparameterized(linear, r1, shift)
    return common
