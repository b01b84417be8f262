"""The queue of runs, with real processes and without a server around it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.server.runs.parent import began
from monailabel_dfqsam.server.runs.queue import STOPPED_BY_REQUEST, BusyError, ElsewhereError, RunQueue
from monailabel_dfqsam.server.runs.record import Run, RunState
from monailabel_dfqsam.server.runs.reporter import SERVER_ENDED
from monailabel_dfqsam.server.settings import Settings
from tests.server_fixtures import WORK_SECONDS, checkpoint, process_exists, slow_processes, wait

QUICK = {"preset": "static", "calibration": "gaussian", "iterations": 2}
LONG = {"iterations": 50_000}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "model", checkpoint=checkpoint(tmp_path))


@pytest.fixture
def queue(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunQueue]:
    """As a server makes it; whatever runs at the end is stopped."""
    monkeypatch.setenv("DFQSAM_SERVER_PID", str(os.getpid()))
    queue = queue_of(settings)
    yield queue
    queue.stop()


def queue_of(settings: Settings) -> RunQueue:
    conf = {"checkpoint": str(settings.checkpoint), "model_dir": str(settings.model_dir), "min_fidelity": "0"}
    app = str(settings.model_dir.parent)
    return RunQueue(ModelFolder(settings.model_dir), {"app_dir": app, "studies": app, "conf": conf})


def run_of(**options: object) -> Run:
    return Run("dfqsam", options)


def record(settings: Settings, run: Run) -> Run:
    found = ModelFolder(settings.model_dir).run(run.id)
    assert found is not None
    return found


def ended(settings: Settings, run: Run) -> Run:
    wait(lambda: record(settings, run).state.ended, WORK_SECONDS)
    return record(settings, run)


def test_a_run_exists_from_the_moment_it_is_accepted(
    queue: RunQueue, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process begins late: all the while it is there, and the one before it is not taken for it."""
    first = replace(run_of(**QUICK), state=RunState.PUBLISHED, key="0" * 16)
    ModelFolder(settings.model_dir).write_run(first)
    monkeypatch.setenv("PYTHONPATH", slow_processes(tmp_path, 4.0))
    run = queue.ask(run_of(**QUICK, seed=1))
    begin = time.monotonic()
    while time.monotonic() - begin < 3:
        found = record(settings, run)
        assert not found.state.ended
        assert [one.id for one in queue.active()] == [run.id]
        time.sleep(0.1)
    with pytest.raises(BusyError):
        queue.ask(run_of(**QUICK))
    second = ended(settings, run)
    assert (second.state, second.options, second.error) == (RunState.PUBLISHED, {**QUICK, "seed": 1}, "")
    assert second.fidelity is not None
    assert ModelFolder(settings.model_dir).published()["key"] == second.key != first.key  # type: ignore[index]
    assert second.ended >= second.created
    assert queue.active() == []
    assert "published" in queue.lines(run.id)[-1]


def test_after_the_clock_was_set_back_the_last_run_is_the_last(queue: RunQueue, settings: Settings) -> None:
    before = replace(run_of(**QUICK), state=RunState.PUBLISHED, created="2099-01-01T00:00:00.000000+00:00")
    folder = ModelFolder(settings.model_dir)
    folder.write_run(before)
    runs = [queue.ask(run_of(**LONG, seed=seed), enqueue=True) for seed in (1, 2)]
    assert [run.id for run in folder.runs()] == [runs[1].id, runs[0].id, before.id]


def test_stopping_drops_what_waits_too_and_the_next_one_runs(queue: RunQueue, settings: Settings) -> None:
    running, waiting = queue.ask(run_of(**LONG)), queue.ask(run_of(**LONG, seed=1), enqueue=True)
    wait(lambda: record(settings, running).stage == "synthesis", WORK_SECONDS)
    assert [run.id for run in queue.active()] == [running.id, waiting.id]
    assert record(settings, waiting).state is RunState.QUEUED
    pid = record(settings, running).pid
    assert pid is not None
    assert [run.id for run in queue.stop()] == [running.id, waiting.id]
    for run in (running, waiting):
        found = record(settings, run)
        assert (found.state, found.error) == (RunState.STOPPED, STOPPED_BY_REQUEST)
    assert not process_exists(pid)
    assert queue.stop() == queue.active() == []
    assert not ModelFolder(settings.model_dir).building.exists()
    found = ended(settings, queue.ask(run_of(**QUICK, checkpoint="other.pth")))
    assert found.state is RunState.FAILED
    assert "there is no checkpoint 'other.pth'" in found.error


