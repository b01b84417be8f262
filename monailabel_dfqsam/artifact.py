"""The file between quantizing and running: one `.safetensors`, self-describing and self-checking.

Layout, tensor names under `image_encoder.` as in the checkpoint:

    {layer}.weight            4 bit: [N, ceil(K/2)] uint8, low nibble first; 6 and 8 bit: [N, K] int8
    {layer}.weight_scale      [N] float32
    {layer}.bias              [N] float32
    {core}.ranges             [7] float32, policy `paper` alone
    every other tensor        float32 with one dimension (norms, padding constants), else float16
    prompt_encoder.*, mask_decoder.*   float16

The metadata is one entry, `dfqsam`: a JSON header. Each quantized layer's entry there gives its bits, input
scale and zero-point, and a convolution's geometry. `tensors_sha256` covers names, types, shapes and bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from monailabel_dfqsam.agreement import Fidelity
from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.ops import Geometry, QuantizedLayer, pack_int4, unpack_int4

FORMAT_VERSION = 1
_METADATA_KEY = "dfqsam"
_ENCODER = "image_encoder."
_MAX_HEADER = 100_000_000  # bytes, by the format's definition


class ArtifactError(ValueError):
    """An artifact that cannot be used; the message says why and what to do."""


class Sizes(TypedDict):
    """Bytes of all tensors and of the encoder's, before and after."""

    checkpoint_bytes: int
    artifact_bytes: int
    encoder_checkpoint_bytes: int
    encoder_artifact_bytes: int


class LayerEntry(TypedDict):
    """A quantized layer but for its tensors; `shape` is its weight's, unpacked."""

    weight_bits: int
    activation_bits: int
    input_scale: float
    input_zero_point: int
    shape: list[int]
    geometry: NotRequired[dict[str, Any]]


class Header(TypedDict):
    """What a file says of itself, as JSON values; checked where it is read, `_header`.

    Attributes:
        variant: the model's name in `VARIANTS`, perhaps of a newer version than this one.
        source_sha256, source_name: the checkpoint's file.
        config: the `QuantizationConfig`, field by field.
        key: `identity.artifact_key`, or `finetuned_key`.
        algorithm: `identity.ALGORITHM` then; versions before 2 did not say it.
        images_sha256: of the images calibrated on.
        layers: quantized layers by name.
        attention_bits: of attention's products, 0 for floats.
        macs, bops, bops_float: multiplications of one image's embedding, and bit operations.
        created: ISO 8601 in UTC.
        seconds: that making it took.
        finetuning: what it was fine-tuned on, and its scores.
    """

    format_version: int
    variant: str
    source_sha256: str
    source_name: str
    config: dict[str, Any]
    preset: NotRequired[str | None]
    key: str
    algorithm: NotRequired[int]
    seed: int
    images_sha256: list[str]
    layers: dict[str, LayerEntry]
    attention_bits: int
    sizes: Sizes
    macs: int
    bops: int
    bops_float: int
    versions: dict[str, str]
    fidelity: Fidelity
    created: str
    seconds: float
    finetuning: NotRequired[dict[str, Any]]
    scores: NotRequired[dict[str, Any]]
    tensors_sha256: NotRequired[str]


_HEADER = TypeAdapter(Header)


@dataclass(frozen=True)
class Artifact:
    """A quantized model: the header, and tensors by name, as in the file."""

    header: Header
    tensors: dict[str, Tensor]

    @property
    def label(self) -> str:
        """What this is in a few letters, like 'W4A4'."""
        bits = self.header["config"]["bits"]
        return f"W{bits}A{bits}"


def encode_layer(name: str, layer: QuantizedLayer) -> tuple[LayerEntry, dict[str, Tensor]]:
    """Header entry and tensors of one quantized layer of the encoder."""
    entry: LayerEntry = {
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
        "input_scale": layer.input_scale,
        "input_zero_point": layer.input_zero_point,
        "shape": list(layer.weight.shape),
    }
    if layer.geometry is not None:
        entry["geometry"] = asdict(layer.geometry)
    weight = pack_int4(layer.weight) if layer.weight_bits == 4 else layer.weight.contiguous()
    tensors = {
        f"{_ENCODER}{name}.weight": weight,
        f"{_ENCODER}{name}.weight_scale": layer.weight_scale.float(),
        f"{_ENCODER}{name}.bias": layer.bias.float(),
    }
    return entry, tensors


