"""The quantization page without a browser: what it is told, what it may ask for, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from monailabel_dfqsam.artifact import read_header
from monailabel_dfqsam.server.page.overview import Overview
from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.server.runs.models import Models
from monailabel_dfqsam.server.runs.queue import RunQueue
from monailabel_dfqsam.server.settings import Settings
from tests.server_fixtures import OBJECT, Running, checkpoint

PICTURE = re.compile(r'src="(data:image/png;base64,[^"]+)"')
UNKNOWN = "0123456789abcdef"
SECONDS = 30


def get(running: Running, path: str) -> requests.Response:
    return requests.get(f"{running.server.url}/dfqsam/{path}", timeout=SECONDS)


def choose(running: Running, key: str, **headers: str) -> requests.Response:
    return requests.post(f"{running.server.url}/dfqsam/choose/{key}", headers=headers, timeout=SECONDS)


def status(running: Running) -> dict[str, Any]:
    answer = get(running, "status")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def folder(running: Running) -> ModelFolder:
    return ModelFolder(running.server.app / "model")


def test_the_status_says_what_the_artifact_says(running: Running) -> None:
    found = status(running)
    key = folder(running).published()["key"]  # type: ignore[index]
    header = read_header(folder(running).artifact(key))
    assert found["model"]["name"] == running.server.serving()
    assert (found["model"]["key"], found["own_key"], found["running"]) == (key, key, None)
    assert found["changing"] is False
    assert found["checkpoint"] == {"name": running.weights.name, "bytes": running.weights.stat().st_size}
    assert found["threshold"] == 0
    (artifact,) = found["artifacts"]
    assert artifact["fidelity"] == found["model"]["fidelity"] == header["fidelity"]
    assert artifact["bytes"] == header["sizes"]["artifact_bytes"] < artifact["checkpoint_bytes"]
    assert (artifact["name"], artifact["made"], artifact["refusal"]) == ("W4A4", header["created"], "")
    assert found["options"]["bits"][0] == "4"
    assert found["options"]["iterations"] == running.conf["iterations"]


def test_the_history_has_the_quantization_of_the_first_start(running: Running) -> None:
    (row,) = status(running)["runs"]
    assert (row["trainer"], row["state"], row["error"]) == ("dfqsam", "published", "")
    assert "pid" not in row
    assert get(running, f"runs/{row['id']}").json() == row
    assert row["key"] == status(running)["model"]["key"]
    assert row["options"] == {
        "bits": 4, "fidelity": "auto", "policy": "deploy", "calibration": "synthetic",
        "iterations": running.conf["iterations"], "images": 1, "seed": 0, "checkpoint": running.weights.name,
    }  # fmt: skip
    assert 0 < row["seconds"] < 600
    assert row["fidelity"] == status(running)["model"]["fidelity"]


@pytest.mark.parametrize("identity", ["0" * 32, "x", "current", "%2e%2e%2fcurrent"])
def test_a_run_is_named_by_its_id_alone(running: Running, identity: str) -> None:
    answer = get(running, f"runs/{identity}")
    assert answer.status_code in (400, 404)
    assert isinstance(answer.json()["detail"], str)


def test_speed_is_that_of_the_clicks_answered(running: Running) -> None:
    before = status(running)["model"]["speed"]["click"]
    running.server.session.infer("phantom0", [OBJECT])  # embeds the slice, unless another test did
    again = running.server.session.infer("phantom0", [OBJECT])
    assert again.params["cached"]
    after = status(running)["model"]["speed"]["click"]
    assert after["count"] > (before or {"count": 0})["count"]
    assert 0 < after["seconds"] < SECONDS


def test_pictures_are_those_of_the_report(running: Running) -> None:
    key = status(running)["model"]["key"]
    report = get(running, f"report/{key}")
    assert "sandbox" in report.headers["Content-Security-Policy"]
    expected = PICTURE.findall(report.text)
    found = get(running, f"pictures/{key}").json()
    steps = [step for steps in found["evolution"] for step in steps]
    assert [picture["src"] for picture in (*found["images"], *steps)] == expected
    assert len(found["images"]) == 1
    assert found["images"][0]["caption"] == "synthetic image 1 of 1"
    assert steps
    caption = re.compile(r"iteration \d+, score \d\.\d\d, \d+ regions?, \d+%")
    assert all(caption.fullmatch(step["caption"]) for step in steps)
    content = base64.b64decode(found["images"][0]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (256, 256)


@pytest.mark.parametrize("name", ["", "page.css", "page.js"])
def test_the_page_is_its_own_and_runs_no_other_script(running: Running, name: str) -> None:
    answer = get(running, name)
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"https?://|//[a-z]+\.", answer.text)
    if not name:
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script>|javascript:", answer.text)


def test_the_address_without_its_slash_leads_there(running: Running) -> None:
    answer = requests.get(f"{running.server.url}/dfqsam", timeout=SECONDS)
    assert answer.url == f"{running.server.url}/dfqsam/"
    assert answer.status_code == 200


def test_nothing_of_the_study_is_told(running: Running) -> None:
    text = json.dumps(status(running))
    for secret in ("phantom", running.server.studies, str(running.server.app), str(running.weights.parent)):
        assert secret not in text


@pytest.mark.parametrize("what", ["report", "pictures", "choose"])
@pytest.mark.parametrize("key", [UNKNOWN, "x", UNKNOWN.upper(), UNKNOWN + "0", "current.json", "%2e%2e", "é"])
def test_a_model_is_named_by_its_key_alone(running: Running, what: str, key: str) -> None:
    before = folder(running).stamp()
    answer = choose(running, key) if what == "choose" else get(running, f"{what}/{key}")
    assert answer.status_code == (404 if key == UNKNOWN else 400 if key != "%2e%2e" else answer.status_code)
    assert 400 <= answer.status_code < 500
    assert isinstance(answer.json()["detail"], str)
    assert folder(running).stamp() == before


def test_another_sites_page_chooses_nothing(running: Running) -> None:
    key = status(running)["model"]["key"]
    before = folder(running).stamp()
    answer = choose(running, key, Origin="http://elsewhere.example")
    assert answer.status_code == 403
    assert "origin" in answer.json()["detail"]
    assert folder(running).stamp() == before


def test_a_model_that_cannot_be_served_says_why(running: Running, tmp_path: Path) -> None:
    """Too low a fidelity, and a damaged file, beside a checkpoint that may be quantized."""
    key = status(running)["model"]["key"]
    whole = folder(running).artifact(key).read_bytes()
    (tmp_path / f"{key}.safetensors").write_bytes(whole)
    (tmp_path / f"{UNKNOWN}.safetensors").write_bytes(whole[:100])
    (tmp_path / "other.pth").touch()
    settings = Settings(tmp_path, checkpoint=checkpoint(tmp_path), min_fidelity=1.0)
    models = Models(settings)
    overview = Overview(models, settings, RunQueue(models.folder, {}))
    found = overview.status()
    assert found["model"]["name"] == "loading"
    refusals = {artifact["key"]: artifact["refusal"] for artifact in found["artifacts"]}
    assert sorted(refusals) == sorted([key, UNKNOWN])
    assert "one grey level away" in refusals[key]
    assert "damaged" in refusals[UNKNOWN]
    assert found["options"]["checkpoint"] == [settings.checkpoint.name, "other.pth"]
    assert overview.pictures(key) is None
    (tmp_path / f"{UNKNOWN}.safetensors").write_bytes(whole)
    again = {artifact["key"]: artifact["refusal"] for artifact in overview.status()["artifacts"]}
    assert "one grey level away" in again[UNKNOWN]
