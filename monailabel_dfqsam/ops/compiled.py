"""The C++ forms of `ops.plain` and of SAM's and TinyViT's attention, reached through a plain C interface.

The library is built when the package is installed, once for each instruction set, where there is a C++
compiler; without it everything runs in plain torch, only slower. It uses the OpenMP that torch has loaded, so
that both share one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterable
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monailabel_dfqsam.ops.layer import GROUP, QuantizedLayer, Rows

logger = logging.getLogger(__name__)

_SIGNATURES = {
    "dfqsam_quantize": [c_void_p, c_void_p, c_int64, c_float, c_float, c_float],
    "dfqsam_layer_norm_quantize": [
        *[c_void_p] * 9, c_int64, c_int64, c_double, c_float, c_float, c_float,
    ],
    "dfqsam_quantize_rows": [*[c_void_p] * 6, c_int64, c_int64, c_int],
    "dfqsam_gelu": [c_void_p, c_int64],
    "dfqsam_rescale": [*[c_void_p] * 7, c_int64, c_int64],
    "dfqsam_attention": [c_void_p] * 6 + [c_int64] * 6 + [c_float] * 3,
    "dfqsam_window_attention": [c_void_p] * 5 + [c_int64] * 6 + [c_float] * 3,
    "dfqsam_keep_memory": [],
}  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library for this processor, or None, which the log explains.

    Raises:
        OSError: when it was built but cannot be loaded.
    """
    path = library_path()
    if path is None:
        logger.info("no compiled CPU operations: plain torch runs in their place")
        return None
    share_openmp()
    loaded = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        getattr(loaded, name).argtypes = arguments
    loaded.dfqsam_keep_memory()
    return loaded


def library_path() -> Path | None:
    """The file built for this processor, or None."""
    names = (torch.backends.cpu.get_cpu_capability().lower(), "default")
    paths = (Path(__file__).with_name(f"libdfqsam_cpu_{name}.so") for name in names)
    return next((path for path in paths if path.is_file()), None)


def share_openmp() -> None:
    """Makes the OpenMP that torch brought visible to the library, which names none itself."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    loaded = [line.split()[-1] for line in lines if "libgomp" in line or "libiomp" in line]
    ctypes.CDLL(loaded[0] if loaded else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def quantize_input(x: Tensor, layer: QuantizedLayer, levels: bool = False) -> Rows:
    """As `plain.quantize_input`; keeps the memory order of x where a row is not what is last in it.

    Args:
        levels: of 4 bit in groups, tell their levels and multipliers apart.
    """
    keeps = (layer.input_range is not None or layer.by_image) and _channels_last(x)
    dense = x if keeps or x.is_contiguous() else x.contiguous()
    q = torch.empty_like(dense, dtype=torch.uint8)
    if layer.input_range is not None:
        _call("dfqsam_quantize", dense.data_ptr(), q.data_ptr(), dense.numel(), *_range(layer))
        return Rows(q)
    count = len(x) if layer.by_image else x.numel() // x.shape[-1]
    rows = _with_ranges(q, count, layer, levels)
    _call("dfqsam_quantize_rows", dense.data_ptr(), *map(_pointer, rows), count, x.numel() // count, 0)
    return rows


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    layer: QuantizedLayer,
    keep: bool,
    levels: bool = False,
) -> tuple[Rows, Tensor | None]:
    """As `plain.layer_norm_quantize`, for contiguous tensors; `levels` as in `quantize_input`."""
    rows = _with_ranges(torch.empty(x.shape, dtype=torch.uint8), len(x), layer, levels)
    normed = torch.empty_like(x) if keep else None
    _call(
        "dfqsam_layer_norm_quantize", x.data_ptr(), weight.data_ptr(), bias.data_ptr(), _pointer(normed),
        *map(_pointer, rows), x.shape[0], x.shape[1], epsilon, *_range(layer),
    )  # fmt: skip
    return rows, normed


def gelu_quantize(x: Tensor, layer: QuantizedLayer, levels: bool = False) -> Rows:
    """As `plain.gelu_quantize`, for contiguous x, which it overwrites; `levels` as in `quantize_input`."""
    if layer.input_range is not None or layer.by_image:
        return quantize_input(gelu(x), layer, levels)
    rows = _with_ranges(torch.empty_like(x, dtype=torch.uint8), len(x), layer, levels)
    _call("dfqsam_quantize_rows", x.data_ptr(), *map(_pointer, rows), *x.shape, 1)
    return rows


def gelu(x: Tensor) -> Tensor:
    """As `plain.gelu`, for dense x, in place."""
    _call("dfqsam_gelu", x.data_ptr(), x.numel())
    return x


def rescale(
    sums: Tensor, rows: Rows, weights: Tensor, layer: QuantizedLayer, residual: Tensor | None
) -> Tensor:
    """As `plain.rescale`, for contiguous tensors, the weights' sums int32."""
    _call(
        "dfqsam_rescale",
        *map(
            _pointer, (sums, rows.scale, rows.zero_point, weights, layer.weight_scale, layer.bias, residual)
        ),
        *sums.shape,
    )
    return sums if residual is None else residual


