"""What every image encoder has, whatever its family: all that synthesis, quantization and engines ask of one.

An encoder is a row of steps from the image to the embedding. Some are transformer blocks: attention, then an
MLP, a LayerNorm before each, and four Linears in the same order. Token tensors are [B, H, W, C] float; images
[B, 3, S, S] float, normalised as the variant wants.

Windows are cut from q, k and v, not from the normalised tokens. The published encoders pad their windows
with zeros before that, so a padded token's q, k and v are a constant, which `pad_qkv` holds; it stays right
when qkv is reparameterized, and padding costs no multiplication.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        """q, k, v: [N, heads, T, d] float; bias: [N or 1, heads, T, T] or None. Returns [N, heads, T, d]."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def window_partition(x: Tensor, size: int, fill: Tensor) -> Tensor:
    """Cuts [B, H, W, C] into windows [B·nH·nW, size, size, C], padding right and bottom with `fill` [C]."""
    b, h, w, c = x.shape
    pad_h, pad_w = -h % size, -w % size
    fill = fill.to(x.dtype)
    if pad_w:
        x = torch.cat([x, fill.expand(b, h, pad_w, c)], 2)
    if pad_h:
        x = torch.cat([x, fill.expand(b, pad_h, w + pad_w, c)], 1)
    n_h, n_w = x.shape[1] // size, x.shape[2] // size
    return x.view(b, n_h, size, n_w, size, c).transpose(2, 3).reshape(-1, size, size, c)


def window_unpartition(windows: Tensor, size: int, h: int, w: int) -> Tensor:
    """The inverse of `window_partition`: windows [B·nH·nW, size, size, C] to [B, h, w, C]."""
    n_h, n_w = -(-h // size), -(-w // size)
    x = windows.view(-1, n_h, n_w, size, size, windows.shape[-1])
    x = x.transpose(2, 3).reshape(-1, n_h * size, n_w * size, windows.shape[-1])
    return x[:, :h, :w].contiguous()


class WindowedAttention(nn.Module):
    """Multi-head attention over windows or the whole grid; families differ in the methods at the end.

    Attributes:
        heads: q, k and v have C / heads channels each.
        window: side of the windows in tokens, 0 for the whole grid.
        pad_qkv: [3C], what q, k and v of windows' padding are; None until `keep_padding`.
    """

    pad_qkv: Tensor | None

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.core = AttentionCore()
        self.register_buffer("pad_qkv", None, persistent=False)

    def keep_padding(self) -> None:
        """Fixes what q, k and v of windows' padding are, before anything changes or replaces qkv."""
        if self.window:
            self.pad_qkv = self.padded_qkv().detach().clone()

    def settle(self) -> None:
        """Computes once what depends on weights alone, which must not change or move from then on."""

    def attend(self, qkv: Tensor) -> Tensor:
        """What lies between the two Linears: [B, H, W, 3C] float to [B, H, W, C] float."""
        _, h, w, _ = qkv.shape
        if self.window:
            fill = self.padded_qkv() if self.pad_qkv is None else self.pad_qkv
            qkv = window_partition(qkv, self.window, fill)
        side = qkv.shape[1]
        q, k, v = self.split(qkv.flatten(1, 2))
        out: Tensor = self.core(q, k, v, self.position(q, side))
        out = out.transpose(1, 2).flatten(2).unflatten(1, (side, side))
        if self.window:
            out = window_unpartition(out, self.window, h, w)
        return out

    def padded_qkv(self) -> Tensor:
        """[3C] float: qkv of a token that the published encoder pads."""
        raise NotImplementedError

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, T, 3C] float to q, k and v, each [N, heads, T, C / heads]."""
        raise NotImplementedError

    def position(self, q: Tensor, side: int) -> Tensor | None:
        """What is added to the logits: of q [N, heads, side², d], [N or 1, heads, side², side²] float."""
        raise NotImplementedError


class TransformerBlock(nn.Module):
    """Attention, then an MLP: [B, H, W, C] float to the same.

    Attributes:
        linears: names within the block of qkv, proj and the MLP's two Linears, in the order of their running.
        norms: the LayerNorm whose output a Linear reads, by the Linear's name.
    """

    linears: ClassVar[tuple[str, str, str, str]]
    norms: ClassVar[Mapping[str, str]]
    attn: WindowedAttention

    def between(self, x: Tensor) -> Tensor:
        """What the family puts between attention and MLP: [B, H, W, C] float to the same."""
        return x

    @property
    def beside(self) -> Callable[[Tensor], Tensor] | None:
        """What reads the MLP's normalised input beside it and is added to its output; None for nothing."""
        return None

    def reparameterized(self, linear: str, r1: Tensor, shift: Tensor) -> None:
        """Told that the norm before a Linear now gives (old + shift) / r1, each [C] float; for `beside`."""


class ImageEncoder(nn.Module):
    """[B, 3, S, S] float to an embedding [B, embed_channels, grid, grid] float."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.img_size = size

    def steps(self) -> list[tuple[str, nn.Module]]:
        """What runs one after another, by name: from the image by tokens to the last, the neck."""
        raise NotImplementedError

    def after(self, step: str, x: Tensor) -> Tensor:
        """What the next step reads where a step gives x."""
        return x

    def attention_blocks(self) -> dict[str, TransformerBlock]:
        """The transformer blocks by name, in the order of their running."""
        return {name: step for name, step in self.steps() if isinstance(step, TransformerBlock)}

    def fold(self) -> None:
        """Merges batch norms into the convolutions before them, where there are any; in place."""

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError for an input of another size than [B, 3, S, S]."""
        if x.ndim != 4 or x.shape[1:] != (3, self.img_size, self.img_size):
            raise ValueError(
                f"the encoder takes [B, 3, {self.img_size}, {self.img_size}], not {list(x.shape)}"
            )
        for name, step in self.steps():
            x = self.after(name, step(x))
        return x


class Neck(nn.Sequential):
    """From tokens [B, H, W, dim] to the embedding [B, channels, H, W], both float."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(dim, channels, 1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            LayerNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        for part in self:
            x = part(x)
        return x
