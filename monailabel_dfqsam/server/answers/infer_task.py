"""The model `dfqsam`: a click or a box on one slice to a mask on the whole image's grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import HTTPException
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from numpy.typing import NDArray

from monailabel_dfqsam.memory import shortage_told
from monailabel_dfqsam.sam.preprocess import to_low_res
from monailabel_dfqsam.segmentation.prompts import of_mask, points_at_nothing, read_prompts
from monailabel_dfqsam.segmentation.refine import fill_holes, largest_component
from monailabel_dfqsam.segmentation.segmenter import Prompts
from monailabel_dfqsam.segmentation.volume import VolumeTooLarge
from monailabel_dfqsam.server.answers.request import (
    FILE_NAME,
    FILE_ORDER,
    SLICER_ORDER,
    WINDOWS,
    View,
    in_file_order,
    read_mask,
    read_window,
)
from monailabel_dfqsam.server.answers.workbench import Clock, Shown, Workbench, write_answer
from monailabel_dfqsam.server.gate.options import read
from monailabel_dfqsam.server.settings import Settings


class InteractiveTask(InferTask):  # type: ignore[misc]
    """What the server's models have in common: their options, and errors as answers with a sentence."""

    def __init__(
        self,
        workbench: Workbench,
        settings: Settings,
        kind: InferType,
        dimension: int,
        description: str,
        labels: tuple[str, ...] = (),
    ) -> None:
        windows = [*WINDOWS]
        if settings.window is not None:
            windows.sort(key=lambda name: name != settings.window)
        config = {
            "multimask": True, "window": windows, "largest_cc": False, "fill_holes": False,
            "slices": [SLICER_ORDER, FILE_ORDER],
        }  # fmt: skip
        super().__init__(kind, list(labels), dimension, description, config)
        self.workbench = workbench
        self.settings = settings

    def info(self) -> dict[str, Any]:
        """Upstream's entries, and under 'serving' which model answers."""
        stats = self.workbench.cache_stats
        cache = {"hits": stats.hits, "misses": stats.misses, "bytes": stats.bytes}
        return {**super().info(), "serving": self.workbench.models.describe(), "embedding_cache": cache}

    def is_valid(self) -> bool:
        """Always: until it is quantized, it answers in full precision."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Segments.

        Args:
            request: `image`, a path; prompts, and `mask`, the path of an existing one; `label`, a name; the
                entries of `config()`, and `window_center` with `window_width` instead of `window`;
                `result_extension`, `result_dtype`, `result_compress`.

        Returns:
            The path of a mask file, the caller's to remove, on the image's grid; and what the viewer is told
            beside it.

        Raises:
            HTTPException: 400 for a request that cannot be answered, 413 for an image that does not fit in
                memory, 503 when no model can be loaded or its work does not fit.
        """
        with self.workbench.busy():
            try:
                with shortage_told("this request"):
                    return self.answer(request, self.view(request))
            except ValueError as error:  # images, prompts and options all raise this, with a sentence
                raise HTTPException(400, str(error)) from None
            except VolumeTooLarge as error:
                raise HTTPException(413, str(error)) from None
            except MemoryError as error:
                raise HTTPException(503, str(error)) from None

    def answer(self, request: Mapping[str, Any], view: View) -> tuple[str, dict[str, Any]]:
        """`__call__`, with errors as ValueError."""
        raise NotImplementedError

    def view(self, request: Mapping[str, Any]) -> View:
        """What the viewer wants; without a window, the one it is offered first. Raises OptionError."""
        return read(View, {"window": self._config["window"], **request})

    def shown(self, request: Mapping[str, Any], view: View) -> Shown:
        """The image that a request is about, and the model that answers."""
        served = self.workbench.served()
        volume = self.workbench.volume(Path(request["image"]), request.get(FILE_NAME))
        return Shown(served, volume, read_window(view, volume))


class SegmentTask(InteractiveTask):
    """One slice by points and boxes, and by an existing mask; prompts as `read_prompts` takes them."""

    def __init__(self, workbench: Workbench, settings: Settings) -> None:
        description = "Segment Anything by points and boxes on a slice"
        super().__init__(workbench, settings, InferType.DEEPGROW, 2, description)

    def answer(self, request: Mapping[str, Any], view: View) -> tuple[str, dict[str, Any]]:
        """The mask lies in one slice."""
        clock = Clock()
        shown = self.shown(request, view)
        request, viewers_number = in_file_order(request, view.slices, shown.volume)
        mask = read_mask(request, shown.volume)
        k, prompts = _prompts(request, shown.volume.shape, mask)
        clock.lap("load")
        embedding, cached = self.workbench.embed(shown, k)
        clock.lap("embed")
        if mask is not None and mask[:, :, k].any():
            prompts = replace(prompts, mask_logits=to_low_res(mask[:, :, k], embedding.frame))
        if _names_an_object(prompts):
            prediction = shown.served.segmenter.predict(embedding, prompts, view.multimask)
            plane, score = prediction.mask, prediction.score
        else:
            plane, score = np.zeros(shown.volume.shape[:2], dtype=bool), 0.0
        clock.lap("decode")
        if view.largest_cc:
            plane = largest_component(plane, inside(prompts, plane.shape))
        if view.fill_holes:
            plane = fill_holes(plane)
        clock.lap("post")
        file = write_answer(plane.astype(np.uint8), k, shown.volume, view)
        clock.lap("write")
        shown.served.speed.count(clock.laps(), cached)
        self.workbench.prepare(shown, (k + 1, k - 1))
        return file, {
            "label_names": {view.label or self.settings.labels[0]: 1},
            "model": shown.served.segmenter.name,
            "engine": shown.served.engine,
            "artifact": shown.served.identity,
            "score": round(score, 4),
            "slice": viewers_number(k),
            "cached": cached,
            "latencies": clock.laps(),
        }


def _prompts(
    request: Mapping[str, Any], shape: tuple[int, int, int], mask: NDArray[np.bool_] | None
) -> tuple[int, Prompts]:
    """The slice and what was pointed at in it; an existing mask alone will do."""
    if mask is not None and points_at_nothing(request):
        return of_mask(mask, request.get("slice"))
    return read_prompts(request, shape)


def _names_an_object(prompts: Prompts) -> bool:
    """Whether more is known than what the object is not; a model asked for that answers with the ground."""
    return prompts.box is not None or prompts.mask_logits is not None or bool(np.any(prompts.labels == 1))


def inside(prompts: Prompts, shape: tuple[int, ...]) -> list[list[int]]:
    """Array indices [i, j] of the foreground points; one on the far edge belongs to the last pixel."""
    points = np.asarray(prompts.points)[np.asarray(prompts.labels) == 1]
    return [[min(int(y), shape[0] - 1), min(int(x), shape[1] - 1)] for x, y in points]
