"""The model `dfqsam`: a click or a box on one slice to a mask on the whole image's grid.

One instance serves all of the server's threads. Volumes and embeddings are kept in two caches, each bounded
in bytes; one lock lets one embedding be computed at a time, since a device is no faster with two. Prompting
needs no lock. A request takes the model once and finishes on it.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from fastapi import HTTPException
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from numpy.typing import NDArray
from scipy import ndimage

from monailabel_dfqsam.segmentation.embeddings import EmbeddingCache
from monailabel_dfqsam.segmentation.prompts import read_prompts
from monailabel_dfqsam.segmentation.segmenter import Embedding
from monailabel_dfqsam.segmentation.slice_mask import write_slice_mask
from monailabel_dfqsam.segmentation.volume import (
    Volume,
    VolumeLoader,
    Window,
    file_key,
    slice_rgb,
)
from monailabel_dfqsam.server.models import Models, Served
from monailabel_dfqsam.server.neighbours import Neighbours
from monailabel_dfqsam.server.settings import Settings

logger = logging.getLogger(__name__)

FULL_RANGE = "full range"
WINDOWS: dict[str, Window | None] = {
    "auto": None,
    "ct soft tissue": Window(-160, 240),
    "ct lung": Window.of_level(-600, 1500),
    "ct bone": Window.of_level(400, 1800),
    "ct brain": Window.of_level(40, 80),
    FULL_RANGE: None,
}
"""Names that a viewer offers; 'auto' is the image's own window, 'full range' its least to greatest value."""

EXTENSIONS = (".nrrd", ".nii.gz", ".nii")
_PIXEL_TYPES = {
    "uint8": sitk.sitkUInt8, "int8": sitk.sitkInt8, "uint16": sitk.sitkUInt16, "int16": sitk.sitkInt16,
    "uint32": sitk.sitkUInt32, "int32": sitk.sitkInt32, "float32": sitk.sitkFloat32,
}  # fmt: skip


