"""What goes wrong in a server's life, and that nothing is lost by it: kills, damaged files, full disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from monailabel_dfqsam.sam import VARIANTS, Sam
from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.server.runs.record import RunState
from monailabel_dfqsam.server.runs.reporter import SERVER_ENDED
from tests.server_fixtures import (
    OBJECT,
    QUANTIZED,
    QUICK,
    WORK_SECONDS,
    Running,
    Server,
    checkpoint,
    new_server,
    process_exists,
    quantize,
    wait,
)

END_SECONDS = 30.0
_ATTEMPTS = 5  # to catch a stage that lasts a moment


@pytest.fixture(scope="module")
def server(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Another server with a copy of the quantized one's models and a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("faults")
    server = new_server(folder)
    shutil.copytree(running.server.app / "model", server.app / "model")
    try:
        server.start({**QUICK, "checkpoint": checkpoint(folder)})
        yield server
    finally:
        server.stop()


def model(server: Server) -> str:
    return str(server.session.infer("phantom0", [OBJECT]).params["model"])


def kept(server: Server) -> dict[str, int]:
    """Artifacts and their reports by name and size."""
    return {p.name: p.stat().st_size for p in (server.app / "model").iterdir() if p.suffix in
            (".safetensors", ".html")}  # fmt: skip


def kill_at(server: Server, stage: str, seed: int) -> str | None:
    """Starts a quantization and kills it at a stage; its id, or None when it was done before it could be."""
    folder = ModelFolder(server.app / "model")
    identity = server.session.train(seed=seed, iterations=2 if stage != "synthesis" else 50_000)
    end = time.monotonic() + WORK_SECONDS
    while time.monotonic() < end:
        run = folder.run(identity)
        assert run is not None
        if run.state.ended:
            return None
        if run.pid and run.stage == stage and (stage != "writing" or folder.building.is_dir()):
            _kill(run.pid)
            return identity
        time.sleep(0.001)
    raise TimeoutError(stage)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not process_exists(pid), END_SECONDS)


@pytest.mark.parametrize("stage", ["synthesis", "compensation", "writing"])
def test_a_killed_quantization_leaves_everything_as_it_was(server: Server, stage: str) -> None:
    seeds = range(100, 100 + _ATTEMPTS)
    before = kept(server)
    for seed in seeds:
        identity = kill_at(server, stage, seed)
        if identity:
            break
        before = kept(server)  # it was done before it could be killed
    else:
        pytest.fail(f"no quantization was caught at '{stage}'")
    run = server.session.ended_run(identity)
    assert run["state"] == "failed"
    assert "ended by SIGKILL" in run["error"]
    assert kept(server) == before
    assert not (server.app / "model" / "building").exists()
    assert model(server) in QUANTIZED


def test_after_the_kills_it_quantizes_again_and_nothing_is_left(server: Server) -> None:
    assert quantize(server, seed=200)["state"] == "published"
    folder = server.app / "model"
    assert not (folder / "building").exists()
    assert not list(folder.glob(".*.partial"))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_an_artifact_damaged_under_the_server_goes_on_serving(server: Server, damage: str) -> None:
    """It was read once; even slices that no one has asked for are answered."""
    published = ModelFolder(server.app / "model").published()
    assert published is not None
    path = server.app / "model" / f"{published['key']}.safetensors"
    whole = path.read_bytes()
    try:
        if damage == "truncated":
            os.truncate(path, 100)
        else:
            path.write_bytes(bytes(byte ^ 0xFF for byte in whole[-4096:]))
        reply = server.session.infer("phantom0", [[9, 9, 5 if damage == "flipped" else 6]])
        assert reply.params["model"] in QUANTIZED
        assert not reply.params["cached"]
    finally:
        path.write_bytes(whole)


def test_a_checkpoint_replaced_by_rubbish_is_said_and_the_model_stays(server: Server) -> None:
    path = server.app.parent / "tiny.safetensors"
    path.write_bytes(b"not a checkpoint" * 100)
    run = quantize(server, seed=300)
    assert run["state"] == "failed"
    assert "tiny.safetensors" in str(run["error"])
    assert str(path.parent) not in str(run["error"])
    assert model(server) in QUANTIZED


def test_a_checkpoint_replaced_by_another_is_quantized_on_demand(server: Server) -> None:
    before = server.session.infer("phantom0", [OBJECT]).params["artifact"]
    torch.manual_seed(1)
    partial = server.app.parent / "new.safetensors"
    save_file(Sam(VARIANTS["tiny"]).state_dict(), partial)
    os.replace(partial, server.app.parent / "tiny.safetensors")
    assert server.session.infer("phantom0", [OBJECT]).params["artifact"] == before
    assert quantize(server, seed=301)["state"] == "published"
    wait(lambda: server.session.infer("phantom0", [OBJECT]).params["artifact"] != before, WORK_SECONDS)


def test_sigterm_leaves_no_orphan(server: Server) -> None:
    """The last test of its server, which it ends."""
    folder = ModelFolder(server.app / "model")
    identity = server.session.train(seed=400, iterations=50_000)
    wait(lambda: folder.run(identity).pid is not None, WORK_SECONDS)  # type: ignore[union-attr]
    server.stop()
    wait(lambda: not process_exists(folder.run(identity).pid), END_SECONDS)  # type: ignore[union-attr, arg-type]
    run = folder.run(identity)
    assert run is not None
    assert (run.state, run.error) == (RunState.STOPPED, SERVER_ENDED)


can_mount = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True
    ).returncode
    != 0,
    reason="mount namespaces are not permitted here",
)


@can_mount
@pytest.mark.slow
def test_full_disks_lose_nothing(tmp_path: Path) -> None:
    line = ["unshare", "-rm", sys.executable, "-m", "tests.full_disk_scenario", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    labels = seen["labels"]
    assert labels["first"] == [200, ""]
    assert labels["full"][0] == 507
    assert "disk" in labels["full"][1]
    assert labels["kept"]
    assert labels["record"] == [{"name": "organ", "idx": 1}]
    assert labels["click"] > 0
    assert labels["room"] == [200, ""]
    assert labels["replaced"]
    assert labels["left"] == []
    assert seen["small"]["state"] == "failed"
    assert "space" in seen["small"]["error"]
    assert seen["after_small"] == "full precision"
    assert not [name for name in seen["left"] if "partial" in name or name.endswith(".safetensors")]
    assert "building" not in seen["left"]
    assert seen["large"]["state"] == "published"
