"""From a checkpoint to an artifact: synthesize, calibrate, pack, measure. Pure of servers and of globals.

Nothing here opens a datastore or a connection; images come out of the weights, or noise, or, for comparison
alone, out of a folder named by the caller.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from monailabel_dfqsam import __version__
from monailabel_dfqsam.agreement import Agreement, Fidelity
from monailabel_dfqsam.artifact import (
    FORMAT_VERSION,
    Artifact,
    Header,
    LayerEntry,
    encode_layer,
    stored,
)
from monailabel_dfqsam.config import Calibration, Progress, QuantizationConfig, SynthesisConfig, silent
from monailabel_dfqsam.engines import layer_by_layer, load_encoder
from monailabel_dfqsam.faithful import affordable, quantize_faithfully
from monailabel_dfqsam.fidelity import FidelityTest
from monailabel_dfqsam.identity import ALGORITHM, artifact_key, calibration_pictures
from monailabel_dfqsam.pretraining.drawings import drawing
from monailabel_dfqsam.pretraining.targets import make_example
from monailabel_dfqsam.quantization.calibrate import QuantizedEncoder, calibrate, quantizable
from monailabel_dfqsam.quantization.cost import encoder_cost
from monailabel_dfqsam.quantization.mixed import linear_form, quantize_mixed, uniform_forms
from monailabel_dfqsam.quantization.views import views
from monailabel_dfqsam.sam.checkpoint import Checkpoint
from monailabel_dfqsam.sam.encoder import ImageEncoder
from monailabel_dfqsam.sam.model import Sam, build
from monailabel_dfqsam.sam.preprocess import normalize, to_input
from monailabel_dfqsam.sam.variants import Variant
from monailabel_dfqsam.segmentation.segmenter import load_segmenter
from monailabel_dfqsam.synthesis.auxiliary import Auxiliary, embedded_auxiliary
from monailabel_dfqsam.synthesis.measures import Measures, measure
from monailabel_dfqsam.synthesis.patch_similarity import encoder_patch_entropies
from monailabel_dfqsam.synthesis.synthesize import Synthesis, synthesize, to_model

_UNKNOWN: Agreement = {"mean_iou": math.nan, "median_iou": math.nan}
PHANTOMS = 8
LEAST_DRAWN = 5  # one round of the kinds
# Far from the seeds of the phantoms that the embedded model was trained on.
PHANTOM_SEED = 1 << 40


@dataclass(frozen=True)
class QuantizationResult:
    """An artifact and what a report shows of its making.

    Attributes:
        synthesis: how the calibration images came to be, for `Calibration.SYNTHETIC`.
        calibration_images: [N, 3, S, S] float32, normalised; after those of the source, drawn pictures.
        sources: how many are of the source.
        layer_errors: relative error of each quantized layer's output within the quantized encoder.
        measures: what the model in full precision makes of the images, by kind: the calibration's, and noise
            beside them.
    """

    artifact: Artifact
    synthesis: Synthesis | None
    calibration_images: Tensor
    sources: int
    layer_errors: dict[str, float]
    measures: dict[str, Measures]


def quantize(
    checkpoint: Checkpoint,
    config: QuantizationConfig,
    *,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> QuantizationResult:
    """Quantizes a checkpoint's image encoder; the same arguments give the same artifact but for its times.

    Args:
        device: where images are synthesized, by default the CPU; calibration and packing run on the CPU.
        progress: called with (stage, done, total).

    Raises:
        ValueError: when the checkpoint does not fit its model, or a calibration folder holds no image.
    """
    started = time.monotonic()
    sam = build(checkpoint)
    images, synthesis = _images(sam, config, device or torch.device("cpu"), progress)
    count = affordable(config.recipe.drawn, min(LEAST_DRAWN, config.recipe.drawn), checkpoint.variant)
    drawn = drawn_images(checkpoint.variant, count, config.seed)
    seen = torch.cat([images, drawn])
    test = FidelityTest(sam, progress)

    def measured(quantized: QuantizedEncoder) -> tuple[Artifact, Fidelity]:
        artifact = pack(checkpoint, config, sam, quantized, seen)
        return artifact, _fidelity(test, artifact)

    # Where there are no masks to tell one form from another by, 8 bit is what does hardly any harm.
    possible = config if test.masks or config.fidelity is None else config.changed(bits=8)
    artifact, fidelity = _quantized(sam, images, drawn, possible, measured, progress)
    header: Header = {
        **artifact.header,
        "fidelity": fidelity,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 2),
    }
    kinds = {config.calibration.value: images, "drawn": drawn}
    kinds["gaussian"] = gaussian_images(checkpoint.variant, max(1, len(images)), config.seed)
    return QuantizationResult(
        artifact=replace(artifact, header=header),
        synthesis=synthesis,
        calibration_images=seen,
        sources=len(images),
        layer_errors=layer_errors(sam.image_encoder, artifact, (seen if len(seen) else test.images)[:1]),
        measures={
            kind: measure(sam, group, _auxiliary(sam.variant)) for kind, group in kinds.items() if len(group)
        },
    )


def _images(
    sam: Sam, config: QuantizationConfig, device: torch.device, progress: Progress
) -> tuple[Tensor, Synthesis | None]:
    """The images to calibrate on, [N, 3, S, S], and how they came to be if they were synthesized."""
    variant = sam.variant
    if config.calibration is Calibration.SYNTHETIC:
        ceiling = phantom_entropies(sam) if config.synthesis.bounded else None
        synthesis = _synthesize(sam, config.synthesis, config.images, config.seed, ceiling, device, progress)
        return synthesis.images, synthesis
    if config.calibration is Calibration.GAUSSIAN:
        return gaussian_images(variant, config.images, config.seed), None
    if config.calibration is Calibration.NONE:
        return torch.empty(0, 3, variant.input_size, variant.input_size), None
    assert config.folder is not None
    return folder_images(variant, Path(config.folder), config.images), None


def _quantized(
    sam: Sam,
    images: Tensor,
    drawn: Tensor,
    config: QuantizationConfig,
    measure: Callable[[QuantizedEncoder], tuple[Artifact, Fidelity]],
    progress: Progress,
) -> tuple[Artifact, Fidelity]:
    encoder, recipe = sam.image_encoder, config.recipe
    if not recipe.run_time:
        assert config.bits is not None
        return measure(calibrate(encoder, images, config.bits, config.policy, recipe, progress))
    images = torch.cat([views(images, recipe.views), drawn])
    if config.fidelity is not None:
        return quantize_faithfully(encoder, sam.variant, images, config.fidelity, measure, progress)
    assert config.bits is not None
    linear = linear_form(config.bits, config.activation_bits or config.bits)
    forms = uniform_forms(encoder, linear)
    return measure(quantize_mixed(encoder, images if recipe.compensate else images[:0], forms, progress))


def fidelity_measure(checkpoint: Checkpoint, progress: Progress = silent) -> Callable[[Artifact], Fidelity]:
    """What measures the fidelity of artifacts as `quantize` does, for those whose weights have changed since.

    Args:
        checkpoint: the model in full precision.
    """
    test = FidelityTest(build(checkpoint), progress)
    return lambda artifact: _fidelity(test, artifact, own_decoder=True)


def gaussian_images(variant: Variant, count: int, seed: int) -> Tensor:
    """[N, 3, S, S] standard normal noise in the model's normalised space, the paper's baseline."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, variant.input_size, variant.input_size, generator=generator)


