"""Programs forked from a process that has imported what takes long, so that each starts in a second or two.

`multiprocessing` keeps that process, one for each that asks. Every program is a real process with an
environment, a log and signals of its own; only the imports are shared.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

# Nothing of MONAI Label, which reads its settings from the environment when it is imported.
_SLOW_TO_IMPORT = [
    "monai.apps",  # and by it torch, torchvision, ignite, pandas
    "SimpleITK",
    "nibabel",
    "pydicom",
    "fastapi",
    "uvicorn",
    "monailabel_dfqsam.segmentation.segmenter",
]


def start(line: Sequence[str], environment: Mapping[str, str], log: Path) -> ForkServerProcess:
    """Starts `python -m line[0] line[1:]`, whose output is added to `log`.

    Libraries that were loaded before the fork count threads by the `OMP_NUM_THREADS` of the first start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_SLOW_TO_IMPORT)
    process = context.Process(target=_become, args=(list(line), dict(environment), str(log)))
    process.start()
    return process


def _become(line: list[str], environment: dict[str, str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # which was found by the environment before
    sys.argv = line
    runpy.run_module(line[0], run_name="__main__", alter_sys=True)
