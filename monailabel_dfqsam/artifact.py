"""The file between quantizing and running: one `.safetensors`, self-describing and self-checking.

Layout, tensor names under `image_encoder.` as in the checkpoint:

    {layer}.weight            4 bit: [N, ceil(K/2)] uint8, low nibble first; 6 and 8 bit: [N, K] int8
    {layer}.weight_groups     [N, ceil(K/32)] uint8, where 4-bit weights have groups of 32 along K: low nibble
                              zero-point, high nibble multiplier − 1; their nibbles above are q − 8
    {layer}.weight_scale      [N] float32
    {layer}.bias              [N] float32
    {core}.ranges             [7] float32, policy `paper` alone
    every other tensor        float32 with one dimension (norms, padding constants), else float16
    prompt_encoder.*, mask_decoder.*   float16

The metadata is one entry, `dfqsam`: a JSON header. Each quantized layer's entry there gives its bits, input
scale and zero-point where these are fixed, and a convolution's geometry; layers without an entry are floats.
`tensors_sha256` covers names, types, shapes and bytes. Format 1 has no groups, and fixes all input ranges.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, cast

import torch
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from monailabel_dfqsam.agreement import Fidelity
from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.ops import (
    Form,
    Geometry,
    Groups,
    QuantizedLayer,
    StaticRange,
    pack_int4,
    unpack_int4,
)
from monailabel_dfqsam.quantization.cost import KEPT, linears
from monailabel_dfqsam.sam.variants import VARIANTS

FORMAT_VERSION = 2
_METADATA_KEY = "dfqsam"
_ENCODER = "image_encoder."
_PARTS = ("weight", "weight_groups", "weight_scale", "bias")  # of a quantized layer's tensors
_MIDDLE = 8  # of the 16 levels of 4-bit weights in groups, which are packed as signed ones
_MAX_HEADER = 100_000_000  # bytes, by the format's definition


class ArtifactError(ValueError):
    """An artifact that cannot be used; the message says why and what to do."""


class Sizes(TypedDict):
    """Bytes of all tensors and of the encoder's, before and after."""

    checkpoint_bytes: int
    artifact_bytes: int
    encoder_checkpoint_bytes: int
    encoder_artifact_bytes: int


_Bits = Annotated[int, Field(ge=2, le=8)]
_Size = Annotated[int, Field(ge=1)]


class GeometryEntry(TypedDict):
    """A `Geometry`."""

    kernel: _Size
    stride: _Size
    padding: Annotated[int, Field(ge=0)]
    transposed: NotRequired[bool]


