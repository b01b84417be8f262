"""The options of `POST /train/…`, from a viewer's JSON to checked configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from monailabel_dfqsam.config import (
    Calibration,
    FinetuneConfig,
    Policy,
    Preset,
    QuantizationConfig,
    Sampling,
    SynthesisConfig,
)
from monailabel_dfqsam.sam.checkpoint import CheckpointError, check_checkpoint
from monailabel_dfqsam.server.settings import Settings

OPTIONS = ("bits", "policy", "iterations", "images", "seed", "calibration", "preset", "checkpoint")
FINETUNING_OPTIONS = ("bits", "sampling", "max_epochs", "seed")

# What MONAI Label, Slicer and OHIF add to every request; none of it concerns quantization.
_ADDED_BY_CLIENTS = frozenset({"model", "client_id", "device", "gpus", "multi_gpu", "local_rank", "name"})


class OptionError(ValueError):
    """An option that cannot be used; the message names it and what it may be."""


def defaults(settings: Settings) -> dict[str, Any]:
    """The options as a viewer shows them: a list is a choice whose first item is taken."""
    config = settings.quantization
    return {
        "bits": _first(str(config.bits), ["4", "6", "8"]),
        "policy": [policy.value for policy in Policy],
        "calibration": [Calibration.SYNTHETIC.value, Calibration.GAUSSIAN.value],
        "iterations": config.synthesis.iterations,
        "images": config.images,
        "seed": config.seed,
    }


def read_options(
    request: Mapping[str, Any], settings: Settings, own_name: str
) -> tuple[QuantizationConfig, Path]:
    """The configuration and the checkpoint that a request asks for.

    Args:
        request: options by name, as JSON values; numbers may be text, and a list stands for its first item.
        settings: what holds where the request says nothing.
        own_name: this trainer's name; OHIF sends the options once more under it.

    Raises:
        OptionError: for unknown options and for values that do not fit.
    """
    given = _given(request, own_name, OPTIONS)
    base = settings.quantization
    if "preset" in given:
        chosen = Preset(_choice(given, "preset", [p.value for p in Preset], "")).config
        base = replace(base, images=chosen.images, synthesis=chosen.synthesis, recipe=chosen.recipe)
    iterations = _whole(given, "iterations", base.synthesis.iterations)
    calibrations = [Calibration.SYNTHETIC.value, Calibration.GAUSSIAN.value]
    try:
        config = QuantizationConfig(
            bits=_whole(given, "bits", base.bits),
            policy=Policy(_choice(given, "policy", [p.value for p in Policy], base.policy.value)),
            calibration=Calibration(_choice(given, "calibration", calibrations, base.calibration.value)),
            images=_whole(given, "images", base.images),
            seed=_whole(given, "seed", base.seed),
            synthesis=replace(base.synthesis, iterations=iterations),
            recipe=base.recipe,
        )
    except ValueError as error:
        raise OptionError(str(error)) from None
    _check_cost(config.synthesis)
    return config, _checkpoint(given.get("checkpoint"), settings)


def quantization_options(request: Mapping[str, Any], settings: Settings, own_name: str) -> dict[str, Any]:
    """What a request chooses, whole; `read_options` makes the same of these as of the request.

    Args:
        request, settings, own_name: as for `read_options`.

    Raises:
        OptionError: as `read_options`.
    """
    config, checkpoint = read_options(request, settings, own_name)
    given = _given(request, own_name, OPTIONS)
    return {
        "bits": config.bits,
        "policy": config.policy.value,
        "calibration": config.calibration.value,
        "iterations": config.synthesis.iterations,
        "images": config.images,
        "seed": config.seed,
        "checkpoint": checkpoint.name,
        # More than iterations and images hang on it.
        **({"preset": given["preset"]} if "preset" in given else {}),
    }


def finetuning_options(request: Mapping[str, Any], settings: Settings, own_name: str) -> dict[str, Any]:
    """The same for fine-tuning and `read_finetuning`."""
    start, config = read_finetuning(request, settings, own_name)
    return {
        "bits": start.bits,
        "sampling": config.sampling.value,
        "max_epochs": config.max_epochs,
        "seed": config.seed,
    }


def finetuning_defaults(settings: Settings) -> dict[str, Any]:
    """The options of fine-tuning as a viewer shows them."""
    return {
        "bits": _first(str(_finetuned_bits(settings)), ["4", "8"]),
        "sampling": [sampling.value for sampling in Sampling],
        "max_epochs": FinetuneConfig.max_epochs,
        "seed": FinetuneConfig.seed,
    }


def read_finetuning(
    request: Mapping[str, Any], settings: Settings, own_name: str
) -> tuple[QuantizationConfig, FinetuneConfig]:
    """How a request asks to fine-tune, and the artifact, by its configuration, that it starts from.

    Args:
        request, settings, own_name: as for `read_options`.

    Raises:
        OptionError: for unknown options and for values that do not fit.
    """
    given = _given(request, own_name, FINETUNING_OPTIONS)
    base = settings.quantization
    bits = _whole(given, "bits", _finetuned_bits(settings))
    if bits not in (4, 8):
        raise OptionError(f"bits must be 4 or 8, not {bits}")
    samplings = [sampling.value for sampling in Sampling]
    try:
        config = FinetuneConfig(
            sampling=Sampling(_choice(given, "sampling", samplings, FinetuneConfig.sampling.value)),
            max_epochs=_whole(given, "max_epochs", FinetuneConfig.max_epochs),
            seed=_whole(given, "seed", FinetuneConfig.seed),
        )
    except ValueError as error:
        raise OptionError(str(error)) from None
    return replace(base, bits=bits), config


MAX_ITERATIONS = 100_000


def _check_cost(synthesis: SynthesisConfig) -> None:
    if synthesis.iterations > MAX_ITERATIONS:
        raise OptionError(f"iterations must be 1 to {MAX_ITERATIONS}, not {synthesis.iterations}")


def _checkpoint(name: Any, settings: Settings) -> Path:
    """The server's own checkpoint, or a file in the model folder: a client cannot name any other path."""
    if name in (None, "", settings.checkpoint.name):
        return settings.checkpoint
    if not isinstance(name, str) or name in (".", "..") or Path(name).name != name or "\\" in name:
        raise OptionError("checkpoint must be the name of a file in the model folder, without a path")
    path = settings.model_dir / name
    if not path.is_file():
        raise OptionError(f"there is no checkpoint '{name}' in the server's model folder")
    try:
        check_checkpoint(path)
    except CheckpointError as error:
        raise OptionError(f"checkpoint: {error}") from None
    return path