class SegmentTask(InferTask):  # type: ignore[misc]
    """MONAI Label's view of the model."""

    def __init__(self, models: Models, settings: Settings) -> None:
        windows = [*WINDOWS]
        if settings.window is not None:
            windows.sort(key=lambda name: name != settings.window)
        super().__init__(
            type=InferType.DEEPGROW,
            labels=[],
            dimension=2,
            description="Segment Anything by points and boxes on a slice",
            config={"multimask": True, "window": windows, "largest_component": False},
        )
        self._models = models
        self._label = settings.labels[0]
        self._volumes = VolumeLoader(settings.cache_mb << 20)
        self._embeddings = EmbeddingCache(settings.cache_mb << 20)
        self._one_embedding = threading.Lock()
        self._neighbours = Neighbours()

    def info(self) -> dict[str, Any]:
        """Upstream's entries, and under 'serving' which model answers."""
        stats = self._embeddings.stats
        cache = {"hits": stats.hits, "misses": stats.misses, "bytes": stats.bytes}
        return {**super().info(), "serving": self._models.describe(), "embedding_cache": cache}

    def is_valid(self) -> bool:
        """Always: until it is quantized, it answers in full precision."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Segments.

        Args:
            request: `image`, a path; the prompts of `read_prompts`; `label`, a name; the entries of
                `config()`; `result_extension`, `result_dtype`, `result_compress`.

        Returns:
            The path of a mask file, the caller's to remove, [I, J, K] with 1 in the object, which lies in
            one slice, and 0 elsewhere; and what the viewer is told beside it.

        Raises:
            HTTPException: 400 for a request that cannot be answered, 503 when no model can be loaded.
        """
        with self._neighbours.busy():
            try:
                return self._answer(self._with_defaults(request))
            except ValueError as error:  # images, prompts and options all raise this, with a sentence
                raise HTTPException(400, str(error)) from None

    def _answer(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        clock = _Clock()
        multimask = _flag(request, "multimask")
        largest = _flag(request, "largest_component")
        label = request.get("label") or self._label
        if not isinstance(label, str):
            raise ValueError(f"label must be a name, not {label!r}")
        extension, pixel_type, compress = _result_format(request)
        served = self._served()
        path = Path(request["image"])
        volume = self._volumes.load(path)
        k, prompts = read_prompts(request, volume.shape)
        window = _window(request["window"], volume)
        clock.lap("load")
        hits = self._embeddings.stats.hits
        embedding = self._embed(served, path, volume, k, window)
        cached = self._embeddings.stats.hits > hits
        clock.lap("embed")
        prediction = served.segmenter.predict(embedding, prompts, multimask)
        clock.lap("decode")
        mask = _largest_component(prediction.mask) if largest else prediction.mask
        clock.lap("post")
        file = _write(mask, k, volume, extension, pixel_type, compress)
        clock.lap("write")
        self._prepare_neighbours(served, path, volume, k, window)
        return file, {
            "label_names": {label: 1},
            "model": served.segmenter.name,
            "engine": served.engine,
            "score": round(prediction.score, 4),
            "slice": k,
            "cached": cached,
            "latencies": clock.laps(),
        }

    def _served(self) -> Served:
        try:
            return self._models.current()
        except (ValueError, OSError) as error:
            raise HTTPException(503, f"no model can be loaded: {error}") from None

    def _embed(self, served: Served, path: Path, volume: Volume, k: int, window: Window | None) -> Embedding:
        def compute() -> Embedding:
            with self._one_embedding:
                return served.segmenter.embed(slice_rgb(volume, k, window))

        return self._embeddings.get_or_compute((file_key(path), k, window, served.identity), compute)

    def _prepare_neighbours(
        self, served: Served, path: Path, volume: Volume, k: int, window: Window | None
    ) -> None:
        near = [n for n in (k + 1, k - 1) if 0 <= n < volume.shape[2]]
        self._neighbours.next([lambda n=n: self._embed(served, path, volume, n, window) for n in near])  # type: ignore[misc]

    def _with_defaults(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request with the config entries it lacks; Slicer sends a choice as a list, chosen first."""
        merged = {**self._config, **request}
        for key in self._config:
            value = merged[key]
            merged[key] = value[0] if isinstance(value, list) and value else value
        return merged


class _Clock:
    """Seconds between laps, by name, and in total."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def laps(self) -> dict[str, float]:
        return {k: round(v, 6) for k, v in {**self._laps, "total": self._last - self._begin}.items()}


def _flag(request: Mapping[str, Any], key: str) -> bool:
    value = request[key]
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {value!r}")
    return value


def _window(name: Any, volume: Volume) -> Window | None:
    if not isinstance(name, str) or name not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}, not {name!r}")
    if name == FULL_RANGE and volume.array.ndim == 3:
        low, high = float(volume.array.min()), float(volume.array.max())
        return Window(low, high if high > low else low + 1)
    return WINDOWS[name]


def _result_format(request: Mapping[str, Any]) -> tuple[str, int, bool]:
    """File ending, ITK pixel type, and whether to compress: unless told not to, as OHIF does."""
    extension = request.get("result_extension") or EXTENSIONS[1]
    if extension not in EXTENSIONS:
        raise ValueError(f"result_extension must be one of {', '.join(EXTENSIONS)}, not {extension!r}")
    name = request.get("result_dtype") or "uint8"
    if not isinstance(name, str) or name not in _PIXEL_TYPES:
        raise ValueError(f"result_dtype must be one of {', '.join(_PIXEL_TYPES)}, not {name!r}")
    compress = request.get("result_compress")
    if compress in (None, ""):
        compress = True
    return extension, _PIXEL_TYPES[name], _flag({"result_compress": compress}, "result_compress")


def _largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[H, W] bool: of several touching-free parts, the largest."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    largest: NDArray[np.bool_] = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    return largest


def _write(
    mask: NDArray[np.bool_], k: int, volume: Volume, extension: str, pixel_type: int, compress: bool
) -> str:
    handle, file = tempfile.mkstemp(prefix="dfqsam-", suffix=extension)
    os.close(handle)
    try:
        write_slice_mask(mask.astype(np.uint8), k, volume, file, compress)
        if pixel_type != sitk.sitkUInt8:
            sitk.WriteImage(sitk.Cast(sitk.ReadImage(file), pixel_type), file, useCompression=compress)
    except BaseException:
        os.unlink(file)
        raise
    return file
