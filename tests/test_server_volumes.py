"""The models of whole volumes over HTTP: an object through its slices, several labels, corrections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from monailabel_dfqsam.server.answers.volume_task import merge
from monailabel_dfqsam.slicer_session import InferReply, ServerAnswer
from tests.server_fixtures import OBJECT, SHAPE, Running

I, J, K = OBJECT  # noqa: E741
BESIDE = [12, 44, 2]  # on the ground, far from the ball
# IoU with the ball; a mask elsewhere or with its axes turned has 0. The model is quantized in two steps only,
# and one click says little of a size.
BY_BOX, BY_CLICK = 0.6, 0.2


def ball() -> NDArray[np.bool_]:
    """What `write_volume` draws."""
    i, j, k = np.indices(SHAPE)
    found: NDArray[np.bool_] = np.sqrt((i - I) ** 2 + (j - J) ** 2 + (4 * (k - K)) ** 2) < 10
    return found


def voxels(reply: InferReply, folder: Path) -> NDArray[Any]:
    path = folder / reply.file_name
    path.write_bytes(reply.image)
    array: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return array.T


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_the_models_are_what_viewers_look_for(running: Running) -> None:
    models = running.server.session.info()["models"]
    volume, labels = models["dfqsam_3d"], models["dfqsam_labels"]
    assert (volume["type"], volume["dimension"], volume["labels"]) == ("deepgrow", 3, [])
    assert (labels["type"], labels["dimension"]) == ("deepedit", 3)
    assert labels["labels"] == running.server.session.info()["labels"]


def test_a_click_goes_through_the_volume(running: Running, tmp_path: Path) -> None:
    reply = running.server.session.infer("phantom0", [OBJECT], model="dfqsam_3d", label="lesion")
    mask = voxels(reply, tmp_path) == 1
    assert iou(mask, ball()) > BY_CLICK
    assert reply.params["label_names"] == {"lesion": 1}
    assert reply.params["slices"] == [int(k) for k in np.flatnonzero(mask.any(axis=(0, 1)))[[0, -1]]]
    assert {stop["from"] for stop in reply.params["stops"]} == {K}
    latencies = reply.params["latencies"]
    assert latencies["total"] == pytest.approx(sum(latencies.values()) - latencies["total"], abs=1e-4)
    assert latencies.keys() == {"load", "embed", "decode", "post", "write", "total"}


def test_the_clicked_slice_is_that_of_the_2d_model(running: Running, tmp_path: Path) -> None:
    session = running.server.session
    plane = voxels(session.infer("phantom0", [OBJECT]), tmp_path)[:, :, K]
    volume = voxels(session.infer("phantom0", [OBJECT], model="dfqsam_3d"), tmp_path)
    assert np.array_equal(volume[:, :, K], plane)


def test_a_roi_bounds_the_object(running: Running, tmp_path: Path) -> None:
    roi = [I - 10, I + 10, J + 10, J - 10, K + 1, K - 1]
    reply = running.server.session.infer("phantom0", roi=roi, model="dfqsam_3d")
    mask = voxels(reply, tmp_path) == 1
    assert set(np.flatnonzero(mask.any(axis=(0, 1)))) <= {K - 1, K, K + 1}
    assert iou(mask[:, :, K - 1 : K + 2], ball()[:, :, K - 1 : K + 2]) > BY_BOX


def test_several_labels_at_once(running: Running, tmp_path: Path) -> None:
    prompts = {"organ": [list(OBJECT)], "vessel": [BESIDE], "lesion": [], "background": []}
    reply = running.server.session.infer_raw(
        "phantom0", {**prompts, "label": "organ", "result_extension": ".nrrd"}, model="dfqsam_labels"
    )
    found = voxels(reply, tmp_path)
    values = {name: 1 + i for i, name in enumerate(running.server.session.info()["labels"])}
    names = reply.params["label_names"]
    assert names == {name: values[name] for name in names}
    assert set(np.unique(found)) == {0, *names.values()}
    assert found[OBJECT] == values["organ"]
    assert iou(found == values["organ"], ball()) > BY_CLICK


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no prompt": ("dfqsam_3d", {}, "nothing to segment"),
    "background alone": ("dfqsam_3d", {"background": [OBJECT]}, "nothing to segment"),
    "outside": ("dfqsam_3d", {"foreground": [[1, 1, 99]]}, "outside"),
    "outside the roi": ("dfqsam_3d", {"foreground": [[1, 1, 6]], "roi": [0, 9, 0, 9, 1, 2]}, "ROI"),
    "no label": ("dfqsam_labels", {"foreground": [OBJECT]}, "points under a label"),
    "no list": ("dfqsam_labels", {"organ": 5}, "list of points"),
    "no list beside": ("dfqsam_labels", {"organ": [OBJECT], "vessel": "x"}, "vessel' must be a list"),
    "background no list": ("dfqsam_labels", {"organ": [OBJECT], "background": 7}, "background"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_400_and_a_sentence(running: Running, name: str) -> None:
    model, params, word = BAD[name]
    with pytest.raises(ServerAnswer, match=word) as refused:
        running.server.session.infer_raw("phantom0", params, model=model)
    assert refused.value.status == 400


@given(
    st.lists(arrays(bool, (3, 2, 2)), min_size=1, max_size=3),
    st.lists(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=2, max_size=2), min_size=3, max_size=3),
)
def test_of_two_claims_the_surer_one_counts(
    masks: list[NDArray[np.bool_]], scores: list[list[float]]
) -> None:
    claims = dict(enumerate(masks, 1))
    sure = {value: np.array(scores[value - 1]) for value in claims}
    merged = merge(claims, sure)
    for place in np.ndindex(3, 2, 2):
        claiming = [value for value in claims if claims[value][place]]
        best = max(claiming, key=lambda value: (sure[value][place[2]], -value), default=0)
        assert merged[place] == best
