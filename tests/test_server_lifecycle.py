"""Starts, stops and accidents of the real server: what it serves afterwards, and what it leaves on disk."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.server.runs.queue import STOPPED_BY_REQUEST
from monailabel_dfqsam.server.runs.record import Run
from monailabel_dfqsam.slicer_session import ServerAnswer
from tests.server_fixtures import (
    OBJECT,
    QUANTIZED,
    WORK_SECONDS,
    Running,
    Server,
    new_server,
    process_exists,
    slow_processes,
    wait,
)

LONG: dict[str, Any] = {
    "seed": 1,
    "iterations": 50_000,
}  # far from done when a test is
ORPHAN_SECONDS = 15.0


def beside(running: Running, folder: Path) -> Server:
    """Another server with a copy of the quantized one's models."""
    server = new_server(folder)
    shutil.copytree(running.server.app / "model", server.app / "model")
    return server


@pytest.fixture(scope="module")
def second(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its trainings' processes begin late, as on a slow machine."""
    folder = tmp_path_factory.mktemp("second")
    server = beside(running, folder)
    try:
        server.start(running.conf, {"PYTHONPATH": slow_processes(folder, 5.0)})
        yield server
    finally:
        server.stop()


def artifacts(server: Server) -> dict[str, int]:
    """Model files by name and size, without what tells how quantizations go."""
    folder = server.app / "model"
    return {
        str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.parent.name != "runs"
    }


def train(server: Server) -> Run:
    """Starts a long quantization; its record once it is at work."""
    model, identity = ModelFolder(server.app / "model"), server.session.train(**LONG)
    wait(lambda: model.run(identity).stage == "synthesis", WORK_SECONDS)  # type: ignore[union-attr]
    run = model.run(identity)
    assert run is not None
    assert run.pid is not None
    return run


def test_the_second_start_is_quantized_at_once(second: Server) -> None:
    assert second.session.infer("phantom0", [OBJECT]).params["model"] in QUANTIZED
    assert not second.session.is_training()


def test_a_run_is_there_when_its_request_is_answered(second: Server) -> None:
    """Whoever asks next is told of it, not of the one before."""
    session = second.session
    (before,) = session.overview()["runs"]
    identity = session.train(**LONG)
    assert identity != before["id"]
    stats = session.info()["train_stats"]["dfqsam"]
    assert (stats["id"], stats["state"] in ("queued", "running")) == (identity, True)
    status = session.train_status()
    assert (status["id"], status["status"] in ("SUBMITTED", "RUNNING")) == (identity, True)
    assert status["details"]  # 3D Slicer shows the last one
    assert session.is_training()
    overview = session.overview()
    assert overview["running"]["id"] == identity
    assert [run["id"] for run in overview["runs"]] == [identity, before["id"]]
    with pytest.raises(ServerAnswer, match="running already") as busy:
        session.train(seed=2)
    assert busy.value.status == 429
    waiting = requests.post(f"{second.url}/train/dfqsam?enqueue=true", json={"seed": 2}, timeout=60).json()
    assert (waiting["status"], session.run(waiting["id"])["state"]) == ("SUBMITTED", "queued")
    stopped = session.stop_training()
    assert (stopped["id"], stopped["status"]) == (identity, "STOPPED")
    assert session.run(waiting["id"])["state"] == "stopped"
    assert not session.is_training()
    assert session.stop_training() is None


def test_a_stopped_quantization_leaves_the_served_model(second: Server) -> None:
    before = artifacts(second)
    run = train(second)
    assert second.session.is_training()
    status = second.session.train_status()
    assert status["status"] == "RUNNING"
    wait(lambda: any("synthesis" in line for line in second.session.train_status()["details"]), WORK_SECONDS)
    stats = second.session.info()["train_stats"]["dfqsam"]
    assert (stats["state"], stats["total_epochs"]) == ("running", LONG["iterations"])
    assert second.session.infer("phantom0", [OBJECT]).params["model"] in QUANTIZED
    assert second.session.stop_training()["status"] == "STOPPED"
    assert not process_exists(run.pid)  # type: ignore[arg-type]
    assert second.session.run(run.id)["error"] == STOPPED_BY_REQUEST
    assert second.session.info()["train_stats"]["dfqsam"]["state"] == "stopped"
    assert second.session.infer("phantom0", [OBJECT]).params["model"] in QUANTIZED
    assert artifacts(second) == before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_quantization_ends_with_its_server(second: Server) -> None:
    """The last test of `second`, which it kills as the kernel would."""
    before = artifacts(second)
    run = train(second)
    os.kill(second.pid, signal.SIGKILL)
    wait(lambda: not process_exists(run.pid), ORPHAN_SECONDS)  # type: ignore[arg-type]
    assert {
        name: size for name, size in artifacts(second).items() if not name.startswith("building")
    } == before


def test_a_truncated_artifact_is_refused_and_made_again(running: Running, tmp_path: Path) -> None:
    server = beside(running, tmp_path)
    path = next((server.app / "model").glob("*.safetensors"))
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole // 2)
    try:
        server.start(running.conf)
        assert server.session.infer("phantom0", [OBJECT]).params["model"] == "full precision"
        wait(lambda: server.serving().startswith("W4A4"), WORK_SECONDS)
        refused = [line for line in server.text().splitlines() if "Refused the quantized model" in line]
        assert len(refused) == 1
        assert path.name in refused[0]
        assert path.stat().st_size == pytest.approx(whole, rel=0.01)  # its header holds times
    finally:
        server.stop()
