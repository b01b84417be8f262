"""Work for idle moments: the slices beside the last click, since the next click is often there.

One daemon thread, started at the first job. A lock guards the list of jobs and the count of requests under
way; jobs run one at a time, only while no request is, and a new list replaces what is left of the old one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 0.2  # after an answer, before a job begins: long enough for the viewer's next request


class Neighbours:
    """Runs jobs while nothing else is to be done."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: list[Callable[[], object]] = []
        self._requests = 0
        self._thread: threading.Thread | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """No job begins within."""
        with self._changed:
            self._requests += 1
        try:
            yield
        finally:
            with self._changed:
                self._requests -= 1
                self._changed.notify()

    def next(self, jobs: Sequence[Callable[[], object]]) -> None:
        """Jobs for the next idle moment, first things first; those of an earlier call are dropped."""
        with self._changed:
            self._jobs = list(jobs)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dfqsam-neighbours", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            _attempt(self._take())

    def _take(self) -> Callable[[], object]:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs and not self._requests)
                # Any request or newer list within this time begins the wait anew.
                if not self._changed.wait(_QUIET_SECONDS) and self._jobs and not self._requests:
                    return self._jobs.pop(0)


def _attempt(job: Callable[[], object]) -> None:
    try:
        job()
    except Exception as error:  # the click itself would say the same to whoever makes it
        logger.debug("A neighbouring slice was not prepared: %s", error)
