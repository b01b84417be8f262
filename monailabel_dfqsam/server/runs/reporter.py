"""What a run's process says of itself.

What it prints becomes the `details` of `GET /train/`; how far it is goes into the run's record.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from monailabel_dfqsam.agreement import Fidelity, in_words
from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.server.runs.parent import began, exit_with_parent
from monailabel_dfqsam.server.runs.record import Run, RunState

PRINTED = re.compile(r"[a-z]+ (\d+/\d+, \d+ s|after [\d.]+ s, .*)|This training reads .*")
"""What a trainer prints itself; the other lines of its process are libraries' and may name folders."""

SERVER_ENDED = "its server ended before it was done"

_REPORT_SECONDS = 2.0


class Outcome(NamedTuple):
    """How a run ended, in the words of its record; a published one has a fidelity, any other an error."""

    state: RunState
    fidelity: Fidelity | None = None
    error: str = ""


class Reporter:
    """A `Progress` that prints a line and keeps the run's record; any thread may use it.

    Attributes:
        run: the record as it was last written.
    """

    def __init__(self, folder: ModelFolder, run: Run) -> None:
        self._folder = folder
        self._begin = time.monotonic()
        self._last = (-_REPORT_SECONDS, "")
        self._lock = threading.Lock()
        self.run = run
        self._update(state=RunState.RUNNING, stage="starting", pid=os.getpid(), began=began(os.getpid()))

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        last, last_stage = self._last
        if stage == last_stage and done < total and now - last < _REPORT_SECONDS:
            return
        self._last = (now, stage)
        self._update(stage=stage, step=done, steps=max(1, total))
        say(f"{stage} {done}/{total}, {now - self._begin:.0f} s")

    def name(self, key: str) -> None:
        """Says which artifact is being made."""
        self._update(key=key)

    def end(self, outcome: Outcome) -> None:
        """The last line: how it ended."""
        self._keep(lambda run: run.end(outcome.state, outcome.error, outcome.fidelity))
        ended = outcome.error or (outcome.fidelity and f"fidelity {in_words(outcome.fidelity)}")
        say(f"{outcome.state.value} after {self.run.seconds} s, {ended}")

    def _update(self, **changes: Any) -> None:
        self._keep(lambda run: replace(run, **changes))

    def _keep(self, change: Callable[[Run], Run]) -> None:
        """Changes the record, unless it says already how the run ended."""
        with self._lock:
            if self.run.state.ended:
                return
            seconds = round(time.monotonic() - self._begin, 1)
            self.run = change(replace(self.run, seconds=seconds))
            try:
                self._folder.write_run(self.run)
            except OSError as error:  # of a full disk; nobody's model is worse for it
                print(f"the progress could not be written: {error.strerror}", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Prints a line for `GET /train/`."""
    # Without it the server, which reads this, has gone: `exit_with_parent` notices within a second.
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def carry_out(folder: ModelFolder, run: Run, work: Callable[[Reporter], Outcome]) -> None:
    """Does the work of a run in this process, and keeps its record.

    Args:
        work: reports how far it is, and answers how it ended, or raises.

    Raises:
        whatever `work` raises, once the record says so.
    """
    report = Reporter(folder, run)
    exit_with_parent(lambda: report.end(Outcome(RunState.STOPPED, error=SERVER_ENDED)))
    try:
        try:
            outcome = work(report)
        finally:
            shutil.rmtree(folder.building, ignore_errors=True)
    except Exception as error:
        report.end(Outcome(RunState.FAILED, error=str(error) or type(error).__name__))
        raise
    report.end(outcome)
