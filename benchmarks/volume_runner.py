"""One engine in its own process: a volume from slices and boxes to masks, each stage of each slice timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from monailabel_dfqsam.benchmark.layout import BOXES, DECODER_WEIGHTS, artifact_path
from monailabel_dfqsam.benchmark.plan import ENGINES, OPENVINO_INT8, Family
from monailabel_dfqsam.benchmark.runner import WARM_UPS, Request, load_engine, without_our_settings
from monailabel_dfqsam.machine import own_memory

STAGES = ("preprocess", "encoder", "decoder", "upsample")

# segment-anything adds this to prompts, to reach pixels' middles; boxes here count from pixels' edges.
_PIXEL_CENTRE = 0.5

Decode = Callable[[Any, Any], Any]
"""Embedding [1, C, G, G] and box [4] in pixels of the model's input, counted from their edges, both float32
tensors, to the logits [1, 1, M, M] of the one mask that the product takes."""


class VolumeRunner:
    """An engine, loaded and warm, and the volume that it segments.

    Pixels to model input and masks to pixels are the product's for all engines. So are OpenMP's waits, but
    for plain torch, which runs as it comes: OpenVINO's threads would wait beside torch's.

    Raises:
        ValueError: when it cannot run here.
        ImportError: when its library is not installed.
    """

    def __init__(self, request: Request, volume: Path) -> None:
        engine = ENGINES[request.engine]
        if engine.family is Family.TORCH:
            without_our_settings()
        import torch

        from monailabel_dfqsam.sam.variants import VARIANTS
        from monailabel_dfqsam.segmentation.volume import load_volume

        torch.set_num_threads(request.threads)
        self._variant = VARIANTS[request.variant]
        self._volume = load_volume(volume)
        boxes = np.load(request.folder / BOXES)
        self._slices = [(int(k), box) for k, *box in boxes.tolist()]
        self._imported_bytes = own_memory("VmRSS")
        begin = time.perf_counter()
        loaded = load_engine(request)
        self._dtype, self._facts = loaded.dtype or engine.dtype, loaded.facts
        self._encode = loaded.encode
        if engine.family is Family.OPENVINO:
            self._encode = lambda x: torch.from_numpy(loaded.encode(x.numpy()))
        self._decode = _decoder(request)
        with torch.inference_mode():
            for _ in range(WARM_UPS):
                self._segment(*self._slices[0])
        self._load_seconds = time.perf_counter() - begin
        self._masks: list[Any] = []

    def turn(self) -> dict[str, float]:
        """Seconds of the whole volume, and of each of `STAGES`, which make it up."""
        import torch

        begin = time.perf_counter()
        with torch.inference_mode():
            answers = [self._segment(k, box) for k, box in self._slices]
        seconds = time.perf_counter() - begin
        self._masks = [mask for mask, _ in answers]
        spent = np.sum([laps for _, laps in answers], axis=0).tolist()
        return {"volume": seconds, **dict(zip(STAGES, spent, strict=True))}

    def masks(self) -> bytes:
        """Those of the last turn, [N, I, J] a bit each."""
        return np.packbits(np.stack(self._masks)).tobytes()

    def facts(self) -> dict[str, Any]:
        """As `EngineRunner.facts`; `imported_bytes` holds the volume too."""
        return {
            "dtype": self._dtype,
            "peak_bytes": own_memory("VmHWM"),
            "imported_bytes": self._imported_bytes,
            "load_s": self._load_seconds,
            **self._facts,
        }

    def _segment(self, k: int, box: list[float]) -> tuple[Any, list[float]]:
        """The mask [I, J] bool of a slice, and the seconds of each stage."""
        import torch

        from monailabel_dfqsam.sam.preprocess import to_image, to_input
        from monailabel_dfqsam.segmentation.volume import slice_rgb

        times = [time.perf_counter()]
        x, frame = to_input(self._variant, slice_rgb(self._volume, k), transposed=True)
        times.append(time.perf_counter())
        embedding = self._encode(x)
        times.append(time.perf_counter())
        logits = self._decode(embedding, torch.from_numpy(frame.places(np.array(box))).float().flatten())
        times.append(time.perf_counter())
        mask = (to_image(logits, frame)[0, 0] > 0).numpy()
        times.append(time.perf_counter())
        return mask, np.diff(times).tolist()


def _decoder(request: Request) -> Decode:
    """The artifact's decoder for engines of ours, else the one in full precision; in torch or in OpenVINO."""
    from safetensors.torch import load_file

    from monailabel_dfqsam.artifact import read_artifact
    from monailabel_dfqsam.sam.model import build_decoder
    from monailabel_dfqsam.sam.variants import VARIANTS
    from monailabel_dfqsam.segmentation.segmenter import load_decoder

    engine, variant = ENGINES[request.engine], VARIANTS[request.variant]
    if engine.family is Family.OURS:
        modules = load_decoder(read_artifact(artifact_path(request.folder, engine.bits)))
    else:
        modules = build_decoder(variant)
        state = load_file(request.folder / DECODER_WEIGHTS)
        for prefix, module in zip(("prompt_encoder.", "mask_decoder."), modules, strict=True):
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            module.load_state_dict(own)
            module.eval().requires_grad_(False)
    if "openvino" in request.engine:
        return _on_openvino(modules, variant, request)
    return _on_torch(modules, variant)


def _on_torch(modules: tuple[Any, Any], variant: Any) -> Decode:
    """As `Segmenter` decodes."""
    import torch

    from monailabel_dfqsam.segmentation.mask_decoding import OneMaskDecoder, channels_last

    prompt_encoder, mask_decoder = modules
    with torch.inference_mode():
        one_mask = OneMaskDecoder(mask_decoder, prompt_encoder.get_dense_pe(), variant.input_size)

    def decode(embedding: Any, box: Any) -> Any:
        sparse, dense = prompt_encoder(None, box[None] - _PIXEL_CENTRE, None)
        by_box = box if variant.taught_here else None
        return one_mask(channels_last(embedding), sparse, dense, not variant.one_mask, by_box)[0]

    return decode


def _on_openvino(modules: tuple[Any, Any], variant: Any, request: Request) -> Decode:
    """As exported; in what OpenVINO chooses for its own int8, else in float32 as the product's."""
    import torch

    from monailabel_dfqsam.benchmark import openvino_peer as peer
    from monailabel_dfqsam.export.decoder import decoder_model

    labels = np.array([[2, 3]], dtype=np.float32)  # top left and bottom right of a box
    precision = None if request.engine == OPENVINO_INT8 else "f32"
    infer = peer.caller(peer.compiled(decoder_model(*modules, variant), request.threads, precision))

    def decode(embedding: Any, box: Any) -> Any:
        corners = (box - _PIXEL_CENTRE).view(1, 2, 2)
        outputs = infer([embedding.contiguous().numpy(), corners.numpy(), labels])
        best = int(outputs[2][0])
        return torch.from_numpy(outputs[0])[:, best : best + 1]

    return decode
