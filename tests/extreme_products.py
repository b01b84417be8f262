"""Run as a program: each engine's products of extreme integers against plain ones, under one instruction set.

Prints JSON: of each engine, what differs and whether it multiplies large weights in halves.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace

import torch
from torch import Tensor

from monailabel_dfqsam.engines import onednn, openvino
from monailabel_dfqsam.engines.onednn import onednn_kernel
from monailabel_dfqsam.engines.reference import reference_kernel
from monailabel_dfqsam.ops import Geometry, QuantizedLayer, Rows, StaticRange, openvino_library

# One row and many, and sizes that fill no vector, with which oneDNN takes other kernels.
ROWS = (1, 2, 7, 31, 64, 257)
COLUMNS = (1, 3, 13, 64, 67, 144, 255, 768, 2304)
OUTPUTS = (1, 16, 65)
# With the channels of each.
GEOMETRIES = (
    (Geometry(1, 1, 0), 144),
    (Geometry(4, 4, 0), 3),
    (Geometry(3, 1, 1), 43),
    (Geometry(4, 2, 1, transposed=True), 144),
)
ZERO_POINT = 7
RUN_TIME_TOLERANCE = 2e-6
SCALE = float(torch.tensor(0.0371))


def extremes(rows: int, columns: int, low: int, high: int) -> Tensor:
    """[rows, columns] int64, in turn the highest, the lowest, both by chance, and anything between."""
    g = torch.Generator().manual_seed(rows * columns)
    values = torch.randint(low, high + 1, (rows, columns), generator=g)
    values[0::4], values[1::4] = high, low
    both = torch.randint(0, 2, (rows, columns), generator=g) * (high - low) + low
    values[2::4] = both[2::4]
    return values


def layer_of(outputs: int, columns: int, geometry: Geometry | None) -> QuantizedLayer:
    """With scales and bias that round nothing."""
    weight = extremes(outputs, columns, -128, 127).to(torch.int8)
    bias = torch.arange(outputs) * 1.0
    if geometry is not None and geometry.transposed:
        bias = bias * 0
    return QuantizedLayer(weight, torch.ones(outputs), bias, StaticRange(1.0, ZERO_POINT), 8, 8, geometry)


def differing_onednn() -> list[str]:
    """The sizes at which products differ from the reference engine's, with a residual and without."""
    found = []
    for rows, columns, outputs in itertools.product(ROWS, COLUMNS, OUTPUTS):
        g = torch.Generator().manual_seed(rows)
        scales, bias = torch.rand(outputs, generator=g), torch.randn(outputs, generator=g)
        fixed = StaticRange(SCALE, ZERO_POINT)
        layer = replace(layer_of(outputs, columns, None), weight_scale=scales, bias=bias, input_range=fixed)
        q = Rows(extremes(rows, columns, 0, 255).to(torch.uint8))
        residual = torch.randn(rows, outputs, generator=g)
        fast, slow = onednn_kernel(layer), reference_kernel(layer)
        same = torch.equal(fast(q), slow(q))
        if not same or not torch.equal(fast(q, residual.clone()), slow(q, residual.clone())):
            found.append(f"{rows} × {columns} × {outputs}")
        # Sums of extremes need more digits than float32 has.
        zero_points = torch.randint(0, 256, (rows,), generator=g, dtype=torch.int32)
        for zero_point in (zero_points, None):
            ranged = Rows(q.q, torch.rand(rows, generator=g) + 0.1, zero_point)
            found_here, expected = (
                kernel(replace(layer, input_range=None))(ranged).double()
                for kernel in (onednn_kernel, reference_kernel)
            )
            if (found_here - expected).norm() > RUN_TIME_TOLERANCE * expected.norm():
                found.append(f"{rows} × {columns} × {outputs} with ranges found at run time")
    return found


def differing_openvino(portable: bool) -> list[str]:
    """The kinds of layers that differ from the product or convolution of the same integers in float64."""
    found = []
    for geometry, inputs in ((None, 144), (None, 67), *GEOMETRIES):
        taps = 1 if geometry is None else geometry.kernel**2
        transposed = geometry is not None and geometry.transposed
        layer = layer_of(40 * taps, inputs, geometry) if transposed else layer_of(40, inputs * taps, geometry)
        q = extremes(33, inputs, 0, 255) if geometry is None else extremes(4, 64 * inputs, 0, 255)
        x = q.float() - ZERO_POINT
        x = x if geometry is None else x.view(4, inputs, 8, 8)
        if not torch.equal(openvino.multiplied(portable, layer, x), _product(layer, x.double())):
            found.append(f"{inputs} inputs, {geometry}")
    return found


def _product(layer: QuantizedLayer, x: Tensor) -> Tensor:
    weight, geometry = layer.weight.double(), layer.geometry
    if geometry is None:
        return (x @ weight.T + layer.bias.double()).float()
    kernel = (geometry.kernel, geometry.kernel)
    if geometry.transposed:
        weight = weight.unflatten(0, (-1, *kernel)).permute(3, 0, 1, 2)
        return torch.conv_transpose2d(x, weight, None, geometry.stride, geometry.padding).float()
    weight = weight.unflatten(1, (-1, *kernel))
    return torch.conv2d(x, weight, layer.bias.double(), geometry.stride, geometry.padding).float()


if __name__ == "__main__":
    told: dict[str, list[str] | bool | None] = {}
    if onednn.available():
        told.update(onednn=differing_onednn(), onednn_halves=onednn.in_halves())
    if openvino_library.why_absent() is None:
        halves = openvino.in_halves()
        told.update(openvino=differing_openvino(bool(halves)), openvino_halves=halves)
        told.update(export=differing_openvino(True))
    json.dump(told, sys.stdout)
