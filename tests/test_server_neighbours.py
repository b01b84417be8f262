"""Idle work stays idle work."""

from __future__ import annotations

import threading
import time

from monailabel_dfqsam.server.answers.neighbours import Neighbours

PATIENCE = 60.0  # seconds, far more than needed
QUIET = 0.5  # seconds in which a job that may start would have started


def test_jobs_run_in_order_once_it_is_quiet() -> None:
    neighbours, done, order = Neighbours(), threading.Event(), []
    with neighbours.busy():
        neighbours.next([lambda: order.append(1), lambda: order.append(2), done.set])
        time.sleep(QUIET)
        assert order == []
    assert done.wait(PATIENCE)
    assert order == [1, 2]


def test_newer_jobs_replace_waiting_ones() -> None:
    neighbours, done, order = Neighbours(), threading.Event(), []
    with neighbours.busy():
        neighbours.next([lambda: order.append("old")])
        neighbours.next([lambda: order.append("new"), done.set])
    assert done.wait(PATIENCE)
    assert order == ["new"]


def test_a_failing_job_stops_nothing() -> None:
    neighbours, done = Neighbours(), threading.Event()

    def fail() -> None:
        raise OSError("gone")

    neighbours.next([fail, done.set])
    assert done.wait(PATIENCE)
