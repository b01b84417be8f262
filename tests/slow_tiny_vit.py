"""TinyViT once more, in float64 and as plainly as it can be written: windows and heads one after another."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.sam.variants import Stage, Variant

BATCH_NORM_EPS = LAYER_NORM_EPS = 1e-5
NECK_EPS = 1e-6


class SlowTinyViT:
    """The image encoder of a state dict under the published names, batch norms unfolded."""

    def __init__(self, variant: Variant, state: Mapping[str, Tensor]) -> None:
        self.variant = variant
        self.state = {key: value.double() for key, value in state.items()}

    def __call__(self, image: Tensor) -> Tensor:
        """[1, 3, S, S] to [1, C, grid, grid], both float64."""
        stages = self.variant.stages
        stride, pad = (2, 1) if stages[0].pixels == 4 else (1, 0)
        x = self.conv(image.double(), "patch_embed.seq.0", stride, pad)
        x = self.conv(F.gelu(x), "patch_embed.seq.2", stride, pad)
        for number, stage in enumerate(stages):
            for index in range(stage.depth):
                name = f"layers.{number}.blocks.{index}"
                x = self.block(x, name, stage) if stage.heads else self.bottleneck(x, name)
            if number + 1 < len(stages):
                x = self.merging(x, f"layers.{number}.downsample", stages[number + 1].pixels // stage.pixels)
        x = F.conv2d(x, self.state["neck.0.weight"])
        x = F.conv2d(self.over_channels(x, "neck.1"), self.state["neck.2.weight"], padding=1)
        return self.over_channels(x, "neck.3")

    def conv(self, x: Tensor, name: str, stride: int = 1, pad: int = 0, groups: int = 1) -> Tensor:
        y = F.conv2d(x, self.state[f"{name}.c.weight"], None, stride, pad, 1, groups)
        mean, var, weight, bias = (
            self.state[f"{name}.bn.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + BATCH_NORM_EPS).sqrt() * weight + bias

    def bottleneck(self, x: Tensor, name: str) -> Tensor:
        y = F.gelu(self.conv(x, f"{name}.conv1"))
        y = F.gelu(self.conv(y, f"{name}.conv2", pad=1, groups=y.shape[1]))
        return F.gelu(x + self.conv(y, f"{name}.conv3"))

    def merging(self, x: Tensor, name: str, stride: int) -> Tensor:
        y = F.gelu(self.conv(x, f"{name}.conv1"))
        y = F.gelu(self.conv(y, f"{name}.conv2", stride, 1, y.shape[1]))
        return self.conv(y, f"{name}.conv3")

    def block(self, x: Tensor, name: str, stage: Stage) -> Tensor:
        _, _, height, width = x.shape
        side = stage.window
        padded = F.pad(x, (0, -width % side, 0, -height % side))
        attended = torch.zeros_like(padded)
        for top in range(0, padded.shape[2], side):
            for left in range(0, padded.shape[3], side):
                part = (0, slice(None), slice(top, top + side), slice(left, left + side))
                tokens = padded[part].flatten(1).T
                attended[part] = self.attention(tokens, f"{name}.attn", stage).T.unflatten(1, (side, side))
        x = x + attended[:, :, :height, :width]
        x = self.conv(x, f"{name}.local_conv", pad=1, groups=x.shape[1])
        tokens = self.norm(x[0].flatten(1).T, f"{name}.mlp.norm")
        tokens = self.linear(F.gelu(self.linear(tokens, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        return x + tokens.T.unflatten(1, (height, width))[None]

    def attention(self, tokens: Tensor, name: str, stage: Stage) -> Tensor:
        """[side², C] to the same."""
        qkv = self.linear(self.norm(tokens, f"{name}.norm"), f"{name}.qkv")
        depth, side = stage.dim // stage.heads, stage.window
        seen: dict[tuple[int, int], int] = {}
        places = [(row, column) for row in range(side) for column in range(side)]
        which = torch.tensor(
            [
                [seen.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(seen)) for b in places]
                for a in places
            ]
        )
        heads = []
        for head in range(stage.heads):
            q, k, v = qkv[:, 3 * depth * head : 3 * depth * (head + 1)].split(depth, 1)
            logits = q @ k.T / math.sqrt(depth) + self.state[f"{name}.attention_biases"][head][which]
            heads.append(logits.softmax(1) @ v)
        return self.linear(torch.cat(heads, 1), f"{name}.proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float = LAYER_NORM_EPS) -> Tensor:
        """Over the last axis."""
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def over_channels(self, x: Tensor, name: str) -> Tensor:
        return self.norm(x.movedim(1, -1), name, NECK_EPS).movedim(-1, 1)
