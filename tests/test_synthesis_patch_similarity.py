from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.variants import VARIANTS
from monailabel_dfqsam.synthesis import patch_similarity
from monailabel_dfqsam.synthesis.patch_similarity import (
    MAX_TOKENS,
    MIN_SPREAD,
    attention_outputs,
    encoder_patch_entropies,
    patch_entropy,
)

FLOAT32_TOLERANCE = 1e-4
FLOAT64_TOLERANCE = 1e-9
SAMPLING_TOLERANCE = 0.1  # nats; images differ by several
GRADIENT_TOLERANCE = 1e-5


def slow_entropy(features: np.ndarray) -> float:
    """The definition, one pair, one kernel and one trapezoid after another, in float64."""
    similarities = []
    for i in range(len(features)):
        for j in range(i + 1, len(features)):
            a, b = features[i], features[j]
            similarities.append(float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))))
    mean = sum(similarities) / len(similarities)
    spread = math.sqrt(sum((s - mean) ** 2 for s in similarities) / len(similarities) + MIN_SPREAD**2)
    h = 1.06 * spread / len(features) ** 0.2
    low, high = min(similarities) - h, max(similarities) + h
    points = [low + (high - low) * k / 9 for k in range(10)]
    values = []
    for x in points:
        kernels = [math.exp(-0.5 * ((x - s) / h) ** 2) / math.sqrt(2 * math.pi) / h for s in similarities]
        p = sum(kernels) / len(kernels)
        values.append(-p * math.log(p))
    return sum((values[k] + values[k + 1]) / 2 * (points[k + 1] - points[k]) for k in range(9))


@pytest.mark.parametrize("shape", [(2, 3), (9, 5), (24, 16)])
def test_entropy_is_its_definition(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(patch_entropy(features)) == pytest.approx(
        slow_entropy(features.numpy()), abs=FLOAT64_TOLERANCE
    )


def test_gradient_is_that_of_finite_differences() -> None:
    features = torch.randn(
        6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()
    assert torch.autograd.gradcheck(patch_entropy, (features,), atol=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("features", [torch.ones(8, 4), torch.zeros(8, 4)], ids=["ones", "zeros"])
def test_features_all_alike_have_a_low_finite_entropy_and_a_finite_gradient(features: torch.Tensor) -> None:
    features = features.clone().requires_grad_()
    entropy = patch_entropy(features)
    entropy.backward()
    assert math.isfinite(entropy.detach())
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())
    varied = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    assert float(entropy.detach()) < float(patch_entropy(varied)) - 1


def test_two_kinds_of_patches_are_more_diverse_than_one_kind() -> None:
    g = torch.Generator().manual_seed(4)
    noise = 0.1 * torch.randn(32, 8, generator=g)
    one = patch_entropy(torch.eye(8)[0] + noise)
    two = patch_entropy(torch.eye(8)[torch.arange(32) % 2] + noise)
    assert float(two) > float(one)


def test_scale_of_the_features_does_not_matter() -> None:
    features = torch.randn(20, 8, generator=torch.Generator().manual_seed(5))
    assert float(patch_entropy(100 * features)) == pytest.approx(
        float(patch_entropy(features)), abs=FLOAT32_TOLERANCE
    )


def test_choosing_pairs_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    features = 1 + torch.randn(256, 36, generator=torch.Generator().manual_seed(8))
    chosen = float(patch_entropy(features))
    monkeypatch.setattr(patch_similarity, "MAX_PAIRS", 256 * 256)
    patch_similarity._pairs.cache_clear()
    everything = float(patch_entropy(features))
    patch_similarity._pairs.cache_clear()
    assert chosen != everything
    assert chosen == pytest.approx(everything, abs=SAMPLING_TOLERANCE)


def test_many_tokens_are_sampled_alike_each_time() -> None:
    features = torch.randn(4096, 8, generator=torch.Generator().manual_seed(6))
    few = features[torch.randperm(4096, generator=torch.Generator().manual_seed(7))[:MAX_TOKENS]]
    sampled = float(patch_entropy(features))
    assert sampled == float(patch_entropy(features))
    assert sampled == pytest.approx(float(patch_entropy(few)), abs=SAMPLING_TOLERANCE)


@pytest.mark.parametrize("shape", [(1, 4), (4,), (2, 3, 4)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        patch_entropy(torch.zeros(shape))


def test_attention_outputs_are_means_over_heads_and_hooks_go_away() -> None:
    torch.manual_seed(0)
    encoder = Sam(VARIANTS["tiny"]).image_encoder.eval()
    taken: list[torch.Tensor] = []
    handle = encoder.blocks[2].attn.proj.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    x = torch.randn(2, 3, 256, 256)
    with torch.no_grad(), attention_outputs(encoder) as outputs:
        encoder(x)
    handle.remove()
    assert len(outputs) == 6
    head_width = 144 // 4
    heads = [taken[0][..., h * head_width : (h + 1) * head_width] for h in range(4)]
    expected = torch.stack(heads).mean(0).reshape(2, 256, head_width)
    torch.testing.assert_close(outputs[2], expected)
    assert not any(block.attn.proj._forward_pre_hooks for block in encoder.blocks)


def test_report_has_one_row_an_image_and_one_column_a_block() -> None:
    torch.manual_seed(0)
    encoder = Sam(VARIANTS["tiny"]).image_encoder.eval()
    images = torch.randn(2, 3, 256, 256)
    entropies = encoder_patch_entropies(encoder, images)
    assert entropies.shape == (2, 6)
    torch.testing.assert_close(entropies[1:], encoder_patch_entropies(encoder, images[1:]))
    assert not entropies.requires_grad
