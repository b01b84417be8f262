"""A Slicer session against the real server: answers, geometry, labels, and what bad input gets."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import requests
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from monailabel_dfqsam.artifact import read_artifact
from monailabel_dfqsam.segmentation.segmenter import Prompts, load_segmenter
from monailabel_dfqsam.slicer_session import InferReply, ServerAnswer
from tests.server_fixtures import (
    OBJECT,
    QUANTIZED,
    SHAPE,
    WORK_SECONDS,
    Running,
    affine,
    wait,
    write_volume,
)

TINY = 1e-4  # millimetres, float32 headers
SAME_MASK = 0.999  # IoU: rounding of one grey value may move a pixel on the edge
MOSTLY = 0.6  # far above what a mask with its axes turned would reach, which is 0


def image_of(reply: InferReply, folder: Path) -> sitk.Image:
    path = folder / reply.file_name
    path.write_bytes(reply.image)
    return sitk.ReadImage(str(path))


def voxels(image: sitk.Image) -> NDArray[Any]:
    """[I, J, K]"""
    array: NDArray[Any] = sitk.GetArrayFromImage(image)
    return array.T


def test_before_quantization_full_precision_answered(running: Running) -> None:
    assert running.first.params["model"] == "full precision"
    assert running.first.image
    assert running.server.session.infer("phantom0", [OBJECT]).params["model"] in QUANTIZED


def test_info_tells_viewers_what_they_need(running: Running) -> None:
    info = running.server.session.info()
    assert isinstance(info["labels"], list)
    model = info["models"]["dfqsam"]
    assert (model["type"], model["dimension"], model["labels"]) == ("deepgrow", 2, [])
    assert set(model["config"]) == {"multimask", "window", "largest_cc", "fill_holes", "slices"}
    assert 0 <= model["serving"]["fidelity"]["mean_iou"] <= 1
    assert 0 < model["serving"]["fidelity"]["grey_level"]["median_iou"] <= 1
    assert info["train_stats"]["dfqsam"]["state"] == "published"
    assert info["strategies"].keys() == {"random", "first", "least_confident"}


def test_the_reply_says_what_happened(running: Running) -> None:
    reply = running.server.session.infer("phantom0", [OBJECT], label="liver", window="ct bone")
    params = reply.params
    assert params["label_names"] == {"liver": 1}
    assert params["slice"] == OBJECT[2]
    assert f"W4A4 ({params['engine']})" in QUANTIZED
    laps = params["latencies"]
    assert set(laps) == {"load", "embed", "decode", "post", "write", "total"}
    assert laps["total"] == pytest.approx(sum(v for k, v in laps.items() if k != "total"), abs=1e-3)
    assert running.server.session.infer("phantom0", [OBJECT], window="ct bone").params["cached"]


def test_the_mask_lies_on_the_images_grid(running: Running, tmp_path: Path) -> None:
    mask = image_of(running.server.session.infer("phantom0", [OBJECT]), tmp_path)
    source = sitk.ReadImage(str(Path(running.server.studies) / "phantom0.nii.gz"))
    assert mask.GetSize() == source.GetSize() == SHAPE
    for a, b in (
        (mask.GetOrigin(), source.GetOrigin()),
        (mask.GetSpacing(), source.GetSpacing()),
        (mask.GetDirection(), source.GetDirection()),
    ):
        np.testing.assert_allclose(a, b, atol=TINY)
    # The same point by nibabel's way, whose millimetres are RAS where ITK's are LPS.
    lps = mask.TransformIndexToPhysicalPoint(OBJECT)
    np.testing.assert_allclose(np.array(lps) * (-1, -1, 1), (affine() @ [*OBJECT, 1])[:3], atol=1e-3)


def test_only_the_clicked_slice_is_set_and_no_axis_is_turned(running: Running, tmp_path: Path) -> None:
    """The mask is the one that the model gives for the slice as people see it: nibabel's, i to the right."""
    server = running.server
    reply = server.session.infer("phantom0", [OBJECT], [[2, 50, OBJECT[2]]], window="full range")
    mask = voxels(image_of(reply, tmp_path))
    assert set(np.flatnonzero(mask.any(axis=(0, 1)))) <= {OBJECT[2]}
    values = np.asanyarray(nibabel.load(Path(server.studies) / "phantom0.nii.gz").dataobj).astype(float)
    grey = np.rint((values[:, :, OBJECT[2]] - values.min()) / (values.max() - values.min()) * 255)
    segmenter = load_segmenter(read_artifact(next((server.app / "model").glob("*.safetensors"))))
    xy = np.array([[OBJECT[0] + 0.5, OBJECT[1] + 0.5], [2.5, 50.5]])
    embedding = segmenter.embed(np.repeat(grey.T[:, :, None], 3, axis=2).astype(np.uint8))
    expected = segmenter.predict(embedding, Prompts(xy, np.array([1, 0]))).mask.T
    assert expected.any()
    assert not expected.all()
    found = mask[:, :, OBJECT[2]] > 0
    assert (found & expected).sum() / (found | expected).sum() > SAME_MASK


