"""The artifact file: what goes in comes out, and no damaged file passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from monailabel_dfqsam.artifact import (
    Artifact,
    ArtifactError,
    decode_layer,
    encode_layer,
    read_artifact,
    read_header,
    tensors_sha256,
    write_artifact,
)
from monailabel_dfqsam.ops import Geometry, QuantizedLayer
from tests.models import header


def _layer(bits: int) -> QuantizedLayer:
    g = torch.Generator().manual_seed(bits)
    weight = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 7), generator=g).to(torch.int8)
    geometry = Geometry(3, 2, 1) if bits == 8 else None
    return QuantizedLayer(
        weight, torch.rand(6, generator=g), torch.randn(6, generator=g), 0.125, 3, bits, bits, geometry
    )


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
    assert (actual.input_scale, actual.input_zero_point, actual.geometry) == (0.125, 3, expected.geometry)


def test_header_comes_back(path: Path) -> None:
    assert read_header(path)["source_name"] == "ä.pth"
    assert _artifact().label == "W4A4"


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
    write_artifact(Artifact({**artifact.header, "format_version": 2}, artifact.tensors), path)
    with pytest.raises(ArtifactError, match=r"format 2.*update"):
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
