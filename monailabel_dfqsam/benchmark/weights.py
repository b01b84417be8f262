"""What all engines of one run share, written to a folder once: weights, images, and the artifact of ours."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from monailabel_dfqsam.artifact import write_artifact
from monailabel_dfqsam.benchmark.layout import DECODER_WEIGHTS, FLOAT_WEIGHTS, IMAGES, artifact_path
from monailabel_dfqsam.config import QuantizationConfig, silent
from monailabel_dfqsam.pipeline import pack
from monailabel_dfqsam.pretraining.phantoms import eight_bit, label_map, render
from monailabel_dfqsam.quantization.calibrate import calibrate
from monailabel_dfqsam.sam.checkpoint import Checkpoint, read_checkpoint
from monailabel_dfqsam.sam.model import Sam, build
from monailabel_dfqsam.sam.preprocess import to_input
from monailabel_dfqsam.sam.variants import VARIANTS, Variant

CALIBRATION_IMAGES = 4


class Preparation:
    """The model in full precision, and the files made of it.

    Files: `FLOAT_WEIGHTS`, `DECODER_WEIGHTS`, and `IMAGES`, at least `CALIBRATION_IMAGES` of them;
    `artifact_path` by each `write_artifact`.

    Raises:
        ValueError: when the checkpoint cannot be read or is of another model.
    """

    def __init__(
        self, folder: Path, variant: str, checkpoint: Path | None, images: int, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._folder = folder
        known = VARIANTS[variant]
        self._checkpoint = read_checkpoint(checkpoint, variant) if checkpoint else seeded_checkpoint(known)
        self._sam = build(self._checkpoint)
        self._images = phantoms(self._sam.variant, max(images, CALIBRATION_IMAGES))
        encoder = self._sam.image_encoder.state_dict()
        decoder = {k: v for k, v in self._sam.state_dict().items() if not k.startswith("image_encoder.")}
        for name, state in ((FLOAT_WEIGHTS, encoder), (DECODER_WEIGHTS, decoder)):
            save_file({k: v.contiguous() for k, v in state.items()}, folder / name)
        np.save(folder / IMAGES, self._images.numpy())

    def has_cuda(self) -> bool:
        """Whether torch finds an NVIDIA GPU."""
        return torch.cuda.is_available()

    def write_artifact(self, bits: int) -> dict[str, int]:
        """Quantizes by the paper's recipe, policy `deploy`; returns bytes of the encoder in both forms."""
        images = self._images[:CALIBRATION_IMAGES]
        config = QuantizationConfig(bits, images=len(images))
        quantized = calibrate(self._sam.image_encoder, images, bits, config.policy, config.recipe, silent)
        artifact = pack(self._checkpoint, config, self._sam, quantized, images)
        write_artifact(artifact, artifact_path(self._folder, bits))
        floats = self._sam.image_encoder.state_dict().values()
        return {
            "encoder_float_bytes": sum(t.numel() * t.element_size() for t in floats),
            "encoder_artifact_bytes": artifact.header["sizes"]["encoder_artifact_bytes"],
        }

    def write_openvino(self, integer: bool) -> None:
        """The encoder as OpenVINO's files, in float32 or quantized by NNCF."""
        from monailabel_dfqsam.benchmark.openvino_peer import write_float, write_int8

        if integer:
            write_int8(self._folder, self._images[:CALIBRATION_IMAGES].numpy())
        else:
            write_float(self._folder, self._sam.image_encoder, self._images[:1])


def seeded_checkpoint(variant: Variant) -> Checkpoint:
    """Weights that depend on their names alone: matrices 0.02·n, norms 1 + 0.1·n, biases 0.1·n, n normal.

    Variances are 1 + 0.1·|n|.
    """
    state = {}
    for name, value in Sam(variant).state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            state[name] = 1 + 0.1 * noise.abs()
        elif value.ndim != 1:
            state[name] = 0.02 * noise
        else:
            state[name] = 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    return Checkpoint(variant, state, "0" * 64, Path("by-seed"))


def phantoms(variant: Variant, count: int) -> Tensor:
    """[count, 3, S, S] float32: procedural phantoms, normalised as the variant wants, always the same."""
    inputs = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        inputs.append(to_input(variant, eight_bit(render(generator, label_map(generator))))[0])
    return torch.cat(inputs)
