"""4-bit storage: two values a byte, low nibble first, row-major along the last dimension.

values   v0 v1 v2 v3 v4            each −8 … 7
bytes    v1v0  v3v2  0 v4          high nibble | low nibble, two's complement; a last odd one is padded
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(values: Tensor) -> Tensor:
    """Packs signed 4-bit values.

    Args:
        values: [..., K] int8, each −8 … 7.

    Returns:
        [..., ceil(K / 2)] uint8.

    Raises:
        ValueError: for another dtype or a value that 4 bits cannot hold.
    """
    if values.dtype != torch.int8:
        raise ValueError(f"4-bit packing takes int8, not {values.dtype}")
    if values.numel() and not (int(values.min()) >= -8 and int(values.max()) <= 7):
        raise ValueError("a value outside −8 … 7 cannot be packed into 4 bits")
    nibbles = (values & 0x0F).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack_int4`.

    Args:
        packed: [..., ceil(width / 2)] uint8.
        width: K, the number of values a row.

    Returns:
        [..., K] int8, each −8 … 7.

    Raises:
        ValueError: when the width does not fit the packed size.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != (width + 1) // 2:
        raise ValueError(f"{width} values of 4 bits do not lie in {list(packed.shape)} {packed.dtype}")
    low = (packed & 0x0F).to(torch.int8)
    high = (packed >> 4).to(torch.int8)
    nibbles = torch.stack((low, high), dim=-1).flatten(-2)[..., :width]
    return torch.where(nibbles > 7, nibbles - 16, nibbles)
