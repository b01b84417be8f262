"""The options of `POST /train/…`, from a viewer's JSON to checked configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from monailabel_dfqsam.config import (
    AUTO,
    Calibration,
    FinetuneConfig,
    Policy,
    QuantizationConfig,
    Sampling,
)
from monailabel_dfqsam.sam.checkpoint import CheckpointError, check_checkpoint
from monailabel_dfqsam.server.gate.options import OptionError, Options, Read, Whole, between, read
from monailabel_dfqsam.server.settings import Bits, QuantizingOptions, Settings

# What MONAI Label, Slicer and OHIF add to every request; none of it concerns a trainer.
_ADDED_BY_CLIENTS = frozenset({"model", "client_id", "device", "gpus", "multi_gpu", "local_rank", "name"})


class _Quantize(QuantizingOptions):
    policy: Policy | None = None
    # Images of a folder are not among them: a request names no path.
    calibration: Annotated[Literal["synthetic", "gaussian", "none"], AfterValidator(Calibration)] | None = (
        None
    )
    seed: Whole | None = None
    checkpoint: str | None = None


class _Finetune(Options):
    bits: Bits | None = None
    sampling: Sampling = Sampling.BALANCED
    max_epochs: Annotated[Whole, between(1, 1000)] = FinetuneConfig.max_epochs
    seed: Annotated[Whole, between(0, 2**63 - 1)] = FinetuneConfig.seed


def defaults(settings: Settings) -> dict[str, Any]:
    """The options as a viewer shows them: a list is a choice whose first item is taken."""
    config = settings.quantization
    return {
        "bits": _first(str(config.bits or AUTO), [AUTO, "4", "6", "8"]),
        "fidelity": str(config.fidelity or AUTO),
        "policy": [policy.value for policy in Policy],
        "calibration": [kind.value for kind in Calibration if kind is not Calibration.FOLDER],
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
    return _chosen(_read(_Quantize, request, own_name), settings)


def quantization_options(request: Mapping[str, Any], settings: Settings, own_name: str) -> dict[str, Any]:
    """What a request chooses, whole; `read_options` makes the same of these as of the request.

    Args:
        request, settings, own_name: as for `read_options`.

    Raises:
        OptionError: as `read_options`.
    """
    given = _read(_Quantize, request, own_name)
    config, checkpoint = _chosen(given, settings)
    return {
        "bits": config.bits or AUTO,
        "fidelity": config.fidelity or AUTO,
        "policy": config.policy.value,
        "calibration": config.calibration.value,
        "iterations": config.synthesis.iterations,
        "images": config.images,
        "seed": config.seed,
        "checkpoint": checkpoint.name,
        # More than iterations and images hang on it.
        **({"preset": given.preset.value} if given.preset else {}),
    }


def finetuning_options(request: Mapping[str, Any], settings: Settings, own_name: str) -> dict[str, Any]:
    """The same for fine-tuning and `read_finetuning`."""
    start, config = read_finetuning(request, settings, own_name)
    return {
        "bits": start.bits or AUTO,
        "sampling": config.sampling.value,
        "max_epochs": config.max_epochs,
        "seed": config.seed,
    }


def finetuning_defaults(settings: Settings) -> dict[str, Any]:
    """The options of fine-tuning as a viewer shows them."""
    return {
        "bits": _first(str(_finetuned_bits(settings)), [AUTO, "4", "8"]),
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
    given = _read(_Finetune, request, own_name)
    bits = _finetuned_bits(settings) if given.bits is None else given.bits
    if bits not in (AUTO, 4, 8):
        raise OptionError(f"bits must be auto, 4 or 8, not {bits}")
    try:
        start = settings.quantization.changed(bits=bits)
    except ValueError as error:  # the server's own way of quantizing has none to choose
        raise OptionError(str(error)) from None
    return start, FinetuneConfig(sampling=given.sampling, max_epochs=given.max_epochs, seed=given.seed)


def _chosen(given: _Quantize, settings: Settings) -> tuple[QuantizationConfig, Path]:
    return given.changed(settings.quantization), _checkpoint(given.checkpoint, settings)


def _checkpoint(name: str | None, settings: Settings) -> Path:
    """The server's own checkpoint, or a file in the model folder: a client cannot name any other path."""
    if name in (None, settings.checkpoint.name):
        return settings.checkpoint
    if name in (".", "..") or Path(name).name != name or "\\" in name:
        raise OptionError("checkpoint must be the name of a file in the model folder, without a path")
    path = settings.model_dir / name
    if not path.is_file():
        raise OptionError(f"there is no checkpoint '{name}' in the server's model folder")
    try:
        check_checkpoint(path)
    except CheckpointError as error:
        raise OptionError(f"checkpoint: {error}") from None
    return path


def _finetuned_bits(settings: Settings) -> int | str:
    """The server's own where fine-tuning takes these, the next more otherwise."""
    own = settings.quantization.bits
    return AUTO if own is None else 4 if own == 4 else 8


def _read(model: type[Read], request: Mapping[str, Any], own_name: str) -> Read:
    nested = request.get(own_name)
    merged = {**request, **nested} if isinstance(nested, Mapping) else request
    return read(model, {k: v for k, v in merged.items() if k not in _ADDED_BY_CLIENTS and k != own_name})


def _first(chosen: str, choices: list[str]) -> list[str]:
    return [chosen, *(choice for choice in choices if choice != chosen)]
