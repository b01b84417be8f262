"""The real server as a process of its own, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

import requests

START_SECONDS = 180.0
STOP_SECONDS = 10.0
_POLL_SECONDS = 0.2
_LOG_LINES = 12


class ServerFailed(ValueError):
    """The server did not start, or ended; the message holds the end of its log."""


class DemoServer:
    """`dfqsam serve` on a free port of 127.0.0.1; entering waits until it answers.

    Leaving the block, by whatever way a Python program ends, SIGTERM included, ends the server and every
    process that it started.

    Attributes:
        url: where it answers.
        app: its app folder.
        started: `time.monotonic()` when the process was started.
    """

    def __init__(self, studies: Path, app: Path, log: Path, checkpoint: Path | None = None) -> None:
        """Nothing is started yet.

        Args:
            checkpoint: what `--checkpoint` takes; the default without it.
        """
        self.app = app
        self.url = ""
        self.started = 0.0
        self._studies = studies
        self._log = log
        self._checkpoint = checkpoint
        self._process: subprocess.Popen[bytes] | None = None
        self._old_handler: object = None

    def __enter__(self) -> DemoServer:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        line = [sys.executable, "-m", "monailabel_dfqsam", "serve", "--studies", str(self._studies)]
        line += ["--host", "127.0.0.1", "--port", str(port), "--app", str(self.app)]
        line += [] if self._checkpoint is None else ["--checkpoint", str(self._checkpoint)]
        # finally blocks, this one among them, do not run on SIGTERM otherwise.
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, _exit_on_signal)
        try:
            with self._log.open("wb") as log:
                self.started = time.monotonic()
                self._process = subprocess.Popen(
                    line,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """The server's process; raises ServerFailed when it has ended."""
        self.check()
        assert self._process is not None
        return self._process.pid

    def check(self) -> None:
        """Raises ServerFailed when the server has ended."""
        if self._process is None or self._process.poll() is not None:
            lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            raise ServerFailed("the server has ended; its last words:\n" + "\n".join(lines))

    def _wait(self) -> None:
        with requests.Session() as http:
            http.trust_env = False
            while time.monotonic() - self.started < START_SECONDS:
                self.check()
                try:
                    if http.get(f"{self.url}/info/", timeout=START_SECONDS).ok:
                        return
                except requests.ConnectionError:
                    pass
                time.sleep(_POLL_SECONDS)
        raise ServerFailed(f"the server did not answer within {START_SECONDS:.0f} s, see {self._log}")

    def _stop(self) -> None:
        """Ends the server's process group: politely, then for certain."""
        process, self._process = self._process, None
        if process is not None:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)  # type: ignore[arg-type]
            self._old_handler = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
