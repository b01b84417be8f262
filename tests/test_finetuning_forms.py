"""Layers of every form while they learn: they start on the artifact's numbers, and gradients pass."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from monailabel_dfqsam.artifact import layer_forms, stored
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines import load_encoder
from monailabel_dfqsam.sam import VARIANTS
from tests.forms import KINDS, SMALL, W4A8, Kind, artifact_of, nearest
from tests.models import relative_error, seeded_sam

pytest.importorskip("brevitas")

from monailabel_dfqsam.finetuning.trainable import TrainableLayer, to_artifact, trainable

# One rounding tipped by another order of sums runs through all later layers.
START_ERROR = 0.1


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("first", range(2))
def test_before_the_first_step_it_is_the_artifact(
    name: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, name, SMALL[name])
    kinds = itertools.islice(itertools.cycle((None, *KINDS)), first * 4, None)
    artifact = artifact_of(name, lambda *_: next(kinds))
    sam = seeded_sam(name)
    parts = ("prompt_encoder", "mask_decoder")
    artifact.tensors.update({k: stored(v) for k, v in sam.state_dict().items() if k.startswith(parts)})
    sam = trainable(artifact)
    same = to_artifact(sam, artifact)
    assert same.tensors.keys() == artifact.tensors.keys()
    assert layer_forms(same.header) == layer_forms(artifact.header)
    for key, tensor in artifact.tensors.items():
        torch.testing.assert_close(same.tensors[key], tensor, rtol=1e-6, atol=0)
    images = torch.randn(1, 3, SMALL[name].input_size, SMALL[name].input_size)
    with torch.no_grad():
        found = sam.image_encoder(images)
    exact = load_encoder(artifact, EngineKind.REFERENCE).embed(images)
    assert relative_error(found, exact) < START_ERROR


def test_gradients_of_groups_are_those_of_learned_step_sizes() -> None:
    layer = nearest(torch.randn(3, 40), torch.zeros(3), W4A8)
    quantizer = TrainableLayer(layer).weight_quantizer
    assert layer.groups is not None
    x = (layer.weight.float() * layer.weight_scale[:, None]).requires_grad_()
    with torch.no_grad():
        x += 0.3 * layer.weight_scale[:, None]
        x[0, 0] = 1e3  # beyond the levels: no gradient passes, the scale feels the end
    quantizer(x).sum().backward()
    inside = torch.ones_like(x)
    inside[0, 0] = 0
    torch.testing.assert_close(x.grad, inside)
    integers, scale = quantizer.integers(x).detach(), layer.weight_scale[:, None]
    by_scale = (integers - torch.where(inside.bool(), x.detach() / scale, 0)).sum(1, keepdim=True)
    expected = by_scale * scale * float(np.log(2))
    torch.testing.assert_close(quantizer.scaling.value.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_pass_a_range_found_at_run_time(bits: int) -> None:
    layer = nearest(torch.randn(3, 40), torch.zeros(3), Kind(8, bits))
    learning, x = TrainableLayer(layer), torch.randn(5, 40, requires_grad=True)
    learning(x).sum().backward()
    weight = layer.weight.float() * layer.weight_scale[:, None]
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))
