"""EfficientSAM once more, in float64, under its published names, as plainly as it can be written."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

VIT_EPS = 1e-6
EPS = 1e-5


class SlowEfficientSam:
    """A published state dict as functions, for an input of `size`² pixels."""

    def __init__(self, state: Mapping[str, Tensor], size: int, heads: int) -> None:
        self.state = {key: value.double() for key, value in state.items()}
        self.size, self.grid, self.heads = size, size // 16, heads

    def embed(self, image: Tensor, depth: int) -> Tensor:
        """[1, 3, S, S] to [1, 256, grid, grid], by the first blocks only."""
        at = "image_encoder"
        x = F.conv2d(image.double(), *self._weights(f"{at}.patch_embed.proj"), stride=16)
        table = self.state[f"{at}.pos_embed"][0, 1:].T.unflatten(1, (14, 14))[None]
        x = x + F.interpolate(table, (self.grid, self.grid), mode="bicubic", align_corners=False)
        tokens = x[0].flatten(1).T
        for index in range(depth):
            name = f"{at}.blocks.{index}"
            qkv = self.linear(self.norm(tokens, f"{name}.norm1", VIT_EPS), f"{name}.attn.qkv")
            tokens = tokens + self.linear(heads_of(*qkv.chunk(3, 1), self.heads), f"{name}.attn.proj")
            hidden = self.linear(self.norm(tokens, f"{name}.norm2", VIT_EPS), f"{name}.mlp.fc1")
            tokens = tokens + self.linear(F.gelu(hidden), f"{name}.mlp.fc2")
        x = tokens.T.unflatten(1, (self.grid, self.grid))[None]
        x = F.conv2d(x, self.state[f"{at}.neck.0.weight"])
        x = self.norm(x.movedim(1, -1), f"{at}.neck.1", VIT_EPS).movedim(-1, 1)
        x = F.conv2d(x, self.state[f"{at}.neck.2.weight"], padding=1)
        return self.norm(x.movedim(1, -1), f"{at}.neck.3", VIT_EPS).movedim(-1, 1)

    def masks(self, embedding: Tensor, prompt: list[tuple[float, float, int]]) -> tuple[Tensor, Tensor]:
        """Logits [4, 4·grid, 4·grid] and IoUs [4] for (x, y, label): 0, 1, or 2 and 3 for a box' corners."""
        kinds = ("point_embeddings", "bbox_top_left_embeddings", "bbox_bottom_right_embeddings")
        rows = [self.state["mask_decoder.iou_token.weight"], self.state["mask_decoder.mask_tokens.weight"]]
        for x, y, label in [*prompt, *[(-1.0, -1.0, -1)] * (6 - len(prompt))]:
            row = self.position(torch.tensor([[(x + 0.5) / self.size, (y + 0.5) / self.size]]))
            if label:
                kind = "invalid_points" if label < 0 else kinds[label - 1]
                row = row + self.state[f"prompt_encoder.{kind}.weight"]
            rows.append(row)
        tokens = torch.cat(rows)
        axis = (torch.arange(self.grid) + 0.5) / self.grid
        places = self.position(torch.stack([axis.repeat(self.grid), axis.repeat_interleave(self.grid)], 1))
        queries, keys = self.transform(tokens, embedding[0].double().flatten(1).T, places)
        x = keys.T.unflatten(1, (self.grid, self.grid))[None]
        at = "mask_decoder.final_output_upscaling_layers"
        x = F.conv_transpose2d(x, *self._weights(f"{at}.0.0"), stride=2)
        x = (x - x.mean()) / (x.var(correction=0) + EPS).sqrt()
        weight, bias = self._weights(f"{at}.0.1")
        x = F.gelu(x * weight[:, None, None] + bias[:, None, None])
        x = F.gelu(F.conv_transpose2d(x, *self._weights(f"{at}.1.0"), stride=2))
        mlps = [
            self.mlp(queries[1 + n], f"mask_decoder.output_hypernetworks_mlps.{n}", hidden=2)
            for n in range(4)
        ]
        logits = torch.einsum("nc,chw->nhw", torch.stack(mlps), x[0])
        return logits, self.mlp(queries[0], "mask_decoder.iou_prediction_head", hidden=2)

    def transform(self, tokens: Tensor, image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys, at = tokens, image, "mask_decoder.transformer"
        for index in range(2):
            name = f"{at}.layers.{index}"
            if index:
                queries = queries + tokens
            attended = self.attention(queries, queries, queries, f"{name}.self_attn")
            queries = self.norm(queries + attended, f"{name}.norm1")
            attended = self.attention(
                queries + tokens, keys + places, keys, f"{name}.cross_attn_token_to_image"
            )
            queries = self.norm(queries + attended, f"{name}.norm2")
            queries = self.norm(queries + self.mlp(queries, f"{name}.mlp", hidden=1), f"{name}.norm3")
            attended = self.attention(
                keys + places, queries + tokens, queries, f"{name}.cross_attn_image_to_token"
            )
            keys = self.norm(keys + attended, f"{name}.norm4")
        attended = self.attention(queries + tokens, keys + places, keys, f"{at}.final_attn_token_to_image")
        return self.norm(queries + attended, f"{at}.norm_final_attn"), keys

    def attention(self, q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
        q, k, v = (self.linear(x, f"{name}.{part}_proj") for x, part in ((q, "q"), (k, "k"), (v, "v")))
        return self.linear(heads_of(q, k, v, 8), f"{name}.out_proj")

    def mlp(self, x: Tensor, name: str, hidden: int) -> Tensor:
        for index in range(hidden):
            x = F.gelu(self.linear(x, f"{name}.layers.{index}.0"))
        return self.linear(x, f"{name}.fc")

    def position(self, place: Tensor) -> Tensor:
        """[N, 2], (x, y) as shares of the side, to [N, 256]."""
        matrix = self.state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
        angle = 2 * math.pi * ((2 * place.double() - 1) @ matrix)
        return torch.cat([angle.sin(), angle.cos()], 1)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights(name)
        return x @ weight.T + bias

    def norm(self, x: Tensor, name: str, eps: float = EPS) -> Tensor:
        weight, bias = self._weights(name)
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]


def heads_of(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of [T, C] on [U, C], one head after another."""
    parts = []
    for q_, k_, v_ in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        parts.append((q_ @ k_.T / math.sqrt(q_.shape[1])).softmax(1) @ v_)
    return torch.cat(parts, 1)