def test_the_ball_is_found_by_click_and_by_box(running: Running, tmp_path: Path) -> None:
    i, j = np.indices(SHAPE[:2])
    ball = np.hypot(i - OBJECT[0], j - OBJECT[1]) < 10
    clicked = voxels(image_of(running.first, tmp_path))[:, :, OBJECT[2]] > 0
    assert clicked[OBJECT[:2]]
    assert (clicked & ball).sum() / clicked.sum() > MOSTLY
    roi = [OBJECT[0] + 10, OBJECT[0] - 10, OBJECT[1] - 10, OBJECT[1] + 10, 5, 1]
    reply = running.server.session.infer("phantom0", roi=roi)
    assert reply.params["slice"] == OBJECT[2]
    boxed = voxels(image_of(reply, tmp_path))[:, :, OBJECT[2]] > 0
    assert (boxed & ball).sum() / (boxed | ball).sum() > MOSTLY


@pytest.mark.parametrize("extension", [".nrrd", ".nii.gz", ".nii"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_result_comes_as_asked(running: Running, tmp_path: Path, extension: str, dtype: str) -> None:
    reply = running.server.session.infer(
        "phantom0", [OBJECT], result_extension=extension, result_dtype=dtype, result_compress=True
    )
    assert reply.file_name.endswith(extension)
    assert voxels(image_of(reply, tmp_path)).dtype == dtype


def test_the_mask_is_compressed_unless_told_not_to(running: Running, tmp_path: Path) -> None:
    infer = running.server.session.infer
    small, plain = infer("phantom0", [OBJECT]), infer("phantom0", [OBJECT], result_compress=False)
    assert b"encoding: gzip" in small.image[:500]
    assert b"encoding: raw" in plain.image[:500]
    assert len(small.image) < len(plain.image) / 10
    assert np.array_equal(*(voxels(image_of(reply, tmp_path)) for reply in (small, plain)))
    with pytest.raises(ServerAnswer, match="result_compress must be true or false"):
        infer("phantom0", [OBJECT], result_compress=3)


def test_ohifs_request_gets_the_file_alone(running: Running, tmp_path: Path) -> None:
    fields = {
        "params": json.dumps(
            {"foreground": [list(OBJECT)], "background": [], "result_extension": ".nrrd",
             "result_dtype": "uint8", "result_compress": False, "restore_label_idx": False}
        )
    }  # fmt: skip
    url = f"{running.server.url}/infer/dfqsam?image=phantom0&output=image"
    answer = requests.post(url, files={k: (None, v) for k, v in fields.items()}, timeout=60)
    assert answer.status_code == 200
    assert answer.content.startswith(b"NRRD")
    assert b"encoding: raw" in answer.content[:500]


def test_a_session_with_an_own_volume(running: Running, tmp_path: Path) -> None:
    own = tmp_path / "own volume.nii.gz"
    write_volume(own, seed=7)
    session = running.server.session.create_session(own)
    reply = running.server.session.infer("3: own/volume", [OBJECT], session_id=session)
    assert voxels(image_of(reply, tmp_path)).shape == SHAPE
    with pytest.raises(ServerAnswer, match="session") as refused:
        running.server.session.infer("own", [OBJECT], session_id="2f0c7a5e-0000-11ef-9d5c-0242ac120002")
    assert refused.value.status == 404


def test_a_label_is_saved_and_the_next_sample_is_another(running: Running, tmp_path: Path) -> None:
    session = running.server.session
    assert session.next_sample("first")["id"] == "phantom0"
    assert len(session.download_image("phantom0")) > 0
    reply = session.infer("phantom0", [OBJECT])
    label = tmp_path / "label.nrrd"
    label.write_bytes(reply.image)
    assert session.save_label("phantom0", label, [{"name": "organ", "idx": 1}])["label"] == "phantom0"
    saved = Path(running.server.studies) / "labels" / "final" / "phantom0.nrrd"
    assert saved.read_bytes() == reply.image
    assert session.info()["datastore"]["completed"] == 1
    assert session.next_sample("first")["id"] == "phantom1"


def test_a_viewers_own_window_is_what_the_model_sees(running: Running, tmp_path: Path) -> None:
    """All of the image is one grey in it, so that the object cannot be told from its ground."""
    session = running.server.session
    seen = voxels(image_of(session.infer("phantom0", [OBJECT]), tmp_path))
    named = session.infer("phantom0", [OBJECT], window="ct brain")
    own = session.infer("phantom0", [OBJECT], window_center=40, window_width=80)
    assert own.params["cached"], "the same values shown are the same embedding"
    assert own.image == named.image
    blind = voxels(
        image_of(session.infer("phantom0", [OBJECT], window_center=[9000], window_width="10"), tmp_path)
    )
    assert not np.array_equal(blind, seen)


def test_an_existing_mask_is_a_prompt(running: Running, tmp_path: Path) -> None:
    reply = running.server.session.infer("phantom0", [OBJECT])
    mask = voxels(image_of(reply, tmp_path))
    url = f"{running.server.url}/infer/dfqsam?image=phantom0&output=image"

    def refine(**params: Any) -> requests.Response:
        fields = {"params": (None, json.dumps({"result_extension": ".nrrd", **params}))}
        return requests.post(url, files={**fields, "label": ("mask.nrrd", reply.image)}, timeout=60)

    answer = refine(label="organ")
    assert answer.status_code == 200, answer.text
    path = tmp_path / "refined.nrrd"
    path.write_bytes(answer.content)
    refined = voxels(sitk.ReadImage(str(path)))
    assert set(np.nonzero(refined)[2]) == {OBJECT[2]}
    assert (refined & mask).sum() / (refined | mask).sum() > 0.7
    answer = refine(slice=0)
    assert (answer.status_code, "empty" in answer.text) == (400, True)
    answer = refine(mask="/etc/passwd")
    assert (answer.status_code, "mask" in answer.text) == (400, True)
    wait(lambda: not list(running.server.temporary.glob("dfqsam-*")), WORK_SECONDS)


def test_what_the_object_is_not_makes_no_mask(running: Running, tmp_path: Path) -> None:
    reply = running.server.session.infer("phantom0", background=[OBJECT])
    assert (reply.params["slice"], reply.params["score"]) == (OBJECT[2], 0)
    assert not voxels(image_of(reply, tmp_path)).any()


def test_one_part_without_holes(running: Running, tmp_path: Path) -> None:
    reply = running.server.session.infer(
        "phantom0", [OBJECT], window="full range", largest_cc=True, fill_holes="true"
    )
    plane = voxels(image_of(reply, tmp_path))[:, :, OBJECT[2]] != 0
    assert ndimage.label(plane)[1] == 1
    assert np.array_equal(ndimage.binary_fill_holes(plane), plane)
    assert plane[OBJECT[:2]]


K = OBJECT[2]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({}, "nothing to segment"),
    "empty prompts": ({"foreground": [], "background": []}, "nothing to segment"),
    "outside": ({"foreground": [[72, 1, 1]]}, "outside"),
    "negative": ({"foreground": [[1, -3, 1]]}, "outside"),
    "not a number": ({"foreground": [["a", 1, 1]]}, "foreground"),
    "not a list": ({"foreground": 5}, "foreground"),
    "two indices": ({"foreground": [[1, 2]]}, "foreground"),
    "other slice": ({"foreground": [[1, 2, 3]], "slice": 5}, "slice"),
    "slice outside": ({"foreground": [[1, 2, 3]], "slice": 99}, "slice"),
    "short roi": ({"roi": [1, 2, 3]}, "roi"),
    "window": ({"foreground": [OBJECT], "window": "pink"}, "window"),
    "half a window": ({"foreground": [OBJECT], "window_center": 40}, "window_width"),
    "no width": ({"foreground": [OBJECT], "window_center": 40, "window_width": 0}, "window"),
    "window of words": ({"foreground": [OBJECT], "window_center": "x", "window_width": 1}, "window_center"),
    "order": ({"foreground": [OBJECT], "slices": "upside down"}, "slices"),
    "stored inside": ({"foreground": [OBJECT], "stored": True}, "stored"),
    "holes": ({"foreground": [OBJECT], "fill_holes": "perhaps"}, "fill_holes"),
    "flag": ({"foreground": [OBJECT], "multimask": 7}, "multimask"),
    "label": ({"foreground": [OBJECT], "label": 7}, "label"),
    "extension": ({"foreground": [OBJECT], "result_extension": ".exe"}, "result_extension"),
    "dtype": ({"foreground": [OBJECT], "result_dtype": "complex"}, "result_dtype"),
    "image inside": ({"foreground": [OBJECT], "image": "/etc/passwd"}, "image"),
    "model inside": ({"foreground": [OBJECT], "model": "other"}, "model"),
    "tag": ({"foreground": [OBJECT], "save_label": True, "label_tag": "../../x"}, "tag"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_400_and_a_sentence(running: Running, name: str) -> None:
    params, word = BAD[name]
    with pytest.raises(ServerAnswer, match=word) as refused:
        running.server.session.infer_raw("phantom0", params)
    assert refused.value.status == 400


def test_unknown_names_are_said(running: Running) -> None:
    session = running.server.session
    with pytest.raises(ServerAnswer, match="no image 'nobody'") as image:
        session.infer("nobody", [OBJECT])
    with pytest.raises(ServerAnswer, match="no model 'sam9'") as model:
        session.infer("phantom0", [OBJECT], model="sam9")
    with pytest.raises(ServerAnswer, match="no trainer 'sam9'") as trainer:
        session.train("sam9")
    assert [e.value.status for e in (image, model, trainer)] == [400, 404, 404]


@pytest.mark.parametrize("params", ["{", "[1]", "5"])
def test_params_that_are_no_object(running: Running, params: str) -> None:
    url = f"{running.server.url}/infer/dfqsam?image=phantom0"
    answer = requests.post(url, files={"params": (None, params)}, timeout=60)
    assert answer.status_code == 400
    assert "JSON" in answer.json()["detail"]


def test_neither_image_nor_session(running: Running) -> None:
    answer = requests.post(f"{running.server.url}/infer/dfqsam", files={"params": (None, "{}")}, timeout=60)
    assert answer.status_code == 400


@pytest.mark.parametrize(("shape", "word"), [((4, 4, 4, 2), "dimensions"), ((), "")])
def test_an_upload_that_is_no_volume(
    running: Running, tmp_path: Path, shape: tuple[int, ...], word: str
) -> None:
    """4-D, or no image at all; and the upload does not stay behind."""
    path = tmp_path / "upload.nii.gz"
    if shape:
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape, dtype=np.int16), np.eye(4)), path)
    else:
        path.write_bytes(b"")
    answer = requests.post(
        f"{running.server.url}/infer/dfqsam",
        files={"file": (path.name, path.read_bytes()), "params": (None, '{"foreground": [[1, 1, 1]]}')},
        timeout=60,
    )
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["detail"]
    wait(lambda: not list(running.server.temporary.glob("*.nii.gz")), WORK_SECONDS)


