"""The guard's rules one by one, without a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from monailabel_dfqsam.server.gate.guard import Guard, Refusal

PAGE = "http://evil.example"


def ask(
    method: str,
    path: str,
    query: str = "",
    host: str = "127.0.0.1:8000",
    origin: str | None = None,
    server: str = "127.0.0.1",
    app: Any = None,
    **options: Any,
) -> tuple[int, str]:
    """Status and detail of one request; 200 when it gets through."""
    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": headers,
        "server": (server, 8000),
    }  # fmt: skip
    sent: list[Any] = []

    async def through(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(app or through, **options)(scope, None, send))  # type: ignore[arg-type]
    body = sent[1]["body"]
    return sent[0]["status"], json.loads(body)["detail"] if body else ""


@pytest.mark.parametrize(
    "path", ["/a/../b", "/proxy/dicom/%2e%2e/x", "/proxy/dicom/%252e%252e/x", "/a\\b", "/a%00"]
)
def test_no_path_leads_upwards(path: str) -> None:
    assert ask("GET", path)[0] == 400


@pytest.mark.parametrize("key", ["image", "label", "id"])
@pytest.mark.parametrize(
    "value", ["/etc/passwd", "../x", "a/b", "..%5Cx", "%252e%252e%252fx", "..", "x%00", "a" * 256]
)
def test_no_parameter_is_a_path(key: str, value: str) -> None:
    status, detail = ask("GET", "/datastore/image", f"{key}={value}")
    assert status == 400
    assert key in detail


def test_plain_names_pass() -> None:
    for name in ("spleen_10", "1.2.840.113619.2.5", "Müller%20CT%201", "a..b", "x.nii"):
        assert ask("GET", "/datastore/image", f"image={name}")[0] == 200


@pytest.mark.parametrize("tag", ["../x", "a/b", "..", ".hidden", "a b", "x%2Fy"])
def test_a_tag_is_a_word(tag: str) -> None:
    assert ask("PUT", "/datastore/label", f"image=a&tag={tag}")[0] == 400


def test_a_session_has_an_id_and_any_image_name() -> None:
    session = "session_id=2f0c7a5e-c5a1-11ef-9d5c-0242ac120002"
    assert ask("POST", "/infer/dfqsam", f"image=3:%20Abdomen/Pelvis&{session}")[0] == 200
    assert ask("POST", "/infer/dfqsam", "image=3:%20Abdomen/Pelvis")[0] == 400
    assert ask("POST", "/infer/dfqsam", "session_id=../../x")[0] == 400
    assert ask("GET", "/datastore/image", f"image=/etc/passwd&{session}")[0] == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/model/dfqsam"), ("DELETE", "/model/dfqsam"), ("POST", "/reload"), ("POST", "/reload/"),
     ("POST", "/batch/infer/dfqsam"), ("POST", "/infer/wsi/dfqsam"), ("POST", "/infer/wsi_v2/dfqsam"),
     ("PUT", "/api/model/dfqsam")],
)  # fmt: skip
def test_closed_endpoints_say_so(method: str, path: str) -> None:
    status, detail = ask(method, path)
    assert status == 403
    assert detail


def test_other_sites_may_look_but_not_touch() -> None:
    assert ask("POST", "/train/dfqsam", origin=PAGE)[0] == 403
    assert ask("DELETE", "/train/", origin="null")[0] == 403
    assert ask("POST", "/train/dfqsam", origin="http://127.0.0.1:8000")[0] == 200
    assert ask("POST", "/train/dfqsam")[0] == 200
    assert ask("GET", "/info/", origin=PAGE)[0] == 200  # the browser keeps the answer from the page
    assert ask("POST", "/train/dfqsam", origin=PAGE, origins=[PAGE + "/"])[0] == 200


def test_loopback_is_addressed_as_loopback() -> None:
    assert ask("GET", "/info/", host="evil.example:8000")[0] == 403
    assert ask("GET", "/info/", host="")[0] == 403
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert ask("GET", "/info/", host=host)[0] == 200
    assert ask("GET", "/info/", host="pacs.example", trusted_hosts=["PACS.example"])[0] == 200
    assert ask("GET", "/info/", host="pacs.example", server="10.0.0.5")[0] == 200


def test_an_exception_becomes_an_answer_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    path = "/patients/" + "".join(("Mil", "ler"))  # in pieces, since the log shows source lines

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise OSError(path)

    status, detail = ask("GET", "/info/", app=broken)
    assert status == 500
    assert "Miller" not in detail
    assert "Miller" not in caplog.text
    assert "broken" in caplog.text  # where it happened


def test_a_refusal_and_a_known_exception_become_their_sentence() -> None:
    async def refused(scope: Any, receive: Any, send: Any) -> None:
        raise Refusal(404, "no such thing")

    async def known(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("x")

    assert ask("GET", "/", app=refused) == (404, "no such thing")
    assert ask("GET", "/", app=known, translate=lambda error: (418, "a teapot")) == (418, "a teapot")
