"""The server on an archive that is slow, broken or away."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import requests
import SimpleITK as sitk

from monailabel_dfqsam.server.upstream.threads import WAITING
from monailabel_dfqsam.slicer_session import ServerAnswer
from tests.dicom_series import Series
from tests.dicomweb_scenario import CLICK, plane
from tests.server_fixtures import Server, checkpoint, new_server, wait
from tests.stub_archive import KIND, Patience, StubArchive, is_retrieval, multipart, send, stub_archive

SLICES = 3
SOON = 60.0  # seconds, far more than needed


@dataclass
class World:
    """A server, its archive, and a first series that is fetched and embedded."""

    server: Server
    archive: StubArchive
    folder: Path
    first: Series
    temporary: Path
    made: list[Series] = field(default_factory=list)

    def series(self) -> Series:
        """One that the server has not asked for yet."""
        made = Series()
        self.made.append(made)
        paths = [self.folder / f"{made.uid}-{k}.dcm" for k in range(SLICES)]
        for k, path in enumerate(paths):
            made.write(path, plane(), k)
        self.archive.add(paths)
        return made

    def click(self) -> None:
        self.server.session.infer(self.first.uid, [CLICK])

    def get(self, path: str, **query: str) -> requests.Response:
        return requests.get(self.server.url + path, params=query, timeout=SOON)

    def download(self, series: Series) -> requests.Response:
        return self.get("/datastore/image", image=series.uid)

    def labels(self, series: Series) -> dict[str, Any]:
        """What the record says of a series' labels, by tag."""
        objects = self.get("/datastore/", output="all").json()["objects"]
        labels: dict[str, Any] = objects[series.uid]["labels"]
        return labels

    def next_sample(self) -> requests.Response:
        return requests.post(f"{self.server.url}/activelearning/first", json={}, timeout=SOON)

    def submit(self, series: Series, values: int = 1) -> requests.Response:
        label = sitk.GetImageFromArray((np.stack([plane()] * SLICES) > 100).astype(np.uint8) * values)
        label.SetOrigin(series.origin)
        label.SetSpacing(series.spacing)
        path = self.folder / f"label-{threading.get_ident()}.nrrd"
        sitk.WriteImage(label, str(path))
        params = json.dumps({"label_info": [{"name": "liver", "idx": values}]})
        with path.open("rb") as file:
            return requests.put(
                f"{self.server.url}/datastore/label",
                params={"image": series.uid},
                files={"label": (path.name, file), "params": (None, params)},
                timeout=SOON,
            )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("archive")
    server = new_server(folder, volumes=0)
    with stub_archive() as archive:
        found = World(server, archive, folder, Series(), server.temporary)
        found.first = found.series()
        server.studies = archive.url
        environment = {
            "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"),
            "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": "1",
            "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": "{}",
        }
        try:
            server.start({"quantize": "false", "checkpoint": checkpoint(folder)}, environment)
            found.click()
            yield found
        finally:
            server.stop()


@pytest.fixture(autouse=True)
def in_order(world: World) -> Iterator[None]:
    """What a test did to the archive ends with it."""
    yield
    world.archive.answer = lambda method, path, handler: False


@contextmanager
def listing(world: World, *series: Series) -> Iterator[None]:
    """The archive's list holds these images alone, and its segmentations."""
    listed, names = world.archive.listed, {one.uid for one in series}
    world.archive.listed = {
        uid: entry for uid, entry in listed.items() if uid in names or entry.Modality == "SEG"
    }
    time.sleep(1.1)  # the list is kept that long
    try:
        yield
    finally:
        world.archive.listed = listed


def all_at_once(work: list[Callable[[], Any]]) -> list[Future[Any]]:
    pool = ThreadPoolExecutor(len(work))
    return [pool.submit(one) for one in work]


@pytest.mark.parametrize("what", ["next sample", "download", "submit", "proxy", "label"])
def test_clicks_are_answered_while_the_archive_keeps_another_waiting(world: World, what: str) -> None:
    series = world.series()
    held = Patience(SOON)
    works: dict[str, Callable[[], requests.Response]] = {
        "next sample": world.next_sample,
        "download": lambda: world.download(series),
        "submit": lambda: world.submit(series),
        "proxy": lambda: world.get(f"/proxy/dicom/wado/studies/{series.study}/series/{series.uid}"),
        "label": lambda: world.get("/datastore/label", label=series.uid, tag="final"),
    }
    if what == "label":  # which is a segmentation in the archive
        assert world.submit(series).status_code == 200
        for kept in (world.folder / "cache").rglob(f"labels/final/{series.uid}*"):
            kept.unlink()
    with listing(world, series):
        world.archive.answer = held
        (answer,) = all_at_once([works[what]])
        assert held.asked.wait(SOON)
        world.click()
        world.get("/info/").raise_for_status()
        assert not answer.done()
        held.release.set()
        assert answer.result().status_code == 200


