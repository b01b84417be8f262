"""Processes that the server starts: which they are, and that they end with it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import psutil

SERVER_PID = "DFQSAM_SERVER_PID"
"""Environment variable by which the server tells its processes whose children they are."""

_CHECK_SECONDS = 1.0
_SAME_SECONDS = 2.0  # the system tells its start in whole seconds, rounded anew when the clock is set
_NICENESS = 10  # clicks come first


def began(pid: int) -> float | None:
    """When a process began, in seconds after the machine's start, which setting the clock leaves as it is.

    Returns:
        None when there is no such process.
    """
    try:
        return round(float(psutil.Process(pid).create_time() - psutil.boot_time()), 2)
    except psutil.NoSuchProcess:
        return None


def is_running(pid: int | None, since: float | None) -> bool:
    """Whether the process that had a number, and began then, still has it; without `since`, nobody knows."""
    if pid is None or since is None:
        return False
    now = began(pid)
    return now is not None and abs(now - since) < _SAME_SECONDS


def exit_with_parent(last_words: Callable[[], object]) -> None:
    """Ends this process soon after the server that started it has gone; clicks come before its work.

    Does nothing within the server itself, or called from Python.

    Args:
        last_words: called before the end, in a thread of its own.
    """
    server = os.environ.get(SERVER_PID, "")
    if not server.isdecimal() or int(server) == os.getpid():
        return
    if hasattr(os, "nice"):
        os.nice(_NICENESS)

    def watch() -> None:
        while os.getppid() == int(server):
            time.sleep(_CHECK_SECONDS)
        try:
            last_words()
        finally:
            os._exit(1)

    threading.Thread(target=watch, name="dfqsam-parent", daemon=True).start()
