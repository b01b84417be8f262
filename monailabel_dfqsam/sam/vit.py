"""SAM's ViT image encoder, with parameter names of the published checkpoints.

Ours and not segment-anything's, because reparameterization and the integer engines need its inside:

- Windows are cut from q, k and v, not from the normalised tokens. The published encoder pads its windows
  with zeros *before* qkv, so a padded token's q, k and v are the qkv bias; here they are the constant
  `pad_qkv`, which stays right when qkv is reparameterized, and padding costs no multiplication.
- The adapter reads norm2's output through `norm2_restore`, the identity until norm2 is reparameterized.

Token tensors are [B, H, W, C] float; images [B, 3, S, S] float, normalised as the variant wants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.sam.adapter import Adapter
from monailabel_dfqsam.sam.variants import Variant

LAYER_NORM_EPS = 1e-6


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS)
        return x.permute(0, 3, 1, 2)


class AttentionCore(nn.Module):
    """softmax(q·kᵀ·scale + bias)·v; a module of its own so that a quantized form can take its place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """q, k, v: [N, heads, T, d] float; bias: [N, heads, T, T] or None. Returns [N, heads, T, d]."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def window_partition(x: Tensor, size: int, fill: Tensor) -> Tensor:
    """Cuts [B, H, W, C] into windows [B·nH·nW, size, size, C], padding right and bottom with `fill` [C]."""
    b, h, w, c = x.shape
    pad_h, pad_w = -h % size, -w % size
    if pad_h or pad_w:
        padded = fill.to(x.dtype).expand(b, h + pad_h, w + pad_w, c).clone()
        padded[:, :h, :w] = x
        x = padded
    n_h, n_w = x.shape[1] // size, x.shape[2] // size
    return x.view(b, n_h, size, n_w, size, c).transpose(2, 3).reshape(-1, size, size, c)


def window_unpartition(windows: Tensor, size: int, h: int, w: int) -> Tensor:
    """The inverse of `window_partition`: windows [B·nH·nW, size, size, C] to [B, h, w, C]."""
    n_h, n_w = -(-h // size), -(-w // size)
    x = windows.view(-1, n_h, n_w, size, size, windows.shape[-1])
    x = x.transpose(2, 3).reshape(-1, n_h * size, n_w * size, windows.shape[-1])
    return x[:, :h, :w].contiguous()


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


class Attention(nn.Module):
    """Multi-head attention over a window or the whole grid, with optional relative position."""

    pad_qkv: Tensor | None

    def __init__(self, dim: int, heads: int, grid: int, window: int, relative_position: bool) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.core = AttentionCore()
        side = window or grid
        if relative_position:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.relative_position = relative_position
        # None stands for qkv's own bias, true until qkv is reparameterized.
        self.register_buffer("pad_qkv", None, persistent=False)

    def attend(self, qkv: Tensor) -> Tensor:
        """What lies between the two Linears: [B, H, W, 3C] float to [B, H, W, C] float."""
        _, h, w, c3 = qkv.shape
        if self.window:
            fill = self.qkv.bias if self.pad_qkv is None else self.pad_qkv
            qkv = window_partition(qkv, self.window, fill)
        side = qkv.shape[1]
        depth = c3 // 3 // self.heads
        q, k, v = qkv.flatten(1, 2).unflatten(2, (3, self.heads, depth)).permute(2, 0, 3, 1, 4)
        bias = (
            relative_position_bias(q, self.rel_pos_h, self.rel_pos_w, side)
            if self.relative_position
            else None
        )
        out: Tensor = self.core(q, k, v, bias).transpose(1, 2).flatten(2).unflatten(1, (side, side))
        if self.window:
            out = window_unpartition(out, self.window, h, w)
        return out

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


class Block(nn.Module):
    """One transformer block; `norm2_restore` undoes norm2's reparameterization for the adapter."""

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

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] float to the same."""
        x = x + self.attn(self.norm1(x))
        normed = self.norm2(x)
        y: Tensor = x + self.mlp(normed)
        if self.Adapter is not None:
            y = y + self.Adapter(self.norm2_restore(normed))
        return y


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [B, 3, S, S] to [B, S/p, S/p, C]."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).permute(0, 2, 3, 1)
        return tokens


class ImageEncoderViT(nn.Module):
    """SAM's image encoder: [B, 3, S, S] float to an embedding [B, embed_channels, S/16, S/16] float."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        dim, grid, out = variant.embed_dim, variant.grid, variant.embed_channels
        self.img_size = variant.input_size
        self.patch_embed = PatchEmbed(variant.patch_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        self.blocks = nn.ModuleList(Block(variant, i) for i in range(variant.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(dim, out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError for an input of another size than [B, 3, S, S]."""
        if x.ndim != 4 or x.shape[1:] != (3, self.img_size, self.img_size):
            raise ValueError(
                f"the encoder takes [B, 3, {self.img_size}, {self.img_size}], not {list(x.shape)}"
            )
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        embedding: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return embedding
