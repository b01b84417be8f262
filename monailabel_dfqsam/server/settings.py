"""What a server is told at its start: `--conf KEY VALUE` pairs, checked once and made into a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from monailabel_dfqsam.config import Preset, QuantizationConfig
from monailabel_dfqsam.sam.checkpoint import EMBEDDED
from monailabel_dfqsam.sam.variants import VARIANTS

DEFAULT_LABELS = ("organ", "lesion", "vessel", "bone", "other")

# Set by MONAI Label itself, not by a person.
_UPSTREAM_KEYS = frozenset({"server_mode"})

_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"0", "false", "no", "off"})


class SettingsError(ValueError):
    """A `--conf` pair that cannot be used; the message names the key and what it may be."""


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
        min_fidelity: least agreement (mean mask IoU with full precision, 0 … 1) to be published. Two masks
            of IoU 0.6 overlap by three quarters of each: less than that no longer shows the same object.
        cache_mb: bound of the embedding cache, and again of the cache of loaded volumes, in MiB.
        window: intensity window offered first, or None for the first of the list.
        trusted_hosts: names under which clients may address a server that listens on loopback.
        max_upload_mb: bound of one upload with all its files, in MiB.
    """

    model_dir: Path
    checkpoint: Path = EMBEDDED
    variant: str | None = None
    labels: tuple[str, ...] = DEFAULT_LABELS
    quantize: bool = True
    quantization: QuantizationConfig = field(default_factory=lambda: Preset.FAST.config)
    min_fidelity: float = 0.6
    cache_mb: int = 512
    window: str | None = None
    trusted_hosts: tuple[str, ...] = ()
    max_upload_mb: int = 4096


def read_settings(conf: Mapping[str, Any], app_dir: Path, windows: tuple[str, ...] = ()) -> Settings:
    """Settings out of the strings given at the start.

    Args:
        conf: key -> text, as MONAI Label hands it over.
        app_dir: the app's folder; models go to its sub-folder `model` unless `model_dir` says otherwise.
        windows: names that `window` may take.

    Raises:
        SettingsError: for an unknown key or a value that does not fit.
    """
    texts = {key: str(value).strip() for key, value in conf.items() if key not in _UPSTREAM_KEYS}
    unknown = sorted(set(texts) - set(_KEYS))
    if unknown:
        raise SettingsError(f"unknown --conf {', '.join(unknown)}; known are: {', '.join(_KEYS)}")
    variant = _one_of(texts, "variant", tuple(VARIANTS))
    labels = tuple(name.strip() for name in texts.get("labels", "").split(",") if name.strip())
    hosts = tuple(name.strip().lower() for name in texts.get("trusted_hosts", "").split(",") if name.strip())
    checkpoint = Path(texts.get("checkpoint", EMBEDDED)).expanduser()
    if "checkpoint" in texts and not checkpoint.is_file():
        raise SettingsError(f"--conf checkpoint: there is no file '{checkpoint}'")
    return Settings(
        model_dir=Path(texts.get("model_dir", app_dir / "model")).expanduser(),
        checkpoint=checkpoint,
        variant=variant,
        labels=labels or DEFAULT_LABELS,
        quantize=_boolean(texts, "quantize", True),
        quantization=_quantization(texts),
        min_fidelity=_number(texts, "min_fidelity", Settings.min_fidelity, 0.0, 1.0),
        cache_mb=int(_number(texts, "cache_mb", Settings.cache_mb, 1, 1 << 20)),
        window=_one_of(texts, "window", windows),
        trusted_hosts=hosts,
        max_upload_mb=int(_number(texts, "max_upload_mb", Settings.max_upload_mb, 1, 1 << 20)),
    )


def _quantization(texts: Mapping[str, str]) -> QuantizationConfig:
    preset = Preset(_one_of(texts, "preset", tuple(p.value for p in Preset)) or Preset.FAST.value).config
    iterations = int(_number(texts, "iterations", preset.synthesis.iterations, 1, 100_000))
    try:
        return replace(
            preset,
            bits=int(_number(texts, "bits", preset.bits, 1, 32)),
            images=int(_number(texts, "images", preset.images, 1, 256)),
            synthesis=replace(preset.synthesis, iterations=iterations),
        )
    except ValueError as error:
        raise SettingsError(f"--conf: {error}") from None


def _one_of(texts: Mapping[str, str], key: str, choices: tuple[str, ...]) -> str | None:
    value = texts.get(key)
    if value is not None and value not in choices:
        raise SettingsError(f"--conf {key} must be one of {', '.join(choices)}, not '{value}'")
    return value


def _boolean(texts: Mapping[str, str], key: str, default: bool) -> bool:
    value = texts.get(key, str(default)).lower()
    if value not in _YES | _NO:
        raise SettingsError(f"--conf {key} must be true or false, not '{value}'")
    return value in _YES


def _number(texts: Mapping[str, str], key: str, default: float, low: float, high: float) -> float:
    """A number within [low, high]; whole when `low` is an int."""
    text = texts.get(key)
    if text is None:
        return default
    whole = isinstance(low, int)
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise SettingsError(f"--conf {key} must be a {'whole ' * whole}number, not '{text}'") from None
    if not low <= value <= high:
        raise SettingsError(f"--conf {key} must be {low} to {high}, not {text}")
    return value


_KEYS = (
    "checkpoint", "variant", "labels", "quantize", "preset", "iterations", "images", "bits", "min_fidelity",
    "cache_mb", "window", "model_dir", "trusted_hosts", "max_upload_mb",
)  # fmt: skip
