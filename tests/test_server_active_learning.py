"""Scoring, the next sample by it, and batches: a real server with labelled, blank and broken studies too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import requests
from monailabel.datastore.local import LocalDatastore

from monailabel_dfqsam.server.answers.active_learning import ConfidenceScoring, is_due, least_confident
from monailabel_dfqsam.server.answers.propose_task import NAME, ProposeTask
from monailabel_dfqsam.server.answers.workbench import Workbench
from monailabel_dfqsam.server.runs.models import FULL_PRECISION, Models
from monailabel_dfqsam.server.settings import Settings
from monailabel_dfqsam.slicer_session import SlicerSession
from tests.server_fixtures import SHAPE, WORK_SECONDS, Server, affine, checkpoint, new_server, wait

MIDDLE = SHAPE[2] // 2
NOW = 1_000_000.0


def add_studies(folder: Path) -> None:
    """Beside the phantoms one study of nothing, and one that no program can read."""
    nibabel.save(nibabel.Nifti1Image(np.full(SHAPE, 7, np.int16), affine()), folder / "blank.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"this is no image")


def infos(server: Server) -> dict[str, dict[str, Any]]:
    """Of all images."""
    objects = get(server, "/datastore/?output=all").json()["objects"]
    return {image: found["image"]["info"] for image, found in objects.items()}


def get(server: Server, path: str) -> requests.Response:
    return requests.get(server.url + path, timeout=60)


def post(server: Server, path: str, **params: Any) -> requests.Response:
    return requests.post(server.url + path, json=params, timeout=60)


def ended(server: Server, status: str) -> dict[str, Any]:
    """What became of something in a process of its own, when it has come to its end."""
    wait(lambda: get(server, status).json()["status"] not in ("SUBMITTED", "RUNNING"), WORK_SECONDS)
    found: dict[str, Any] = get(server, status).json()
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("learning")
    server = new_server(folder, volumes=3)
    add_studies(Path(server.studies))
    try:
        server.start({"quantize": "false", "checkpoint": checkpoint(folder)})
        label = np.zeros(SHAPE, np.uint8)
        label[40:48, 16:24, 3] = 1
        nibabel.save(nibabel.Nifti1Image(label, affine()), folder / "label.nii.gz")
        server.session.save_label("phantom0", folder / "label.nii.gz", [{"name": "organ", "idx": 1}])
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def scored(server: Server) -> dict[str, Any]:
    """The scoring that begins when the least confident image is asked for."""
    assert get(server, "/scoring/").status_code == 404  # not at the start, nor for any other strategy
    assert server.session.next_sample("first")["id"] == "blank"
    assert get(server, "/scoring/").status_code == 404
    assert server.session.next_sample("least_confident")["id"] == "blank"  # by name, when none is scored
    wait(lambda: get(server, "/scoring/").status_code == 200, WORK_SECONDS)
    return ended(server, "/scoring/")


@pytest.fixture(scope="module")
def batch(server: Server) -> dict[str, Any]:
    assert post(server, f"/batch/infer/{NAME}?images=unlabeled", max_workers=1).status_code == 200
    return ended(server, "/batch/infer")


def test_every_unlabelled_image_is_scored(server: Server, scored: dict[str, Any]) -> None:
    assert scored["status"] == "DONE"
    assert any(line.startswith("3 scored, 1 skipped") for line in scored["details"])
    assert any(line.startswith("4/4 phantom2: confidence") for line in scored["details"])
    assert any(line.startswith("2/4 broken: skipped") for line in scored["details"])
    entries = {image: info.get("confidence") for image, info in infos(server).items()}
    assert entries["phantom0"] is None
    assert entries["blank"] == {"value": 0.0, "objects": 0, "slice": MIDDLE, "model": FULL_PRECISION}
    assert set(entries["broken"]) == {"error", "model"}
    for image in ("phantom1", "phantom2"):
        assert 0 < entries[image]["value"] <= 1
        assert entries[image]["objects"] > 0


def test_the_least_confident_is_next_and_not_for_two_at_once(server: Server, scored: dict[str, Any]) -> None:
    found = infos(server)
    phantoms = sorted(("phantom1", "phantom2"), key=lambda image: found[image]["confidence"]["value"])

    def following(client: str) -> Any:
        return SlicerSession(server.url, client_id=client).next_sample("least_confident")["id"]

    # `scored` asked for the blank one, as somebody else.
    assert [following(client) for client in ("one", "two", "three")] == [*phantoms, "broken"]
    assert server.session.next_sample("least_confident")["id"] == "blank"
    assert following("one") == phantoms[0]
    assert found["blank"]["confidence"] == infos(server)["blank"]["confidence"]


def test_a_batch_saves_a_label_of_each_unlabelled_image(server: Server, batch: dict[str, Any]) -> None:
    assert batch["status"] == "DONE"
    assert any(line.startswith("3 saved, 1 skipped") for line in batch["details"])
    assert any(line.startswith("skipped broken: ") for line in batch["details"])
    objects = get(server, "/datastore/?output=all").json()["objects"]
    saved = {image: set(found["labels"]) for image, found in objects.items()}
    assert saved == {
        "phantom0": {"final"}, "phantom1": {"original"}, "phantom2": {"original"}, "blank": {"original"},
        "broken": set(),
    }  # fmt: skip


def test_a_saved_label_is_read_again(server: Server, batch: dict[str, Any], tmp_path: Path) -> None:
    params = get(server, "/datastore/label/info?label=phantom1&tag=original").json()["params"]
    names = params["label_names"]
    assert names == {f"object {n}": n for n in range(1, len(names) + 1)}
    assert len(params["scores"]) == len(names) > 0
    reply = get(server, "/datastore/label?label=phantom1&tag=original")
    path = tmp_path / "label.nii.gz"
    path.write_bytes(reply.content)
    image = nibabel.load(path)
    np.testing.assert_allclose(image.affine, affine(), atol=1e-4)
    label = np.asarray(image.dataobj)
    assert label.shape == SHAPE
    assert set(np.unique(label[:, :, MIDDLE])) == {0, *names.values()}
    assert not np.delete(label, MIDDLE, axis=2).any()
    # The same as asked for alone.
    alone = server.session.infer("phantom1", [], model=NAME)
    assert alone.params["label_names"] == names
    assert alone.params["score"] == pytest.approx(params["score"])


def test_what_is_labelled_stays_as_it_is(server: Server, batch: dict[str, Any]) -> None:
    stored = get(server, "/datastore/label?label=phantom0&tag=final").content
    assert stored == (Path(server.studies).parent / "label.nii.gz").read_bytes()
    info = get(server, "/datastore/label/info?label=phantom0&tag=final").json()
    assert info["label_info"] == [{"name": "organ", "idx": 1}]


def test_the_log_names_no_study(server: Server, scored: dict[str, Any], batch: dict[str, Any]) -> None:
    assert "phantom2" not in server.text()
    assert "broken" not in server.text()


@pytest.mark.parametrize("model", ["dfqsam", "dfqsam_3d", "dfqsam_labels", "nothing"])
def test_a_batch_needs_a_model_without_prompts(server: Server, model: str) -> None:
    reply = post(server, f"/batch/infer/{model}?images=unlabeled")
    assert reply.status_code == 403
    assert "without prompts" in reply.json()["detail"]


@pytest.mark.parametrize(
    ("query", "params", "word"),
    [
        ("", {"max_workers": 2}, "max_workers"),
        ("", {"max_batch_size": -1}, "max_batch_size"),
        ("", {"label_tag": "../x"}, "tag"),
        ("", {"label_tag": "final"}, "finished"),
        ("", {"save_label": False}, "save_label"),
        ("", {"window": []}, "window"),
        ("", {"slice": "middle"}, "slice"),
        ("", {"model": "dfqsam"}, "option model"),
        ("", {"images": ["phantom0"]}, "option images"),
        ("&run_sync=true", {}, "run_sync"),
    ],
)
def test_options_that_cannot_be(server: Server, query: str, params: dict[str, Any], word: str) -> None:
    reply = post(server, f"/batch/infer/{NAME}?images=unlabeled{query}", **params)
    assert reply.status_code == 400
    assert word in reply.json()["detail"]


def test_what_a_viewer_is_told(server: Server) -> None:
    info = server.session.info()
    assert info["models"][NAME]["type"] == "others"  # which no viewer's panel lists
    assert set(info["models"][NAME]["config"]) == {"window"}
    assert "confidence" in info["scoring"]
    assert "least_confident" in info["strategies"]
    for k in (0, SHAPE[2] - 1):
        assert server.session.infer("phantom1", [], model=NAME, slice_index=k).params["slice"] == k
    with pytest.raises(Exception, match="slice must be 0 to 6"):
        server.session.infer("phantom1", [], model=NAME, slice_index=SHAPE[2])


def test_a_model_judges_an_image_once(tmp_path: Path) -> None:
    studies = Path(new_server(tmp_path, volumes=2).studies)
    add_studies(studies)
    shutil.copy(studies / "phantom0.nii.gz", studies / "same.nii.gz")
    settings = Settings(model_dir=tmp_path / "model", checkpoint=checkpoint(tmp_path), quantize=False)
    scoring = ConfidenceScoring(ProposeTask(Workbench(Models(settings), 64), settings))
    store = LocalDatastore(str(studies))
    assert scoring({}, store) == {"scored": 4, "before": 0, "skipped": 1}
    assert "damaged" in store.get_image_info("broken")["confidence"]["error"]
    assert store.get_image_info("same")["confidence"] == store.get_image_info("phantom0")["confidence"]
    assert scoring({}, store) == {"scored": 0, "before": 5, "skipped": 0}
    store.update_image_info("same", {"confidence": {"value": 0.9, "model": "another"}})
    assert scoring({}, store) == {"scored": 1, "before": 4, "skipped": 0}
    record = json.loads((studies / "datastore_v2.json").read_text())
    assert record["objects"]["same"]["image"]["info"]["confidence"]["model"] == FULL_PRECISION


def info(value: object = None, client: str = "", minutes: float = 0) -> dict[str, Any]:
    """An image's, scored or not, given to a client some minutes ago or not."""
    found: dict[str, Any] = {} if value is None else {"confidence": {"value": value, "model": "m"}}
    if client:
        found["strategy"] = {"random": {"ts": int(NOW - 60 * minutes), "client_id": client}}
    return found


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ({}, None),
        ({"b": info(), "a": info()}, "a"),
        ({"a": info(), "b": info(0.9)}, "b"),
        ({"a": info(0.5), "b": info(0.2), "c": info(0.2)}, "b"),
        ({"a": info(0.1, "other", 14), "b": info(0.5)}, "b"),
        ({"a": info(0.1, "other", 16), "b": info(0.5)}, "a"),
        ({"a": info(0.1, "me", 1), "b": info(0.5)}, "a"),
        ({"a": info(0.1, "other", 1), "b": info()}, "b"),
        ({"a": info(0.6, "other", 1), "b": info(0.5, "other", 2)}, "b"),
        # Given out an hour ahead of a clock that was set back since, and a minute.
        ({"a": info(0.1, "other", -60), "b": info(0.5)}, "a"),
        ({"a": info(0.1, "other", -1), "b": info(0.5)}, "b"),
        ({"a": info("much"), "b": info(float("nan")), "c": {"confidence": 3, "strategy": [1]}}, "a"),
    ],
)
def test_the_order_of_images(images: dict[str, dict[str, Any]], expected: str | None) -> None:
    assert least_confident(images, "me", NOW) == expected


def test_what_is_due() -> None:
    assert is_due({}, "m")
    assert is_due({"confidence": "text"}, "m")
    assert is_due(info(0.5), "another")
    assert not is_due(info(0.5), "m")
    assert not is_due({"confidence": {"error": "unreadable", "model": "m"}}, "m")