def test_training_options_are_checked_before_anything_runs(running: Running) -> None:
    for options, word in (
        ({"bits": 5}, "bits"),
        ({"epochs": 3}, "epochs"),
        ({"checkpoint": "../x"}, "checkpoint"),
    ):
        with pytest.raises(ServerAnswer, match=word) as refused:
            running.server.session.train(**options)  # type: ignore[arg-type]
        assert refused.value.status == 400
    answer = requests.post(f"{running.server.url}/train/", json={"dfqsam": {"bits": 5}}, timeout=60)
    assert answer.status_code == 400
    answer = requests.post(f"{running.server.url}/train/dfqsam?run_sync=true", json={}, timeout=60)
    assert answer.status_code == 400
    assert not running.server.session.is_training()


SECRET = "secret text of another file"


def test_no_path_is_read(running: Running, tmp_path: Path) -> None:
    outside = tmp_path / "outside.nii.gz"
    write_volume(outside)
    relative = os.path.relpath(outside.with_name("outside"), running.server.studies)
    for name in (str(outside), relative, "../app/main", "%2e%2e/app", str(outside).replace("/", "\\")):
        with pytest.raises(ServerAnswer) as refused:
            running.server.session.infer(name, [OBJECT])
        assert refused.value.status == 400
        with pytest.raises(ServerAnswer) as refused:
            running.server.session.download_image(name)
        assert refused.value.status == 400


