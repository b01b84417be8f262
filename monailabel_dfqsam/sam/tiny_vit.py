"""The TinyViT image encoder of MobileSAM and LiteMedSAM, with parameter names of the published checkpoints.

Facts: arXiv 2207.10666, and the checkpoints' shapes. A first stage of inverted bottlenecks, three of windowed
attention, depthwise convolutions between attention and MLP; SAM's neck behind them. Of TinyViT as published
for classification it differs in that the last merging keeps the resolution; LiteMedSAM's patch embedding
keeps it too, being made of 1×1 convolutions.

Every step takes and gives tokens [B, H, W, C]; convolutions see them as images whose channels come last.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.sam.encoder import ImageEncoder, Neck, TransformerBlock, WindowedAttention
from monailabel_dfqsam.sam.variants import Stage, Variant

EXPANSION = 4
"""Channels of a bottleneck, and of an MLP, in multiples of the stage's."""


class ConvNorm(nn.Module):
    """A convolution and the batch norm behind it, one convolution once folded; [B, C, H, W] float.

    Padding keeps the resolution at stride 1. `groups` of as many as there are channels is depthwise.
    """

    bn: nn.BatchNorm2d | None

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def fold(self) -> None:
        """Merges the batch norm, as it is in evaluation, into the convolution; nothing when done before."""
        norm = self.bn
        if norm is None:
            return
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight: Tensor = self.c.weight
        bias: Tensor = norm.bias
        if not weight.is_meta:  # of shapes alone, torch would load its compiler for the arithmetic
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = weight * factor[:, None, None, None]
            bias = norm.bias - norm.running_mean * factor
        trained = self.c.weight.requires_grad
        for name, value in (("weight", weight), ("bias", bias)):
            setattr(self.c, name, nn.Parameter(value.detach().to(self.c.weight.dtype), trained))
        self.bn = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(x)
        return y if self.bn is None else self.bn(y)


class PatchEmbed(nn.Module):
    """Two convolutions to the first stage's tokens: [B, 3, S, S] float to [B, H, W, C]."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        kernel, stride = (3, 2) if stage.pixels == 4 else (1, 1)
        self.seq = nn.Sequential(
            ConvNorm(3, stage.dim // 2, kernel, stride),
            nn.GELU(),
            ConvNorm(stage.dim // 2, stage.dim, kernel, stride),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.seq(x.contiguous(memory_format=torch.channels_last))
        return _tokens(y)


class Bottleneck(nn.Module):
    """GELU(x + conv3(GELU(conv2(GELU(conv1(x)))))), wider in between: [B, H, W, C] float to the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = EXPANSION * dim
        self.conv1 = ConvNorm(dim, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        image = _image(x)
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(image))))
        return _tokens(F.gelu(image + self.conv3(hidden)))


class Merging(nn.Module):
    """From a stage's tokens to the next one's, [B, H, W, C] float to [B, H / stride, W / stride, C']."""

    def __init__(self, dim: int, following: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, following)
        self.conv2 = ConvNorm(following, following, 3, stride, groups=following)
        self.conv3 = ConvNorm(following, following)

    def forward(self, x: Tensor) -> Tensor:
        return _tokens(self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(_image(x)))))))


class Attention(WindowedAttention):
    """LayerNorm and attention within windows, with a learned bias for each distance between two tokens."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__(dim, heads, window)
        self.norm = nn.LayerNorm(dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        self._position: Tensor | None = None

    def padded_qkv(self) -> Tensor:
        # The published encoder pads with zeros before the norm, which gives its bias for them.
        return F.linear(self.norm.bias, self.qkv.weight, self.qkv.bias)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Each head's q, k and v stand side by side, unlike in SAM's ViT.
        q, k, v = qkv.unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return q, k, v

    def position(self, q: Tensor, side: int) -> Tensor | None:
        if self._position is not None:
            return self._position
        return self.attention_biases[:, distances(side, q.device)][None]

    def settle(self) -> None:
        biases = self.attention_biases.detach()
        self._position = biases[:, distances(self.window, biases.device)][None]

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] float to the same."""
        result: Tensor = self.proj(self.attend(self.qkv(self.norm(x))))
        return result


@functools.lru_cache(maxsize=8)
def distances(side: int, device: torch.device) -> Tensor:
    """[side², side²] int64: which of side² biases two tokens of a window share, |Δrow|·side + |Δcolumn|."""
    # A tensor made in inference mode could never again take part in training.
    with torch.inference_mode(False):
        place = torch.arange(side * side, device=device)
        row, column = place // side, place % side
        return (row[:, None] - row).abs() * side + (column[:, None] - column).abs()


class MLP(nn.Module):
    """fc2(GELU(fc1(norm(x))))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, EXPANSION * dim)
        self.fc2 = nn.Linear(EXPANSION * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return result


class Block(TransformerBlock):
    """Attention, a depthwise convolution, an MLP; the convolution has no way around it."""

    linears: ClassVar = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    norms: ClassVar = {"attn.qkv": "attn.norm", "mlp.fc1": "mlp.norm"}

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.attn = Attention(stage.dim, stage.heads, stage.window)
        self.local_conv = ConvNorm(stage.dim, stage.dim, 3, groups=stage.dim)
        self.mlp = MLP(stage.dim)

    def between(self, x: Tensor) -> Tensor:
        return _tokens(self.local_conv(_image(x)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] float to the same."""
        x = self.between(x + self.attn(x))
        y: Tensor = x + self.mlp(x)
        return y


class Layer(nn.Module):
    """A stage's blocks and the merging behind them, which the last one lacks; run by the encoder's steps."""

    def __init__(self, stage: Stage, following: Stage | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(stage) if stage.heads else Bottleneck(stage.dim) for _ in range(stage.depth)
        )
        self.downsample = None
        if following is not None:
            self.downsample = Merging(stage.dim, following.dim, following.pixels // stage.pixels)


class ImageEncoderTinyViT(ImageEncoder):
    """[B, 3, S, S] float to an embedding [B, embed_channels, grid, grid] float."""

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant.input_size)
        stages = variant.stages
        self.patch_embed = PatchEmbed(stages[0])
        self.layers = nn.ModuleList(
            Layer(stage, following) for stage, following in zip(stages, (*stages[1:], None), strict=True)
        )
        self.neck = Neck(stages[-1].dim, variant.embed_channels)

    def steps(self) -> list[tuple[str, nn.Module]]:
        found: list[tuple[str, nn.Module]] = [("patch_embed", self.patch_embed)]
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            name = f"layers.{number}"
            found += [(f"{name}.blocks.{index}", block) for index, block in enumerate(layer.blocks)]
            if layer.downsample is not None:
                found.append((f"{name}.downsample", layer.downsample))
        return [*found, ("neck", self.neck)]

    def fold(self) -> None:
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()


def _image(tokens: Tensor) -> Tensor:
    """[B, H, W, C] as [B, C, H, W]."""
    return tokens.permute(0, 3, 1, 2)


def _tokens(image: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H, W, C], contiguous."""
    return image.permute(0, 2, 3, 1).contiguous()
