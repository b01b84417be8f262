"""Integer products in C++: a layer is packed once for this processor's instructions, then multiplied exactly.

Sums of 4-bit values fit in 16 bit for many products, those of 8-bit values do not: on a processor without an
instruction for 8-bit dot products, 4 bit is faster than 8. One library holds the kernels of all instruction
sets; what runs is found when it is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor

from monailabel_dfqsam.ops.compiled import call, share_openmp
from monailabel_dfqsam.ops.layer import CENTRE, QuantizedLayer, Rows, spread

PATH = Path(__file__).with_name("libdfqsam_product.so")

# The fastest first, by what torch says of the processor, which can be told to say less.
_SETS = {
    "AVX512": ("avx512_vnni", "avx_vnni", "avx512", "avx2"),
    "AVX2": ("avx_vnni", "avx2"),
}
_ARM = ("neon_dot",)
_LARGEST_SUM = 32767
_PAIRS_A_BLOCK = 8  # products of 8 bit that meet in a lane of 16 before it can be widened


class Sums(IntEnum):
    """How sums stay exact, as in kernels/cpu/product_kernels.h."""

    DOT = 0
    PAIRS = 1
    LEVELS = 2
    WIDE = 3


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where none was built.

    Raises:
        OSError: when it was built but cannot be loaded.
    """
    if not PATH.is_file():
        return None
    share_openmp()
    loaded = ctypes.CDLL(str(PATH))
    loaded.dfqsam_has.argtypes = [c_char_p]
    loaded.dfqsam_tile_seconds.argtypes = [c_char_p, c_int]
    loaded.dfqsam_tile_seconds.restype = c_double
    loaded.dfqsam_pack.argtypes = [c_char_p, c_int, *[c_void_p] * 4, *[c_int64] * 3]
    loaded.dfqsam_pack.restype = c_void_p
    loaded.dfqsam_unpack.argtypes = [c_void_p]
    loaded.dfqsam_product.argtypes = [*[c_void_p] * 7, c_int64, c_int, c_int]
    return loaded


def available_sets() -> tuple[str, ...]:
    """The sets of instructions that products can run on here, the fastest first."""
    loaded = library()
    if loaded is None:
        return ()
    arm = platform.machine().lower() in ("aarch64", "arm64")
    names = _ARM if arm else _SETS.get(torch.backends.cpu.get_cpu_capability(), ())
    return tuple(name for name in names if loaded.dfqsam_has(name.encode()))


def instruction_set() -> str | None:
    """The set that products run on here, or None where none of them is known."""
    return next(iter(available_sets()), None)


def tile_seconds(instructions: str, how: Sums) -> float:
    """Seconds of one multiplication in a tile whose numbers stay in the first cache, on one thread."""
    loaded = library()
    assert loaded is not None
    taken: float = loaded.dfqsam_tile_seconds(instructions.encode(), how)
    return taken


def has_dot(instructions: str) -> bool:
    """Whether a set of instructions adds four products of 8 bit to 32 at once."""
    return instructions.endswith(("vnni", "dot"))


class Product:
    """One layer's product: rows [M, K] to [M, N] float32, `integer.multiplied` bit for bit.

    Rows of 4 bit in groups come with multipliers where the instructions have no dot product, else without.
    """

    def __init__(self, layer: QuantizedLayer, instructions: str) -> None:
        """Packs a layer.

        Args:
            layer: its weight [N, K] in the order of K that its rows have.
            instructions: as `instruction_set` gives them.
        """
        loaded = library()
        assert loaded is not None
        self._outputs = len(layer.weight)
        how, weight, multiplier = _form(layer, has_dot(instructions))
        scale, bias = layer.weight_scale.float().contiguous(), layer.bias.float().contiguous()
        self._packed = loaded.dfqsam_pack(
            instructions.encode(), how, weight.data_ptr(), _pointer(multiplier), scale.data_ptr(),
            bias.data_ptr(), *weight.shape, layer.largest_input,
        )  # fmt: skip
        assert self._packed is not None
        finalize(self, loaded.dfqsam_unpack, self._packed)
        self._static: tuple[Tensor, Tensor] | None = None
        if layer.input_range is not None:
            found, zero_point = layer.input_range
            self._static = torch.tensor([found]), torch.tensor([zero_point], dtype=torch.int32)

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Tensor:
        """Rows [M, K], contiguous, to [M, N] float32; added to `residual` in place where there is one."""
        loaded = library()
        assert loaded is not None
        count = len(rows.q)
        out = torch.empty(count, self._outputs) if residual is None else residual
        scale, zero_point = self._static or (rows.scale, rows.zero_point)
        if zero_point is None and rows.multiplier is None:
            zero_point = torch.full((count,), CENTRE, dtype=torch.int32)
        call(
            loaded.dfqsam_product, self._packed, rows.q.data_ptr(), _pointer(scale), _pointer(zero_point),
            _pointer(rows.multiplier), _pointer(rows.term), out.data_ptr(), count, self._static is not None,
            residual is not None,
        )  # fmt: skip
        return out


def _form(layer: QuantizedLayer, dot: bool) -> tuple[Sums, Tensor, Tensor | None]:
    """How a layer is multiplied, its weights [N, K] int8 for that, and multipliers of their groups."""
    weight = layer.weight.contiguous()
    if dot:
        return Sums.DOT, weight, None
    if layer.input_range is None and layer.activation_bits == 4:
        return Sums.LEVELS, weight, None
    if layer.groups is not None:
        multiplier, zero_point = layer.groups.multiplier, layer.groups.zero_point
        levels = layer.groups.levels(weight).to(torch.int8) - spread(zero_point, weight.shape[1]).to(
            torch.int8
        )
        return Sums.PAIRS, levels.contiguous(), multiplier.contiguous()
    largest = max(1, int(weight.to(torch.int16).abs().max())) * layer.largest_input
    return (Sums.PAIRS if _PAIRS_A_BLOCK * largest <= _LARGEST_SUM else Sums.WIDE), weight, None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
