"""The quantized image encoder, common to the engines on the CPU: any family's on integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from monailabel_dfqsam.artifact import Artifact, ArtifactError, decode_layer, float_tensors
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines.kernels import Kernel, Kernels
from monailabel_dfqsam.engines.tiny_vit import IntegerConvolutions
from monailabel_dfqsam.ops import Geometry, QuantizedLayer, Rows
from monailabel_dfqsam.quantization.modules import put_module
from monailabel_dfqsam.sam.encoder import AttentionCore, ImageEncoder, TransformerBlock, WindowedAttention
from monailabel_dfqsam.sam.model import build_encoder
from monailabel_dfqsam.sam.tiny_vit import Bottleneck, Merging
from monailabel_dfqsam.sam.variants import VARIANTS

# Rows at a time: what lies between two products, several times as wide and in float, then stays in cache.
_MLP_ROWS = 512
_ATTENTION_ROWS = 512


class Encoder(Protocol):
    """A quantized image encoder, whatever runs it; `kind` says what does."""

    kind: EngineKind

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] float32, normalised, to [B, C, grid, grid] float32.

        Raises:
            ValueError: for another shape.
        """


class IntegerLinear(nn.Module):
    """A Linear or convolution on integers: quantize the input, multiply by the engine's kernel.

    Attributes:
        layer: its numbers without the weight, which only the kernel holds, in its own order.
        kernel: takes rows in the order of `layer.geometry.gather`.
    """

    bias: Tensor

    def __init__(self, layer: QuantizedLayer, kernels: Kernels) -> None:
        super().__init__()
        weight = layer.weight if layer.geometry is None else layer.geometry.arrange(layer.weight)
        self.kernel = kernels.linear(replace(layer, weight=weight))
        self.layer = replace(layer, weight=weight.new_empty(0), groups=None)
        self.quantize_input = kernels.quantize_input

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] or [B, C, H, W] float32, to [..., N] or [B, N, H', W'] float32."""
        geometry, static = self.layer.geometry, self.layer.input_range
        if geometry is None:
            return self.kernel(self.quantize_input(x, self.layer).flat()).view(*x.shape[:-1], -1)
        if static is None and not self.layer.by_image:
            rows = self.quantize_input(geometry.gather(x, 0).contiguous(), self.layer)
        else:
            rows = self._gathered(self.quantize_input(x, self.layer), geometry)
        return geometry.scatter(self.kernel(rows), x.shape[0], x.shape[2], x.shape[3])

    def _gathered(self, images: Rows, geometry: Geometry) -> Rows:
        """Rows of the product out of images [B, C, H, W]."""
        if self.layer.input_range is not None:
            return Rows(geometry.gather(images.q, self.layer.input_range.zero_point).contiguous())
        assert images.scale is not None
        assert images.zero_point is not None
        q = geometry.gather(images.q, images.zero_point).contiguous()
        pixels = len(q) // len(images.q)
        return Rows(q, *(part.repeat_interleave(pixels) for part in (images.scale, images.zero_point)))


class _Product(NamedTuple):
    layer: QuantizedLayer
    kernel: Kernel


class IntegerBlock(nn.Module):
    """A transformer block whose activations go from product to product as integers where they can."""

    attn: WindowedAttention

    def __init__(self, block: TransformerBlock, kernels: Kernels) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        layers: list[Any] = [block.get_submodule(name) for name in block.linears]
        self._qkv, self._proj, self._lin1, self._lin2 = (
            _Product(layer.layer, layer.kernel) for layer in layers
        )
        norms: list[Any] = [block.get_submodule(block.norms[name]) for name in block.linears[::2]]
        self._norms = tuple(norms)  # under their own names they are here already
        block.attn.settle()
        self.between, self.beside = block.between, block.beside
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] float32 to the same; x is overwritten where it is contiguous."""
        x = x.contiguous()
        for independent in _independent(x, self.attn.window):
            self._attend(independent)
        x = self.between(x)
        rows = x.view(-1, x.shape[-1])
        normed, floats = self._normed(rows, self._norms[1], self._lin1.layer, self.beside is not None)
        for part, target in zip(normed.split(_MLP_ROWS), rows.split(_MLP_ROWS), strict=True):
            hidden = self.kernels.gelu_quantize(self._lin1.kernel(part), self._lin2.layer)
            self._lin2.kernel(hidden, target)
        if self.beside is not None and floats is not None:
            x += self.beside(floats.view(x.shape))
        return x

    def _attend(self, x: Tensor) -> None:
        rows = x.view(-1, x.shape[-1])
        q, _ = self._normed(rows, self._norms[0], self._qkv.layer, False)
        qkv = self._qkv.kernel(q).view(*x.shape[:-1], -1)
        attended = self.kernels.attend_quantize(self.attn, qkv, self._proj.layer)
        self._proj.kernel(attended.flat(), rows)

    def _normed(
        self, rows: Tensor, norm: nn.LayerNorm, reader: QuantizedLayer, keep: bool
    ) -> tuple[Rows, Tensor | None]:
        return self.kernels.layer_norm_quantize(rows, norm.weight, norm.bias, norm.eps, reader, keep)