class LayerEntry(TypedDict):
    """A quantized layer but for its tensors.

    Attributes:
        input_scale, input_zero_point: both, or neither where ranges are found at run time.
        shape: its weight's, unpacked.
        group_size: of 4-bit weights in groups.
    """

    weight_bits: _Bits
    activation_bits: _Bits
    input_scale: NotRequired[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    input_zero_point: NotRequired[Annotated[int, Field(ge=0, le=255)]]
    shape: Annotated[list[_Size], Field(min_length=2, max_length=2)]
    group_size: NotRequired[Literal[32]]
    geometry: NotRequired[GeometryEntry]


def _possible(entry: LayerEntry) -> LayerEntry:
    """The entry, if a layer can be so; raises ValueError."""
    if ("input_scale" in entry) != ("input_zero_point" in entry):
        raise ValueError("an input has both scale and zero-point, or neither")
    nothing = torch.empty(0)
    QuantizedLayer(nothing, nothing, nothing, **_kind(entry), groups=_no_groups(entry))
    return entry


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
        four_bit: share of the multiplications whose weights have 4 bits, 0 … 1.
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
    layers: dict[str, Annotated[LayerEntry, AfterValidator(_possible)]]
    attention_bits: int
    sizes: Sizes
    macs: int
    bops: int
    bops_float: int
    four_bit: NotRequired[float]
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
        """`label` of the header."""
        return label(self.header)


def label(header: Header) -> str:
    """What all Linears of an artifact's encoder are, like 'W4A4'; otherwise 'mixed precision'."""
    forms = layer_forms(header)
    variant = VARIANTS.get(header["variant"])
    if variant is not None:
        names = set(linears(variant))
    else:
        names = {name for name, entry in header["layers"].items() if "geometry" not in entry}
    found = {str(forms.get(name, KEPT)) for name in names}
    return found.pop() if len(found) == 1 else "mixed precision"


def layer_forms(header: Header) -> dict[str, Form]:
    """The form of each quantized layer by name, in words 'W4A8'; layers that are missing are floats."""
    return {
        name: Form(entry["weight_bits"], entry["activation_bits"], "group_size" in entry)
        for name, entry in header["layers"].items()
    }


def encode_layer(name: str, layer: QuantizedLayer) -> tuple[LayerEntry, dict[str, Tensor]]:
    """Header entry and tensors of one quantized layer of the encoder."""
    entry: LayerEntry = {
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
        "shape": list(layer.weight.shape),
    }
    if layer.input_range is not None:
        entry["input_scale"], entry["input_zero_point"] = layer.input_range
    if layer.geometry is not None:
        entry["geometry"] = cast(GeometryEntry, asdict(layer.geometry))
    weight, groups = layer.weight.contiguous(), layer.groups
    if groups is not None:
        entry["group_size"] = 32
        weight = (groups.levels(weight).to(torch.int16) - _MIDDLE).to(torch.int8)
    tensors = {} if groups is None else {f"{_ENCODER}{name}.weight_groups": _packed_groups(groups)}
    tensors |= {
        f"{_ENCODER}{name}.weight": pack_int4(weight) if layer.weight_bits == 4 else weight,
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
    groups = None
    if "group_size" in entry:
        groups = _unpacked_groups(artifact.tensors[f"{_ENCODER}{name}.weight_groups"])
        weight = groups.weight((weight + _MIDDLE).to(torch.uint8))
    return QuantizedLayer(
        weight=weight,
        weight_scale=artifact.tensors[f"{_ENCODER}{name}.weight_scale"],
        bias=artifact.tensors[f"{_ENCODER}{name}.bias"],
        **_kind(entry),
        groups=groups,
    )


def _kind(entry: LayerEntry) -> dict[str, Any]:
    """What of a `QuantizedLayer` is no tensor."""
    static = "input_scale" in entry
    return {
        "input_range": StaticRange(entry["input_scale"], entry["input_zero_point"]) if static else None,
        "weight_bits": entry["weight_bits"],
        "activation_bits": entry["activation_bits"],
        "geometry": Geometry(**entry["geometry"]) if "geometry" in entry else None,
    }


def _no_groups(entry: LayerEntry) -> Groups | None:
    """Groups without numbers where a layer has groups."""
    return Groups(torch.empty(0), torch.empty(0)) if "group_size" in entry else None


def _packed_groups(groups: Groups) -> Tensor:
    """[N, G] uint8: multiplier − 1 in the high nibble, the zero-point in the low one."""
    return (groups.multiplier - 1) << 4 | groups.zero_point


def _unpacked_groups(packed: Tensor) -> Groups:
    return Groups((packed >> 4) + 1, packed & 15)


def stored(tensor: Tensor) -> Tensor:
    """A floating tensor as the file keeps it: float16, but float32 where it has one dimension."""
    return tensor.float().contiguous() if tensor.ndim <= 1 else tensor.half().contiguous()


def float_tensors(artifact: Artifact, prefix: str) -> dict[str, Tensor]:
    """The floating tensors under a prefix as float32, the prefix taken off, quantized layers left out."""
    taken = {f"{_ENCODER}{n}.{p}" for n in artifact.header["layers"] for p in _PARTS}
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
