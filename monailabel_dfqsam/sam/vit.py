"""SAM's ViT image encoder, with parameter names of the published checkpoints.

Ours and not segment-anything's, because reparameterization and the integer engines need its inside. The
adapter reads norm2's output through `norm2_restore`, the identity until norm2 is reparameterized.

Token tensors are [B, H, W, C] float; images [B, 3, S, S] float, normalised as the variant wants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.sam.adapter import Adapter
from monailabel_dfqsam.sam.encoder import (
    LAYER_NORM_EPS,
    ImageEncoder,
    Neck,
    TransformerBlock,
    WindowedAttention,
)
from monailabel_dfqsam.sam.variants import Variant


def relative_position_bias(q: Tensor, table_h: Tensor, table_w: Tensor, side: int) -> Tensor:
    """Decomposed relative position of SAM (arXiv 2112.01526): one score for rows, one for columns.

    Args:
        q: [N, heads, side·side, d] float, unscaled.
        table_h: [2·side − 1, d], a learned vector per row offset.
        table_w: [2·side − 1, d], a learned vector per column offset.
        side: side of the window in tokens.

    Returns:
        [N, heads, side², side²], to be added to the attention logits.
    """
    offsets = torch.arange(side, device=q.device)
    index = offsets[:, None] - offsets[None, :] + side - 1
    grid = q.unflatten(2, (side, side))
    rows = torch.einsum("nhyxd,ykd->nhyxk", grid, table_h[index])
    columns = torch.einsum("nhyxd,xkd->nhyxk", grid, table_w[index])
    return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


class Attention(WindowedAttention):
    """Attention over a window or the whole grid, with optional relative position."""

    def __init__(self, dim: int, heads: int, grid: int, window: int, relative_position: bool) -> None:
        super().__init__(dim, heads, window)
        side = window or grid
        if relative_position:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.relative_position = relative_position

    def padded_qkv(self) -> Tensor:
        # The published encoder pads with zeros between norm1 and qkv.
        return self.qkv.bias

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def position(self, q: Tensor, side: int) -> Tensor | None:
        if not self.relative_position:
            return None
        return relative_position_bias(q, self.rel_pos_h, self.rel_pos_w, side)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] float to the same."""
        result: Tensor = self.proj(self.attend(self.qkv(x)))
        return result


class MLP(nn.Module):
    """lin2(GELU(lin1(x)))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lin2(F.gelu(self.lin1(x)))
        return result


class Block(TransformerBlock):
    """One transformer block; `norm2_restore` undoes norm2's reparameterization for the adapter."""

    linears: ClassVar = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    norms: ClassVar = {"attn.qkv": "norm1", "mlp.lin1": "norm2"}
    restore_scale: Tensor | None
    restore_shift: Tensor | None

    def __init__(self, variant: Variant, index: int) -> None:
        super().__init__()
        dim = variant.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(
            dim, variant.num_heads, variant.grid, variant.window_of(index), variant.relative_position
        )
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim, dim * variant.mlp_ratio)
        self.Adapter = Adapter(dim) if variant.adapters else None
        self.register_buffer("restore_scale", None, persistent=False)
        self.register_buffer("restore_shift", None, persistent=False)

    def norm2_restore(self, x: Tensor) -> Tensor:
        """norm2's output as it was before reparameterization: x·r1 − s⊙r2 (DFQ-SAM Eq. 14)."""
        if self.restore_scale is None or self.restore_shift is None:
            return x
        return x * self.restore_scale + self.restore_shift

    @property
    def beside(self) -> Callable[[Tensor], Tensor] | None:
        adapter = self.Adapter
        return None if adapter is None else lambda normed: adapter(self.norm2_restore(normed))

    def reparameterized(self, linear: str, r1: Tensor, shift: Tensor) -> None:
        if self.Adapter is not None and linear == "mlp.lin1":
            self.restore_scale, self.restore_shift = r1, -shift

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] float to the same."""
        x = x + self.attn(self.norm1(x))
        normed = self.norm2(x)
        y: Tensor = x + self.mlp(normed)
        return y if self.beside is None else y + self.beside(normed)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [B, 3, S, S] to [B, S/p, S/p, C]."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).permute(0, 2, 3, 1)
        return tokens


class ImageEncoderViT(ImageEncoder):
    """SAM's image encoder: [B, 3, S, S] float to an embedding [B, embed_channels, S/16, S/16] float."""

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant.input_size)
        dim, grid = variant.embed_dim, variant.grid
        self.patch_embed = PatchEmbed(variant.patch_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        self.blocks = nn.ModuleList(Block(variant, i) for i in range(variant.depth))
        self.neck = Neck(dim, variant.embed_channels)

    def steps(self) -> list[tuple[str, nn.Module]]:
        blocks = ((f"blocks.{index}", block) for index, block in enumerate(self.blocks))
        return [("patch_embed", self.patch_embed), *blocks, ("neck", self.neck)]

    def after(self, step: str, x: Tensor) -> Tensor:
        return x + self.pos_embed if step == "patch_embed" else x
