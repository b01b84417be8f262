"""MONAI Label's view of the trainers: what they offer, what they make of a request, how their last run is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from monailabel_dfqsam.config import Policy
from monailabel_dfqsam.server.gate.options import OptionError
from monailabel_dfqsam.server.runs import finetuning, quantizing
from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.server.runs.options import (
    defaults,
    finetuning_defaults,
    finetuning_options,
    quantization_options,
)
from monailabel_dfqsam.server.runs.record import Run
from monailabel_dfqsam.server.runs.reporter import Outcome, Reporter, carry_out
from monailabel_dfqsam.server.settings import Settings

NEEDED = "fine-tuning needs the package brevitas: pip install 'monailabel-dfqsam[qat]' on the server"


class Trainer(TrainTask):  # type: ignore[misc]
    """A trainer that makes an artifact and, if it may be served, publishes it."""

    name: str

    def __init__(self, description: str, settings: Settings) -> None:
        super().__init__(description)
        self._settings = settings
        self._folder = ModelFolder(settings.model_dir)

    def accepted(self, request: Mapping[str, Any]) -> Run:
        """A request as a run, not yet written anywhere.

        Raises:
            OptionError: for a request that cannot be served.
        """
        return Run(self.name, self._options(request))

    def stats(self) -> dict[str, Any]:
        """How this trainer's last run is, in Slicer's words; the run's record without its process besides.

        `epoch` of `total_epochs` counts the steps of `stage`, `best_metric` is the fidelity, and
        `total_time`, in seconds, is there once the run has ended.
        """
        run = next((run for run in self._folder.runs() if run.trainer == self.name), None)
        if run is None:
            # Slicer takes 1 of 1 for what is missing, and shows work as done before it has begun.
            return {"epoch": 0, "total_epochs": 1}
        told = run.told()
        found = {
            **told,
            "epoch": told.pop("step"),
            "total_epochs": told.pop("steps"),
            "best_metric": round(run.fidelity["mean_iou"], 4) if run.fidelity else 0.0,
        }
        return {**found, "total_time": run.seconds} if run.state.ended else found

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Accepts a request and carries it out in this process.

        Returns:
            `stats()` at the end.

        Raises:
            ValueError: for options, a checkpoint or labels that cannot be used.
        """
        run = self.accepted(request)
        self._folder.write_run(run)
        carry_out(self._folder, run, lambda report: self._work(run, datastore, report))
        return self.stats()

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _work(self, run: Run, datastore: Datastore, report: Reporter) -> Outcome:
        raise NotImplementedError


class QuantizeTask(Trainer):
    """Quantization; `datastore` is not touched."""

    name = quantizing.NAME

    def __init__(self, settings: Settings) -> None:
        super().__init__(quantizing.DESCRIPTION, settings)

    def config(self) -> dict[str, Any]:
        """The options that a viewer shows."""
        return defaults(self._settings)

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return quantization_options(request, self._settings, self.name)

    def _work(self, run: Run, datastore: Datastore, report: Reporter) -> Outcome:
        return quantizing.work(run.options, self._settings, self._folder, report)


class FinetuneTask(Trainer):
    """Quantization-aware fine-tuning on finished labels."""

    name = finetuning.NAME

    def __init__(self, settings: Settings) -> None:
        super().__init__(finetuning.DESCRIPTION, settings)

    def config(self) -> dict[str, Any]:
        """The options that a viewer shows."""
        return finetuning_defaults(self._settings)

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        options = finetuning_options(request, self._settings, self.name)
        if find_spec("brevitas") is None:
            raise OptionError(NEEDED)
        if self._settings.quantization.policy is not Policy.DEPLOY:
            raise OptionError("only models of policy 'deploy' can be fine-tuned")
        return options

    def _work(self, run: Run, datastore: Datastore, report: Reporter) -> Outcome:
        return finetuning.work(run.options, self._settings, self._folder, datastore, report)
