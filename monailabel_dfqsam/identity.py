"""What names an artifact: 16 hexadecimal digits of all that its content depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from monailabel_dfqsam.config import FinetuneConfig, QuantizationConfig

ALGORITHM = 3
"""Number of the quantization algorithm.

Raise it with every change after which the same checkpoint and configuration make other tensors: of synthesis,
its auxiliary network, calibration, reparameterization, rounding or packing. Servers then quantize again at
their next start; artifacts made before stay on disk and may still be chosen.
"""

FINETUNING_ALGORITHM = 1
"""The same for fine-tuning; a new `ALGORITHM` counts for it as well."""

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def artifact_key(config: QuantizationConfig, checkpoint_sha256: str, variant: str) -> str:
    """Names the artifact that a configuration makes of a checkpoint.

    Args:
        checkpoint_sha256: of the file's bytes.
        variant: the name of the model that the file is read as.

    Raises:
        ValueError: when the configuration's folder holds too few pictures.
    """
    choices = {**asdict(config), "folder": None}
    if config.folder is not None:
        pictures = calibration_pictures(Path(config.folder), config.images)
        choices["folder"] = [content_sha256(path) for path in pictures]
    return _digits({"algorithm": ALGORITHM, "checkpoint": checkpoint_sha256, "variant": variant, **choices})


def finetuned_key(config: FinetuneConfig, start: str, labels: Iterable[str]) -> str:
    """Names the artifact that fine-tuning makes.

    Args:
        start: the key of the artifact to begin with.
        labels: a digest of each label map with its image.
    """
    algorithm = {"algorithm": FINETUNING_ALGORITHM, "start": start, "labels": sorted(labels)}
    return _digits({**algorithm, **asdict(config)})


def calibration_pictures(folder: Path, count: int) -> list[Path]:
    """The first `count` pictures of a folder in the order of names.

    Raises:
        ValueError: when there are fewer.
    """
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in _PICTURES)[:count]
    if len(paths) < count:
        raise ValueError(
            f"the calibration folder holds {len(paths)} pictures ({', '.join(_PICTURES)}), "
            f"but {count} are asked for"
        )
    return paths


def content_sha256(path: Path) -> str:
    """Hex digest of a file's bytes, or of a folder's files in the order of names."""
    digest = hashlib.sha256()
    for one in sorted(path.iterdir()) if path.is_dir() else [path]:
        with one.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _digits(values: dict[str, object]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
