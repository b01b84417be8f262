"""How diverse an encoder finds the patches of an image (DFQ-SAM Eq. 7-9, after PSAQ-ViT, arXiv 2203.02250).

In every block the attention output, averaged over its heads, gives one vector a token. The cosine
similarities of all pairs of tokens have a distribution, wide for an image with distinct things in it, narrow
for noise; its differential entropy measures that width. The tokens are those of the whole image, also in
blocks whose attention keeps to windows: what is asked is whether the image shows distinct things, and a
window sees little of it, in TinyViT a fifth to an eighteenth of its side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.sam.encoder import ImageEncoder

EVALUATION_POINTS = 10
# Of a 1024-pixel input's 4096 tokens, and of the pairs of any larger number than 128 tokens, a fixed random
# choice: all of them would take gigabytes and most of the time of an iteration, for the same estimate.
MAX_TOKENS = 512
MAX_PAIRS = 8192
# The least standard deviation of a similarity: keeps the entropy of a constant image finite. Early blocks may
# tell patches apart by a thousandth only; float32 resolves a ten-millionth.
MIN_SPREAD = 1e-5
_SAMPLE_SEED = 20


def patch_entropy(features: Tensor) -> Tensor:
    """Differential entropy of the cosine similarities of all pairs of tokens.

    The density is a Gaussian kernel estimate whose bandwidth follows the data (Scott's rule; pairs that share
    a token are not independent, so the number of tokens counts). It is evaluated at 10 points from one
    bandwidth below the least similarity to one above the greatest, and -p·log p is integrated by trapezoids.
    Without the margin, features that are all alike would have an empty range and seem more diverse than any.

    Args:
        features: [T, d] float, T >= 2; of more than `MAX_TOKENS` tokens or `MAX_PAIRS` pairs, a fixed random
            choice is used.

    Returns:
        A scalar in nats, negative for narrow distributions; differentiable.

    Raises:
        ValueError: for another shape or fewer than two tokens.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"features must be [T, d] with at least two tokens, not {list(features.shape)}")
    similarity = _pair_similarities(_sample_tokens(features))
    tokens = min(features.shape[0], MAX_TOKENS)
    spread = (similarity.var(correction=0) + MIN_SPREAD**2).sqrt()
    bandwidth = 1.06 * spread * tokens ** (-1 / 5)
    low, high = similarity.min() - bandwidth, similarity.max() + bandwidth
    steps = torch.linspace(0, 1, EVALUATION_POINTS, device=features.device, dtype=features.dtype)
    points = low + (high - low) * steps
    # The kernel's constants go into its arguments, which are few, and not into its values, which are many.
    width = bandwidth * math.sqrt(2)
    distance = (points / width)[:, None] - (similarity / width)[None, :]
    density = torch.exp(-distance.square()).mean(1) / (width * math.sqrt(math.pi))
    # p·log p tends to 0 with p; the smallest normal number keeps the logarithm finite there.
    integrand = -density * torch.log(density.clamp_min(torch.finfo(features.dtype).tiny))
    return torch.trapezoid(integrand, points)


def _sample_tokens(features: Tensor) -> Tensor:
    count = features.shape[0]
    # Random and not every n-th, which would be the same few columns of the token grid.
    return features if count <= MAX_TOKENS else features[_choice(count, MAX_TOKENS).to(features.device)]


def _pair_similarities(features: Tensor) -> Tensor:
    """[T, d] to [pairs], the cosine similarities of unordered pairs of distinct tokens."""
    unit = F.normalize(features, dim=1)
    pairs = _pairs(len(unit)).to(features.device)
    return (unit @ unit.T).flatten().index_select(0, pairs)


@functools.lru_cache(maxsize=8)
def _pairs(count: int) -> Tensor:
    """[pairs] int64, positions in a flattened [T, T] matrix, at most `MAX_PAIRS`."""
    rows, columns = torch.triu_indices(count, count, 1)
    pairs = rows * count + columns
    chosen: Tensor = pairs if len(pairs) <= MAX_PAIRS else pairs[_choice(len(pairs), MAX_PAIRS)]
    return chosen


def _choice(count: int, wanted: int) -> Tensor:
    """`wanted` of the numbers below `count`, at random and always the same."""
    generator = torch.Generator().manual_seed(_SAMPLE_SEED)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


@contextmanager
def attention_outputs(encoder: ImageEncoder) -> Iterator[list[Tensor]]:
    """Collects, while open, each block's attention output of each forward pass, in order.

    Args:
        encoder: in floating point; each block's `attn.proj` takes [B, H, W, heads·d], real tokens only.

    Yields:
        A list that each forward pass extends by one [B, H·W, d] float a block, the mean over its heads.
    """
    outputs: list[Tensor] = []

    def collector(heads: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].flatten(1, 2)
            outputs.append(tokens.view(*tokens.shape[:2], heads, -1).mean(2))

        return collect

    attentions = [block.attn for block in encoder.attention_blocks().values()]
    handles = [attn.proj.register_forward_pre_hook(collector(attn.heads)) for attn in attentions]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def encoder_patch_entropies(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """Patch entropy of each image in each block, for reports; no gradients.

    Args:
        encoder: in floating point.
        images: [N, 3, S, S] float32, as the model takes them.

    Returns:
        [N, blocks] float32 on the CPU, in nats.
    """
    rows = []
    for image in images:
        with attention_outputs(encoder) as outputs:
            encoder(image[None])
        rows.append(torch.stack([patch_entropy(tokens[0]).cpu() for tokens in outputs]))
    return torch.stack(rows)
