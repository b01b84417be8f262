"""How much memory an image encoder needs beside its weights, out of the model's sizes alone.

Per image, in float32, with T tokens, width C and h heads: what a block keeps of its tokens at a time, and in
encoders that hold attention as a matrix, so many matrices of h·T² (or of h·t² for each window of t tokens).
To that comes once what threads, kernels and reordered weights take at the first call. Peaks beyond the
weights measured at the first image on two cores, and this estimate, in MB:

    tiny            torch        23    202
    sam_b_256       torch        77    227
    sam_med2d_b     torch       187    227
    sam_b_1024      torch      1863   2011
    sam_b_256       reference   125    275
    sam_b_256       openvino    225    312
    sam_med2d_b     openvino    574    489
    lite_medsam     openvino    274    472
    sam_b_1024      openvino   1353   2096

OpenVINO reads its files and reorders the weights at the first image only; its peaks hold both, of which the
files' pages can be taken back.

A GPU's own memory is not estimated: where it runs out, torch says so.
"""

from __future__ import annotations

from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.sam.variants import Variant

_FLOAT = 4
_ONCE = 200_000_000
_TOKENS_KEPT = 16  # in multiples of C: input, normed, qkv, hidden (4 C) before and after its activation …
# int64 accumulators and float copies of integers come to it.
_TOKENS_KEPT_BY_REFERENCE = 40
# The relative position and its sum with nothing else; policy `paper` also quantizes logits and probabilities.
_MATRICES, _MATRICES_OF_REFERENCE = 2, 6


def embed_bytes(variant: Variant, engine: EngineKind | None, images: int = 1) -> int:
    """Bytes of main memory that one call of an image encoder takes at most, beside its weights.

    Args:
        engine: what runs it; None is torch in full precision.
        images: in one call.
    """
    if engine is EngineKind.CUTLASS:
        return 0
    reference = engine is EngineKind.REFERENCE
    kept = _TOKENS_KEPT_BY_REFERENCE if reference else _TOKENS_KEPT
    floats = kept * variant.widest
    if engine in (None, EngineKind.OPENVINO) and variant.relative_position:
        floats += _MATRICES * _largest_attention(variant)
    if reference:
        floats += _MATRICES_OF_REFERENCE * _largest_attention(variant)
    once = _ONCE + _weights(variant) if engine is EngineKind.OPENVINO else _ONCE
    return once + images * floats * _FLOAT


def _weights(variant: Variant) -> int:
    """Bytes of the blocks' weights in 8 bit: four Linears of 12 C² in all, and adapters of 25 C²."""
    each = 12 + 25 * variant.adapters
    return sum(each * block.dim**2 for block in variant.blocks)


def _largest_attention(variant: Variant) -> int:
    """Numbers in the attention matrices of the block that has most."""
    return max(
        block.heads * (-(-block.grid // block.window)) ** 2 * block.window**4 for block in variant.blocks
    )
