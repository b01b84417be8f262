"""The artifact file: what goes in comes out, and no damaged file passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from monailabel_dfqsam.artifact import (
    FORMAT_VERSION,
    Artifact,
    ArtifactError,
    LayerEntry,
    decode_layer,
    encode_layer,
    float_tensors,
    layer_forms,
    read_artifact,
    read_header,
    tensors_sha256,
    write_artifact,
)
from monailabel_dfqsam.ops import Geometry, QuantizedLayer, StaticRange, pack_int4
from monailabel_dfqsam.quantization.cost import linears
from monailabel_dfqsam.sam import VARIANTS
from tests.forms import KINDS, W4A8, Kind, nearest, static_range
from tests.models import header


def _layer(bits: int) -> QuantizedLayer:
    g = torch.Generator().manual_seed(bits)
    weight = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 7), generator=g).to(torch.int8)
    geometry = Geometry(3, 2, 1) if bits == 8 else None
    scale, bias = torch.rand(6, generator=g), torch.randn(6, generator=g)
    return QuantizedLayer(weight, scale, bias, StaticRange(0.125, 3), bits, bits, geometry)


def _artifact() -> Artifact:
    layers, tensors = {}, {}
    for bits in (4, 6, 8):
        layers[f"layer{bits}"], parts = encode_layer(f"layer{bits}", _layer(bits))
        tensors.update(parts)
    return Artifact(header(layers=layers, source_name="ä.pth"), tensors)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    write_artifact(_artifact(), path)
    return path


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_layers_come_back_as_they_were(path: Path, bits: int) -> None:
    actual, expected = decode_layer(read_artifact(path), f"layer{bits}"), _layer(bits)
    for name in ("weight", "weight_scale", "bias"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))
    assert (actual.input_range, actual.geometry) == (expected.input_range, expected.geometry)


@pytest.mark.parametrize("geometry", [None, Geometry(1, 1, 0)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_form_comes_back_as_it_was(tmp_path: Path, kind: Kind, geometry: Geometry | None) -> None:
    weight, bias = torch.randn(5, 67), torch.randn(5)
    layer = nearest(weight, bias, kind, geometry, static_range(torch.randn(9), kind) if kind.static else None)
    entry, tensors = encode_layer("a.b", layer)
    path = tmp_path / "a.safetensors"
    write_artifact(Artifact(header(layers={"a.b": entry}, format_version=FORMAT_VERSION), tensors), path)
    artifact = read_artifact(path)
    back = decode_layer(artifact, "a.b")
    for name in ("weight", "weight_scale", "bias"):
        assert torch.equal(getattr(back, name), getattr(layer, name))
    assert (back.input_range, back.geometry, back.form) == (layer.input_range, geometry, layer.form)
    assert (back.groups is None) == (layer.groups is None)
    if back.groups is not None and layer.groups is not None:
        assert torch.equal(back.groups.multiplier, layer.groups.multiplier)
        assert torch.equal(back.groups.zero_point, layer.groups.zero_point)
        assert tensors["image_encoder.a.b.weight"].shape == (5, 34)
        assert tensors["image_encoder.a.b.weight_groups"].shape == (5, 3)
    assert layer_forms(artifact.header) == {"a.b": layer.form}
    assert float_tensors(artifact, "image_encoder.") == {}


def test_a_file_of_the_first_format_is_read(tmp_path: Path) -> None:
    """Written out here as that version wrote it."""
    weight = torch.tensor([[-8, 7, 3], [0, 1, -1]], dtype=torch.int8)
    entry = {
        "weight_bits": 4, "activation_bits": 4, "input_scale": 0.5, "input_zero_point": 3, "shape": [2, 3],
    }  # fmt: skip
    tensors = {
        "image_encoder.x.weight": pack_int4(weight),
        "image_encoder.x.weight_scale": torch.tensor([1.0, 2.0]),
        "image_encoder.x.bias": torch.zeros(2),
    }
    path = tmp_path / "a.safetensors"
    write_artifact(Artifact(header(layers={"x": entry}, format_version=1), tensors), path)
    layer = decode_layer(read_artifact(path), "x")
    assert torch.equal(layer.weight, weight)
    assert (layer.input_range, layer.groups) == (StaticRange(0.5, 3), None)


_ENTRY: LayerEntry = {
    "weight_bits": 4, "activation_bits": 8, "input_scale": 0.5, "input_zero_point": 3, "shape": [2, 3],
    "geometry": {"kernel": 1, "stride": 1, "padding": 0, "transposed": False},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"weight_bits": 16}, {"activation_bits": 1}, {"input_scale": 0.0}, {"input_scale": float("inf")},
        {"input_zero_point": 256}, {"input_scale": None}, {"shape": [2]}, {"shape": [0, 3]},
        {"group_size": 16}, {"group_size": 32, "weight_bits": 8}, {"geometry": {"kernel": 3}},
        {"group_size": 32, "geometry": {"kernel": 3, "stride": 1, "padding": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_that_no_layer_has_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(Artifact(header(layers={"x": _ENTRY}), {}), path)
    assert read_header(path)["layers"]["x"] == _ENTRY
    write_artifact(Artifact(header(layers={"x": {**_ENTRY, **change}}), {}), path)
    with pytest.raises(ArtifactError, match=r"'layers\.x.*' is missing or wrong"):
        read_header(path)


def test_an_input_has_both_scale_and_zero_point_or_neither(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for missing in ("input_scale", "input_zero_point"):
        entry = {key: value for key, value in _ENTRY.items() if key != missing}
        write_artifact(Artifact(header(layers={"x": entry}), {}), path)
        with pytest.raises(ArtifactError, match=r"'layers\.x' is missing or wrong"):
            read_header(path)


def test_a_label_is_what_all_linears_are() -> None:
    names = sorted(linears(VARIANTS["tiny"]))
    entry, _ = encode_layer("", nearest(torch.randn(2, 40), torch.zeros(2), W4A8))
    eight = {**entry, "weight_bits": 8}
    one, rest = names[0], dict.fromkeys(names[1:], entry)
    for layers, label in (
        ({one: entry, **rest}, "W4A8"),
        ({one: entry, **rest, "neck.0": eight}, "W4A8"),
        ({one: eight, **rest}, "mixed precision"),
        (rest, "mixed precision"),
        ({}, "W16A16"),
    ):
        assert Artifact(header(layers=layers), {}).label == label
    unknown = Artifact(header(layers={"a": entry, "b": entry}, variant="of tomorrow"), {})
    assert unknown.label == "W4A8"


def test_header_comes_back(path: Path) -> None:
    assert read_header(path)["source_name"] == "ä.pth"


@pytest.mark.parametrize("name", sorted(_artifact().header.keys() - {"format_version", "algorithm"}))
@pytest.mark.parametrize("wrong", ["missing", "null"])
def test_a_header_of_another_version_is_refused_in_a_sentence(path: Path, name: str, wrong: str) -> None:
    artifact = _artifact()
    values = {key: value for key, value in artifact.header.items() if key != name}
    values |= {name: None} if wrong == "null" else {}
    write_artifact(Artifact(values, artifact.tensors), path)  # type: ignore[arg-type]
    for read in (read_header, read_artifact):
        with pytest.raises(ArtifactError, match=f"another version, .*'{name}' is missing or wrong: quantize"):
            read(path)


def test_an_artifact_may_not_lie_under_anothers_name(path: Path) -> None:
    assert read_artifact(path, "0" * 16).header["key"] == "0" * 16
    with pytest.raises(ArtifactError, match="holds another model than its name says"):
        read_artifact(path, "1" * 16)


def test_writing_leaves_no_other_file_and_the_same_bytes(path: Path) -> None:
    first = path.read_bytes()
    write_artifact(_artifact(), path)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_artifact(_artifact(), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_truncated_file_is_refused(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ArtifactError, match="quantize again"):
        read_artifact(path)


def test_every_flipped_tensor_byte_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(ArtifactError, match="checksum"):
            read_artifact(path)


def test_newer_format_is_refused(path: Path) -> None:
    artifact = _artifact()
    newer = FORMAT_VERSION + 1
    write_artifact(Artifact({**artifact.header, "format_version": newer}, artifact.tensors), path)
    with pytest.raises(ArtifactError, match=rf"format {newer}.*update"):
        read_artifact(path)


def test_a_fidelity_without_its_yardstick_is_another_versions(path: Path) -> None:
    artifact = _artifact()
    earlier = {"mean_iou": 0.9, "n": 1, "engine": "reference"}
    write_artifact(Artifact({**artifact.header, "fidelity": earlier}, artifact.tensors), path)  # type: ignore[typeddict-item]
    with pytest.raises(ArtifactError, match=r"another version.*fidelity\.median_iou.*quantize again"):
        read_header(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="no artifact"):
        read_artifact(tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="there is no artifact"):
        read_artifact(tmp_path / "none.safetensors")


def test_digest_depends_on_names_shapes_and_types() -> None:
    x = torch.zeros(2, 3)
    digests = {
        tensors_sha256(tensors)
        for tensors in ({"a": x}, {"b": x}, {"a": x.view(3, 2)}, {"a": x.to(torch.int32)}, {"a": x + 1})
    }
    assert len(digests) == 5