def _independent(x: Tensor, window: int) -> Iterator[Tensor]:
    """Parts of [B, H, W, C], each contiguous, between which no attention passes."""
    _, h, w, _ = x.shape
    if not window or h * w <= _ATTENTION_ROWS:
        yield from x.split(max(1, _ATTENTION_ROWS // (h * w)))
        return
    strip = window * max(1, _ATTENTION_ROWS // (window * w))
    for image in x.split(1):
        yield from image.split(strip, dim=1)


def assemble(artifact: Artifact, kernels: Kernels, fused: bool = True) -> ImageEncoder:
    """The encoder of an artifact on an engine's kernels, under the checkpoint's names.

    Args:
        fused: activations pass from product to product as integers; else each quantized layer is a module
            from floats to floats, in a float model otherwise.

    Raises:
        ArtifactError: when the artifact's tensors are not those of its model.
    """
    encoder = assemble_modules(artifact, lambda layer: IntegerLinear(layer, kernels), kernels.core)
    for name, step in encoder.steps() if fused else ():
        if isinstance(step, TransformerBlock) and _all_integer(step, step.linears):
            put_module(encoder, name, IntegerBlock(step, kernels))
        elif isinstance(step, (Bottleneck, Merging)) and _all_integer(step, ("conv1.c", "conv3.c")):
            put_module(encoder, name, IntegerConvolutions(step, kernels))
    return encoder


def assemble_modules(
    artifact: Artifact,
    quantized: Callable[[QuantizedLayer], nn.Module],
    core: Callable[[Tensor, int], nn.Module] | None = None,
) -> ImageEncoder:
    """The float encoder of an artifact, but for what takes its quantized layers' places.

    Args:
        quantized: a module from floats to floats out of a layer's numbers.
        core: as `Kernels.core`.

    Raises:
        ArtifactError: when the artifact's tensors are not those of its model.
    """
    variant = VARIANTS.get(artifact.header["variant"])
    if variant is None:
        raise ArtifactError(f"the artifact is of a model unknown here: '{artifact.header['variant']}'")
    with torch.device("meta"):
        encoder = build_encoder(variant)
        encoder.fold()
    layers = artifact.header["layers"]
    expected = {key for key in encoder.state_dict() if key.rpartition(".")[0] not in layers}
    floats = float_tensors(artifact, "image_encoder.")
    attention_bits = artifact.header["attention_bits"]
    for name in [name for name, module in encoder.named_modules() if isinstance(module, AttentionCore)]:
        ranges = floats.pop(f"{name}.ranges", None)
        if ranges is not None and core is not None:
            put_module(encoder, name, core(ranges, attention_bits))
    if not expected <= set(floats):
        raise ArtifactError(
            f"the artifact lacks tensors, '{min(expected - set(floats))}' first: quantize again"
        )
    encoder.load_state_dict({key: floats.pop(key) for key in expected}, strict=False, assign=True)
    for key, value in floats.items():
        parent, _, buffer = key.rpartition(".")
        encoder.get_submodule(parent).register_buffer(buffer, value, persistent=False)
    for name in layers:
        put_module(encoder, name, quantized(decode_layer(artifact, name)))
    return encoder.eval().requires_grad_(False)


def _all_integer(step: nn.Module, names: Iterable[str]) -> bool:
    return all(isinstance(step.get_submodule(name), IntegerLinear) for name in names)