def test_no_path_is_written(running: Running, tmp_path: Path) -> None:
    server, content = running.server, (tmp_path / "x.nii.gz")
    write_volume(content)

    def files() -> set[Path]:
        found = server.app.parent.rglob("*")
        return {p for p in found if "logs" not in p.parts and server.temporary not in p.parents}

    before = files()
    for url, field, name in (
        ("/datastore/image?image=../x", "file", "x.nii.gz"),
        ("/datastore/?image=../x", "file", "x.nii.gz"),
        ("/datastore/image?image=x", "file", "x.py"),
        ("/datastore/image?image=x", "file", "x.pkl"),
        ("/datastore/label?image=phantom1&tag=../../x", "label", "x.nii.gz"),
        ("/datastore/label?image=../phantom1", "label", "x.nii.gz"),
        ("/datastore/label?image=phantom1", "label", "x.pt"),
        ("/session/", "files", "x.py"),
        ("/session/?uncompress=true", "files", "x.zip"),
        ("/model/dfqsam", "file", "x.pt"),
    ):
        answer = requests.put(server.url + url, files={field: (name, content.read_bytes())}, timeout=60)
        assert answer.status_code in (400, 403), (url, answer.text)
        assert answer.json()["detail"]
    assert files() == before


def test_upstreams_open_doors_are_closed(running: Running) -> None:
    url = running.server.url
    assert requests.post(f"{url}/reload", timeout=60).status_code == 403
    evil = {"Origin": "http://evil.example"}
    answer = requests.get(f"{url}/info/", headers={**evil, "Cookie": "a=b"}, timeout=60)
    assert "access-control-allow-origin" not in answer.headers
    assert requests.post(f"{url}/train/dfqsam", json={}, headers=evil, timeout=60).status_code == 403
    assert requests.get(f"{url}/info/", headers={"Host": "evil.example"}, timeout=60).status_code == 403
    assert requests.get(f"{url}/proxy/dicom/studies", timeout=60).status_code == 404
    assert requests.delete(f"{url}/datastore/image?id=nobody", timeout=60).status_code == 404
    assert (
        requests.put(f"{url}/datastore/image/info?image=phantom0", data={"info": "{"}, timeout=60).status_code
        == 400
    )


