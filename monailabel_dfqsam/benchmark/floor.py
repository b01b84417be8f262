"""The floor: what an encoder's matrix products alone take, at the best rate measured in the same run.

Two terms. Integer: every quantized layer's product [M, K]·[K, N] by oneDNN's int8 kernel or by ours in 4
bit, alone, the fastest call. Attention: its multiplications between real tokens (no window padding) and those
of the relative position, at the fastest rate of a large float32 product. An engine whose attention computes
in less than float32 can be faster.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from monailabel_dfqsam.engines import native
from monailabel_dfqsam.engines.rates import layer_of
from monailabel_dfqsam.ops import Form, StaticRange
from monailabel_dfqsam.quantization.calibrate import quantizable
from monailabel_dfqsam.sam.model import build_encoder
from monailabel_dfqsam.sam.variants import VARIANTS, Variant

_FLOAT_SIDE = 1024
# Each shape is called again until this has passed; one call may be shorter than what a timer resolves.
_TURN_SECONDS = 0.01


class Shape(NamedTuple):
    """A product [m, k]·[k, n]."""

    m: int
    k: int
    n: int

    @property
    def macs(self) -> int:
        """Multiplications."""
        return self.m * self.k * self.n


FLOAT_SHAPE = Shape(_FLOAT_SIDE, _FLOAT_SIDE, _FLOAT_SIDE)


def layer_shapes(variant: Variant, batch: int) -> dict[Shape, int]:
    """How often each product occurs among the quantized layers, by a run on torch's meta device.

    A convolution is the product over its gathered patches; a transposed one that before its scattering.
    """
    shapes: Counter[Shape] = Counter()

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            shape = Shape(output.numel() // module.out_features, module.in_features, module.out_features)
        else:
            assert isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
            transposed = isinstance(module, nn.ConvTranspose2d)
            image = inputs[0] if transposed else output
            positions = image.numel() // image.shape[1]
            inner = module.in_channels if transposed else module.weight[0].numel()
            shape = Shape(positions, inner, module.weight.numel() // inner)
        shapes[shape] += 1

    with torch.device("meta"):
        encoder = build_encoder(variant)
        for module in quantizable(encoder).values():
            module.register_forward_hook(count)
        encoder(torch.empty(batch, 3, variant.input_size, variant.input_size))
    return dict(shapes)


def attention_macs(variant: Variant, batch: int) -> int:
    """Multiplications of q·kᵀ, of probabilities·v and of the relative position, real tokens alone."""
    total = 0
    for block in variant.blocks:
        cuts = [min(block.window, block.grid - start) for start in range(0, block.grid, block.window)]
        for rows in cuts:
            for columns in cuts:
                tokens = rows * columns
                position = rows + columns if variant.relative_position else 0
                total += tokens * (2 * tokens + position) * block.dim
    return batch * total


def floor_terms(
    variant: str, batch: int, seconds: dict[Shape, list[float]]
) -> tuple[float, float, list[float]]:
    """The floor of a run.

    Args:
        seconds: of each shape's fastest call in each round, `FLOAT_SHAPE` among them.

    Returns:
        Seconds of the integer term and of the attention term, both at the run's best rates, and their sum
        at the rates of each round.
    """
    counts = layer_shapes(VARIANTS[variant], batch)
    attention = attention_macs(VARIANTS[variant], batch) / FLOAT_SHAPE.macs
    rounds = [
        sum(count * seconds[shape][i] for shape, count in counts.items()) + attention * float_seconds
        for i, float_seconds in enumerate(seconds[FLOAT_SHAPE])
    ]
    integer = sum(count * min(seconds[shape]) for shape, count in counts.items())
    return integer, attention * min(seconds[FLOAT_SHAPE]), rounds


class GemmFloor:
    """Times every product of a variant alone."""

    def __init__(self, variant: str, batch: int, threads: int) -> None:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        self._calls: dict[Shape, list[Callable[[], Tensor]]] = {
            shape: [
                *(_IntegerProduct(shape, generator, dtype) for dtype in (torch.float32, torch.uint8)),
                *([] if native.why_unavailable() else [_ours(shape)]),
            ]
            for shape in layer_shapes(VARIANTS[variant], batch)
        }
        square = torch.randn(_FLOAT_SIDE, _FLOAT_SIDE, generator=generator)
        packed = torch.ops.mkldnn._reorder_linear_weight(square, _FLOAT_SIDE)
        # torch.mm goes to MKL, which on other makers' CPUs ran at less than half of oneDNN's rate.
        self._float_calls = (
            lambda: torch.mm(square, square),
            lambda: torch.ops.mkldnn._linear_pointwise(square, packed, None, "none", [], ""),
        )

    def turn(self) -> dict[Shape, float]:
        """Seconds of the fastest call of each shape, of `FLOAT_SHAPE` too."""
        with torch.inference_mode():
            found = {shape: min(_fastest(call) for call in calls) for shape, calls in self._calls.items()}
            found[FLOAT_SHAPE] = min(_fastest(call) for call in self._float_calls)
        return found

    def facts(self) -> dict[str, Any]:
        """Nothing beside the seconds."""
        return {}


class _IntegerProduct:
    """One layer's u8×s8 product with zero-point, scales and bias, to float32 or to uint8."""

    def __init__(self, shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._x = torch.randint(0, 16, (shape.m, shape.k), generator=generator, dtype=torch.uint8)
        weight = torch.randint(-8, 8, (shape.n, shape.k), generator=generator, dtype=torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale = torch.full((shape.n,), 1e-3)
        self._zero = torch.zeros(shape.n, dtype=torch.int64)
        self._bias = torch.zeros(shape.n)

    def __call__(self) -> Tensor:
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            self._x, 0.1, 7, self._weight, self._scale, self._zero, self._bias, 1.0, 0, self._dtype,
            "none", [], "",
        )  # fmt: skip
        return result


def _ours(shape: Shape) -> Callable[[], Tensor]:
    """One layer's product in W4A4 of a static range, to float32."""
    layer = replace(layer_of(Form(4, 4), shape.n, shape.k), input_range=StaticRange(0.1, 7))
    kernels = native.native_kernels()
    rows = kernels.quantize_input(torch.randn(shape.m, shape.k), layer)
    return functools.partial(kernels.linear(layer), rows)


def _fastest(call: Callable[[], object]) -> float:
    best, spent = float("inf"), 0.0
    while spent < _TURN_SECONDS:
        begin = time.perf_counter()
        call()
        elapsed = time.perf_counter() - begin
        best, spent = min(best, elapsed), spent + elapsed
    return best
