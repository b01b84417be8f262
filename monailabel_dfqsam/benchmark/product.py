"""Integer products alone, in turns: our kernels of every instruction set here, torch float32, oneDNN int8."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.config import Progress, silent
from monailabel_dfqsam.engines import onednn
from monailabel_dfqsam.engines.rates import layer_of
from monailabel_dfqsam.ops import Form, StaticRange, compiled
from monailabel_dfqsam.ops.product import Product, Sums, available_sets, has_dot, tile_seconds

SHAPES = (
    (256, 3072, 768),
    (256, 768, 768),
    (1024, 576, 144),
    (4096, 3072, 768),
    (1024, 640, 160),
    (4096, 512, 128),
)
"""(M, N, K): those of ViT-B, and those of TinyViTs."""

FLOAT, INT8 = "torch float32", "oneDNN int8"
FORMS = {
    "W4A4": Form(4, 4, grouped=True),
    "W4A8": Form(4, 8, grouped=True),
    "W8A8": Form(8, 8),
    "W4A4 static": Form(4, 4),
}
"""Of our products; ranges are found at run time but where it is said."""

_ROUNDS = 9


def measure_products(
    shapes: Sequence[tuple[int, int, int]] = SHAPES, threads: int = 1, progress: Progress = silent
) -> dict[str, Any]:
    """Times products of every shape.

    Args:
        shapes: (M, N, K) each.
        threads: for all of them.
        progress: called with ('products', done, total).

    Returns:
        `threads`; `instructions`, our sets here; `tiles`, {instructions: {sums: GMAC/s}}, the rate of a tile
        on one thread whose numbers stay in the first cache, which nothing can exceed; and `rows`, each
        {m, n, k, by, form, gmacs_per_s, times_float, times_int8}, medians; `by` is a set of ours, or a peer,
        whose form is ''.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = []
        for number, shape in enumerate(shapes):
            progress("products", number, len(shapes))
            rows += _rows(*shape)
        progress("products", len(shapes), len(shapes))
    finally:
        torch.set_num_threads(before)
    return {
        "threads": threads,
        "instructions": list(available_sets()),
        "tiles": {name: _tile_rates(name) for name in available_sets()},
        "rows": rows,
    }


def _rows(m: int, n: int, k: int) -> list[dict[str, Any]]:
    calls = _calls(m, n, k)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(_ROUNDS):
        for key, call in calls.items():
            call()  # what others left in the caches is not this one's
            begin = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - begin)
    median = {key: statistics.median(found) for key, found in seconds.items()}
    slow, peer = median[FLOAT, ""], median.get((INT8, ""))
    return [
        {
            "m": m, "n": n, "k": k, "by": by, "form": form, "gmacs_per_s": m * n * k / taken * 1e-9,
            "times_float": slow / taken, "times_int8": None if peer is None else peer / taken,
        }
        for (by, form), taken in median.items()
    ]  # fmt: skip


def _calls(m: int, n: int, k: int) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """What is timed, by who multiplies and in which form."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g), torch.zeros(n)
    found: dict[tuple[str, str], Callable[[], Tensor]] = {
        (FLOAT, ""): functools.partial(F.linear, x, weight, bias)
    }
    if onednn.why_unavailable() is None:
        layer = replace(layer_of(Form(8, 8), n, k), input_range=StaticRange(0.03, 128))
        found[INT8, ""] = functools.partial(onednn.onednn_kernel(layer), compiled.quantize_input(x, layer))
    for name in available_sets():
        for form in FORMS:
            layer = layer_of(FORMS[form], n, k)
            if form == "W4A4 static":
                layer = replace(layer, input_range=StaticRange(0.5, 8))
            rows = compiled.quantize_input(x, layer, levels=not has_dot(name))
            found[name, form] = functools.partial(Product(layer, name), rows)
    return found


def _tile_rates(name: str) -> dict[str, float]:
    """GMAC/s of one tile of an instruction set, by how it sums."""
    sums = (Sums.DOT,) if has_dot(name) else (Sums.PAIRS, Sums.LEVELS, Sums.WIDE)
    return {how.name.lower(): 1e-9 / tile_seconds(name, how) for how in sums}