@pytest.mark.parametrize("path", ["/", "/ohif/", "/dfqsam/", "/logs/", "/info/"])
def test_no_page_asks_another_host(running: Running, path: str) -> None:
    """A browser loads nothing that this forbids; OHIF's own page names a host of fonts."""
    answer = requests.get(running.server.url + path, timeout=60)
    assert answer.status_code == 200
    rules = dict(rule.split(None, 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"].split()[0] in ("'self'", "'none'")
    assert "http" not in answer.headers["content-security-policy"]


def test_the_log_names_no_image_and_no_prompt(running: Running) -> None:
    running.server.session.infer("phantom1", [OBJECT], label="rarename")
    log = running.server.text()
    for word in ("phantom", "rarename", str(list(OBJECT))):
        assert word not in log


def test_the_server_answers_while_it_segments(running: Running) -> None:
    """Our route runs in a worker thread, so that /info/ need not wait for a click."""
    done: list[InferReply] = []
    threads = [
        threading.Thread(
            target=lambda k=k: done.append(running.server.session.infer("phantom1", [[5, 5, k]]))
        )
        for k in range(SHAPE[2])
    ]
    for thread in threads:
        thread.start()
    running.server.session.info()
    wait(lambda: len(done) == SHAPE[2], WORK_SECONDS)
    assert {reply.params["slice"] for reply in done} == set(range(SHAPE[2]))


def test_neighbouring_slices_are_ready_before_they_are_clicked(running: Running) -> None:
    session = running.server.session
    session.infer("phantom0", [[5, 5, 1]], window="ct brain")

    def ready() -> bool:
        before = session.info()["models"]["dfqsam"]["embedding_cache"]["misses"]
        return (
            bool(before >= 3) and session.infer("phantom0", [[5, 5, 2]], window="ct brain").params["cached"]
        )

    wait(ready, WORK_SECONDS)
