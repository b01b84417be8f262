"""Uniform and log√2 quantizers, and the search for their ranges (DFQ-SAM Eq. 1–2, RepQ-ViT §3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monailabel_dfqsam.ops.integer import row_rounded

MIN_SCALE = 1e-8
# A constant channel has no range. Its scale gets this share of the median scale: large enough that
# reparameterization, which divides by it, keeps float32 precision.
MIN_CHANNEL_SCALE = 1e-2
PERCENTILES = (1.0, 0.99999, 0.9999, 0.999)
WEIGHT_SHRINK = tuple(1.0 - 0.05 * i for i in range(11))


@dataclass(frozen=True)
class Affine:
    """x ≈ scale·(q − zero_point), q in 0 … 2^bits − 1.

    Attributes:
        scale: [C] or [1] float32, > 0.
        zero_point: [C] or [1] float32 holding integers; within 0 … 2^bits − 1 for a whole tensor, anything
            for channels, which reparameterization brings to a common one.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int

    def fake(self, x: Tensor) -> Tensor:
        """x after a round trip through the integers; the last dimension is C."""
        # In place, for x may take a large part of the memory.
        q = (x / self.scale).round_().add_(self.zero_point).clamp_(0, (1 << self.bits) - 1)
        return q.sub_(self.zero_point).mul_(self.scale)


@dataclass(frozen=True)
class RunTime:
    """Ranges of activations found at run time, for each token.

    Attributes:
        bits: 4, in groups along the channels, or 8.
    """

    bits: int

    def fake(self, x: Tensor) -> Tensor:
        """x [..., K] after a round trip through the integers."""
        return row_rounded(x, self.bits)


def tensor_affine(low: Tensor, high: Tensor, bits: int) -> Affine:
    """Eq. 2 for a whole tensor; the range is widened to hold 0, so that zero padding stays exact."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / ((1 << bits) - 1)).clamp_min(MIN_SCALE)
    return Affine(scale, torch.round(-low / scale), bits)


def channel_affine(low: Tensor, high: Tensor, bits: int) -> Affine:
    """Eq. 2 for each channel, with a floor for channels that are (nearly) constant."""
    scale = (high - low) / ((1 << bits) - 1)
    scale = scale.clamp_min(max(MIN_SCALE, MIN_CHANNEL_SCALE * float(scale.median())))
    return Affine(scale, torch.round(-low / scale), bits)


def search_affine(x: Tensor, bits: int, per_channel: bool) -> Affine:
    """The percentile range with the least mean squared error, for each channel or for the whole tensor.

    Args:
        x: [T, C] float samples of an activation.
        bits: 2 … 8.
        per_channel: one range a column of x, else one range.
    """
    x = x.float()
    columns, affine = (x, channel_affine) if per_channel else (x.reshape(-1, 1), tensor_affine)
    last = columns.shape[0] - 1
    indices = [round(percentile * last) for percentile in PERCENTILES]
    places = sorted({place for index in indices for place in (index, last - index)})
    # Only these places need to hold what they would in a sorted column.
    ordered = torch.from_numpy(np.partition(columns.T.numpy(), places, axis=1)[:, places])
    at = {place: ordered[:, position] for position, place in enumerate(places)}
    best: Affine | None = None
    best_error = torch.full((columns.shape[1],), torch.inf)
    for index in indices:
        candidate = affine(at[last - index], at[index], bits)
        error = (candidate.fake(columns) - columns).square().mean(0)
        if best is None:
            best, best_error = candidate, error
            continue
        better = error < best_error
        best = Affine(
            torch.where(better, candidate.scale, best.scale),
            torch.where(better, candidate.zero_point, best.zero_point),
            bits,
        )
        best_error = torch.where(better, error, best_error)
    assert best is not None
    return best


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric weights, one scale an output channel, the scale with the least squared error.

    Args:
        weight: [N, K] float.
        bits: 2 … 8.

    Returns:
        [N, K] int8 within −2^(bits−1) … 2^(bits−1) − 1, and the scale [N] float32.
    """
    scale = weight_scale(weight, bits)
    return round_weight(weight.float(), scale, bits).to(torch.int8), scale


def weight_scale(weight: Tensor, bits: int) -> Tensor:
    """The scale [N] float32 of each row of [N, K] with the least squared error of nearest rounding."""
    weight = weight.float()
    full = (weight.abs().amax(1) / ((1 << (bits - 1)) - 1)).clamp_min(MIN_SCALE)
    best_scale, best_error = full, torch.full_like(full, torch.inf)
    for shrink in WEIGHT_SHRINK:
        scale = full * shrink
        error = round_weight(weight, scale, bits).mul_(scale[:, None]).sub_(weight).square_().sum(1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def round_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest integers to weight [N, K] over scale [N], within −2^(bits−1) … 2^(bits−1) − 1, float."""
    return (weight / scale[:, None]).round_().clamp_(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def fake_log_sqrt2(x: Tensor, delta: float, bits: int) -> Tensor:
    """Post-softmax probabilities after a round trip through log√2 levels (RepQ-ViT Eq. 12–14).

    Args:
        x: float in [0, delta].
        delta: the largest probability.
        bits: levels beyond 2^bits − 1 become 0.
    """
    q = torch.round(-2 * torch.log2((x / delta).clamp_min(1e-30)))
    kept = q <= (1 << bits) - 1
    value = delta * torch.exp2(-torch.ceil(q / 2)) * torch.where(q % 2 == 1, 2**0.5, 1.0)
    return torch.where(kept, value, 0.0)
