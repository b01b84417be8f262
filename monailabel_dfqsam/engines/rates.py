"""How long a multiplication takes on this machine, of integers and of floats."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.engines import native, onednn
from monailabel_dfqsam.ops import GROUP, Form, Groups, QuantizedLayer, plain
from monailabel_dfqsam.quantization.cost import KEPT

_ROWS, _OUTPUTS, _INPUTS = 1024, 640, 320
_REPEATS = 15


def seconds(form: Form) -> float:
    """Of one multiplication of a layer in a form, on the CPU and as many threads as torch has.

    Measured once a process, by our own products where they run, else by oneDNN's, where 4-bit integers take
    as long as those of 8 bit.
    """
    ours = native.why_unavailable() is None
    return _rate(form if ours or form == KEPT else Form(8, 8), ours, torch.get_num_threads())


@functools.cache
def _rate(form: Form, ours: bool, threads: int) -> float:
    """Seconds of one multiplication, rounded so that noise seldom changes a choice that hangs on it."""
    del threads  # another number, another measurement
    g = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, _INPUTS, generator=g)
    run: Callable[[], Tensor]
    if form == KEPT or not (ours or onednn.why_unavailable() is None):
        weight, bias = torch.randn(_OUTPUTS, _INPUTS, generator=g), torch.zeros(_OUTPUTS)
        run = functools.partial(F.linear, x, weight, bias)
    elif ours:
        kernels, layer = native.native_kernels(), layer_of(form, _OUTPUTS, _INPUTS)
        run = functools.partial(kernels.linear(layer), kernels.quantize_input(x, layer))
    else:
        layer = layer_of(form, _OUTPUTS, _INPUTS)
        run = functools.partial(onednn.onednn_kernel(layer), plain.quantize_input(x, layer))
    taken = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    exact = min(taken) / (_ROWS * _OUTPUTS * _INPUTS)
    return float(2 ** (round(2 * math.log2(exact)) / 2))


def layer_of(form: Form, outputs: int, inputs: int) -> QuantizedLayer:
    """Any Linear [outputs, inputs] of a form with ranges at run time."""
    highest, g = (1 << (form.weight_bits - 1)) - 1, torch.Generator().manual_seed(0)
    weight = torch.randint(-highest, highest + 1, (outputs, inputs), generator=g).to(torch.int8)
    ones = torch.ones(outputs, -(-inputs // GROUP), dtype=torch.uint8)
    groups = Groups(ones, 8 * ones) if form.grouped else None
    scale, bias = torch.ones(outputs), torch.zeros(outputs)
    return QuantizedLayer(weight, scale, bias, None, form.weight_bits, form.activation_bits, None, groups)