def _finetuned_bits(settings: Settings) -> int:
    """The server's own where fine-tuning takes these, the next more otherwise."""
    return 4 if settings.quantization.bits == 4 else 8


def _given(request: Mapping[str, Any], own_name: str, known: Sequence[str]) -> dict[str, Any]:
    """A request's options by name, without what clients add.

    Raises:
        OptionError: when one is not known.
    """
    nested = request.get(own_name)
    merged = {**request, **nested} if isinstance(nested, Mapping) else dict(request)
    given = {k: _plain(v) for k, v in merged.items() if k not in _ADDED_BY_CLIENTS and k != own_name}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise OptionError(f"unknown option {', '.join(unknown)}; known are: {', '.join(known)}")
    return given


def _plain(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _choice(given: Mapping[str, Any], key: str, choices: list[str], default: str) -> str:
    value = given.get(key, default)
    if value not in choices:
        raise OptionError(f"{key} must be one of {', '.join(choices)}, not {value!r}")
    return str(value)


def _whole(given: Mapping[str, Any], key: str, default: int) -> int:
    value = given.get(key, default)
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"{key} must be a whole number, not {value!r}")
    return value


def _first(chosen: str, choices: list[str]) -> list[str]:
    return [chosen, *(choice for choice in choices if choice != chosen)]
