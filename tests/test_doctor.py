"""The doctor: as a command on this machine, and each complaint on what it is about."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from monailabel_dfqsam.doctor import Diagnosis, Finding, Level, surroundings
from monailabel_dfqsam.doctor.speed import model
from monailabel_dfqsam.doctor.surroundings import PORT, archive, folder, settings, viewers
from monailabel_dfqsam.doctor.telling import as_json
from monailabel_dfqsam.sam import checkpoint
from monailabel_dfqsam.server.runs.folder import ModelFolder
from tests.server_fixtures import write_volume

SECONDS = 20.0  # on an idle machine; its own clock is asked, since a busy one is no fault of the doctor's


def diagnosis_of(*findings: Finding) -> Diagnosis:
    return Diagnosis(findings, None)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The command's JSON on a folder with one image, and its user seconds."""
    root = tmp_path_factory.mktemp("doctor")
    (root / "studies").mkdir()
    write_volume(root / "studies" / "a.nii.gz")
    line = [sys.executable, "-m", "monailabel_dfqsam", "doctor", "--studies", str(root / "studies"), "--json"]
    environment = {**os.environ, "XDG_DATA_HOME": str(root / "data")}
    before = os.times()
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
    after = os.times()
    assert done.returncode in (0, 1), done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    seconds = after.children_user - before.children_user
    return {**found, "returncode": done.returncode, "seconds": seconds, "left": list(root.rglob("data/**/*"))}


def named(told: dict[str, Any], name: str) -> dict[str, Any]:
    found = [finding for finding in told["findings"] if finding["name"] == name]
    assert len(found) == 1, name
    return found[0]


def test_the_command_says_the_same_as_its_exit_status(told: dict[str, Any]) -> None:
    levels = {finding["level"] for finding in told["findings"]}
    assert told["serves"] == ("problem" not in levels) == (told["returncode"] == 0)


def test_every_complaint_has_a_remedy_in_a_sentence(told: dict[str, Any]) -> None:
    for finding in told["findings"]:
        assert (finding["remedy"] is None) == (finding["level"] == "fine"), finding
        assert finding["remedy"] is None or finding["remedy"][-1] == "." or "pip install" in finding["remedy"]


def test_machine_engines_and_packages_are_those_of_this_process(told: dict[str, Any]) -> None:
    assert named(told, "torch")["text"] == torch.__version__.partition("+")[0]
    assert f"{told['machine']['cores_usable']} cores" in named(told, "processor")["text"]
    assert named(told, "reference")["level"] == "fine"
    if not torch.cuda.is_available():
        assert (
            "torch sees no CUDA device" in named(told, "cutlass")["text"]
            or "not built" in named(told, "cutlass")["text"]
        )


def test_a_folder_of_studies_and_viewers_are_looked_at(told: dict[str, Any]) -> None:
    studies = next(finding for finding in told["findings"] if finding["part"] == "studies")
    assert (studies["level"], studies["text"][-2:]) == ("fine", " 1")
    assert named(told, "OHIF")["level"] == named(told, "python")["level"] == "fine"


def test_clicks_are_measured_and_nothing_is_left(told: dict[str, Any]) -> None:
    assert 0 < told["model"]["cached_ms"] < told["model"]["first_ms"] < 60_000
    assert told["model"]["memory_bytes"] > 1e8
    assert told["left"] == []
    assert told["seconds"] < SECONDS


def test_a_diagnosis_is_json(tmp_path: Path) -> None:
    bad = diagnosis_of(Finding("studies", "x", "is a file", Level.PROBLEM, "Give a folder."))
    told = json.loads(json.dumps(as_json(bad)))
    assert (told["serves"], told["model"]) == (False, None)
    assert told["findings"][0]["remedy"] == "Give a folder."


def test_folders_that_do_not_serve(tmp_path: Path) -> None:
    assert folder(tmp_path / "none").level is Level.PROBLEM
    assert folder(tmp_path).level is Level.WARNING  # empty
    file = tmp_path / "a.nii.gz"
    file.touch()
    assert "is a file" in folder(file).text
    assert folder(tmp_path).level is Level.FINE


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written to" in folder(tmp_path).text
    finally:
        tmp_path.chmod(0o700)


