"""The server's side of runs: accepts them, starts one process at a time, stops them, says how they ended.

One lock guards all that changes here. A run's record is written by this module before its process is started
and after it has ended, and by the process in between; whoever wants to know how it goes reads the record.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from monailabel_dfqsam.server.runs.folder import HISTORY, ModelFolder
from monailabel_dfqsam.server.runs.parent import is_running
from monailabel_dfqsam.server.runs.record import Run, RunState
from monailabel_dfqsam.server.runs.reporter import SERVER_ENDED

logger = logging.getLogger(__name__)

STOPPED_BY_REQUEST = "it was stopped before it was done"

_LINES = 20
_KILL_SECONDS = 10.0


class BusyError(Exception):
    """A run is queued or running already."""


class ElsewhereError(Exception):
    """Another server may start runs in this model folder, so this one may not."""


@dataclass(eq=False)
class _Job:
    run: Run
    gpus: str
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES))
    process: subprocess.Popen[str] | None = None
    is_stopped: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


class RunQueue:
    """One server's; its methods may be called from any thread."""

    def __init__(self, folder: ModelFolder, server: Mapping[str, Any]) -> None:
        """Starts nothing.

        Args:
            server: what a run's process is told on its standard input, JSON values: see `process`.
        """
        self._folder = folder
        self._server = server
        self._lock = threading.RLock()
        self._jobs: deque[_Job] = deque()  # the first one runs
        self._known: deque[_Job] = deque(maxlen=HISTORY)
        self._is_settled = False

    def own(self) -> bool:
        """Whether this server may start runs in its model folder; what a dead one left is settled then.

        Raises:
            OSError: when the folder cannot be written to.
        """
        with self._lock:
            if not self._is_settled and self._folder.own():
                for run in self._folder.runs():
                    if not run.state.ended:
                        _kill_orphan(run)
                        self._write(run.end(RunState.STOPPED, SERVER_ENDED))
                self._folder.sweep()
                self._is_settled = True
            return self._is_settled

    def ask(self, run: Run, gpus: str = "all", enqueue: bool = False) -> Run:
        """Accepts a run: its record is on disk when this returns.

        Args:
            run: as its trainer makes it of a request.
            gpus: numbers of CUDA devices with commas between them, or 'all'.
            enqueue: wait for those before it.

        Raises:
            BusyError: when there is one already and `enqueue` is false.
            ElsewhereError: when another server owns the model folder.
            OSError: when the record cannot be written.
        """
        with self._lock:
            if not self.own():
                raise ElsewhereError
            if self.active() and not enqueue:
                raise BusyError
            run = run.after(next(iter(self._folder.runs()), None))
            self._folder.write_run(run)
            job = _Job(run, gpus)
            self._known.append(job)
            self._jobs.append(job)
            if len(self._jobs) == 1:
                threading.Thread(target=self._work, name="dfqsam-runs", daemon=True).start()
        return run

    def active(self) -> list[Run]:
        """What is queued or running, in order, as its record says."""
        with self._lock:
            jobs = list(self._jobs)
        return [run for run in map(self._record, jobs) if not run.state.ended]

    def stop(self) -> list[Run]:
        """Stops what runs and drops what is queued; answers these, in order, as they ended."""
        with self._lock:
            jobs = [job for job in self._jobs if not self._record(job).state.ended]
            for job in jobs:
                job.is_stopped = True
                if job.process is not None and job.process.poll() is None:
                    _kill_tree(job.process.pid)
        for job in jobs:
            job.ended.wait(_KILL_SECONDS)
        return [self._record(job) for job in jobs]

    def lines(self, identity: str) -> list[str]:
        """The last lines that a run printed; none of one before this server's start."""
        with self._lock:
            return next((list(job.lines) for job in self._known if job.run.id == identity), [])

    def _work(self) -> None:
        waiting = True
        while waiting:
            job = self._jobs[0]
            try:
                self._carry_out(job)
            except Exception:
                logger.exception("Run %s cannot be followed any more", job.run.id)
            with self._lock:
                self._jobs.popleft()
                waiting = bool(self._jobs)
            job.ended.set()

    def _carry_out(self, job: _Job) -> None:
        """Starts a run's process and follows it to its end; the record has ended then."""
        error = ""
        with self._lock:
            if not job.is_stopped:
                error = self._launch(job)
        if job.process is not None:
            error = _followed(job.process, job.lines)
        run = self._record(job)
        with self._lock:
            self._folder.sweep()
            if run.state.ended:
                return
            if job.is_stopped:
                self._write(run.end(RunState.STOPPED, STOPPED_BY_REQUEST))
            else:
                self._write(run.end(RunState.FAILED, error))

    def _launch(self, job: _Job) -> str:
        """Starts a run's process; answers why there is none, or ""."""
        job.run = replace(job.run, state=RunState.RUNNING, stage="starting")
        self._write(job.run)
        line = [sys.executable, "-m", "monailabel_dfqsam.server.runs.process", job.run.id]
        environment = {**os.environ, "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false"}
        if job.gpus != "all":
            environment["CUDA_VISIBLE_DEVICES"] = job.gpus
        try:
            job.process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", env=environment,
            )  # fmt: skip
        except OSError as error:
            return f"no process could be started for it: {error.strerror}"
        assert job.process.stdin is not None
        # One that has ended already says so by its status.
        with contextlib.suppress(BrokenPipeError), job.process.stdin as told:
            told.write(json.dumps(self._server))
        return ""

    def _record(self, job: _Job) -> Run:
        """A run as its process last wrote it."""
        return self._folder.run(job.run.id) or job.run

    def _write(self, run: Run) -> None:
        try:
            self._folder.write_run(run)
        except OSError as error:
            logger.error("How run %s is could not be written: %s", run.id, error)


def _followed(process: subprocess.Popen[str], lines: deque[str]) -> str:
    """Keeps what a process prints until it ends; answers how it ended, a sentence."""
    log = logging.getLogger("task_train")
    assert process.stdout is not None
    with process.stdout as printed:
        for line in map(str.rstrip, printed):
            if line:
                log.info(line)
                lines.append(line)
    status = process.wait()
    if status < 0:
        name = signal.Signals(-status).name
        return f"its process was ended by {name}" + ", perhaps for want of memory" * (name == "SIGKILL")
    return f"its process ended with status {status} before it had said how it went; the server's log says why"


def _kill_tree(pid: int) -> None:
    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def _kill_orphan(run: Run) -> None:
    """Ends a run's process whose server has gone, should it still be there."""
    if run.pid is None or not is_running(run.pid, run.began):
        return
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.TimeoutExpired):
        process = psutil.Process(run.pid)
        if run.id in process.cmdline():
            _kill_tree(run.pid)
            process.wait(_KILL_SECONDS)
