"""A thousand requests, good and bad: temporary files, sessions, caches, open files and memory come back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from tests.server_fixtures import OBJECT, SHAPE, Server, checkpoint, new_server, write_volume

REQUESTS = 1000
CACHE_MB = 1  # four embeddings; a session's seven slices do not fit
MIB = 1 << 20
# A thread pool fills up, arenas of malloc are made: once, not with every request.
GROWTH = 64 * MIB
FEW = 16


@dataclass(frozen=True)
class Bounded:
    """A server with a temporary folder of its own."""

    server: Server
    temporary: Path


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bounded]:
    folder = tmp_path_factory.mktemp("bounded")
    temporary = folder / "temporary"
    temporary.mkdir()
    server = new_server(folder, volumes=2)
    environment = {"TMPDIR": str(temporary), "MONAI_LABEL_SESSION_PATH": str(folder / "sessions")}
    conf = {"quantize": "false", "cache_mb": CACHE_MB, "checkpoint": checkpoint(folder)}
    try:
        server.start(conf, environment)
        yield Bounded(server, temporary)
    finally:
        server.stop()


def kinds(server: Server, folder: Path) -> list[tuple[Callable[[int], requests.Response], int]]:
    """One request each, by its number, and the status it must get."""
    http, infer = requests.Session(), f"{server.url}/infer/"
    volume, mask = folder / "own.nii.gz", folder / "mask.nrrd"
    write_volume(volume, seed=5)
    own = volume.read_bytes()
    mask.write_bytes(server.session.infer("phantom0", [OBJECT]).image)
    drawn = mask.read_bytes()

    def click(model: str, image: str, **files: tuple[str, bytes]) -> Callable[[int], requests.Response]:
        def send(n: int) -> requests.Response:
            params = {"foreground": [[*OBJECT[:2], n % SHAPE[2]]], "result_extension": ".nrrd"}
            parts = {"params": (None, json.dumps(params)), **files}
            return http.post(infer + model, params={"image": image}, files=parts, timeout=60)

        return send

    def bad(params: str, **files: tuple[str, bytes]) -> Callable[[int], requests.Response]:
        return lambda n: http.post(
            infer + "dfqsam?image=phantom0", files={"params": (None, params), **files}, timeout=60
        )

    def session(n: int) -> requests.Response:
        made = http.put(f"{server.url}/session/", files={"files": ("own.nii.gz", own)}, timeout=60)
        name = made.json()["session_id"]
        parts = {"params": (None, json.dumps({"foreground": [[*OBJECT[:2], n % SHAPE[2]]]}))}
        http.post(infer + "dfqsam", params={"session_id": name}, files=parts, timeout=60).raise_for_status()
        return http.delete(f"{server.url}/session/{name}", timeout=60)

    def label(n: int) -> requests.Response:
        parts = {"label": ("mask.nrrd", drawn), "params": (None, "{}")}
        return http.put(f"{server.url}/datastore/label?image=phantom1&tag=draft", files=parts, timeout=60)

    return [
        (click("dfqsam", "phantom0"), 200),
        (click("dfqsam", "phantom1"), 200),
        (click("dfqsam_3d", "phantom0"), 200),
        (click("dfqsam", "phantom0", label=("mask.nrrd", drawn)), 200),
        (click("dfqsam", "", file=("own.nii.gz", own)), 200),
        (session, 200),
        (label, 200),
        (click("dfqsam", "nobody"), 400),
        (click("sam9", "phantom0"), 404),
        (click("dfqsam", "", file=("own.nii.gz", own[:500])), 400),
        (click("dfqsam", "", file=("own.py", own)), 400),
        (bad("{"), 400),
        (bad('{"foreground": [[1, 2, 99]]}'), 400),
        (bad('{"foreground": [[1, 2, 3]]}', label=("mask.nrrd", b"rubbish")), 400),
        (lambda n: http.put(f"{server.url}/session/", files={"files": ("x.py", own)}, timeout=60), 400),
        (lambda n: http.get(f"{server.url}/session/{'0' * 32}", timeout=60), 404),
        (lambda n: http.get(f"{server.url}/datastore/image?image=../x", timeout=60), 400),
    ]


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind(bounded: Bounded, tmp_path: Path) -> None:
    server, process = bounded.server, psutil.Process(bounded.server.pid)
    requests_ = kinds(server, tmp_path)
    numbered = itertools.count()
    sent = list(itertools.islice(itertools.cycle(requests_), REQUESTS))

    def send(some: list[tuple[Callable[[int], requests.Response], int]]) -> None:
        for request, status in some:
            answer = request(next(numbered))
            assert answer.status_code == status, answer.text

    send(sent[: REQUESTS // 5])
    before = (process.num_fds(), process.num_threads(), process.memory_info().rss)
    files = {p for p in bounded.temporary.rglob("*") if p.is_file()}
    send(sent[REQUESTS // 5 :])
    after = (process.num_fds(), process.num_threads(), process.memory_info().rss)

    assert {p for p in bounded.temporary.rglob("*") if p.is_file()} <= files
    assert not [p for p in bounded.temporary.glob("dfqsam-*") if p.is_dir()]
    sessions = bounded.temporary.parent / "sessions"
    assert not [p for p in sessions.rglob("*") if p.is_file()]
    assert after[0] <= before[0] + FEW
    assert after[1] <= before[1] + FEW
    assert after[2] - before[2] < GROWTH
    model = server.session.info()["models"]["dfqsam"]
    assert 0 < model["embedding_cache"]["bytes"] <= CACHE_MB * MIB
