"""A run's own process: `python -m monailabel_dfqsam.server.runs.process ID`.

On its standard input the server tells, as JSON, what it was started with itself: `app_dir`, `studies` and
`conf`. Only a trainer that reads labels makes a MONAI Label app with a datastore.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel_dfqsam.server.runs import quantizing
from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.server.runs.record import Run
from monailabel_dfqsam.server.runs.reporter import Outcome, Reporter, carry_out
from monailabel_dfqsam.server.settings import Settings, read_settings

_FORM = "[%(asctime)s] [%(process)s] [%(levelname)s] (%(name)s) - %(message)s"


def main() -> None:
    """Carries out the run that the command line names."""
    logging.basicConfig(level=logging.INFO, format=_FORM)
    server = json.load(sys.stdin)
    settings = read_settings(server["conf"], Path(server["app_dir"]))
    folder = ModelFolder(settings.model_dir)
    run = folder.run(sys.argv[1])
    if run is None:
        raise SystemExit("there is no record of this run")
    carry_out(folder, run, lambda report: _work(run, settings, folder, report, server))


def _work(
    run: Run, settings: Settings, folder: ModelFolder, report: Reporter, server: Mapping[str, Any]
) -> Outcome:
    if run.trainer == quantizing.NAME:
        return quantizing.work(run.options, settings, folder, report)
    from monailabel.interfaces.utils.app import app_instance

    from monailabel_dfqsam.server.runs import finetuning

    store = app_instance(server["app_dir"], server["studies"], server["conf"]).datastore()
    return finetuning.work(run.options, settings, folder, store, report)


if __name__ == "__main__":
    main()
