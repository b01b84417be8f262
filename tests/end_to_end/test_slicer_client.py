"""A whole session of 3D Slicer's plugin, by its own client, against the real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import SimpleITK as sitk
from numpy.typing import NDArray

from tests.end_to_end.slicer_plugin import DEFAULT_EXTENSION, MODEL, Index, Panel, voxels
from tests.server_fixtures import (
    OBJECT,
    SHAPE,
    WORK_SECONDS,
    Server,
    checkpoint,
    new_server,
    wait,
    write_volume,
)

MOSTLY = 0.6  # far above what a mask with its axes turned would reach, which is 0
TINY = 1e-4  # millimetres, float32 headers
RADIUS = 10  # of the ball's disc on its middle slice, in voxels
LABEL_INFO = [{"name": "organ", "idx": 1}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that begins in full precision and quantizes only when Slicer asks for it."""
    folder = tmp_path_factory.mktemp("slicer")
    server = new_server(folder, volumes=2)
    try:
        server.start(
            {"preset": "static", "quantize": False, "min_fidelity": 0, "checkpoint": checkpoint(folder)}
        )
        yield server
    finally:
        server.stop()


@pytest.fixture
def panel(server: Server, tmp_path: Path) -> Panel:
    return Panel(server.url, tmp_path)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A volume that the server does not have, under a name as Slicer gives it."""
    path = tmp_path / f"tmp_own{DEFAULT_EXTENSION}"
    write_volume(path, seed=5)
    return path


def disc() -> NDArray[np.bool_]:
    """[I, J] the ball on its middle slice."""
    i, j = np.indices(SHAPE[:2])
    found: NDArray[np.bool_] = np.hypot(i - OBJECT[0], j - OBJECT[1]) < RADIUS
    return found


def judged(mask: sitk.Image, source: Path, k: int) -> NDArray[np.bool_]:
    """[I, J] a mask's slice k, once its grid is the image's and all other slices are empty."""
    image = sitk.ReadImage(str(source))
    assert mask.GetSize() == image.GetSize()
    np.testing.assert_allclose(mask.GetOrigin(), image.GetOrigin(), atol=TINY)
    np.testing.assert_allclose(mask.GetSpacing(), image.GetSpacing(), atol=TINY)
    np.testing.assert_allclose(mask.GetDirection(), image.GetDirection(), atol=TINY)
    values = voxels(mask)
    assert values.dtype == np.uint8
    assert set(np.flatnonzero(values.any(axis=(0, 1)))) <= {k}
    assert set(np.unique(values)) <= {0, 1}
    return np.asarray(values[:, :, k] > 0)


def image_file(server: Server, name: str = "phantom0") -> Path:
    return Path(server.studies) / f"{name}.nii.gz"


def test_the_panel_finds_what_it_offers(panel: Panel) -> None:
    info = panel.info
    assert info["models"][MODEL]["type"] == "deepgrow"
    assert info["models"][MODEL]["dimension"] == 2
    assert "organ" in info["labels"]
    assert MODEL in info["trainers"]
    for section, name in (
        ("models", MODEL),
        ("trainers", MODEL),
        *(("strategies", s) for s in info["strategies"]),
    ):
        for value in panel.config(section, name).values():  # what a table of text, numbers and ticks can hold
            assert isinstance(value, (str, bool, int, float))
    assert not panel.client.train_status(check_if_running=True)
    assert not panel.client.auth_enabled()


def test_the_next_sample_can_be_loaded(server: Server, panel: Panel) -> None:
    for strategy in panel.info["strategies"]:
        sample = panel.client.next_sample(strategy, panel.config("strategies", strategy))
        assert sample["id"] in ("phantom0", "phantom1")
        assert Path(sample["path"]) == image_file(server, sample["id"])
        url = f"{server.url}/datastore/image?image={sample['id']}"
        answer = requests.get(url, timeout=60)
        assert answer.content == image_file(server, sample["id"]).read_bytes()


def test_clicks_find_the_ball_and_are_corrected(server: Server, panel: Panel) -> None:
    mask, reply = panel.click("phantom0", [OBJECT])
    first = judged(mask, image_file(server), OBJECT[2])
    assert reply["label_names"] == {"organ": 1}
    assert reply["slice"] == OBJECT[2]
    assert first[OBJECT[:2]]
    assert (first & disc()).sum() / first.sum() > MOSTLY
    inside = [int(x) for x in np.argwhere(first & disc())[5]]
    correction: Index = (inside[0], inside[1], OBJECT[2])
    second = judged(panel.click("phantom0", [OBJECT], [correction])[0], image_file(server), OBJECT[2])
    assert (first != second).any()


def test_a_click_on_another_slice_is_about_that_slice_alone(server: Server, panel: Panel) -> None:
    """Slicer sends slice 0 with the points of every slice."""
    for k in (0, 5):
        mask, reply = panel.click("phantom0", [OBJECT, (40, 22, k)])
        judged(mask, image_file(server), k)
        assert reply["slice"] == k


def test_background_points_alone_are_answered(server: Server, panel: Panel) -> None:
    mask, reply = panel.click("phantom0", background=[OBJECT])
    judged(mask, image_file(server), OBJECT[2])
    assert reply["slice"] == OBJECT[2]


BOX = (OBJECT[0] - RADIUS, OBJECT[0] + RADIUS, OBJECT[1] - RADIUS, OBJECT[1] + RADIUS, 2, 4)
DESCENDING = (BOX[1], BOX[0], BOX[3], BOX[2], BOX[5], BOX[4])


@pytest.mark.parametrize("roi", [BOX, DESCENDING, (*BOX[:2], *DESCENDING[2:])])
@pytest.mark.parametrize("offset", [250.3, -87.0, 0.4, 6.0], ids=["far", "below", "zero", "like an index"])
def test_a_roi_is_a_box_on_its_middle_slice(
    server: Server, panel: Panel, roi: tuple[int, ...], offset: float
) -> None:
    """Whatever millimetres the red view stands at: Slicer sends them for a slice."""
    mask, reply = panel.update_with_roi("phantom0", roi, offset)
    assert reply["slice"] == OBJECT[2]
    found = judged(mask, image_file(server), OBJECT[2])
    assert (found & disc()).sum() / (found | disc()).sum() > MOSTLY


def test_options_of_the_table_are_obeyed(server: Server, panel: Panel) -> None:
    windows = panel.info["models"][MODEL]["config"]["window"]
    masks = [panel.click("phantom0", [OBJECT], window=window)[0] for window in windows]
    for mask in masks:
        judged(mask, image_file(server), OBJECT[2])
    assert any((voxels(mask) != voxels(masks[0])).any() for mask in masks[1:])


def test_an_existing_mask_goes_with_a_request(server: Server, panel: Panel, tmp_path: Path) -> None:
    """As the client sends the label map of scribbles; without a point, the mask says slice and box."""
    image = sitk.ReadImage(str(image_file(server)))
    drawn = np.zeros(SHAPE[::-1], dtype=np.uint8)
    drawn[OBJECT[2]] = disc().T
    mask = sitk.GetImageFromArray(drawn)
    mask.CopyInformation(image)
    file = tmp_path / f"tmp_label{DEFAULT_EXTENSION}"
    sitk.WriteImage(mask, str(file))
    params = {"label": "organ", "result_extension": ".nrrd", "result_dtype": "uint8"}
    reply_file, reply = panel.client.infer(MODEL, "phantom0", params, label_in=str(file))
    assert reply["slice"] == OBJECT[2]
    found = judged(sitk.ReadImage(reply_file), image_file(server), OBJECT[2])
    assert (found & disc()).sum() / (found | disc()).sum() > MOSTLY


def test_an_own_volume_by_session(panel: Panel, own: Path) -> None:
    with panel.session(own) as session:
        assert panel.client.get_session(session)["name"]
        mask, _ = panel.click("Own volume: 1", [OBJECT], session_id=session)
        found = judged(mask, own, OBJECT[2])
        assert (found & disc()).sum() / found.sum() > MOSTLY
    with pytest.raises(panel.module.MONAILabelClientException) as refused:
        panel.click("Own volume: 1", [OBJECT], session_id=session)
    assert "Status: 404" in refused.value.msg
    assert "there is no such session" in refused.value.msg
    with pytest.raises(panel.module.MONAILabelClientException) as gone:
        panel.client.get_session(session)
    assert gone.value.status_code == 404


def test_what_is_wrong_is_said_in_the_clients_own_exception(panel: Panel) -> None:
    refusal = panel.module.MONAILabelClientException
    client = panel.client
    for attempt, sentence in (
        (lambda: client.infer("sam9", "phantom0", {}), "there is no model 'sam9'"),
        (lambda: panel.click("nobody", [OBJECT]), "there is no image 'nobody'"),
        (lambda: panel.click("phantom0", [(SHAPE[0], 1, 1)]), "outside the image"),
        (
            lambda: panel.click("phantom0", [OBJECT], session_id="2f0c7a5e-0000-11ef-9d5c-0242ac120002"),
            "session",
        ),
        (lambda: client.infer(MODEL, "phantom0", {"foreground": []}), "nothing to segment"),
        (lambda: client.train_start("sam9", {}), "there is no trainer 'sam9'"),
    ):
        with pytest.raises(refusal) as refused:
            attempt()
        assert refused.value.error == panel.module.MONAILabelError.SERVER_ERROR
        assert sentence in refused.value.msg
        assert any(status in refused.value.msg for status in ("Status: 400", "Status: 404"))


def test_a_label_is_submitted_and_read_again(server: Server, panel: Panel, tmp_path: Path) -> None:
    mask, _ = panel.click("phantom0", [OBJECT])
    file = tmp_path / f"label{DEFAULT_EXTENSION}"
    sitk.WriteImage(mask, str(file))
    assert (
        panel.client.save_label("phantom0", str(file), params={"label_info": LABEL_INFO})["label"]
        == "phantom0"
    )
    assert panel.client.info()["datastore"]["completed"] == 1
    saved = panel.client.datastore()["objects"]["phantom0"]["labels"]["final"]
    assert saved["info"]["label_info"] == LABEL_INFO
    again = sitk.ReadImage(panel.client.download_label("phantom0", "final"))
    assert np.array_equal(voxels(again), voxels(mask))
    judged(again, image_file(server), OBJECT[2])
    assert panel.client.next_sample("first", {})["id"] == "phantom1"


def test_a_label_comes_from_windows_too(server: Server) -> None:
    """The client sends its temporary file's whole path."""
    name = "C:\\Users\\a b\\AppData\\Local\\Temp\\tmp_1.nii.gz"
    content = image_file(server).read_bytes()
    url = f"{server.url}/datastore/label?image=phantom0"
    answer = requests.put(url, files={"label": (name, content)}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert (Path(server.studies) / "labels" / "final" / "phantom0.nii.gz").read_bytes() == content


def progress(panel: Panel) -> tuple[int, int]:
    """Steps done and steps in all, out of which the plugin makes its bar: the first trainer's statistics."""
    stats: dict[str, Any] = next(iter(panel.client.info()["train_stats"].values()))
    assert not stats.get("total_time")
    return stats.get("epoch", 1), stats.get("total_epochs", 1)


@pytest.mark.slow
def test_training_is_started_watched_and_stopped(server: Server, panel: Panel) -> None:
    client, options = panel.client, panel.config("trainers", MODEL)
    client.train_start(MODEL, options)
    wait(lambda: client.train_status(check_if_running=True), WORK_SECONDS)
    wait(lambda: client.train_status()["status"] == "RUNNING", WORK_SECONDS)
    wait(lambda: progress(panel)[1] == options["iterations"], WORK_SECONDS)
    early, _ = progress(panel)
    wait(lambda: progress(panel)[0] > early, WORK_SECONDS)
    assert "synthesis" in str(client.train_status()["details"])
    panel.click("phantom1", [OBJECT])
    stopped = client.train_stop()
    assert stopped.get("result", stopped["details"][-1])  # what the plugin shows
    assert not client.train_status(check_if_running=True)
    _, reply = panel.click("phantom1", [OBJECT])
    assert reply["model"] == "full precision"


def test_the_log_is_shown(server: Server) -> None:
    """The plugin opens it in a browser."""
    answer = requests.get(f"{server.url}/logs/?text=true", timeout=60)
    assert answer.status_code == 200
    assert answer.text
    assert "phantom" not in answer.text