class _Archive(BaseHTTPRequestHandler):
    """Answers by path: /works, /empty, /closed, /page."""

    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        kind = self.path.split("/")[1]
        status = {"works": 200, "empty": 204, "closed": 401, "page": 200}.get(kind, 404)
        body = {"works": b'[{"0020000D": {}}]', "page": b"<html>"}.get(kind, b"")
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def http() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Archive)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("kind", "level", "words"),
    [
        ("works", Level.FINE, "answers"),
        ("empty", Level.FINE, "it is empty"),
        ("closed", Level.PROBLEM, "refuses this user (401)"),
        ("page", Level.PROBLEM, "is no DICOMweb service"),
        ("missing", Level.PROBLEM, "is no DICOMweb service"),
    ],
)
def test_an_archive_is_asked_once(http: HTTPServer, kind: str, level: Level, words: str) -> None:
    found = archive(f"http://127.0.0.1:{http.server_port}/{kind}/")
    assert (found.level, words in found.text) == (level, True), found
    assert http.asked == [f"/{kind}/studies?limit=1"]  # type: ignore[attr-defined]


def test_an_archive_that_is_not_there() -> None:
    begin = time.monotonic()
    found = archive("http://127.0.0.1:9/dicom-web")
    assert (found.level, "does not answer" in found.text) == (Level.PROBLEM, True)
    assert time.monotonic() - begin < surroundings._QIDO_SECONDS + 5


def test_a_port_that_is_taken_prevents_serving() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", PORT))
            listener.listen()
        except OSError:
            pass  # somebody else's, which serves as well
        found = next(finding for finding in viewers() if finding.name == f"port {PORT}")
    assert (found.level, found.text) == (Level.PROBLEM, "taken")


def test_a_program_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    levels = {finding.name: finding.level for finding in viewers()}
    assert levels["python"] is Level.PROBLEM


def test_settings_that_slow_down_or_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "usable_cores", lambda: 4)
    found = {
        finding.name: finding
        for finding in settings(
            {
                "OMP_NUM_THREADS": "64",
                "MKL_NUM_THREADS": "4",
                "MONAI_LABEL_CORS_ORIGINS": '["https://viewer"]',
                "MONAI_LABEL_DATASTORE_PASSWORD": "secret",
            }
        )
    }
    assert found["OMP_NUM_THREADS"].level is Level.WARNING
    assert found["MKL_NUM_THREADS"].level is Level.FINE
    assert found["MONAI_LABEL_CORS_ORIGINS"].level is Level.WARNING
    assert "MONAI_LABEL_DATASTORE_PASSWORD" in found["set for MONAI Label"].text
    assert not any("secret" in finding.text for finding in found.values())
    assert "login" not in {finding.name for finding in settings({"MONAI_LABEL_AUTH_ENABLE": "true"})}


def test_a_checkpoint_that_cannot_be_served(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    models = ModelFolder(tmp_path / "model")
    findings, measured = model(path, models)
    assert ([finding.level for finding in findings], measured) == ([Level.PROBLEM], None)
    path.write_bytes(b"no checkpoint")
    findings, measured = model(path, models)
    assert ([finding.level for finding in findings], measured) == ([Level.PROBLEM], None)
    assert "is damaged" in findings[0].text


def test_the_published_lite_medsam_is_known_by_its_name(
    lite_medsam: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = Path(checkpoint.LITE_MEDSAM)
    findings, measured = model(named, ModelFolder(tmp_path))
    assert measured is not None
    assert findings[0] == Finding("model", "checkpoint", lite_medsam.name)
    monkeypatch.setattr(checkpoint, "_LITE_MEDSAM_PACKAGE", "no_such_medsam")
    findings, measured = model(named, ModelFolder(tmp_path))
    assert (measured, findings[0].level) == (None, Level.PROBLEM)
    assert "install monailabel-dfqsam[litemedsam]" in findings[0].text
