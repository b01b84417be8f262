"""What a server is told at its start: `--conf KEY VALUE` pairs, checked once and made into a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from monailabel_dfqsam.config import AUTO, Preset, QuantizationConfig
from monailabel_dfqsam.ops import cuda_library
from monailabel_dfqsam.sam.checkpoint import DEFAULT, CheckpointError, find_checkpoint
from monailabel_dfqsam.sam.variants import VARIANTS
from monailabel_dfqsam.server.answers.request import WINDOWS
from monailabel_dfqsam.server.gate.options import Number, OptionError, Options, Whole, between, read

DEFAULT_LABELS = ("organ", "lesion", "vessel", "bone", "other")
MAX_ITERATIONS = 100_000

# Set by MONAI Label itself, not by a person.
_UPSTREAM_KEYS = frozenset({"server_mode"})

_MEBIBYTES = between(1, 1 << 20)


def _usual() -> QuantizationConfig:
    """How a server quantizes where nobody says: in what its GPU's kernels multiply, where it has some."""
    preset = Preset.FAST if cuda_library.why_unavailable() is not None else Preset.STATIC
    return preset.config


@dataclass(frozen=True)
class Settings:
    """One server's choices.

    Attributes:
        model_dir: folder of artifacts, reports and progress; the only one the server writes models to.
        checkpoint: the full-precision weights.
        variant: the model they belong to, for files that leave it open.
        labels: names offered to the viewer.
        quantize: whether the server quantizes by itself at its start.
        quantization: how; a request to `POST /train/dfqsam` may differ.
        min_fidelity: least agreement with full precision to be published, as a share of what full precision
            agrees with itself one grey level away; 0 publishes anything.
        cache_mb: bound of the embedding cache, and again of the cache of loaded volumes, in MiB.
        window: intensity window offered first, or None for the first of the list.
        trusted_hosts: names under which clients may address a server that listens on loopback.
        max_upload_mb: bound of one upload with all its files, in MiB.
    """

    model_dir: Path
    checkpoint: Path = DEFAULT
    variant: str | None = None
    labels: tuple[str, ...] = DEFAULT_LABELS
    quantize: bool = True
    quantization: QuantizationConfig = field(default_factory=_usual)
    min_fidelity: float = 0.9
    cache_mb: int = 512
    window: str | None = None
    trusted_hosts: tuple[str, ...] = ()
    max_upload_mb: int = 4096


def _bits(value: Any) -> Any:
    try:
        return AUTO if value == AUTO else _WHOLE.validate_python(value)
    except ValidationError:
        raise ValueError("auto or a whole number is expected") from None


def _fidelity(value: Any) -> Any:
    try:
        return AUTO if value == AUTO else _NUMBER.validate_python(value)
    except ValidationError:
        raise ValueError("auto or a number is expected") from None


_WHOLE: TypeAdapter[int] = TypeAdapter(Whole)
_NUMBER: TypeAdapter[float] = TypeAdapter(Number)
Bits = Annotated[int | str, BeforeValidator(_bits)]
"""Bits of Linears, or 'auto', which leaves each layer's to the fidelity to keep."""


class QuantizingOptions(Options):
    """How to quantize, as `--conf` and `POST /train/dfqsam` both say it; None leaves it as it was."""

    preset: Preset | None = None
    bits: Bits | None = None
    fidelity: Annotated[float | str, BeforeValidator(_fidelity)] | None = None
    images: Whole | None = None
    iterations: Annotated[Whole, between(1, MAX_ITERATIONS)] | None = None

    def changed(self, base: QuantizationConfig) -> QuantizationConfig:
        """`base` with what these say.

        Raises:
            OptionError: for values that the configuration does not take.
        """
        names = {"preset", "iterations", *(field.name for field in fields(base))}
        try:
            return base.changed(**self.model_dump(exclude_none=True, include=names))
        except ValueError as error:
            raise OptionError(str(error)) from None


def _names(text: str) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",") if name.strip()) or None


_Names = Annotated[tuple[str, ...] | None, BeforeValidator(_names)]


class _Conf(QuantizingOptions):
    """`--conf`, each value a text."""

    checkpoint: Path | None = None
    variant: Literal[tuple(VARIANTS)] | None = None  # type: ignore[valid-type]
    labels: _Names = None
    quantize: bool | None = None
    min_fidelity: Annotated[float, between(0, 1)] | None = None
    cache_mb: Annotated[Whole, _MEBIBYTES] | None = None
    window: Literal[tuple(WINDOWS)] | None = None  # type: ignore[valid-type]
    model_dir: Path | None = None
    trusted_hosts: _Names = None
    max_upload_mb: Annotated[Whole, _MEBIBYTES] | None = None


def read_settings(conf: Mapping[str, Any], app_dir: Path) -> Settings:
    """Settings out of the strings given at the start.

    Args:
        conf: key -> text, as MONAI Label hands it over.
        app_dir: the app's folder; models go to its sub-folder `model` unless `model_dir` says otherwise.

    Raises:
        OptionError: for an unknown key or a value that does not fit.
    """
    texts = {key: str(value).strip() for key, value in conf.items() if key not in _UPSTREAM_KEYS}
    try:
        given = read(_Conf, texts)
        quantization = given.changed(_usual())
        checkpoint = _checkpoint(given.checkpoint)
    except OptionError as error:
        raise OptionError(f"--conf {error}") from None
    own = given.model_dump(exclude_none=True, exclude=set(QuantizingOptions.model_fields))
    own["checkpoint"] = checkpoint
    if "model_dir" in own:
        own["model_dir"] = own["model_dir"].expanduser()
    own["trusted_hosts"] = tuple(name.lower() for name in own.get("trusted_hosts", ()))
    return Settings(**{"model_dir": app_dir / "model", **own, "quantization": quantization})


def _checkpoint(given: Path | None) -> Path:
    if given is None:
        return DEFAULT
    try:
        path = find_checkpoint(given)
    except CheckpointError as error:
        raise OptionError(f"checkpoint: {error}") from None
    if not path.is_file():
        raise OptionError(f"checkpoint: there is no file '{given}'")
    return path
