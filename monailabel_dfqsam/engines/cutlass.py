"""The NVIDIA engine: quantized matrix products by CUTLASS, fp16 between them, one CUDA graph a batch size.

Tokens are rows [B·T, C] from the patch embedding to the neck; nothing is transposed on the way:

    LayerNorm+quantize → qkv → q, k, v of windows → attention → collect+quantize → proj + residual
    LayerNorm+quantize → lin1+GELU+quantize → lin2 + residual

`GraphlessForward` is that arithmetic on any device, in float32 through the ops' references on a CPU, where
tests hold it to the reference engine. `CutlassEncoder` runs it on a GPU and captures it.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.artifact import Artifact, ArtifactError, decode_layer, float_tensors
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines.cutlass_layers import Layer, Windows, window_tables
from monailabel_dfqsam.ops.cuda import layer_norm_quantize, linear_gelu_quantize, quantize_rows
from monailabel_dfqsam.ops.cuda_attention import attention_inputs, attention_output
from monailabel_dfqsam.ops.cuda_library import native_4bit, why_unavailable
from monailabel_dfqsam.quantization.cost import layer_costs
from monailabel_dfqsam.sam.encoder import LAYER_NORM_EPS
from monailabel_dfqsam.sam.variants import VARIANTS

ADAPTER_NORM_EPS = 1e-5
NO_TINY_VIT = "the engine 'cutlass' runs ViT encoders, not TinyViT"
ONE_FORM = (
    "the engine 'cutlass' runs encoders all of whose layers are quantized to one fixed input range each, "
    "without groups of weights"
)
_WARM_UPS = 2


def available() -> bool:
    """Whether compiled kernels and a GPU that they fit are here; `why_unavailable` says what is missing."""
    return why_unavailable() is None


def why_not(artifact: Artifact) -> str | None:
    """Why an artifact of policy `deploy` is none for this engine, or None when it is one."""
    variant, header = VARIANTS.get(artifact.header["variant"]), artifact.header
    if variant is None:
        return None
    if variant.stages:
        return NO_TINY_VIT
    layers = header["layers"]
    whole = layer_costs(variant, {}).keys() <= layers.keys()
    plain = all("input_scale" in entry and "group_size" not in entry for entry in layers.values())
    return None if whole and plain else ONE_FORM


class CutlassEncoder:
    """Runs artifacts of policy `deploy` on the current CUDA device.

    One call at a time: its graphs' inputs and outputs are fixed places in GPU memory.

    Attributes:
        arithmetic: 'w4a4_native' where the GPU multiplies 4-bit values itself, 'w4a4_int8' where it
            multiplies them in 8-bit containers; layers of more bits are multiplied as int8 on both.
    """

    kind = EngineKind.CUTLASS

    def __init__(self, artifact: Artifact) -> None:
        reason = why_unavailable()
        if reason is not None:
            raise ArtifactError(f"the engine 'cutlass' cannot run here: {reason}")
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._forward = GraphlessForward(artifact, self._device, torch.float16, native_4bit(self._device))
        self.arithmetic = "w4a4_native" if self._forward.native else "w4a4_int8"
        self._graphs: dict[int, _Graph] = {}
        self._lock = threading.Lock()

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] float32, normalised, to [B, C, S/16, S/16] float32 on the images' device.

        Raises:
            ValueError: for another shape.
        """
        self._forward.check(images)
        with self._lock, torch.inference_mode(), torch.cuda.device(self._device):
            graph = self._graphs.get(images.shape[0])
            if graph is None:
                graph = self._graphs[images.shape[0]] = self._capture(images)
            graph.images.copy_(images)
            graph.graph.replay()
            # A copy in any case: the next replay overwrites the graph's own.
            return graph.embedding.to(images.device, copy=True)

    def _capture(self, images: Tensor) -> _Graph:
        static = images.to(self._device, torch.float32, copy=True)
        # Kernels are loaded and libraries set up before capture, which forbids both.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._forward(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            embedding = self._forward(static)
        return _Graph(graph, static, embedding)