def drawn_images(variant: Variant, count: int, seed: int) -> Tensor:
    """[N, 3, S, S] float32, normalised: phantoms, scattered shapes and clouds, preprocessed as images are."""
    drawn = [to_input(variant, drawing(index, seed))[0] for index in range(count)]
    return torch.cat(drawn) if drawn else torch.empty(0, 3, variant.input_size, variant.input_size)


def phantom_images(variant: Variant, seeds: Iterable[int]) -> Tensor:
    """[N, 3, S, S] float32, normalised: a drawn phantom for each seed."""
    drawn = [make_example(torch.Generator().manual_seed(s), variant.input_size).image for s in seeds]
    return to_model(variant, normalize(torch.stack(drawn) * 255))


def folder_images(variant: Variant, folder: Path, count: int) -> Tensor:
    """[N, 3, S, S] of the first `count` pictures of a folder in the order of names, normalised.

    Raises:
        ValueError: when there are fewer pictures than asked for.
    """
    paths = calibration_pictures(folder, count)
    return torch.cat([to_input(variant, np.array(Image.open(path).convert("RGB")))[0] for path in paths])


def layer_errors(float_encoder: ImageEncoder, artifact: Artifact, images: Tensor) -> dict[str, float]:
    """‖quantized − float‖ / ‖float‖ of each quantized layer's output, errors of earlier layers included."""
    names = list(quantizable(float_encoder))
    expected: dict[str, Tensor] = {}
    errors: dict[str, float] = {}

    def keep(name: str, output: Tensor) -> None:
        expected[name] = output.clone()

    def compare(name: str, output: Tensor) -> None:
        exact = expected.pop(name)
        errors[name] = float((output - exact).norm() / exact.norm().clamp_min(1e-12))

    _watch(float_encoder, names, images, keep)
    _watch(layer_by_layer(artifact), names, images, compare)
    return errors