def test_an_archive_that_keeps_many_waiting_leaves_threads_for_clicks(world: World) -> None:
    series = [world.series() for _ in range(WAITING + 4)]
    held = Patience(SOON)
    world.archive.answer = held
    answers = all_at_once([lambda one=one: world.download(one) for one in series])
    wait(lambda: sum(answer.done() for answer in answers) == 4, SOON)
    world.click()
    refused = [answer.result() for answer in answers if answer.done()]
    assert {answer.status_code for answer in refused} == {503}
    assert f"{WAITING} requests wait for the image archive" in refused[0].json()["detail"]
    held.release.set()
    assert sorted(answer.result().status_code for answer in answers) == [200] * WAITING + [503] * 4


def test_labels_submitted_at_once_are_each_kept(world: World) -> None:
    series = world.series()
    world.download(series).raise_for_status()
    answers = all_at_once([lambda n=n: world.submit(series, n) for n in (1, 2, 3)])
    assert [answer.result().status_code for answer in answers] == [200] * 3
    sources = [
        d[0].ReferencedSeriesSequence[0].SeriesInstanceUID
        for d in world.archive.series.values()
        if d[0].Modality == "SEG"
    ]
    assert sources.count(series.uid) == 3
    label = world.get("/datastore/label", label=series.uid, tag="final")
    path = world.folder / "kept.nrrd"
    path.write_bytes(label.content)
    values = np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    info = world.get("/datastore/label/info", label=series.uid, tag="final").json()
    assert values.tolist() == [0, info["label_info"][0]["idx"]]


Answer = Callable[[str, str, BaseHTTPRequestHandler], bool]


def broken(act: Callable[[BaseHTTPRequestHandler, World, str], None], everything: bool = True) -> Any:
    """An archive that answers so to everything, or only when asked for a series."""

    def of(world: World) -> Answer:
        def answer(method: str, path: str, handler: BaseHTTPRequestHandler) -> bool:
            if not everything and not is_retrieval(method, path):
                return False
            act(handler, world, path)
            return True

        return answer

    return of


def instances(world: World, path: str) -> list[pydicom.Dataset]:
    return world.archive.series[path.split("?")[0].rsplit("/", 1)[1]]


def hang_up(handler: BaseHTTPRequestHandler, world: World, path: str) -> None:
    handler.close_connection = True
    handler.connection.close()


