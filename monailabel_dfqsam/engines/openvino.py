"""The engine OpenVINO: an artifact's encoder as its model, whose products the CPU plugin runs in integers.

What the plugin takes for a product of integers, and its graph shows as `u8`, is a FakeQuantize of 256 levels
right before a product with a constant of 8-bit integers, converted to float and scaled for each output:

    x → + z·s → Clamp(0, (2^bits − 1)·s) → FakeQuantize(0 … 255·s, 256 levels) ┐
    weight i8 → Convert → · scale ─────────────────────────────────────────────┴→ product → + bias'

Behind a FakeQuantize of 64 levels products run in float32, so fewer bits are the lowest levels of 256, to
which the clamp keeps. Constants of 4 bits would be smaller, but are multiplied in float32, in twice the time.
With the zero-point z added before and taken off again in bias' = bias − s·z·scale·Σ weight, levels begin at
0, and the plugin has nothing to make up for after the product.

A layer whose input's ranges are found at run time is a product of floats: the graph finds each row's range
itself and rounds to its levels.

Weights so large that sums may saturate go in halves, along the inputs, which are then given twice: in the
engine where this processor needs it, in an export always, since its client may run on another.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.artifact import Artifact, ArtifactError
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines.encoder import assemble_modules
from monailabel_dfqsam.ops import QuantizedLayer, openvino_library, row_rounded, saturation
from monailabel_dfqsam.ops.openvino_library import converted, openvino
from monailabel_dfqsam.quantization.modules import put_module
from monailabel_dfqsam.sam.encoder import LAYER_NORM_EPS, LayerNorm2d

_LEVELS = 256


def why_unavailable() -> str | None:
    """Why the engine cannot run here, or None when it can.

    Raises:
        RuntimeError: when OpenVINO is there but broken.
    """
    reason = openvino_library.why_unavailable()
    return reason if reason is not None or in_halves() is not None else saturation.WRONG


@functools.cache
def in_halves() -> bool | None:
    """Whether weights that are large go in halves here, as `saturation.needs_halves` says."""

    def proof(split: bool) -> bool:
        product = functools.partial(multiplied, split)
        return saturation.is_exact(product) and saturation.convolves_exactly(product)

    return saturation.needs_halves("openvino", proof)


def multiplied(split: bool, layer: QuantizedLayer, x: Tensor) -> Tensor:
    """A layer's output, as `is_exact` asks for it, for its input as numbers of any type."""
    inputs = {"x": (x.float(), (-1, *x.shape[1:]))}
    compiled = _compiled(_model(_quantized(split, layer).eval(), inputs, "y"))
    return torch.from_numpy(compiled([x.float().numpy()])[0].copy())