def _fidelity(test: FidelityTest, artifact: Artifact, own_decoder: bool = False) -> Fidelity:
    encoder = load_encoder(artifact)
    decoder = load_segmenter(artifact, encoder.kind) if own_decoder else None
    return test.measure(encoder.embed, encoder.kind.value, decoder)


def _synthesize(
    sam: Sam,
    config: SynthesisConfig,
    count: int,
    seed: int,
    ceiling: Tensor | None,
    device: torch.device,
    progress: Progress,
) -> Synthesis:
    auxiliary = _auxiliary(sam.variant)
    if auxiliary is not None:
        auxiliary.to(device)
    sam.to(device)
    try:
        return synthesize(
            sam,
            config,
            images=count,
            seed=seed,
            auxiliary=auxiliary,
            ceiling=ceiling,
            progress=progress,
        )
    finally:
        sam.to("cpu")


def phantom_entropies(sam: Sam) -> Tensor:
    """What a model's blocks show of diversity where there are things to be seen: no data, only drawn shapes.

    Returns:
        [blocks] float32 on the CPU, patch-similarity entropies, means over the same few phantoms each time.
    """
    images = phantom_images(sam.variant, range(PHANTOM_SEED, PHANTOM_SEED + PHANTOMS))
    found = [encoder_patch_entropies(sam.image_encoder, image[None]) for image in images]
    return torch.cat(found).mean(0)


def _auxiliary(variant: Variant) -> Auxiliary | None:
    """The network that knows a model's classes: there is one for the embedded model alone."""
    return embedded_auxiliary() if variant.name == "tiny" else None


def pack(
    checkpoint: Checkpoint, config: QuantizationConfig, sam: Sam, quantized: QuantizedEncoder, images: Tensor
) -> Artifact:
    """A calibrated encoder and the model's other parts as an artifact, its fidelity not yet measured.

    Args:
        config: what `quantized` was made by.
        sam: of the checkpoint.
        images: [N, 3, S, S] float32, those calibrated on; their digests go into the header.
    """
    layers: dict[str, LayerEntry] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in quantized.layers.items():
        layers[name], parts = encode_layer(name, layer)
        tensors.update(parts)
    tensors.update({f"image_encoder.{key}": stored(value) for key, value in quantized.float_tensors.items()})
    tensors.update({f"image_encoder.{key}.ranges": value for key, value in quantized.attention.items()})
    encoder_bytes = _bytes(tensors)
    for prefix, module in (("prompt_encoder", sam.prompt_encoder), ("mask_decoder", sam.mask_decoder)):
        tensors.update({f"{prefix}.{key}": stored(value) for key, value in module.state_dict().items()})
    cost = encoder_cost(
        checkpoint.variant,
        {name: layer.form for name, layer in quantized.layers.items()},
        quantized.attention_bits,
    )
    encoder_float = {k: v for k, v in checkpoint.state_dict.items() if k.startswith("image_encoder.")}
    header: Header = {
        "format_version": FORMAT_VERSION,
        "variant": checkpoint.variant.name,
        "source_sha256": checkpoint.sha256,
        "source_name": checkpoint.path.name,
        "config": asdict(config),
        "preset": None if config.preset is None else config.preset.value,
        "key": artifact_key(config, checkpoint.sha256, checkpoint.variant.name),
        "algorithm": ALGORITHM,
        "seed": config.seed,
        "images_sha256": [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images],
        "layers": layers,
        "attention_bits": quantized.attention_bits,
        "sizes": {
            "checkpoint_bytes": _bytes(checkpoint.state_dict),
            "artifact_bytes": _bytes(tensors),
            "encoder_checkpoint_bytes": _bytes(encoder_float),
            "encoder_artifact_bytes": encoder_bytes,
        },
        "macs": cost.macs,
        "bops": cost.bops,
        "bops_float": cost.bops_float,
        "four_bit": cost.four_bit,
        "versions": {
            "monailabel-dfqsam": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "fidelity": {**_UNKNOWN, "n": 0, "engine": "", "grey_level": _UNKNOWN, "as_near": math.nan},
        "created": "",
        "seconds": 0.0,
    }
    return Artifact(header, tensors)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _watch(
    encoder: ImageEncoder, names: list[str], images: Tensor, see: Callable[[str, Tensor], None]
) -> None:
    """Runs the encoder; `see` gets the name and the output of each of the named layers, one after another."""
    handles = [
        encoder.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: see(name, output)
        )
        for name in names
    ]
    try:
        with torch.inference_mode():
            encoder(images)
    finally:
        for handle in handles:
            handle.remove()