PAGE = b"<html><body>Please log in</body></html>"
FAULTS: dict[str, tuple[Any, int, str]] = {
    "away": (broken(hang_up), 502, "does not answer"),
    "fails": (broken(lambda h, w, p: send(h, 500, "text/plain", b"no")), 502, "failed (500)"),
    "fails on the series": (
        broken(lambda h, w, p: send(h, 500, "text/plain", b"no"), False),
        502,
        "failed (500)",
    ),
    "overloaded": (broken(lambda h, w, p: send(h, 503, "text/plain", b"")), 503, "is busy (503)"),
    "a login": (broken(lambda h, w, p: send(h, 401, "text/plain", b"")), 502, "does not let this server in"),
    "a page": (broken(lambda h, w, p: send(h, 200, "text/html", PAGE)), 502, "answered with a web page"),
    "a page for a series": (
        broken(lambda h, w, p: send(h, 200, "text/html; charset=utf-8", PAGE), False),
        502,
        "answered with a web page",
    ),
    "no JSON": (
        broken(lambda h, w, p: send(h, 200, "application/dicom+json", b"[{]")),
        502,
        "something that is not JSON",
    ),
    "JSON of something else": (
        broken(lambda h, w, p: send(h, 200, "application/json", b'{"error": "none"}')),
        502,
        "something that is not DICOMweb",
    ),
    "a list of numbers": (
        broken(lambda h, w, p: send(h, 200, "application/json", b"[1, 2]")),
        502,
        "something that is not DICOMweb",
    ),
    "no DICOM": (
        broken(lambda h, w, p: send(h, 200, KIND, multipart(instances(w, p))[:80] + b"rubbish" * 9), False),
        502,
        "something that is not DICOMweb",
    ),
    "no series": (broken(lambda h, w, p: send(h, 200, KIND, b""), False), 502, "sent 0 of"),
    "half of the series": (
        broken(lambda h, w, p: send(h, 200, KIND, multipart(instances(w, p)[:-1])), False),
        502,
        "sent 2 of the series' 3 instances",
    ),
    "broken off": (
        broken(lambda h, w, p: send(h, 200, KIND, multipart(instances(w, p)), cut=4000), False),
        502,
        "does not answer",
    ),
    "deleted since it was listed": (
        broken(lambda h, w, p: send(h, 404, "text/plain", b""), False),
        404,
        "does not have this series any more",
    ),
    "deleted": (
        broken(lambda h, w, p: send(h, 200, "application/dicom+json", b"[]")),
        404,
        "has no series",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_archive_is_told_in_a_sentence(world: World, fault: str) -> None:
    answer, status, sentence = FAULTS[fault]
    series = world.series()
    world.archive.answer = answer(world)
    for ask in (world.download, world.submit):
        told = ask(series)
        assert (told.status_code, sentence in told.json()["detail"]) == (status, True), told.text
    with pytest.raises(ServerAnswer, match="archive") as refused:
        world.server.session.infer(series.uid, [CLICK])
    assert (refused.value.status, sentence in refused.value.detail) == (status, True)
    world.click()  # what is here already needs no archive
    world.get("/info/").raise_for_status()
    assert not list((world.folder / "cache").rglob(f"{series.uid}*"))
    world.archive.answer = lambda method, path, handler: False
    assert world.download(series).status_code == 200


@pytest.mark.parametrize("fault", ["away", "fails", "a page", "no JSON", "deleted"])
def test_the_way_to_a_broken_archive_says_so_too(world: World, fault: str) -> None:
    answer, status, _ = FAULTS[fault]
    world.archive.answer = answer(world)
    found = world.get("/proxy/dicom/qido/studies")
    passed_on = {"fails": 500, "a page": 200, "no JSON": 200, "deleted": 200}
    assert found.status_code == passed_on.get(fault, status)


def test_a_series_that_is_gone_is_not_proposed(world: World) -> None:
    """The archive's list still has it."""
    gone, there = sorted((world.series(), world.series()), key=lambda series: series.uid)
    del world.archive.series[gone.uid]
    with listing(world, gone, there):
        for _ in range(2):
            assert world.next_sample().json()["id"] == there.uid


def test_a_label_that_the_archive_does_not_take_is_not_kept(world: World) -> None:
    series = world.series()
    world.download(series).raise_for_status()

    def refuse(method: str, path: str, handler: BaseHTTPRequestHandler) -> bool:
        if method == "POST":
            send(handler, 409, "application/dicom+json", b"{}")
        return method == "POST"

    world.archive.answer = refuse
    before = sorted(world.temporary.rglob("*.dcm"))
    answer = world.submit(series)
    assert (answer.status_code, answer.json()["detail"]) == (502, "the image archive failed (409)")
    assert "final" not in world.labels(series)
    assert sorted(world.temporary.rglob("*.dcm")) == before


def infer_segmentation(world: World, image: str, **params: Any) -> requests.Response:
    return requests.post(
        f"{world.server.url}/infer/dfqsam",
        params={"image": image, "output": "dicom_seg"},
        files={"params": (None, json.dumps({"foreground": [CLICK], "label": "liver", **params}))},
        timeout=SOON,
    )


@pytest.mark.parametrize(
    ("params", "name"),
    [({}, "liver"), ({"label_info": [{"name": "Spleen", "idx": 1, "color": "rgb(1, 2, 3)"}]}, "Spleen")],
)
def test_an_answer_as_a_segmentation_is_the_mask(world: World, params: dict[str, Any], name: str) -> None:
    mask = world.folder / "mask.nrrd"
    mask.write_bytes(world.server.session.infer(world.first.uid, [CLICK]).image)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(mask)))
    files = {path for path in world.temporary.rglob("*") if path.is_file()}
    answer = infer_segmentation(world, world.first.uid, **params)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/dicom"), answer.text
    d = pydicom.dcmread(io.BytesIO(answer.content))
    assert [segment.SegmentLabel for segment in d.SegmentSequence] == [name]
    assert d.ReferencedSeriesSequence[0].SeriesInstanceUID == world.first.uid
    position = d.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
    np.testing.assert_allclose(position, world.first.world((0, 0, CLICK[2])), atol=1e-3)
    np.testing.assert_array_equal(d.pixel_array.astype(bool), expected[CLICK[2]].astype(bool))
    # The clean-up runs when the answer is on its way.
    wait(lambda: {path for path in world.temporary.rglob("*") if path.is_file()} <= files, SOON)


@pytest.mark.parametrize(
    ("image", "params", "status", "sentence"),
    [
        ("", {}, 400, "there is no image"),
        ("1.2.3", {}, 404, "has no series '1.2.3'"),
        (None, {"label_info": {"name": "x"}}, 400, "label_info must be a list"),
        (None, {"foreground": []}, 400, "nothing to segment"),
    ],
)
def test_a_segmentation_that_cannot_be_made(
    world: World, image: str | None, params: dict[str, Any], status: int, sentence: str
) -> None:
    files = {path for path in world.temporary.rglob("*") if path.is_file()}
    answer = infer_segmentation(world, world.first.uid if image is None else image, **params)
    assert (answer.status_code, sentence in answer.json()["detail"]) == (status, True), answer.text
    wait(lambda: {path for path in world.temporary.rglob("*") if path.is_file()} <= files, SOON)
