"""The models `dfqsam_3d` and `dfqsam_labels`: clicks on a few slices to objects through the whole volume."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferType
from numpy.typing import NDArray

from monailabel_dfqsam.segmentation.prompts import (
    PromptError,
    VolumePrompts,
    of_mask,
    points_at_nothing,
    read_volume_prompts,
)
from monailabel_dfqsam.segmentation.propagation import Propagation, propagate
from monailabel_dfqsam.segmentation.refine import fill_holes, largest_component
from monailabel_dfqsam.segmentation.segmenter import Embedding, Prediction, Prompts
from monailabel_dfqsam.server.answers.infer_task import InteractiveTask, inside
from monailabel_dfqsam.server.answers.request import (
    View,
    in_file_order,
    read_mask,
)
from monailabel_dfqsam.server.answers.workbench import Clock, Shown, Workbench, write_answer
from monailabel_dfqsam.server.settings import Settings

logger = logging.getLogger(__name__)

_LOG_SECONDS = 2.0


class VolumeTask(InteractiveTask):
    """One object by points and boxes on one or several slices, and by an existing mask."""

    def __init__(self, workbench: Workbench, settings: Settings) -> None:
        description = "Segment Anything by points and boxes on some slices, through the volume"
        super().__init__(workbench, settings, InferType.DEEPGROW, 3, description)

    def answer(self, request: Mapping[str, Any], view: View) -> tuple[str, dict[str, Any]]:
        """Prompts as `read_volume_prompts` takes them; of a mask alone, its largest slice."""
        run = _Run(self.workbench, request, view, self.shown)
        prompts = _prompts(run.request, run.shown)
        run.clock.lap("load")
        found = run.propagate(prompts)
        mask = run.refined(found, prompts)
        return run.reply(mask.view(np.uint8), {view.label or self.settings.labels[0]: 1}, [found])


class LabelsTask(InteractiveTask):
    """Several objects at once, each by points under its label's name, as viewers prompt DeepEdit models.

    A point in one object is outside the others. Voxels carry the label's place in the server's list, from 1.
    """

    def __init__(self, workbench: Workbench, settings: Settings) -> None:
        description = "Segment Anything by points for several labels at once, through the volume"
        super().__init__(workbench, settings, InferType.DEEPEDIT, 3, description, settings.labels)

    def answer(self, request: Mapping[str, Any], view: View) -> tuple[str, dict[str, Any]]:
        """Prompts: {label: [[i, j, k], …]}, and `background`."""
        given = {name: _points(request[name], name) for name in self.settings.labels if request.get(name)}
        if not given:
            raise PromptError(
                f"there is nothing to segment: give points under a label, {', '.join(self.settings.labels)}"
            )
        run = _Run(self.workbench, request, view, self.shown, self.settings.labels)
        given = {name: run.request[name] for name in given}
        prompts = {}
        for name, points in given.items():
            outside = [point for other in given if other != name for point in given[other]]
            outside += _points(run.request.get("background") or [], "background")
            objects = {"foreground": points, "background": outside}
            prompts[name] = read_volume_prompts(objects, run.shown.volume.shape)
        run.clock.lap("load")
        found = {name: run.propagate(prompts[name]) for name in given}
        values = {name: 1 + self.settings.labels.index(name) for name in given}
        masks = {values[name]: run.refined(found[name], prompts[name]) for name in given}
        merged = merge(masks, {values[name]: found[name].scores for name in given})
        present = {name: value for name, value in values.items() if (merged == value).any()}
        return run.reply(merged, present, list(found.values()))


def merge(
    masks: Mapping[int, NDArray[np.bool_]], scores: Mapping[int, NDArray[np.float64]]
) -> NDArray[np.uint8]:
    """Objects in one label map; where two claim a voxel, the one that the model is surer of on that slice.

    Args:
        masks: value, 1 … 255 -> [I, J, K] bool, all of one shape.
        scores: value -> [K] float, NaN where the object is not.

    Returns:
        [I, J, K] uint8.
    """
    merged = np.zeros(next(iter(masks.values())).shape, dtype=np.uint8, order="F")
    for k in range(merged.shape[2]):
        here = [value for value in masks if masks[value][:, :, k].any()]
        for value in sorted(here, key=lambda value: (scores[value][k], -value)):
            merged[:, :, k][masks[value][:, :, k]] = value
    return merged


class _Run:
    """One request on its way from prompts to the reply."""

    def __init__(
        self,
        workbench: Workbench,
        request: Mapping[str, Any],
        view: View,
        show: Callable[[Mapping[str, Any], View], Shown],
        labels: Sequence[str] = (),
    ) -> None:
        self.clock = Clock()
        self._workbench, self._view = workbench, view
        self.shown = show(request, view)
        self.request, self._viewers_number = in_file_order(request, view.slices, self.shown.volume, labels)

    def propagate(self, prompts: VolumePrompts) -> Propagation:
        """One object through the volume, with its progress in the log."""
        found = propagate(
            self._embed,
            self._predict,
            self.shown.volume,
            prompts.by_slice,
            window=self.shown.window,
            roi=prompts.bounds,
            progress=_logged(),
        )
        self.clock.lap("decode")
        return found

    def refined(self, found: Propagation, prompts: VolumePrompts) -> NDArray[np.bool_]:
        """The mask, cleaned up as the request asks for."""
        mask = found.mask
        if self._view.largest_cc:
            mask = largest_component(mask, _inside(prompts, mask.shape))
        if self._view.fill_holes:
            mask = fill_holes(mask)
        self.clock.lap("post")
        return mask

    def reply(
        self, mask: NDArray[np.uint8], names: Mapping[str, int], found: Sequence[Propagation]
    ) -> tuple[str, dict[str, Any]]:
        """The mask's file and what is told beside it."""
        held = [int(k) for k in np.flatnonzero(mask.any(axis=(0, 1)))]
        # One slice alone is written faster, and is large where it is all there is.
        part, k = (mask[:, :, held[0]], held[0]) if len(held) == 1 else (mask, None)
        file = write_answer(part, k, self.shown.volume, self._view)
        self.clock.lap("write")
        served = self.shown.served
        slices = sorted(map(self._viewers_number, held))
        scores = np.concatenate([one.scores[~np.isnan(one.scores)] for one in found])
        return file, {
            "label_names": dict(names),
            "model": served.segmenter.name,
            "engine": served.engine,
            "artifact": served.identity,
            "score": round(float(scores.mean()), 4),
            "slices": [slices[0], slices[-1]] if slices else [],
            "stops": [
                {
                    "from": self._viewers_number(front.source),
                    "to": self._viewers_number(front.last),
                    "because": front.stop.value,
                }
                for one in found
                for front in one.fronts
            ],
            "latencies": self.clock.laps(),
        }

    def _embed(self, slices: Sequence[int]) -> Sequence[Embedding]:
        self.clock.lap("decode")
        embeddings = self._workbench.embed_slices(self.shown, slices)
        self.clock.lap("embed")
        return embeddings

    def _predict(self, embedding: Embedding, prompts: Prompts) -> Prediction:
        return self.shown.served.segmenter.predict(embedding, prompts, self._view.multimask)


def _prompts(request: Mapping[str, Any], shown: Shown) -> VolumePrompts:
    mask = read_mask(request, shown.volume)
    if mask is not None and points_at_nothing(request):
        k, prompts = of_mask(mask, request.get("slice"))
        return VolumePrompts({k: prompts}, None)
    return read_volume_prompts(request, shown.volume.shape)


def _points(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise PromptError(f"'{name}' must be a list of points [i, j, k], not {value!r}")
    return value


def _inside(prompts: VolumePrompts, shape: tuple[int, ...]) -> list[list[int]]:
    """Voxels [i, j, k] of the foreground points."""
    return [[*place, k] for k, given in prompts.by_slice.items() for place in inside(given, shape)]


def _logged() -> Callable[[int, int], None]:
    """A progress callback that logs a line now and then; a short run logs none."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _LOG_SECONDS:
            last = time.monotonic()
            logger.info("Propagation: %d of %d slices settled", done, total)

    return progress