class OpenvinoEncoder:
    """Runs artifacts of policy `deploy` on the CPU, one call at a time; between products in float32.

    Attributes:
        compiled: the `openvino.CompiledModel`, on as many threads as torch has when it is made.
    """

    kind = EngineKind.OPENVINO

    def __init__(self, artifact: Artifact) -> None:
        model = encoder_model(artifact, portable=bool(in_halves()))
        self._shape = tuple(model.inputs[0].get_partial_shape()[axis].get_max_length() for axis in (1, 2, 3))
        self.compiled = _compiled(model)
        self._request = self.compiled.create_infer_request()
        self._lock = threading.Lock()

    def embed(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != self._shape:
            expected = ", ".join(map(str, self._shape))
            raise ValueError(f"the encoder takes [B, {expected}], not {list(images.shape)}")
        with self._lock:
            # A copy: the next call overwrites the request's own.
            result = self._request.infer([images.contiguous().numpy()])[0].copy()
        return torch.from_numpy(result)


def _compiled(model: Any) -> Any:
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Faster in bfloat16 on CPUs that have it, but the masks then differ.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return openvino().Core().compile_model(model, "CPU", options)


def encoder_model(artifact: Artifact, portable: bool) -> Any:
    """The encoder of an artifact as an `openvino.Model`.

    Its input is `images` [B, 3, S, S] float32, normalised, B left open, and its output `embedding`
    [B, C, G, G] float32.

    Args:
        portable: right on processors, too, whose sums of 8-bit products saturate.

    Raises:
        ArtifactError: for policy `paper`, or when the artifact's tensors are not those of its model.
        ImportError: where openvino is not installed.
    """
    if artifact.header["attention_bits"]:
        raise ArtifactError("policy 'paper' quantizes attention, which only the reference engine runs")
    encoder = assemble_modules(artifact, functools.partial(_quantized, portable))
    for name, module in list(encoder.named_modules()):
        if isinstance(module, (nn.LayerNorm, LayerNorm2d)):
            put_module(encoder, name, _RowNorm(module))
    side = encoder.img_size
    inputs = {"images": (torch.zeros(1, 3, side, side), (-1, 3, side, side))}
    return _model(encoder, inputs, "embedding")


def _model(module: nn.Module, inputs: Mapping[str, tuple[Tensor, tuple[int, ...]]], output: str) -> Any:
    model = converted(module, inputs, (output,))
    # Else the plugin rounds what is multiplied with 8-bit constants to levels of its own choice.
    model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return model


def _quantized(portable: bool, layer: QuantizedLayer) -> nn.Module:
    # Ranges found at run time are multiplied in floats, which do not saturate.
    split = portable and layer.input_range is not None and saturation.may_saturate(layer)
    if layer.geometry is None:
        return _Linear(layer, split)
    return (_TransposedConvolution if layer.geometry.transposed else _Convolution)(layer, split)


class _Quantized(nn.Module):
    """A quantized layer as the module's text draws it.

    Args:
        split: the weight goes in halves.

    Attributes:
        channels: axis of the input that a weight in halves takes twice.
        zero: what an input of 0 becomes.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    channels = -1

    def __init__(self, layer: QuantizedLayer, split: bool) -> None:
        super().__init__()
        self.split = split
        self.fixed, self.bits, self.by_image = layer.input_range, layer.activation_bits, layer.by_image
        self.zero = 0.0 if self.fixed is None else self.fixed.scale * self.fixed.zero_point
        rows = layer.weight.sum(1, dtype=torch.int64).double() * layer.weight_scale.double()
        weight = saturation.halves(layer.weight) if split else layer.weight
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", layer.weight_scale[:, None], persistent=False)
        self.register_buffer("bias", (layer.bias.double() - self.zero * rows).float(), persistent=False)

    def rounded(self, x: Tensor) -> Tensor:
        """x + `zero` at the levels of the layer's input, as often as the weight takes it."""
        if self.fixed is None:
            return self._at_run_time(x)
        scale = self.fixed.scale
        x = (x + self.zero).clamp(0, scale * ((1 << self.bits) - 1))
        y: Tensor = torch.fake_quantize_per_tensor_affine(x, scale, 0, 0, _LEVELS - 1)
        return torch.cat([y, y], self.channels) if self.split else y

    def _at_run_time(self, x: Tensor) -> Tensor:
        if self.by_image:
            return row_rounded(x.flatten(1), self.bits).view_as(x)
        return row_rounded(x.movedim(self.channels, -1), self.bits).movedim(-1, self.channels)


class _Linear(_Quantized):
    def forward(self, x: Tensor) -> Tensor:
        """[..., K] float32 to [..., N] float32."""
        return F.linear(self.rounded(x), self.weight.float() * self.scale, self.bias)


class _Convolution(_Quantized):
    channels = 1

    def __init__(self, layer: QuantizedLayer, split: bool) -> None:
        super().__init__(layer, split)
        assert layer.geometry is not None
        self.geometry = layer.geometry
        self.weight = self.weight.unflatten(1, (-1, self.geometry.kernel, self.geometry.kernel))
        self.scale = layer.weight_scale[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] float32 to [B, N, H', W'] float32."""
        if self.geometry.padding:
            x = F.pad(x, (self.geometry.padding,) * 4)
        return F.conv2d(self.rounded(x), self.weight.float() * self.scale, self.bias, self.geometry.stride)


class _TransposedConvolution(_Quantized):
    """As products, since each tap of the kernel has scales of its own.

    A kernel of r·stride pixels falls into r × r tiles of stride × stride, of which each enlarges the image
    without overlap; the result is the sum of the enlarged images, each shifted by its tile's place.

    Attributes:
        weight: [r², stride²·N, K or 2K] int8, the tiles row by row, and so the pixels within each.
    """

    def __init__(self, layer: QuantizedLayer, split: bool) -> None:
        super().__init__(layer, split)
        assert layer.geometry is not None
        self.geometry, self.tiles = layer.geometry, layer.geometry.kernel // layer.geometry.stride
        self.weight, self.scale, self.bias = (
            self._by_tile(part) for part in (self.weight, self.scale, self.bias[:, None])
        )

    def _by_tile(self, rows: Tensor) -> Tensor:
        """[N·kernel², …] to [r², stride²·N, …]."""
        stride = self.geometry.stride
        axes = rows.unflatten(0, (-1, self.tiles, stride, self.tiles, stride))
        tiles: Tensor = axes.permute(1, 3, 2, 4, 0, 5).flatten(2, 4).flatten(0, 1).contiguous()
        return tiles

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W] float32 to [B, N, H', W'] float32."""
        stride, padding = self.geometry.stride, self.geometry.padding
        x = self.rounded(x.permute(0, 2, 3, 1))
        last = (self.tiles - 1) * stride
        total: Tensor | None = None
        for tile in range(self.tiles**2):
            y = F.linear(x, self.weight[tile].float() * self.scale[tile], self.bias[tile, :, 0])
            y = y.unflatten(3, (stride, stride, -1)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
            down, right = (place * stride for place in divmod(tile, self.tiles))
            edges = (right, last - right, down, last - down)
            y = F.pad(y, (0, 0, *(edge - padding for edge in edges)))
            total = y if total is None else total + y
        assert total is not None
        image: Tensor = total.permute(0, 3, 1, 2)
        return image


class _RowNorm(nn.Module):
    """LayerNorm over rows: the plugin has an operation for that, and takes it for other shapes apart."""

    def __init__(self, norm: nn.LayerNorm | LayerNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.epsilon = norm.eps if isinstance(norm, nn.LayerNorm) else LAYER_NORM_EPS
        self.image = isinstance(norm, LayerNorm2d)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] float32 to the same, or [B, C, H, W] to the same."""
        x = x.permute(0, 2, 3, 1) if self.image else x
        _, height, width, channels = (int(side) for side in x.shape)
        rows = F.layer_norm(x.reshape(-1, channels), self.weight.shape, self.weight, self.bias, self.epsilon)
        y = rows.reshape(-1, height, width, channels)
        return y.permute(0, 3, 1, 2) if self.image else y
