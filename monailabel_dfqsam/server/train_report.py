"""What a training process says of itself: to whom it reports, and when it ends without being told.

What it prints becomes the `details` of `GET /train/`; how far it is goes to the model folder, where the
server reads it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from monailabel_dfqsam.server.model_folder import ModelFolder

SERVER_PID = "DFQSAM_SERVER_PID"
"""Environment variable by which the server tells its training process whose child it is."""

PRINTED = re.compile(r"[a-z]+ (\d+/\d+, \d+ s|after [\d.]+ s, .*)|This training reads .*")
"""What a task prints itself; the other lines of its process are MONAI Label's and name folders."""

_PARENT_CHECK_SECONDS = 1.0
_REPORT_SECONDS = 2.0
_NICENESS = 10  # clicks come first


class Reporter:
    """A `Progress` that prints a line, writes the progress now and then, and begins and ends the history."""

    def __init__(self, folder: ModelFolder, options: Mapping[str, Any]) -> None:
        self._folder = folder
        self._begin = time.monotonic()
        self._last = (-_REPORT_SECONDS, "")
        self._record: dict[str, Any] = {
            "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "options": dict(options), "key": "", "state": "running", "seconds": 0.0, "pid": os.getpid(),
            "stage": "starting", "epoch": 0, "total_epochs": 1, "best_metric": 0.0,
        }  # fmt: skip
        self._write(history=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        last, last_stage = self._last
        if stage == last_stage and done < total and now - last < _REPORT_SECONDS:
            return
        self._last = (now, stage)
        self._record.update(stage=stage, epoch=done, total_epochs=max(1, total), seconds=self._seconds())
        self._write()
        say(f"{stage} {done}/{total}, {now - self._begin:.0f} s")

    def name(self, key: str) -> None:
        """Says which artifact is being made."""
        self._record["key"] = key

    def end(self, state: str, fidelity: float = 0.0, error: str = "") -> None:
        """The last line: how it ended."""
        seconds = self._seconds()
        self._record.update(state=state, seconds=seconds, total_time=seconds, best_metric=round(fidelity, 4))
        if fidelity:
            self._record["fidelity"] = fidelity
        if error:
            self._record["error"] = error
        self._write(history=True)
        say(f"{state} after {seconds} s, {error or f'fidelity {fidelity:.3f}'}")

    def _seconds(self) -> float:
        return round(time.monotonic() - self._begin, 1)

    def _write(self, history: bool = False) -> None:
        try:
            self._folder.write_progress(self._record)
            if history:
                self._folder.write_history(self._record)
        except OSError as error:  # of a full disk; nobody's model is worse for it
            print(f"the progress could not be written: {error.strerror}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Prints a line for `GET /train/`; ends the process when the server, which reads it, has gone."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os._exit(1)  # the server, which reads this, has gone


def exit_with_parent(work: str) -> None:
    """Ends this process soon after the server that started it has gone, for nobody else would.

    Does nothing within the server itself, or called from Python.

    Args:
        work: what this process does, for the message.
    """
    server = os.environ.get(SERVER_PID, "")
    if not server.isdecimal() or int(server) == os.getpid():
        return
    if hasattr(os, "nice"):
        os.nice(_NICENESS)

    def watch() -> None:
        while os.getppid() == int(server):
            time.sleep(_PARENT_CHECK_SECONDS)
        print(f"the server has gone: {work} stops", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="dfqsam-parent", daemon=True).start()
