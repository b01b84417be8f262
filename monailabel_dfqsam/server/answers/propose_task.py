"""The model `dfqsam_propose`: objects of one slice without any prompt, and the same for many images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from monailabel.interfaces.tasks.batch_infer import BatchInferTask, run_infer_task
from monailabel.interfaces.tasks.infer_v2 import InferType
from pydantic import AfterValidator

from monailabel_dfqsam.segmentation.proposals import Proposals, propose
from monailabel_dfqsam.segmentation.volume import slice_rgb
from monailabel_dfqsam.server.answers.infer_task import InteractiveTask
from monailabel_dfqsam.server.answers.request import WINDOWS, View
from monailabel_dfqsam.server.answers.workbench import Clock, Shown, Workbench, write_answer
from monailabel_dfqsam.server.gate.guard import Refusal, check_tag
from monailabel_dfqsam.server.gate.options import OptionError, Options, Whole, between, read
from monailabel_dfqsam.server.runs.parent import exit_with_parent
from monailabel_dfqsam.server.settings import Settings

logger = logging.getLogger(__name__)

NAME = "dfqsam_propose"

# The last lines are what a status shows, 20 of them.
_SKIPPED_SHOWN = 15

# Sent by upstream's own page and clients; they decide nothing here.
_IGNORED = frozenset({"device", "multi_gpu", "gpus", "logging", "client_id"})


@dataclass(frozen=True, eq=False)
class Found:
    """What was proposed, and where."""

    shown: Shown
    k: int
    proposals: Proposals


class ProposeTask(InteractiveTask):
    """The objects of one slice, for batches and scoring.

    Its type is `InferType.OTHERS`: the panels of Slicer and OHIF offer models by type, and one that answers
    for one slice only would be taken there for an automatic segmentation of the volume.
    """

    def __init__(self, workbench: Workbench, settings: Settings) -> None:
        description = "Objects that Segment Anything proposes on one slice, without prompts"
        super().__init__(workbench, settings, InferType.OTHERS, 2, description)
        self._config = {"window": self.config()["window"]}

    def answer(self, request: Mapping[str, Any], view: View) -> tuple[str, dict[str, Any]]:
        """`slice` is the slice, by default the middle one; voxels are 1 … N, the largest object 1."""
        clock = Clock()
        found = self.find(request, view, clock)
        served = found.shown.served
        file = write_answer(found.proposals.labels, found.k, found.shown.volume, view)
        clock.lap("write")
        count = len(found.proposals.confidences)
        return file, {
            "label_names": {f"object {n}": n for n in range(1, count + 1)},
            "model": served.segmenter.name,
            "engine": served.engine,
            "score": round(found.proposals.confidence, 4),
            "scores": [round(score, 4) for score in found.proposals.confidences],
            "slice": found.k,
            "latencies": clock.laps(),
        }

    def find(self, request: Mapping[str, Any], view: View, clock: Clock) -> Found:
        """The proposals themselves; `request` holds `image`, and `slice` unless it is the middle one.

        Raises:
            ValueError: for an image or an option that cannot be used; HTTPException 503 without a model.
        """
        shown = self.shown(request, view)
        k = _slice(request.get("slice"), shown.volume.shape[2])
        clock.lap("load")
        embedding, _ = self.workbench.embed(shown, k)
        clock.lap("embed")
        rgb = slice_rgb(shown.volume, k, shown.window)
        proposals = propose(shown.served.segmenter, embedding, rgb)
        clock.lap("decode")
        return Found(shown, k, proposals)


class ProposeBatch(BatchInferTask):  # type: ignore[misc]
    """`dfqsam_propose` on all, labelled or unlabelled images; the label is saved under `label_tag`.

    An image that fails is skipped. What is printed becomes the `details` of `GET /batch/infer`, in the
    process of its own that MONAI Label starts for it.
    """

    def check(self, model: str, params: Mapping[str, Any]) -> None:
        """Raises Refusal 400 for a model or options that a batch cannot be run with."""
        if model != NAME:
            raise Refusal(400, f"batch inference needs a model without prompts: {NAME}, not '{model}'")
        try:
            _read_batch(params)
        except OptionError as error:
            raise Refusal(400, str(error)) from None

    def __call__(
        self, request: Mapping[str, Any], datastore: Any, infer: Callable[[Any, Any], Mapping[str, Any]]
    ) -> dict[str, int]:
        """Runs the batch.

        Args:
            request: `model`, `images` ('all', 'labeled', 'unlabeled'), and options that `check` lets pass.
            datastore: MONAI Label's.
            infer: the app's.

        Returns:
            How many images were `saved`, and how many `skipped`.
        """
        exit_with_parent(lambda: logger.warning("The server has gone: the batch stops"))
        given = _read_batch({k: v for k, v in request.items() if k not in ("model", "images")})
        images = sorted(self.get_images(request, datastore))
        images = images[: given.max_batch_size or None]
        options = given.model_dump(include={"window", "slice"}, exclude_none=True)
        skipped: dict[str, str] = {}
        begin = time.monotonic()
        for n, image in enumerate(images, start=1):
            one = {**options, "model": NAME, "image": image, "save_label": True, "label_tag": given.label_tag}
            try:
                told = f"{len(run_infer_task(one, datastore, infer)['params']['label_names'])} objects"
            except Exception as error:  # whatever is wrong with one image is no reason to leave the others
                skipped[image] = reason(error)
                told = f"skipped: {skipped[image]}"
            print(f"{n}/{len(images)} {image}: {told}", flush=True)
        summarize(len(images), skipped, "saved", time.monotonic() - begin)
        return {"saved": len(images) - len(skipped), "skipped": len(skipped)}


def reason(error: Exception) -> str:
    """A sentence for a person; of an unforeseen error, whose text may say anything, only its kind."""
    if isinstance(error, ValueError):
        return str(error)
    detail = getattr(error, "detail", None)
    return str(detail) if isinstance(detail, str) else f"failed ({type(error).__name__})"


def summarize(count: int, skipped: Mapping[str, str], done: str, seconds: float) -> None:
    """Prints the last lines of a run over `count` images: what was skipped, and how many were `done`."""
    for image in list(skipped)[:_SKIPPED_SHOWN]:
        print(f"skipped {image}: {skipped[image]}")
    if len(skipped) > _SKIPPED_SHOWN:
        print(f"skipped {len(skipped) - _SKIPPED_SHOWN} more")
    print(f"{count - len(skipped)} {done}, {len(skipped)} skipped, {seconds:.1f} s", flush=True)


def _slice(value: Any, count: int) -> int:
    """The slice asked for, the middle one by default; raises ValueError when it is none of `count`."""
    if value is None:
        return count // 2
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(f"slice must be 0 to {count - 1}, not {value!r}")
    return value


def _tag(tag: str) -> str:
    check_tag(tag)
    if tag == "final":
        raise Refusal(400, "proposals are not saved as finished labels: give another label_tag than 'final'")
    return tag


class _Batch(Options):
    """The options of a batch; it has nowhere but the datastore to put its results."""

    label_tag: Annotated[str, AfterValidator(_tag)] = "original"
    save_label: Literal[True] = True
    # One embedding is computed at a time: more workers would only wait for each other.
    max_workers: Annotated[Whole, between(0, 1)] = 0
    max_batch_size: Annotated[Whole, between(0, 1_000_000)] = 0
    slice: Annotated[Whole, between(0, 1_000_000)] | None = None
    window: Literal[tuple(WINDOWS)] | None = None  # type: ignore[valid-type]


def _read_batch(params: Mapping[str, Any]) -> _Batch:
    return read(_Batch, {key: value for key, value in params.items() if key not in _IGNORED})
