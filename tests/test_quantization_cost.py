"""What an image costs, and what each layer takes in a file."""

from __future__ import annotations

import itertools

import pytest

from monailabel_dfqsam.artifact import layer_forms
from monailabel_dfqsam.ops import Form
from monailabel_dfqsam.quantization.cost import KEPT, encoder_cost, layer_costs
from monailabel_dfqsam.sam import VARIANTS
from tests.forms import SMALL, W4A8, W8A8, Kind, artifact_of

PARTS = ("weight", "weight_groups", "weight_scale", "bias")


def test_every_product_of_a_plain_transformer_counts() -> None:
    v = VARIANTS["tiny"]
    tokens, c = v.grid**2, v.embed_dim
    attention = v.depth * 2 * tokens * tokens * c
    linear = tokens * c * c
    rest = tokens * c * 3 * 16 * 16 + tokens * (c * v.embed_channels + v.embed_channels**2 * 9)
    floats = encoder_cost(v, {}, 0)
    assert floats.macs == v.depth * linear * (3 + 1 + 4 + 4) + attention + rest
    assert floats.bops == (floats.macs - attention) * 16**2 + attention * 32**2
    assert (floats.bops_float, floats.four_bit) == (floats.macs * 32**2, 0)
    mixed = encoder_cost(v, {"blocks.0.mlp.lin1": Form(4, 8), "blocks.1.attn.qkv": Form(8, 8)}, 8)
    saved = 4 * linear * (16**2 - 4 * 8) + 3 * linear * (16**2 - 8 * 8) + attention * (32**2 - 8**2)
    assert floats.bops - mixed.bops == saved
    assert mixed.four_bit == 4 * linear / floats.macs


@pytest.mark.parametrize("name", SMALL)
def test_a_layers_bytes_are_those_of_its_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, name, SMALL[name])
    kinds = itertools.cycle([None, W8A8, W4A8, Kind(4, 4, static=True)])
    artifact = artifact_of(name, lambda *_: next(kinds))
    forms = layer_forms(artifact.header)
    costs = layer_costs(SMALL[name], forms)
    for layer, cost in costs.items():
        assert cost.form == forms.get(layer, KEPT)
        own = [artifact.tensors.get(f"image_encoder.{layer}.{part}") for part in PARTS]
        found = sum(tensor.numel() * tensor.element_size() for tensor in own if tensor is not None)
        assert cost.bytes == found, layer
