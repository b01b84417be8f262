"""Which image an annotator gets next: the one whose objects the model is least sure of.

`ConfidenceScoring` writes into each unlabelled image's info, under `CONFIDENCE`:

    value     0 … 1, mean of the objects proposed on the middle slice, 0 where none is; absent after an error
    objects   how many
    slice     which
    error     why the image could not be scored, instead of the three above
    model     identity of the model that judged: another model judges anew
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy

from monailabel_dfqsam.server.answers.propose_task import ProposeTask, reason, summarize
from monailabel_dfqsam.server.answers.workbench import Clock
from monailabel_dfqsam.server.runs.parent import exit_with_parent
from monailabel_dfqsam.server.upstream.repairs import image_path

logger = logging.getLogger(__name__)

CONFIDENCE = "confidence"

_MOST_DOWNLOADS = 100
_TAKEN_SECONDS = 15 * 60


class ConfidenceScoring(ScoringMethod):  # type: ignore[misc]
    """How sure the model is of each unlabelled image, in the process that MONAI Label starts for it."""

    def __init__(self, task: ProposeTask) -> None:
        super().__init__("Mean confidence of the objects that the model proposes on the middle slice")
        self._task = task

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, int]:
        """Scores the images that the model served has not judged yet; one that fails is skipped.

        Of an archive, at most 100 images are fetched in one run; the next run takes the following ones.

        Returns:
            How many images were `scored`, had been judged `before`, and were `skipped`.
        """
        exit_with_parent(lambda: logger.warning("The server has gone: scoring stops"))
        identity = self._task.workbench.served().identity
        unlabelled = sorted(datastore.get_unlabeled_images())
        infos = {image: datastore.get_image_info(image) for image in unlabelled}
        due = [image for image in unlabelled if is_due(infos[image], identity)]
        # A folder's images have an info from the start, an archive's when they have been fetched.
        away = [image for image in due if not infos[image]]
        later = set(away[_MOST_DOWNLOADS:])
        due = [image for image in due if image not in later]
        skipped: dict[str, str] = {}
        begin = time.monotonic()
        for n, image in enumerate(due, start=1):
            try:
                entry = self._score(image, datastore)
            except Exception as error:  # whatever is wrong with one image is no reason to leave the others
                skipped[image] = reason(error)
                entry = {"error": skipped[image], "model": identity}
            told = f"skipped: {entry['error']}" if "error" in entry else f"confidence {entry['value']:.3f}"
            print(f"{n}/{len(due)} {image}: {told}", flush=True)
            if datastore.get_image_info(image):  # not of an image that could not be fetched
                datastore.update_image_info(image, {CONFIDENCE: entry})
        if later:
            print(f"{len(later)} more images of the archive wait for the next run")
        summarize(len(due), skipped, "scored", time.monotonic() - begin)
        before = len(unlabelled) - len(due) - len(later)
        return {"scored": len(due) - len(skipped), "before": before, "skipped": len(skipped)}

    def _score(self, image: str, datastore: Any) -> dict[str, Any]:
        found = self._task.find({"image": image_path(datastore, image)}, self._task.view({}), Clock())
        return {
            "value": round(found.proposals.confidence, 6),
            "objects": len(found.proposals.confidences),
            "slice": found.k,
            "model": found.shown.served.identity,
        }


class LeastConfident(Strategy):  # type: ignore[misc]
    """The unlabelled image with the least confidence known."""

    def __init__(self) -> None:
        super().__init__("Image of which the model is least sure; scored by POST /scoring/confidence")

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, str] | None:
        """`{'id': image}`, or None when all are labelled; `client_id` in the request says who asks."""
        infos = {image: datastore.get_image_info(image) for image in datastore.get_unlabeled_images()}
        image = least_confident(infos, request.get("client_id"), time.time())
        return None if image is None else {"id": image}


def least_confident(infos: Mapping[str, Mapping[str, Any]], client: object, now: float) -> str | None:
    """The image to do next.

    First those that nobody else was given in the last 15 minutes, then the others. Among these the least
    sure first, and after all scored ones the unscored, by name: what is known to be hard goes before what may
    be easy, and before anything is scored this is the order of names.

    Args:
        infos: of unlabelled images.
        client: who asks, as recorded in the infos.
        now: seconds since 1970.

    Returns:
        None when there is none.
    """

    def order(image: str) -> tuple[bool, float, str]:
        confidence = _confidence(infos[image])
        return _taken(infos[image], client, now), math.inf if confidence is None else confidence, image

    return min(infos, key=order, default=None)


def is_due(info: Mapping[str, Any], identity: str) -> bool:
    """Whether the model has not judged an image yet."""
    entry = info.get(CONFIDENCE)
    return not isinstance(entry, Mapping) or entry.get("model") != identity


def _confidence(info: Mapping[str, Any]) -> float | None:
    """An older model's too; anything that is no number, for clients may write infos, is none."""
    entry = info.get(CONFIDENCE)
    value = entry.get("value") if isinstance(entry, Mapping) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _taken(info: Mapping[str, Any], client: object, now: float) -> bool:
    """Whether another client was given the image lately, by any strategy; upstream records the last one."""
    given = info.get("strategy")
    for record in given.values() if isinstance(given, Mapping) else ():
        when = record.get("ts") if isinstance(record, Mapping) else None
        if (
            isinstance(when, int | float)
            and abs(now - when) < _TAKEN_SECONDS  # the clock may have been set back since
            and record.get("client_id") != client
        ):
            return True
    return False
