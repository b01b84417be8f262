"""Processes that the server starts end with it, for nobody else would end them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

SERVER_PID = "DFQSAM_SERVER_PID"
"""Environment variable by which the server tells its processes whose children they are."""

_CHECK_SECONDS = 1.0
_NICENESS = 10  # clicks come first


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
