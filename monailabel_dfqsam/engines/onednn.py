"""The CPU engine: oneDNN's 8-bit matrix product on 4-bit values in 8-bit containers.

No CPU multiplies 4-bit integers natively; the artifact stays packed on disk, and each layer is unpacked and
prepacked once when it is loaded. What lies between two products runs compiled where the library was built.
Where the processor's sums saturate, weights so large that theirs may are multiplied in halves.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from monailabel_dfqsam.artifact import Artifact
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines.encoder import assemble
from monailabel_dfqsam.engines.kernels import Kernel, Kernels, attend_quantize
from monailabel_dfqsam.ops import QuantizedLayer, Rows, StaticRange, compiled, plain, saturation
from monailabel_dfqsam.ops.layer import CENTRE
from monailabel_dfqsam.sam import tiny_vit, vit
from monailabel_dfqsam.sam.encoder import WindowedAttention


def available() -> bool:
    """Whether this torch has oneDNN's quantized linear for the CPU."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


def why_unavailable() -> str | None:
    """Why the engine cannot run here, or None when it can."""
    if not available():
        return "this torch has no oneDNN product of integers for this processor"
    return None if in_halves() is not None else saturation.WRONG


@functools.cache
def in_halves() -> bool | None:
    """Whether weights that are large go in halves here, as `saturation.needs_halves` says."""

    def proof(split: bool) -> bool:
        return saturation.is_exact(lambda layer, x: _kernel(layer, split)(Rows(x)))

    return saturation.needs_halves("onednn", proof)


class OnednnEncoder:
    """Runs artifacts of policy `deploy` on the CPU."""

    kind = EngineKind.ONEDNN

    def __init__(self, artifact: Artifact) -> None:
        self.encoder = assemble(artifact, _kernels())

    def embed(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            embedding: Tensor = self.encoder(images)
        return embedding


def _kernels() -> Kernels:
    forms, attend = (
        (plain, attend_quantize) if compiled.library() is None else (compiled, attend_quantize_compiled)
    )
    return Kernels(
        onednn_kernel,
        forms.quantize_input,
        forms.layer_norm_quantize,
        forms.gelu,
        forms.gelu_quantize,
        attend,
    )


def attend_quantize_compiled(
    attention: WindowedAttention, qkv: Tensor, reader: QuantizedLayer, levels: bool = False
) -> Rows:
    """`attend_quantize` by the compiled library; `levels` as in `compiled.quantize_input`."""
    # A row's range is known once all its heads are.
    static = None if reader.input_range is None else reader
    if isinstance(attention, tiny_vit.Attention):
        pad, biases = attention.pad_qkv, attention.attention_biases
        out = compiled.window_attention(qkv, pad, biases, attention.window, static)
    elif isinstance(attention, vit.Attention):
        tables = (attention.rel_pos_h, attention.rel_pos_w) if attention.relative_position else None
        out = compiled.attention(qkv, attention.pad_qkv, tables, attention.heads, attention.window, static)
    else:
        out, static = attention.attend(qkv).contiguous(), None
    return Rows(out) if static is not None else compiled.quantize_input(out, reader, levels)


def onednn_kernel(layer: QuantizedLayer) -> Kernel:
    """oneDNN's u8×s8 product for one layer, zero-point, bias and residual within it, or right behind it."""
    if layer.input_range is None:
        return _run_time_kernel(layer)
    return _kernel(layer, bool(in_halves()) and saturation.may_saturate(layer))


def _run_time_kernel(layer: QuantizedLayer) -> Kernel:
    """A product whose rows have ranges of their own.

    Inputs less 128 keep its sums small: float32 holds them exactly up to 1,000 inputs of any value, and far
    beyond that of those that occur.
    """
    ones, zeros = torch.ones_like(layer.weight_scale), torch.zeros_like(layer.bias)
    product = _kernel(
        replace(
            layer, weight_scale=ones, bias=zeros, input_range=StaticRange(1.0, CENTRE), activation_bits=8
        ),
        bool(in_halves()) and saturation.may_saturate(layer),
    )
    weights = layer.weight.sum(1, dtype=torch.int32)
    constants = replace(layer, weight=layer.weight.new_empty(0), groups=None)
    form = plain if compiled.library() is None else compiled

    def kernel(rows: Rows, residual: Tensor | None = None) -> Tensor:
        result: Tensor = form.rescale(product(Rows(rows.q)), rows, weights, constants, residual)
        return result

    return kernel


def _kernel(layer: QuantizedLayer, split: bool) -> Kernel:
    """The kernel of a layer with a static range."""
    if split:
        half = _kernel(replace(layer, weight=saturation.halves(layer.weight)), False)
        return lambda rows, residual=None: half(Rows(torch.cat([rows.q, rows.q], 1)), residual)
    ops = torch.ops.onednn
    prepacked = ops.qlinear_prepack(layer.weight, None)
    # One scale, as the reference engine's: of two, the order depends on the processor, and so the rounding.
    assert layer.input_range is not None
    both_scales = layer.input_range.scale * layer.weight_scale
    fixed = (prepacked, both_scales, torch.zeros(layer.weight.shape[0], dtype=torch.int64))
    scale, zero_point, bias = 1.0, layer.input_range.zero_point, layer.bias

    def kernel(rows: Rows, residual: Tensor | None = None) -> Tensor:
        result: Tensor
        if residual is None:
            result = ops.qlinear_pointwise(
                rows.q, scale, zero_point, *fixed, bias, 1.0, 0, torch.float32, "none", [], ""
            )
        else:
            result = ops.qlinear_pointwise.binary(
                rows.q, scale, zero_point, *fixed, residual, bias, 1.0, 0, torch.float32,
                1.0, 0, "sum", 1.0, "none", [], "",
            )  # fmt: skip
        return result

    return kernel
