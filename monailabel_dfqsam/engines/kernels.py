"""What differs between the engines on the CPU: the integer matrix product, and what lies between two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from monailabel_dfqsam.ops import QuantizedLayer, Rows, plain
from monailabel_dfqsam.sam.encoder import WindowedAttention


class Kernel(Protocol):
    """The integer product of one layer, dequantized, bias added."""

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Tensor:
        """Rows [M, K] to [M, N] float32; added to `residual` in place where there is one."""


@dataclass(frozen=True)
class Kernels:
    """An engine's parts; `ops.plain` defines the middle four; GELU may overwrite its input.

    Attributes:
        attend_quantize: an attention's qkv [B, H, W, 3C] float32 to the integers [B, H, W, C] that the
            layer behind it multiplies; `attend_quantize` below defines it.
        core: for policy `paper`: an attention core from its ranges [7] and bits.
    """

    linear: Callable[[QuantizedLayer], Kernel]
    quantize_input: Callable[[Tensor, QuantizedLayer], Rows]
    layer_norm_quantize: Callable[
        [Tensor, Tensor, Tensor, float, QuantizedLayer, bool], tuple[Rows, Tensor | None]
    ]
    gelu: Callable[[Tensor], Tensor]
    gelu_quantize: Callable[[Tensor, QuantizedLayer], Rows]
    attend_quantize: Callable[[WindowedAttention, Tensor, QuantizedLayer], Rows]
    core: Callable[[Tensor, int], nn.Module] | None = None


def attend_quantize(attention: WindowedAttention, qkv: Tensor, reader: QuantizedLayer) -> Rows:
    """`Kernels.attend_quantize` in plain torch."""
    return plain.quantize_input(attention.attend(qkv), reader)
