"""The files of a run's folder, by which the process that prepares and those that measure meet."""

from __future__ import annotations

from pathlib import Path

FLOAT_WEIGHTS = "encoder.safetensors"
"""The encoder's state dict, float32, batch norms folded."""

DECODER_WEIGHTS = "decoder.safetensors"
"""The same of `prompt_encoder.` and `mask_decoder.`."""

IMAGES = "images.npy"
"""[N, 3, S, S] float32, normalised phantoms."""

BOXES = "boxes.npy"
"""[N, 5] float64: slice k and the box (x0, y0, x1, y1) on it, in pixels."""


def artifact_path(folder: Path, bits: int) -> Path:
    """The whole model quantized, Linears at so many bits."""
    return folder / f"artifact-w{bits}a{bits}.safetensors"
