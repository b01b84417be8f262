"""How long a multiplication takes on this machine, of integers and of floats."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.engines import onednn
from monailabel_dfqsam.ops import Form, QuantizedLayer, plain
from monailabel_dfqsam.quantization.cost import KEPT

_ROWS, _OUTPUTS, _INPUTS = 1024, 640, 320
_REPEATS = 15


def seconds(form: Form) -> float:
    """Of one multiplication of a layer in a form, on the CPU and as many threads as torch has.

    4-bit integers are multiplied in 8-bit containers. Measured once a process.
    """
    return _rate(form != KEPT, torch.get_num_threads())


@functools.cache
def _rate(integers: bool, threads: int) -> float:
    """Seconds of one multiplication, rounded so that noise seldom changes a choice that hangs on it."""
    del threads  # another number, another measurement
    g = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, _INPUTS, generator=g)
    weight, bias = torch.randn(_OUTPUTS, _INPUTS, generator=g), torch.zeros(_OUTPUTS)

    def floats() -> Tensor:
        return F.linear(x, weight, bias)

    run: Callable[[], Tensor] = floats
    if integers and onednn.why_unavailable() is None:
        layer = QuantizedLayer(
            (weight * 40).clamp(-127, 127).to(torch.int8), torch.ones(_OUTPUTS), bias, None, 8, 8
        )
        kernel, rows = onednn.onednn_kernel(layer), plain.quantize_input(x, layer)

        def run() -> Tensor:
            return kernel(rows)

    taken = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    exact = min(taken) / (_ROWS * _OUTPUTS * _INPUTS)
    return float(2 ** (round(2 * math.log2(exact)) / 2))