def test_one_that_is_killed_has_failed(queue: RunQueue, settings: Settings) -> None:
    run = queue.ask(run_of(**LONG))
    wait(lambda: record(settings, run).pid is not None, WORK_SECONDS)
    os.kill(record(settings, run).pid or 0, signal.SIGKILL)
    found = ended(settings, run)
    assert found.state is RunState.FAILED
    assert found.error == "its process was ended by SIGKILL, perhaps for want of memory"


def test_one_whose_process_does_not_come_up_has_failed(
    queue: RunQueue, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", slow_processes(tmp_path, 0.0, "import os; os._exit(7)"))
    found = ended(settings, queue.ask(run_of(**QUICK)))
    assert found.state is RunState.FAILED
    assert "status 7" in found.error


def test_a_second_server_of_the_folder_touches_nothing_until_the_first_has_gone(
    queue: RunQueue, settings: Settings
) -> None:
    run = queue.ask(run_of(**LONG))
    wait(lambda: record(settings, run).stage == "synthesis", WORK_SECONDS)
    building = ModelFolder(settings.model_dir).building
    building.mkdir()
    second = queue_of(settings)
    assert not second.own()
    with pytest.raises(ElsewhereError):
        second.ask(run_of(**QUICK))
    assert second.stop() == []
    assert record(settings, run).state is RunState.RUNNING
    assert building.is_dir()


def test_an_orphan_is_ended_and_another_process_of_its_number_is_not(settings: Settings) -> None:
    """Even one that has the run's id in its command line, as an editor of its record has."""
    folder, run = ModelFolder(settings.model_dir), run_of(**LONG)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", run.id])
    since = began(process.pid)
    assert since is not None
    try:
        for wrong in (since - 3600, None):
            folder.write_run(replace(run, state=RunState.RUNNING, pid=process.pid, began=wrong))
            assert queue_of(settings).own()
            assert record(settings, run).state is RunState.STOPPED
            assert process.poll() is None
        folder.write_run(replace(run, state=RunState.RUNNING, pid=process.pid, began=since))
        assert queue_of(settings).own()
        assert not process_exists(process.pid)
    finally:
        process.kill()
        process.wait()
    assert began(process.pid) is None


def test_a_record_of_an_earlier_version_is_read(settings: Settings) -> None:
    """It does not say when its process began."""
    folder, run = ModelFolder(settings.model_dir), replace(run_of(**QUICK), state=RunState.PUBLISHED)
    folder.write_run(run)
    path = folder.path / "runs" / f"{run.id}.json"
    values = json.loads(path.read_text())
    del values["began"]
    path.write_text(json.dumps(values))
    assert record(settings, run) == run


def test_what_a_dead_server_left_is_settled_at_the_next_start(settings: Settings) -> None:
    folder = ModelFolder(settings.model_dir)
    waiting = run_of(**QUICK)
    # Another process may have its number by then, like this one here, which lives on.
    running = replace(run_of(**QUICK), state=RunState.RUNNING, pid=os.getpid(), seconds=5.0)
    done = replace(run_of(**QUICK), state=RunState.PUBLISHED)
    for run in (waiting, running, done):
        folder.write_run(run)
    folder.building.mkdir()
    assert queue_of(settings).own()
    for run in (waiting, running):
        found = record(settings, run)
        assert (found.state, found.error, found.seconds) == (RunState.STOPPED, SERVER_ENDED, run.seconds)
    assert record(settings, done) == done
    assert not folder.building.exists()