def decode_layer(artifact: Artifact, name: str) -> QuantizedLayer:
    """One quantized layer of the encoder, 'blocks.0.attn.qkv' for instance."""
    entry = artifact.header["layers"][name]
    weight = artifact.tensors[f"{_ENCODER}{name}.weight"]
    if entry["weight_bits"] == 4:
        weight = unpack_int4(weight, entry["shape"][1])
    return QuantizedLayer(
        weight=weight,
        weight_scale=artifact.tensors[f"{_ENCODER}{name}.weight_scale"],
        bias=artifact.tensors[f"{_ENCODER}{name}.bias"],
        input_scale=entry["input_scale"],
        input_zero_point=entry["input_zero_point"],
        weight_bits=entry["weight_bits"],
        activation_bits=entry["activation_bits"],
        geometry=Geometry(**entry["geometry"]) if "geometry" in entry else None,
    )


def stored(tensor: Tensor) -> Tensor:
    """A floating tensor as the file keeps it: float16, but float32 where it has one dimension."""
    return tensor.float().contiguous() if tensor.ndim <= 1 else tensor.half().contiguous()


def float_tensors(artifact: Artifact, prefix: str) -> dict[str, Tensor]:
    """The floating tensors under a prefix as float32, the prefix taken off, quantized layers left out."""
    taken = {
        f"{_ENCODER}{n}.{p}" for n in artifact.header["layers"] for p in ("weight", "weight_scale", "bias")
    }
    return {
        key.removeprefix(prefix): value.float()
        for key, value in artifact.tensors.items()
        if key.startswith(prefix) and key not in taken
    }


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest over names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_artifact(artifact: Artifact, path: Path) -> None:
    """Writes an artifact: a reader sees the old file or the whole new one.

    Raises:
        OSError: when the disk is full or the folder cannot be written; nothing is left behind.
    """
    header = {**artifact.header, "tensors_sha256": tensors_sha256(artifact.tensors)}
    text = json.dumps(header, sort_keys=True)
    try:
        with replacing(path) as partial:
            save_file(dict(artifact.tensors), partial, metadata={_METADATA_KEY: text})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
    except SafetensorError as error:
        raise OSError(f"the artifact could not be written: {error}") from None


def read_header(path: Path) -> Header:
    """The header alone, without reading the tensors.

    Raises:
        ArtifactError: as `read_artifact`, but for damage within the tensors.
    """
    return _read(path, header_only=True).header


def read_artifact(path: Path, key: str | None = None) -> Artifact:
    """Reads and checks an artifact.

    Args:
        key: which artifact it must be; None takes any.

    Raises:
        ArtifactError: when the file is missing, cut short, changed, no artifact, or of a newer format, or
            when it is another one than `key` says.
    """
    artifact = _read(path, header_only=False)
    if key is not None and artifact.header.get("key") != key:
        raise ArtifactError(f"'{path.name}' holds another model than its name says: quantize again")
    return artifact


def _read(path: Path, header_only: bool) -> Artifact:
    name = path.name
    if not path.is_file():
        raise ArtifactError(f"there is no artifact '{name}'")
    try:
        # Read, and not mapped into memory as safetensors would: a process whose mapped file is cut short
        # meanwhile is killed for it.
        with path.open("rb") as file:
            metadata = _metadata(file)
            data = b"" if header_only else path.read_bytes()
        if _METADATA_KEY not in metadata:
            raise ArtifactError(f"'{name}' is a safetensors file, but no artifact of dfqsam quantize")
        header = _header(json.loads(metadata[_METADATA_KEY]), name)
        if header_only:
            return Artifact(header, {})
        tensors = load(data)
    except ArtifactError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"'{name}' is damaged or cut short ({error}): quantize again") from None
    if tensors_sha256(tensors) != header.get("tensors_sha256"):
        raise ArtifactError(f"'{name}' was changed after it was written (checksum): quantize again")
    return Artifact(header, tensors)


def _header(values: dict[str, Any], name: str) -> Header:
    """The header in a file's metadata; raises ArtifactError where it is another version's."""
    if values.get("format_version", 0) > FORMAT_VERSION:
        raise ArtifactError(
            f"'{name}' has format {values['format_version']}, this version reads up to {FORMAT_VERSION}: "
            "update monailabel-dfqsam, or quantize again"
        )
    try:
        _HEADER.validate_python(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ArtifactError(
            f"'{name}' was made by another version, or changed: its header's '{where}' is missing or wrong: "
            "quantize again"
        ) from None
    return cast(Header, values)


def _metadata(file: BinaryIO) -> dict[str, str]:
    """The metadata of a safetensors file: a JSON object's length in 8 bytes, the object, the tensors' bytes.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: when it is not one, or not of the length it says.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        raise ValueError("it begins with no header")
    entries = json.loads(file.read(length))
    metadata: dict[str, str] = entries.pop("__metadata__", {})
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if os.fstat(file.fileno()).st_size != end:
        raise ValueError("it is not as long as its header says")
    return metadata
