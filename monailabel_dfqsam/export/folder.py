"""What `dfqsam export` writes: two models of OpenVINO, and how pixels and prompts go into them.

    encoder.xml encoder.bin   images [B, 3, S, S] float32 → embedding [B, C, G, G]; B is open
    decoder.xml decoder.bin   embedding, points, labels → masks [1, 4, M, M], iou [1, 4]; see `decoder_model`
    model.json                `description`

The folder appears at once and whole, or not at all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from monailabel_dfqsam import __version__
from monailabel_dfqsam.artifact import Artifact
from monailabel_dfqsam.config import Progress, silent
from monailabel_dfqsam.engines.openvino import encoder_model
from monailabel_dfqsam.export.decoder import decoder_model
from monailabel_dfqsam.ops.openvino_library import openvino, why_unavailable
from monailabel_dfqsam.sam.preprocess import PIXEL_MEAN, PIXEL_STD
from monailabel_dfqsam.sam.variants import VARIANTS, Preprocessing, Variant
from monailabel_dfqsam.segmentation.segmenter import load_decoder

FORMAT = "dfqsam-openvino"
FORMAT_VERSION = 1
DESCRIPTION = "model.json"
FILES = ("encoder.xml", "encoder.bin", "decoder.xml", "decoder.bin", DESCRIPTION)

# The longest side to S, or both; whether the kernel widens where an image shrinks.
_RESIZING: dict[Preprocessing, dict[str, Any]] = {
    Preprocessing.SAM: {"keep_aspect": True, "kernel": "linear", "antialias": True},
    Preprocessing.SAM_MED2D: {"keep_aspect": False, "kernel": "nearest", "antialias": False},
    Preprocessing.MEDSAM: {"keep_aspect": False, "kernel": "cubic", "antialias": True},
    Preprocessing.TINY: {"keep_aspect": False, "kernel": "linear", "antialias": True},
    Preprocessing.LITE_MEDSAM: {"keep_aspect": True, "kernel": "area", "antialias": True},
    Preprocessing.EFFICIENT_SAM: {"keep_aspect": False, "kernel": "linear", "antialias": False},
}


def write_openvino(artifact: Artifact, folder: Path, progress: Progress = silent) -> None:
    """Writes an artifact's encoder and decoder for OpenVINO.

    Args:
        folder: to be made; one that holds an earlier export, or nothing, is replaced.

    Raises:
        ValueError: when openvino is missing, the artifact is of policy `paper` or does not fit its model, or
            the folder holds anything else.
        RuntimeError: when openvino is there but broken.
        OSError: when the folder cannot be written, or the disk is full; then there is nothing new.
    """
    reason = why_unavailable()
    if reason is not None:
        raise ValueError(reason)
    if folder.exists() and not _replaceable(folder):
        raise ValueError(f"'{folder}' holds something else than an earlier export: give a new folder")
    makers: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("encoder", lambda: encoder_model(artifact, portable=True)),
        ("decoder", lambda: decoder_model(*load_decoder(artifact), _variant(artifact))),
    )
    models = {}
    for done, (name, make) in enumerate(makers):
        progress("export", done, len(makers))
        models[name] = make()
    text = json.dumps(description(artifact), indent=2) + "\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        partial = Path(temporary) / "new"
        partial.mkdir()
        for name, model in models.items():
            _save(model, partial / f"{name}.xml")
        (partial / DESCRIPTION).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        partial.rename(folder)
    progress("export", len(makers), len(makers))


def description(artifact: Artifact) -> dict[str, Any]:
    """What a client has to know beside the models, as plain JSON values.

    `pixels` says how an image [H, W, 3] of 8 bit becomes `images`: it is resized to S×S, or with
    `keep_aspect` its longest side to S; then `values` are (x − mean) / std, or with 'min_max'
    (x − min) / (max − min) over the image, whose values the kernel 'cubic' must not exceed before, and which
    'area' rounds before; then zeros are added right and below up to S×S. A mask [M, M] goes back the same
    way: bilinear to S×S, cut to what the image took, bilinear to H×W, and is where it is above 0.
    """
    variant, header = _variant(artifact), artifact.header
    minimum = variant.preprocessing in (Preprocessing.MEDSAM, Preprocessing.LITE_MEDSAM)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "variant": variant.name,
        "artifact": header.get("key"),
        "quantization": artifact.label,
        "input_size": variant.input_size,
        "mask_side": variant.mask_side,
        "embedding": [1, variant.embed_channels, variant.grid, variant.grid],
        "pixels": {
            **_RESIZING[variant.preprocessing],
            "values": "min_max" if minimum else "mean_std",
            "mean": list(PIXEL_MEAN),
            "std": list(PIXEL_STD),
        },
        "versions": {
            "monailabel-dfqsam": __version__,
            "openvino": openvino().__version__,
            "torch": torch.__version__,
        },
    }


def _variant(artifact: Artifact) -> Variant:
    """Of an artifact that an encoder was made of, so that its variant is known."""
    return VARIANTS[artifact.header["variant"]]


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or (DESCRIPTION in names and names <= set(FILES))


def _save(model: Any, path: Path) -> None:
    ov = openvino()
    try:
        ov.save_model(model, path, compress_to_fp16=False)
        ov.Core().read_model(path)
    except RuntimeError as error:  # which does not say why
        raise OSError(f"'{path.name}' could not be written: is the disk full? ({error})") from None
