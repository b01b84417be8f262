"""Hostile requests against the real server: each gets a 4xx, and nothing was written or read outside.

Around every test stands `untouched`: all files that the server could write to are the same afterwards, the
listener that addresses in requests lead to was not called, and the server still answers.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.besieged import MAX_UPLOAD, SECRET, Answer, Besieged, Evil, besieged
from tests.hostile_files import bombs, detached
from tests.hostile_requests import (
    CLICK,
    FIELDS,
    FILE_NAMES,
    JSON,
    MEGABYTE,
    OPTIONS,
    OTHERS,
    PATHS,
    PLACES,
    PROMPTS,
    RAW,
    SIZES,
    UPLOADS,
)
from tests.server_fixtures import OBJECT, wait, write_volume

__all__ = ["besieged"]


@pytest.fixture(autouse=True)
def untouched(besieged: Besieged) -> Iterator[None]:
    before = besieged.snapshot()
    besieged.watch()
    yield
    assert besieged.was_read() == []
    # The file of an answer goes a moment after the client has it.
    with suppress(TimeoutError):
        wait(lambda: besieged.snapshot() == before, 10)
    after = besieged.snapshot()
    assert after == before, sorted(set(after.items()) ^ set(before.items()))
    assert besieged.calls == []
    assert besieged.send("GET", "/info/").status == 200


def refused(answer: Answer, *statuses: int, head: bool = False) -> None:
    """A refusal with a sentence, as JSON that a browser takes for nothing else, without the secret."""
    assert 400 <= answer.status < 500, (answer.status, answer.body[:300])
    if statuses:
        assert answer.status in statuses, (answer.status, answer.body[:300])
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    if not head:
        assert len(answer.detail) > 5
    assert SECRET.encode() not in answer.body
    assert b"root:" not in answer.body


def test_what_is_read_is_seen(besieged: Besieged) -> None:
    """The tests below see as much as the file system tells; what comes back they see anyway."""
    seen = besieged.reading_is_seen()
    besieged.watch()
    if not seen:
        pytest.skip("this file system keeps no times of reading")


@pytest.mark.parametrize("place", PLACES)
def test_no_name_is_a_path(besieged: Besieged, place: str) -> None:
    at = PLACES[place]
    for name, text in PATHS.items():
        if name in at.without:
            continue
        path = text.replace("{outside}", str(besieged.outside)).replace("{elsewhere}", besieged.elsewhere)
        files = {at.files[0]: (at.files[1], b"x")} if at.files else None
        answer = besieged.send_form(at.method, at.target.replace("{}", path), files, at.data)
        try:
            refused(answer, head=at.method == "HEAD")
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{name}: {path}: {answer}") from error


@pytest.mark.parametrize("upload", UPLOADS)
def test_no_upload_has_another_name(besieged: Besieged, upload: str, tmp_path: Path) -> None:
    method, target, field = UPLOADS[upload]
    write_volume(tmp_path / "x.nii.gz")
    content = (tmp_path / "x.nii.gz").read_bytes()
    for name, file_name in FILE_NAMES.items():
        files = {field: (file_name, content), "params": (None, json.dumps(CLICK))}
        answer = besieged.send_form(method, target, files)
        assert (answer.status, len(answer.detail) > 5) == (400, True), (name, answer)


@pytest.mark.parametrize(
    "names",
    [("a.dcm", "../b.dcm"), ("a.dcm", "b.py"), ("a.dcm", "a.dcm"), ("a.dcm", ".."), ("a.pkl", "b.pkl")],
)
def test_no_file_of_a_series_has_another_name(besieged: Besieged, names: tuple[str, ...]) -> None:
    files = [("files", (name, b"x")) for name in names]
    refused(besieged.send_form("PUT", "/session/", files), 400)


def test_archives_are_not_unpacked(besieged: Besieged) -> None:
    for name in ("x.zip", "x.tar.gz", "x.nii.gz"):
        answer = besieged.send_form("PUT", "/session/?uncompress=true", {"files": (name, b"PK\x03\x04")})
        refused(answer, 400)


FILES = {**detached(Path("x")), **bombs()}


@pytest.mark.parametrize("name", FILES)
def test_no_content_leads_elsewhere_or_explodes(besieged: Besieged, name: str) -> None:
    secret = besieged.outside / "secret.txt"
    content = {**detached(secret), **bombs()}[name]
    params = (None, json.dumps({"foreground": [[1, 1, 1]], "output": "all"}))
    answer = besieged.send_form("POST", "/infer/dfqsam", {"file": (name, content), "params": params})
    refused(answer, 400)


@pytest.mark.parametrize(
    "info", [{"strategy": 5}, {"strategy": {"random": {"ts": 1e18}}}, {"confidence": []}, {"path": "/etc"}]
)
def test_what_the_server_keeps_about_an_image_is_its_own(besieged: Besieged, info: dict[str, Any]) -> None:
    text = {"info": json.dumps(info)}
    refused(besieged.send_form("PUT", "/datastore/image/info?image=phantom0", data=text), 400)
    files = {"file": ("x.nii.gz", b"x"), "params": (None, json.dumps(info))}
    refused(besieged.send_form("PUT", "/datastore/image?image=new", files), 400)


def test_no_pickle_is_opened(besieged: Besieged) -> None:
    evil = pickle.dumps(Evil(besieged.outside))
    for method, target, field, name in (
        ("PUT", "/model/dfqsam", "file", "x.pth"), ("PUT", "/model/dfqsam", "file", "x.safetensors"),
        ("POST", "/infer/dfqsam", "file", "x.nii.gz"), ("POST", "/infer/dfqsam", "file", "x.dcm"),
        ("POST", "/infer/dfqsam?image=phantom0", "label", "x.nrrd"),
    ):  # fmt: skip
        files = {field: (name, evil), "params": (None, json.dumps(CLICK))}
        refused(besieged.send_form(method, target, files))
    for checkpoint in (
        "evil.pth",
        "../outside/secret.txt",
        "evil.pkl",
        str(besieged.outside / "secret.txt"),
        5,
    ):
        refused(send_json(besieged, "/train/dfqsam", {"checkpoint": checkpoint}), 400)
        refused(send_json(besieged, "/train/", {"dfqsam": {"checkpoint": checkpoint}}), 400)
    assert not (besieged.outside / "made by a pickle").exists()


def send_json(besieged: Besieged, target: str, value: Any, method: str = "POST") -> Answer:
    text = value if isinstance(value, str) else json.dumps(value)
    return besieged.send(method, target, text.encode(), {"Content-Type": "application/json"})


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_holds_other_json(besieged: Besieged, field: str) -> None:
    method, target, name, file = FIELDS[field]
    for what, text in JSON.items():
        files: dict[str, Any] = {name: (None, text)}
        if file:
            files[file[0]] = (file[1], b"x")
        answer = besieged.send_form(method, target, files)
        assert answer.status == 400, (what, answer)


@pytest.mark.parametrize(
    "target", ["/train/dfqsam", "/train/", "/activelearning/random", "/scoring/dice", "/scoring/"]
)
def test_no_body_holds_other_json(besieged: Besieged, target: str) -> None:
    for what, text in JSON.items():
        answer = send_json(besieged, target, text)
        assert answer.status in (400, 404, 413, 422), (what, answer)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_does_more(besieged: Besieged, name: str) -> None:
    target, options = OPTIONS[name]
    refused(send_json(besieged, target, options))


@pytest.mark.parametrize("name", PROMPTS)
def test_no_prompt_does_more(besieged: Besieged, name: str) -> None:
    fields = {"params": (None, json.dumps(PROMPTS[name]))}
    refused(besieged.send_form("POST", "/infer/dfqsam?image=phantom0", fields), 400)


def test_a_million_points_are_refused(besieged: Besieged) -> None:
    text = json.dumps({"foreground": [list(OBJECT)] * 1_000_000})
    for form in ({"files": {"params": (None, text)}}, {"data": {"params": text}}):
        refused(besieged.send_form("POST", "/infer/dfqsam?image=phantom0", **form), 400, 413)


@pytest.mark.parametrize(
    "label", ["$(touch pwned)", "`id`", "x; rm -rf /", "<script>alert(1)</script>", "a\r\nb: c"]
)
def test_a_label_is_only_text(besieged: Besieged, label: str) -> None:
    fields = {"params": (None, json.dumps({"label": label, **CLICK}))}
    answer = besieged.send_form("POST", "/infer/dfqsam?image=phantom0&output=json", fields)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body)["label_names"] == {label: 1}
    assert "b" not in answer.headers


def test_names_in_answers_are_no_pages(besieged: Besieged) -> None:
    script = "%3Cscript%3Ealert(1)%3C%2Fscript%3E"
    for method, target in (
        ("POST", f"/train/{script}"), ("GET", f"/datastore/image/info?image={script}"),
        ("GET", f"/session/{script}"), ("GET", f"/{script}"), ("GET", "/logs/?lines=%3Cscript%3E"),
        ("POST", "/activelearning/%3Cscript%3E"), ("POST", "/infer/%3Cb%3E?image=x"),
    ):  # fmt: skip
        refused(besieged.send(method, target))


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_way_in(besieged: Besieged, name: str) -> None:
    method, target, headers, status = OTHERS[name]
    target = target.replace("{elsewhere}", besieged.elsewhere)
    data = f"{method} {target} HTTP/1.1\r\n"
    given = {"Host": "127.0.0.1", "Connection": "close", **headers}
    data += "".join(f"{key}: {value}\r\n" for key, value in given.items()) + "Content-Length: 0\r\n\r\n"
    answered = besieged.send_raw(data.encode())
    assert answered.startswith(f"HTTP/1.1 {status} ".encode()), answered[:300]
    assert SECRET.encode() not in answered
    if method != "HEAD":
        assert len(json.loads(answered.split(b"\r\n\r\n", 1)[1])["detail"]) > 5 or status == 422


@pytest.mark.parametrize("name", RAW)
def test_no_trick_with_framing(besieged: Besieged, name: str) -> None:
    """Most of these the HTTP library refuses itself, in plain text; none may start anything."""
    answered = besieged.send_raw(RAW[name])
    assert answered.startswith(b"HTTP/1.1 4"), answered[:300]
    assert answered.count(b"HTTP/1.1 ") == answered.count(b"HTTP/1.1 4") <= 2


@pytest.mark.parametrize("name", SIZES)
def test_no_body_is_too_large(besieged: Besieged, name: str) -> None:
    answered = besieged.send_raw(SIZES[name]())
    assert answered.startswith(b"HTTP/1.1 413 "), answered[:300]
    assert b"MB are taken" in answered


def test_an_upload_within_the_limit_is_received(besieged: Besieged) -> None:
    """It is then refused for its content alone."""
    answer = besieged.send_form("POST", "/infer/dfqsam", {"file": ("x.nii.gz", bytes(MAX_UPLOAD - MEGABYTE))})
    refused(answer, 400)
    assert "cannot be read" in answer.detail or "nothing to segment" in answer.detail


def test_there_are_enough() -> None:
    places = sum(len(PATHS) - len(place.without) for place in PLACES.values())
    tables = (FILES, OPTIONS, PROMPTS, OTHERS, RAW, SIZES)
    assert places + len(FILE_NAMES) * len(UPLOADS) + len(JSON) * len(FIELDS) + sum(map(len, tables)) > 1000