class _Graph(NamedTuple):
    """A captured encoder: images go in and the embedding comes out at fixed addresses."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    embedding: Tensor


class GraphlessForward:
    """An artifact's encoder as a function, on one device and in one float type.

    Args:
        dtype: between matrix products: float16 on CUDA, float32 on a CPU.
        native: 4-bit layers stay packed and are multiplied as 4-bit integers; else in 8-bit containers.

    Raises:
        ArtifactError: when the artifact is of policy `paper` or a TinyViT's, or does not fit its model.
    """

    def __init__(self, artifact: Artifact, device: torch.device, dtype: torch.dtype, native: bool) -> None:
        if artifact.header["attention_bits"]:
            raise ArtifactError("policy 'paper' quantizes attention, which only the reference engine runs")
        variant = VARIANTS.get(artifact.header["variant"])
        if variant is None:
            raise ArtifactError(f"the artifact is of a model unknown here: '{artifact.header['variant']}'")
        if (reason := why_not(artifact)) is not None:
            raise ArtifactError(reason)
        self.variant, self.dtype, self.native, self._device = variant, dtype, native, device
        self._floats = float_tensors(artifact, "image_encoder.")
        self._layers = {
            name: Layer(decode_layer(artifact, name), device, native) for name in artifact.header["layers"]
        }
        self._position = self._float("pos_embed").flatten(0, 2).to(device, dtype)
        self._norms = {
            name.removesuffix(".weight"): (
                self._float(name).to(device),
                self._float(name.removesuffix("weight") + "bias").to(device),
            )
            for name in self._norm_names()
        }
        self._windows = {side: window_tables(variant.grid, side, device) for side in self._sides()}
        self._blocks = [self._attention_constants(i) for i in range(variant.depth)]
        self._floats = {}

    def check(self, images: Tensor) -> None:
        """Raises ValueError for another shape than [B, 3, S, S]."""
        side = self.variant.input_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"the encoder takes [B, 3, {side}, {side}], not {list(images.shape)}")

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] float32 on the device, to [B, C, S/16, S/16] float32."""
        batch, grid = images.shape[0], self.variant.grid
        x = self._patches(images)
        for index in range(self.variant.depth):
            x = self._block(x, index, batch)
        first, second = self._layers["neck.0"], self._layers["neck.2"]
        x = first.product(first.quantize(x), self.dtype)
        rows = layer_norm_quantize(x, *self._norms["neck.1"], LAYER_NORM_EPS, *second.container_8bit)
        x = second.convolve(rows, batch, grid, grid, self.dtype)
        weight, bias = self._norms["neck.3"]
        x = F.layer_norm(x.float(), weight.shape, weight, bias, LAYER_NORM_EPS)
        return x.view(batch, grid, grid, -1).permute(0, 3, 1, 2).contiguous()

    def _patches(self, images: Tensor) -> Tensor:
        layer = self._layers["patch_embed.proj"]
        batch, side = images.shape[0], self.variant.input_size
        pixels = quantize_rows(images.reshape(-1, side), *layer.container_8bit)
        pixels = pixels[:, :side].view(batch, 3, side, side)
        position = self._position.expand(batch, *self._position.shape).flatten(0, 1)
        return layer.convolve_image(pixels, self.dtype, position)

    def _block(self, x: Tensor, index: int, batch: int) -> Tensor:
        name = f"blocks.{index}"
        qkv, proj = self._layers[f"{name}.attn.qkv"], self._layers[f"{name}.attn.proj"]
        rows = layer_norm_quantize(x, *self._norms[f"{name}.norm1"], LAYER_NORM_EPS, *qkv.container)
        rows = self._attend(qkv.product(rows, self.dtype), index, batch, proj)
        x = proj.product(rows, self.dtype, x)
        lin1, lin2 = self._layers[f"{name}.mlp.lin1"], self._layers[f"{name}.mlp.lin2"]
        rows = layer_norm_quantize(x, *self._norms[f"{name}.norm2"], LAYER_NORM_EPS, *lin1.container)
        scale, zero_point, bits, _ = lin2.container
        rows = linear_gelu_quantize(rows, lin1.weight, lin1.scale, lin1.bias, scale, zero_point, bits)
        y = lin2.product(rows, self.dtype, x)
        return y + self._adapt(x, name, batch) if self.variant.adapters else y

    def _attend(self, qkv: Tensor, index: int, batch: int, proj: Layer) -> Tensor:
        """qkv [B·T, 3C] to quantized rows of attention's result, for `proj`."""
        constants, heads = self._blocks[index], self.variant.num_heads
        depth, windows = self.variant.embed_dim // heads, constants.windows
        results: list[Tensor | None] = []
        for group in windows.groups:
            q, k, v = attention_inputs(
                qkv, constants.padding, constants.table_h, constants.table_w, group.query, group.place,
                group.key, self.variant.grid**2, windows.side, heads,
            )  # fmt: skip
            results.append(F.scaled_dot_product_attention(q, k, v, scale=depth**-0.5))
        full, partial = (*results, None)[:2]
        rows: Tensor = attention_output(full, partial, windows.slot, batch, depth, *proj.container)
        return rows

    def _adapt(self, x: Tensor, name: str, batch: int) -> Tensor:
        """SAM-Med2D's adapter on norm2's output as it was before reparameterization; see sam/adapter.py."""
        grid, dim = self.variant.grid, self.variant.embed_dim
        down, up = (self._layers[f"{name}.Adapter.channel.{i}"] for i in (0, 2))
        shrink, enlarge = (self._layers[f"{name}.Adapter.spatial.{i}"] for i in (0, 2))
        weight, bias = self._norms[f"{name}.restored"]
        normed = F.layer_norm(x.float(), (dim,), weight, bias, LAYER_NORM_EPS)
        tokens = normed.view(batch, -1, dim)
        hidden = down.product(down.quantize(tokens.mean(1)), self.dtype).relu_()
        gate = up.product(up.quantize(hidden), self.dtype).float().sigmoid_()
        gated = (tokens * gate[:, None]).flatten(0, 1)
        y = shrink.convolve(quantize_rows(gated, *shrink.container_8bit), batch, grid, grid, self.dtype)
        y = quantize_rows(y.relu_(), *enlarge.container_8bit)
        y = enlarge.convolve(y, batch, grid // 2, grid // 2, self.dtype)
        weight, bias = self._norms[f"{name}.Adapter.norm"]
        return F.layer_norm(normed + y.relu(), (dim,), weight, bias, ADAPTER_NORM_EPS).to(self.dtype)

    def _norm_names(self) -> list[str]:
        names = ["neck.1.weight", "neck.3.weight"]
        for index in range(self.variant.depth):
            name = f"blocks.{index}"
            names += [f"{name}.norm1.weight", f"{name}.norm2.weight"]
            if self.variant.adapters:
                names.append(f"{name}.Adapter.norm.weight")
        return names

    def _sides(self) -> set[int]:
        return {self.variant.window_of(i) or self.variant.grid for i in range(self.variant.depth)}

    def _attention_constants(self, index: int) -> _AttentionConstants:
        name, variant = f"blocks.{index}", self.variant
        if variant.adapters:
            # The adapter's affine of norm2, undoing the reparameterization for lin1.
            weight, bias = self._norms[f"{name}.norm2"]
            scale, shift = (
                self._float(f"{name}.restore_{part}").to(self._device) for part in ("scale", "shift")
            )
            self._norms[f"{name}.restored"] = (weight * scale, bias * scale + shift)

        def constant(tensor: str) -> Tensor:
            return self._float(f"{name}.attn.{tensor}").to(self._device, self.dtype).contiguous()

        window = variant.window_of(index)
        return _AttentionConstants(
            windows=self._windows[window or variant.grid],
            padding=constant("pad_qkv") if window else None,
            table_h=constant("rel_pos_h") if variant.relative_position else None,
            table_w=constant("rel_pos_w") if variant.relative_position else None,
        )

    def _float(self, name: str) -> Tensor:
        if name not in self._floats:
            raise ArtifactError(f"the artifact lacks tensors, '{name}' first: quantize again")
        return self._floats[name]


class _AttentionConstants(NamedTuple):
    """What a block's attention needs beside q, k and v."""

    windows: Windows
    padding: Tensor | None
    table_h: Tensor | None
    table_w: Tensor | None
