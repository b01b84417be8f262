"""What all engines of one run share, written to a folder once: weights, images, and the artifact of ours."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from monailabel_dfqsam.artifact import FORMAT_VERSION, Artifact, encode_layer, stored, write_artifact
from monailabel_dfqsam.config import Policy, Recipe, silent
from monailabel_dfqsam.pretraining.phantoms import label_map, render
from monailabel_dfqsam.quantization.calibrate import calibrate
from monailabel_dfqsam.sam.checkpoint import read_checkpoint
from monailabel_dfqsam.sam.encoder import ImageEncoder
from monailabel_dfqsam.sam.model import build, build_encoder
from monailabel_dfqsam.sam.preprocess import to_input
from monailabel_dfqsam.sam.variants import VARIANTS, Variant

FLOAT_WEIGHTS = "encoder.safetensors"
ARTIFACT = "artifact.safetensors"
IMAGES = "images.npy"
CALIBRATION_IMAGES = 4
BITS = 4


class Preparation:
    """The encoder in full precision, and the files made of it.

    Files: `FLOAT_WEIGHTS`, the encoder's state dict, float32; `IMAGES`, [N, 3, S, S] float32, normalised
    phantoms, at least `CALIBRATION_IMAGES`; `ARTIFACT` when `write_artifact` is called, encoder alone.

    Raises:
        ValueError: when the checkpoint cannot be read or is of another model.
    """

    def __init__(
        self, folder: Path, variant: str, checkpoint: Path | None, images: int, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._folder = folder
        self._variant = VARIANTS[variant]
        self._encoder = _encoder(self._variant, checkpoint)
        self._images = phantoms(self._variant, max(images, CALIBRATION_IMAGES))
        save_file({k: v.contiguous() for k, v in self._encoder.state_dict().items()}, folder / FLOAT_WEIGHTS)
        np.save(folder / IMAGES, self._images.numpy())

    def has_cuda(self) -> bool:
        """Whether torch finds an NVIDIA GPU."""
        return torch.cuda.is_available()

    def write_artifact(self) -> dict[str, int]:
        """Quantizes to W4A4, policy `deploy`; returns bytes of the encoder in both forms."""
        images = self._images[:CALIBRATION_IMAGES]
        quantized = calibrate(self._encoder, images, BITS, Policy.DEPLOY, Recipe(), silent)
        layers, tensors = {}, {}
        for name, layer in quantized.layers.items():
            layers[name], parts = encode_layer(name, layer)
            tensors.update(parts)
        tensors.update({f"image_encoder.{k}": stored(v) for k, v in quantized.float_tensors.items()})
        header = {
            "format_version": FORMAT_VERSION,
            "variant": self._variant.name,
            "layers": layers,
            "attention_bits": quantized.attention_bits,
            "config": {"bits": BITS, "policy": Policy.DEPLOY.value},
        }
        write_artifact(Artifact(header, tensors), self._folder / ARTIFACT)
        return {
            "encoder_float_bytes": _bytes(self._encoder.state_dict()),
            "encoder_artifact_bytes": _bytes(tensors),
        }

    def write_openvino(self, integer: bool) -> None:
        """The encoder as OpenVINO's files, in float32 or quantized by NNCF."""
        from monailabel_dfqsam.benchmark.openvino_peer import write_float, write_int8

        if integer:
            write_int8(self._folder, self._images[:CALIBRATION_IMAGES].numpy())
        else:
            write_float(self._folder, self._encoder, self._images[:1])


def seeded_state(encoder: ImageEncoder) -> dict[str, Tensor]:
    """Weights that depend on their names alone: matrices 0.02·n, norms 1 + 0.1·n, biases 0.1·n, n normal.

    Variances are 1 + 0.1·|n|.
    """
    state = {}
    for name, value in encoder.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            state[name] = 1 + 0.1 * noise.abs()
        elif value.ndim != 1:
            state[name] = 0.02 * noise
        else:
            state[name] = 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    return state


def phantoms(variant: Variant, count: int) -> Tensor:
    """[count, 3, S, S] float32: procedural phantoms, normalised as the variant wants, always the same."""
    inputs = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        image = render(generator, label_map(generator))
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        inputs.append(to_input(variant, pixels)[0])
    return torch.cat(inputs)


def _encoder(variant: Variant, checkpoint: Path | None) -> ImageEncoder:
    if checkpoint is not None:
        return build(read_checkpoint(checkpoint, variant.name)).image_encoder
    encoder = build_encoder(variant)
    encoder.load_state_dict(seeded_state(encoder))
    encoder.fold()
    return encoder.eval().requires_grad_(False)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
