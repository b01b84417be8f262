"""MONAI Label's endpoints of training, on this server's own queue of runs.

Upstream starts a training in a process that alone knows of it, reports its state as that of whatever process
is there, and cannot drop one that waits. Here `POST /train/…` answers with a run that exists from then on;
its `id` is the run's, and stands under `/dfqsam/runs/ID` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from fastapi import HTTPException
from monailabel.endpoints import train as endpoint

from monailabel_dfqsam.server.gate.guard import Refusal
from monailabel_dfqsam.server.gate.json_input import check_options, check_own
from monailabel_dfqsam.server.gate.options import OptionError
from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.server.runs.queue import BusyError, ElsewhereError, RunQueue
from monailabel_dfqsam.server.runs.record import Run, RunState
from monailabel_dfqsam.server.runs.trainers import Trainer

BUSY = "a quantization or training is running already: wait for it, or stop it with DELETE /train/"
ELSEWHERE = (
    "another server uses this model folder and quantizes for both: ask that one, or give this one a folder "
    "of its own with --app"
)

_STATUS = {
    RunState.QUEUED: "SUBMITTED",
    RunState.RUNNING: "RUNNING",
    RunState.PUBLISHED: "DONE",
    RunState.REJECTED: "DONE",
    RunState.FAILED: "ERROR",
    RunState.STOPPED: "STOPPED",
}

TrainingsFor = Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]]


class Training:
    """The trainers of a server and its queue; its methods are upstream's functions by the same names."""

    def __init__(self, trainers: Mapping[str, Trainer], queue: RunQueue, folder: ModelFolder) -> None:
        self._trainers, self._queue, self._folder = trainers, queue, folder

    def install(self, trainings_for: TrainingsFor) -> None:
        """Takes the place of upstream's functions.

        Args:
            trainings_for: which trainers run, each with its options, where none is named.
        """

        def run(params: dict[str, Any] | None = None, run_sync: bool | None = False) -> dict[str, Any]:
            check_options(params, run_sync)
            for name in self._trainers:
                check_own(params, name)
            runs = [self._accepted(name, own) for name, own in trainings_for(params or {}).items()]
            tasks = [self._begin(run, params, enqueue=True) for run in runs]
            return {task["request"]["model"]: {"result": task, "detail": None} for task in tasks}

        endpoint.status, endpoint.run = self.status, run
        endpoint.run_model, endpoint.stop = self.run_model, self.stop

    def run_model(
        self,
        model: str,
        params: dict[str, Any] | None = None,
        run_sync: bool | None = False,
        enqueue: bool | None = False,
    ) -> dict[str, Any]:
        """Accepts a run of one trainer.

        Raises:
            Refusal: 404, 400 or 409 with a sentence.
            HTTPException: 429 when there is one already.
        """
        check_options(params, run_sync)
        return self._begin(self._accepted(model, params or {}), params, bool(enqueue))

    def status(self, all: bool = False, check_if_running: bool = False) -> Any:
        """What runs or waits, else the last one; with `all` every one kept, the oldest first.

        Raises:
            HTTPException: 404 when there is none.
        """
        runs = self._queue.active()
        if not runs and not check_if_running:
            runs = self._folder.runs()
        if not runs:
            nothing = "no training is running" if check_if_running else "there was no training yet"
            raise HTTPException(404, nothing)
        if all and not check_if_running:
            return [self._task(run) for run in reversed(self._folder.runs())]
        return self._task(runs[0])

    def stop(self) -> dict[str, Any] | None:
        """Stops what runs and drops what waits; answers the first of these, None where there is none."""
        stopped = self._queue.stop()
        return self._task(stopped[0]) if stopped else None

    def _accepted(self, name: str, request: Mapping[str, Any]) -> Run:
        trainer = self._trainers.get(name)
        if trainer is None:
            raise Refusal(404, f"there is no trainer '{name}'; there is: {', '.join(self._trainers)}")
        try:
            return trainer.accepted(request)
        except OptionError as error:
            raise Refusal(400, str(error)) from None

    def _begin(self, run: Run, request: Mapping[str, Any] | None, enqueue: bool) -> dict[str, Any]:
        try:
            return self._task(self._queue.ask(run, (request or {}).get("gpus") or "all", enqueue))
        except BusyError:
            raise HTTPException(429, BUSY) from None
        except ElsewhereError:
            raise Refusal(409, ELSEWHERE) from None
        except OSError as error:
            reason = error.strerror or "it is not known why"
            raise Refusal(507, f"the server's model folder cannot be written to: {reason}") from None

    def _task(self, run: Run) -> dict[str, Any]:
        """A run as upstream describes a task; `run` is its record."""
        return {
            "id": run.id,
            "status": _STATUS[run.state],
            "request": {"model": run.trainer, **run.options},
            "start_ts": _local(run.created),
            **({"end_ts": _local(run.ended)} if run.ended else {}),
            # 3D Slicer shows the last line of one that was stopped, and fails where there is none.
            "details": self._queue.lines(run.id) or [run.error or run.state.value],
            "run": run.told(),
        }


def _local(moment: str) -> str:
    """A time in UTC, ISO 8601, as upstream writes it."""
    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S")