def attention(
    qkv: Tensor,
    pad: Tensor | None,
    tables: tuple[Tensor, Tensor] | None,
    heads: int,
    window: int,
    reader: QuantizedLayer | None = None,
) -> Tensor:
    """As `sam.vit.Attention.attend`, in float32; its relative error against float64 is below 2e-6.

    Neither logits nor relative position ever exist as a matrix, and padded tokens ask nothing.

    Args:
        qkv: [B, H, W, 3C] float32, contiguous.
        pad: [3C] float32, qkv of tokens beyond the edge; None where windows divide the grid.
        tables: of relative position by rows and by columns, each [2·side − 1, C / heads] float32.
        window: side in tokens, 0 for the whole grid.
        reader: the layer behind, of a static range, if its integers are wanted.

    Returns:
        [B, H, W, C] float32, or uint8 with a reader.

    Raises:
        ValueError: for sizes that do not fit each other.
    """
    inputs = (qkv, pad, *(tables or (None, None)))
    return _attended("dfqsam_attention", inputs, qkv.shape, heads, window, reader)


def window_attention(
    qkv: Tensor, pad: Tensor | None, biases: Tensor, window: int, reader: QuantizedLayer | None = None
) -> Tensor:
    """As `sam.tiny_vit.Attention.attend`, in float32; its relative error against float64 is below 2e-6.

    Args:
        qkv: [B, H, W, 3C] float32, contiguous.
        pad: [3C] float32, qkv of tokens beyond the edge; None where windows divide the grid.
        biases: [heads, window²] float32, contiguous, by |Δrow|·window + |Δcolumn|.
        window: side in tokens.
        reader: the layer behind, of a static range, if its integers are wanted.

    Returns:
        [B, H, W, C] float32, or uint8 with a reader.

    Raises:
        ValueError: for sizes that do not fit each other.
    """
    inputs = (qkv, pad, biases)
    return _attended("dfqsam_window_attention", inputs, qkv.shape, len(biases), window, reader)


def _attended(
    name: str,
    inputs: Iterable[Tensor | None],
    shape: torch.Size,
    heads: int,
    window: int,
    reader: QuantizedLayer | None,
) -> Tensor:
    """What a function of the library makes of qkv of a shape [B, H, W, 3C], the first of its inputs."""
    b, h, w, c3 = shape
    out = torch.empty(b, h, w, c3 // 3, dtype=torch.float32 if reader is None else torch.uint8)
    places = (out.data_ptr(), None) if reader is None else (None, out.data_ptr())
    sizes = (b, h, w, heads, c3 // 3 // heads, window)
    levels = (1.0, 0.0, 0.0) if reader is None else _range(reader)
    if _call(name, *map(_pointer, inputs), *places, *sizes, *levels):
        raise ValueError(f"attention cannot run on {list(shape)} with {heads} heads and window {window}")
    return out


def _call(name: str, *arguments: object) -> int:
    loaded = library()
    assert loaded is not None
    return call(getattr(loaded, name), *arguments)


def call(function: Any, *arguments: object) -> int:
    """Calls a function of a library, under its name where torch's profiler runs."""
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return function(*arguments)  # type: ignore[no-any-return]
    with torch.profiler.record_function(function.__name__):
        return function(*arguments)  # type: ignore[no-any-return]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _with_ranges(q: Tensor, count: int, layer: QuantizedLayer, levels: bool) -> Rows:
    """Room for q and, where the layer's ranges are found at run time, for those of `count` rows."""
    if layer.input_range is not None:
        return Rows(q)
    scale = torch.empty(count)
    if layer.activation_bits == 8:
        return Rows(q, scale, torch.empty(count, dtype=torch.int32))
    if not levels:
        return Rows(q, scale)
    groups = -(-q.shape[-1] // GROUP)
    multiplier = torch.empty(count, groups, dtype=torch.int32)
    return Rows(q, scale, None, multiplier, torch.empty(count, dtype=torch.int32))


def _range(layer: QuantizedLayer) -> tuple[float, float, float]:
    """Inverse scale, zero-point and highest level; of a range found at run time anything."""
    scale, zero_point = layer.input_range or (1.0, 0)
    return 1.0 / scale, zero_point, layer.largest_input


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
