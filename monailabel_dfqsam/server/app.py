"""The MONAI Label app: its models, which share their weights, and the trainers that make these."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.utils.async_tasks.task import AsyncTask

from monailabel_dfqsam.server.answers import active_learning, propose_task
from monailabel_dfqsam.server.answers.infer_task import InteractiveTask, SegmentTask
from monailabel_dfqsam.server.answers.request import STORED
from monailabel_dfqsam.server.answers.volume_task import LabelsTask, VolumeTask
from monailabel_dfqsam.server.answers.workbench import Workbench
from monailabel_dfqsam.server.page import routes as page
from monailabel_dfqsam.server.runs import finetuning, quantizing
from monailabel_dfqsam.server.runs.models import Models
from monailabel_dfqsam.server.runs.parent import SERVER_PID
from monailabel_dfqsam.server.runs.queue import RunQueue
from monailabel_dfqsam.server.runs.trainers import FinetuneTask, QuantizeTask, Trainer
from monailabel_dfqsam.server.settings import read_settings
from monailabel_dfqsam.server.upstream import disk, repairs, shared, start

logger = logging.getLogger(__name__)

NAME = quantizing.NAME

_SCORING_PAUSE_SECONDS = 600.0


class DFQSamApp(MONAILabelApp):  # type: ignore[misc]
    """DFQ-SAM in MONAI Label; made in the server and again in each training process, so it loads nothing."""

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, Any]) -> None:
        """As MONAI Label calls it.

        Raises:
            OptionError: for a wrong `--conf` pair.
        """
        self._settings = read_settings(conf or {}, Path(app_dir))
        self._models = Models(self._settings)
        self._workbench = Workbench(self._models, self._settings.cache_mb)
        server = {"app_dir": app_dir, "studies": studies, "conf": dict(conf or {})}
        self._queue = RunQueue(self._models.folder, server)
        repairs.quieten()
        disk.repair_writing()
        shared.share_datastore()
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=dict(conf or {}),
            name="DFQ-SAM",
            description="Segment Anything by points and boxes, quantized by this server itself, without data",
            labels=list(self._settings.labels),
        )
        # Upstream would start a process whenever an image is asked for.
        self._auto_update_scoring = False
        self._scoring_begun = -math.inf

    def init_datastore(self) -> Any:
        """Upstream's, which also notices files that are renamed into place."""
        store = super().init_datastore()
        disk.notice_renamed(store)
        return store

    def init_infers(self) -> dict[str, InteractiveTask]:
        """The models offered; all answer with the same weights."""
        return {
            NAME: SegmentTask(self._workbench, self._settings),
            f"{NAME}_3d": VolumeTask(self._workbench, self._settings),
            f"{NAME}_labels": LabelsTask(self._workbench, self._settings),
            propose_task.NAME: propose_task.ProposeTask(self._workbench, self._settings),
        }

    def init_trainers(self) -> dict[str, Trainer]:
        """Quantization, and fine-tuning, which runs only when it is named."""
        return {task.name: task for task in (QuantizeTask(self._settings), FinetuneTask(self._settings))}

    def init_strategies(self) -> dict[str, Any]:
        """Which image next: any, the first unlabelled one by name, or the one the model is least sure of."""
        return {"random": Random(), "first": First(), "least_confident": active_learning.LeastConfident()}

    def init_scoring_methods(self) -> dict[str, Any]:
        """How sure the model is of each image."""
        return {"confidence": active_learning.ConfidenceScoring(self._infers[propose_task.NAME])}

    def init_batch_infer(self) -> propose_task.ProposeBatch:
        """The model without prompts on many images."""
        return propose_task.ProposeBatch()

    def server_mode(self, mode: bool) -> None:
        """Called by the server, once, when it starts."""
        super().server_mode(mode)
        if mode:
            from monailabel.app import app
            from monailabel.config import settings

            from monailabel_dfqsam.server.upstream.training import Training

            repairs.install(app, self._settings.trusted_hosts, self._settings.max_upload_mb << 20)
            self._training = Training(self._trainers, self._queue, self._models.folder)
            self._training.install(self._trainings_for)
            routes = page.router(self._models, self._settings, self._queue)
            app.include_router(routes, prefix=settings.MONAI_LABEL_API_STR)

    def on_init_complete(self) -> None:
        """Loads the model in the background, and quantizes it if that has not been done."""
        super().on_init_complete()
        os.environ[SERVER_PID] = str(os.getpid())
        try:
            self._queue.own()
        except OSError as error:
            logger.error("No model can be made here: the model folder cannot be written to (%s)", error)
        self._models.start(quantize=self._quantize_first)
        start.settle()

    def on_save_label(self, image_id: str, label_id: str) -> None:
        """Nothing to do: labels are learned from only when somebody asks for it."""

    def check_model(self, model: str) -> None:
        """Raises HTTPException 404 unless there is such a model."""
        if model not in self._infers:
            raise HTTPException(404, f"there is no model '{model}'; there is: {', '.join(self._infers)}")

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Upstream's; the least confident one is asked for: images not judged yet are then scored too."""
        found: dict[str, Any] = super().next_sample(request)
        if request.get("strategy") == "least_confident" and self._is_scoring_due():
            self._scoring_begun = time.monotonic()
            AsyncTask.run("scoring", request={"method": "confidence"})  # unless it runs already
        return found

    def async_training(
        self, model: str, params: dict[str, Any] | None = None, enqueue: bool = False
    ) -> dict[str, Any]:
        """Accepts a run of a trainer, in server mode; upstream's answer."""
        return self._training.run_model(model, params, False, enqueue)

    def _trainings_for(self, params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What runs where no trainer is named, with the options of each.

        Args:
            params: options of all, and those of one under its name. Labels are read only if these are there.
        """
        common = {key: value for key, value in params.items() if key not in self._trainers}
        return {
            name: {**common, **(params.get(name) or {})}
            for name in self._trainers
            if name != finetuning.NAME or name in params
        }

    def check_batch(self, model: str, params: Mapping[str, Any]) -> None:
        """Raises Refusal for a model or options that a batch cannot be run with."""
        self._batch_infer.check(model, params)

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Segments; upstream's request and answer, errors as 4xx with a sentence.

        Args:
            request: `model`; `image`, an image's name, or the absolute path of an upload or a session's
                image as the server itself puts it there; prompts and options, see `InteractiveTask`.
        """
        model = str(request.get("model", ""))
        self.check_model(model)
        request = copy.deepcopy(request)
        store = datastore if datastore is not None else self.datastore()
        image = request.get("image")
        stored = isinstance(image, str) and not os.path.isabs(image)
        if stored:
            request["image"] = repairs.image_path(store, str(image))
            request[STORED] = True
        file, params = self._infers[model](request)
        label: Any = file
        tag = request.get("label_tag") or "original"
        if stored and request.get("save_label") is True:
            try:
                label = store.save_label(image, file, tag, {"model": model, "params": params})
            except BaseException:
                os.unlink(file)
                raise
        return {"label": label, "tag": tag, "file": file, "params": params}

    def infer_wsi(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Not offered."""
        raise HTTPException(400, "whole-slide inference is not offered")

    def _is_scoring_due(self) -> bool:
        """Now and then only: of an archive, series that cannot be read stay unscored."""
        if time.monotonic() - self._scoring_begun < _SCORING_PAUSE_SECONDS:
            return False
        served, store = self._models.served(), self.datastore()
        return served is not None and any(
            active_learning.is_due(store.get_image_info(image), served.identity)
            for image in store.get_unlabeled_images()
        )

    def _quantize_first(self) -> None:
        """What the server does of its own accord when no artifact is there."""
        try:
            self.async_training(NAME)
        except HTTPException as error:
            logger.warning("Full precision answers: %s", error.detail)
