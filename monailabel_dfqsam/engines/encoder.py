"""The quantized image encoder, common to engines: SAM's ViT with integer layers in place of float ones.

What differs between engines is one function, the integer matrix product; see `Kernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from monailabel_dfqsam.artifact import Artifact, ArtifactError, decode_layer, float_tensors
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.ops import QuantizedLayer, quantize
from monailabel_dfqsam.sam.variants import VARIANTS
from monailabel_dfqsam.sam.vit import AttentionCore, ImageEncoderViT

Kernel = Callable[[Tensor], Tensor]
"""Rows [M, K] uint8 to [M, N] float32: integer product, dequantized, bias added."""


class Encoder(Protocol):
    """A quantized image encoder, whatever runs it.

    Attributes:
        kind: which engine.
        encoder: the assembled modules, under the checkpoint's names.
    """

    kind: EngineKind
    encoder: ImageEncoderViT

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] float32, normalised, to [B, C, S/16, S/16] float32.

        Raises:
            ValueError: for another shape.
        """


class IntegerLinear(nn.Module):
    """A Linear or convolution on integers: quantize the input, multiply by the engine's kernel."""

    bias: Tensor

    def __init__(self, layer: QuantizedLayer, make_kernel: Callable[[QuantizedLayer], Kernel]) -> None:
        super().__init__()
        self.scale, self.zero_point = layer.input_scale, layer.input_zero_point
        self.bits, self.geometry = layer.activation_bits, layer.geometry
        self.kernel = make_kernel(layer)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] or [B, C, H, W] float32, to [..., N] or [B, N, H', W'] float32."""
        q = quantize(x, self.scale, self.zero_point, self.bits)
        if self.geometry is None:
            return self.kernel(q.flatten(0, -2)).view(*x.shape[:-1], -1)
        rows = self.geometry.gather(q, self.zero_point)
        return self.geometry.scatter(self.kernel(rows.contiguous()), x.shape[0], x.shape[2], x.shape[3])


def assemble(
    artifact: Artifact,
    make_kernel: Callable[[QuantizedLayer], Kernel],
    make_core: Callable[[Tensor, int], nn.Module] | None = None,
) -> ImageEncoderViT:
    """The encoder of an artifact with every quantized layer on the engine's kernel.

    Args:
        make_core: for policy `paper`: an attention core from its ranges [7] and bits.

    Raises:
        ArtifactError: when the artifact's tensors are not those of its model.
    """
    variant = VARIANTS.get(artifact.header["variant"])
    if variant is None:
        raise ArtifactError(f"the artifact is of a model unknown here: '{artifact.header['variant']}'")
    with torch.device("meta"):
        encoder = ImageEncoderViT(variant)
    for name in artifact.header["layers"]:
        _replace(encoder, name, IntegerLinear(decode_layer(artifact, name), make_kernel))
    floats = float_tensors(artifact, "image_encoder.")
    attention_bits = artifact.header["attention_bits"]
    for name in [name for name, module in encoder.named_modules() if isinstance(module, AttentionCore)]:
        ranges = floats.pop(f"{name}.ranges", None)
        if ranges is not None and make_core is not None:
            _replace(encoder, name, make_core(ranges, attention_bits))
    expected = set(encoder.state_dict())
    if not expected <= set(floats):
        raise ArtifactError(
            f"the artifact lacks tensors, '{min(expected - set(floats))}' first: quantize again"
        )
    encoder.load_state_dict({key: floats.pop(key) for key in expected}, strict=True, assign=True)
    for key, value in floats.items():
        parent, _, buffer = key.rpartition(".")
        encoder.get_submodule(parent).register_buffer(buffer, value, persistent=False)
    return encoder.eval().requires_grad_(False)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    owner = root.get_submodule(parent)
    if isinstance(owner, nn.Sequential):
        owner[int(child)] = module
    else:
        setattr(owner, child, module)
