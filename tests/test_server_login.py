"""The real server with logins: tokens of a realm, what each role may do, and what upstream got wrong."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import jwt
import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from monailabel_dfqsam.slicer_session import SlicerSession
from tests import forked
from tests.server_fixtures import OBJECT, Server, checkpoint, new_server

KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PUBLIC = KEY.public_key().public_bytes(
    serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
)
USER, ANNOTATOR, REVIEWER, ADMIN = ROLES = tuple(
    f"monailabel-{name}" for name in ("user", "annotator", "reviewer", "admin")
)
PASSWORD = "correct horse"


class Realm(BaseHTTPRequestHandler):
    """What Keycloak answers about a realm, as far as the server asks."""

    def do_GET(self) -> None:
        realm = f"http://{self.headers['Host']}"
        self.answer(
            200, {"public_key": base64.b64encode(PUBLIC).decode(), "token_endpoint": f"{realm}/token"}
        )

    def do_POST(self) -> None:
        given = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if given.get("password") == [PASSWORD]:
            self.answer(200, {"access_token": token(USER), "token_type": "bearer"})
        else:
            self.answer(401, {"error": "invalid_grant"})

    def answer(self, status: int, value: dict[str, str]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def environment(realm: HTTPServer) -> dict[str, str]:
    return {
        "MONAI_LABEL_AUTH_ENABLE": "true",
        "MONAI_LABEL_AUTH_REALM_URI": f"http://127.0.0.1:{realm.server_port}",
    }


@pytest.fixture(scope="module")
def realm() -> Iterator[HTTPServer]:
    realm = HTTPServer(("127.0.0.1", 0), Realm)
    threading.Thread(target=realm.serve_forever, daemon=True).start()
    yield realm
    realm.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, realm: HTTPServer) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("login")
    server = new_server(folder)
    conf = {"quantize": "false", "checkpoint": checkpoint(folder)}
    try:
        server.start(conf, environment(realm), path="/auth/")
        yield server
    finally:
        server.stop()


def claims(role: str, seconds: float = 600) -> dict[str, Any]:
    return {"preferred_username": "u", "email": "e", "name": "n", "realm_access": {"roles": [role]},
            "exp": int(time.time() + seconds)}  # fmt: skip


def token(role: str, **options: Any) -> str:
    return jwt.encode(claims(role, **options), KEY, algorithm="RS256")


def status(server: Server, method: str, path: str, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return requests.request(
        method, server.url + path, headers=headers, json={"bits": 5}, timeout=60
    ).status_code


def test_a_user_logs_in_and_clicks(server: Server) -> None:
    session = SlicerSession(server.url, token=token(USER))
    assert session.info()["name"] == "DFQ-SAM"
    assert session.infer("phantom0", [OBJECT]).image


def test_forged_and_expired_tokens_are_refused(server: Server) -> None:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    unsigned = f"{part({'alg': 'none'})}.{part(claims(ADMIN))}."
    # The public key used as the secret of a symmetric signature, the classic mistake.
    pem = (
        f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(PUBLIC).decode()}\n-----END PUBLIC KEY-----".encode()
    )
    text = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(claims(ADMIN))}"
    signature = base64.urlsafe_b64encode(hmac.new(pem, text.encode(), hashlib.sha256).digest()).rstrip(b"=")
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for forged in (
        unsigned,
        f"{text}.{signature.decode()}",
        jwt.encode(claims(ADMIN), other, algorithm="RS256"),
        token(ADMIN, seconds=-10),
    ):
        assert status(server, "GET", "/info/", forged) == 401


def test_a_name_and_a_password_get_a_token(server: Server) -> None:
    def login(password: str) -> requests.Response:
        form = {"username": "u", "password": password, "grant_type": "password"}
        return requests.post(f"{server.url}/auth/token", data=form, timeout=60)

    assert status(server, "GET", "/info/", login(PASSWORD).json()["access_token"]) == 200
    wrong = login("battery staple")
    assert (wrong.status_code, "name and password" in wrong.json()["detail"]) == (401, True)


@pytest.mark.parametrize("missing", ["realm_access", "preferred_username"])
def test_a_token_that_does_not_say_who_lets_nobody_in(server: Server, missing: str) -> None:
    known = {name: value for name, value in claims(ADMIN).items() if name != missing}
    assert status(server, "GET", "/info/", jwt.encode(known, KEY, algorithm="RS256")) == 401
    assert status(server, "GET", "/info/", token("somebody")) == 403


def test_an_upload_without_a_token_is_refused_before_it_is_sent(server: Server) -> None:
    lines = "PUT /session/ HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(f"{lines}Content-Length: 900000000\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


ANYONE, NOBODY = "anyone", "nobody"


@dataclass(frozen=True)
class Row:
    """Who may use a route: `least`, a role, and every greater one; what those get for the request below."""

    least: str
    target: str
    status: int
    options: dict[str, Any] = field(default_factory=dict)


def form(**parts: str) -> dict[str, Any]:
    return {"files": {name: (None, text) for name, text in parts.items()}}


def upload(name: str) -> dict[str, Any]:
    return {"files": {name: ("x.txt", b"x")}}


LABEL = "?label=nobody&tag=final"
# Upstream's own declarations, in its order, but for model files, which are closed; then our routes. A route
# that would do something is asked for what cannot be done.
ROWS: dict[tuple[str, str], Row] = {
    ("GET", "/openapi.json"): Row(ANYONE, "/openapi.json", 200),
    ("GET", "/static"): Row(ANYONE, "/static/favicon.ico", 200),
    ("GET", "/"): Row(ANYONE, "/", 200),
    ("GET", "/favicon.ico"): Row(ANYONE, "/favicon.ico", 200),
    ("GET", "/auth/"): Row(ANYONE, "/auth/", 200),
    ("POST", "/auth/token"): Row(ANYONE, "/auth/token", 422),
    ("GET", "/auth/token/valid"): Row(USER, "/auth/token/valid", 200),
    ("GET", "/info/"): Row(USER, "/info/", 200),
    ("GET", "/model/{model}"): Row(ADMIN, "/model/dfqsam", 404),
    ("GET", "/model/info/{model}"): Row(ADMIN, "/model/info/dfqsam", 404),
    ("PUT", "/model/{model}"): Row(NOBODY, "/model/dfqsam", 403, upload("file")),
    ("DELETE", "/model/{model}"): Row(NOBODY, "/model/dfqsam", 403),
    ("POST", "/infer/{model}"): Row(USER, "/infer/dfqsam?image=nobody", 400, form(params="{}")),
    ("POST", "/infer/wsi/{model}"): Row(NOBODY, "/infer/wsi/dfqsam", 403),
    ("POST", "/infer/wsi_v2/{model}"): Row(NOBODY, "/infer/wsi_v2/dfqsam", 403),
    ("GET", "/batch/infer"): Row(USER, "/batch/infer", 404),
    ("POST", "/batch/infer/{model}"): Row(ADMIN, "/batch/infer/dfqsam_propose?run_sync=true", 400),
    ("DELETE", "/batch/infer"): Row(ADMIN, "/batch/infer", 200),
    ("GET", "/train/"): Row(USER, "/train/", 404),
    ("POST", "/train/"): Row(ADMIN, "/train/", 400, {"json": {"bits": 5}}),
    ("POST", "/train/{model}"): Row(ADMIN, "/train/dfqsam", 400, {"json": {"bits": 5}}),
    ("DELETE", "/train/"): Row(ADMIN, "/train/", 200),
    ("POST", "/activelearning/{strategy}"): Row(USER, "/activelearning/nobody", 404),
    ("GET", "/scoring/"): Row(USER, "/scoring/", 404),
    ("POST", "/scoring/"): Row(ANNOTATOR, "/scoring/?run_sync=true", 400),
    ("POST", "/scoring/{method}"): Row(ANNOTATOR, "/scoring/nobody", 404),
    ("DELETE", "/scoring/"): Row(ANNOTATOR, "/scoring/", 200),
    ("GET", "/datastore/"): Row(USER, "/datastore/", 200),
    ("PUT", "/datastore/"): Row(ANNOTATOR, "/datastore/?image=x", 400, upload("file")),
    ("PUT", "/datastore/image"): Row(ANNOTATOR, "/datastore/image?image=x", 400, upload("file")),
    ("DELETE", "/datastore/"): Row(ADMIN, "/datastore/?id=nobody", 404),
    ("DELETE", "/datastore/image"): Row(ADMIN, "/datastore/image?id=nobody", 404),
    ("HEAD", "/datastore/image"): Row(USER, "/datastore/image?image=phantom0", 200),
    ("GET", "/datastore/image"): Row(USER, "/datastore/image?image=phantom0", 200),
    ("GET", "/datastore/image/info"): Row(USER, "/datastore/image/info?image=phantom0", 200),
    ("PUT", "/datastore/image/info"): Row(
        ANNOTATOR, "/datastore/image/info?image=nobody", 404, form(info="{}")
    ),
    ("PUT", "/datastore/label"): Row(ANNOTATOR, "/datastore/label?image=nobody", 400, upload("label")),
    ("DELETE", "/datastore/label"): Row(ADMIN, "/datastore/label?id=nobody&tag=final", 404),
    ("HEAD", "/datastore/label"): Row(USER, "/datastore/label?image=nobody&tag=final", 404),
    ("GET", "/datastore/label"): Row(USER, f"/datastore/label{LABEL}", 404),
    ("GET", "/datastore/label/info"): Row(USER, f"/datastore/label/info{LABEL}", 200),
    ("PUT", "/datastore/label/info"): Row(ANNOTATOR, f"/datastore/label/info{LABEL}", 404, form(info="{}")),
    ("PUT", "/datastore/updatelabelinfo"): Row(
        ANNOTATOR, f"/datastore/updatelabelinfo{LABEL}", 404, form(params="{}")
    ),
    ("GET", "/datastore/dataset"): Row(ANNOTATOR, "/datastore/dataset", 404),
    ("GET", "/logs/"): Row(ADMIN, "/logs/", 200),
    ("GET", "/logs/gpu"): Row(ADMIN, "/logs/gpu", 200 if shutil.which("nvidia-smi") else 404),
    ("GET", "/ohif/{path:path}"): Row(USER, "/ohif/", 200),
    **{
        (method, f"/proxy/dicom/{part}{{path:path}}"): Row(USER, f"/proxy/dicom/{part}x", 404)
        for method in ("GET", "POST")
        for part in ("wado/", "qido/", "stow/", "")
    },
    ("GET", "/session/{session_id}"): Row(USER, "/session/nobody", 404),
    ("PUT", "/session/"): Row(USER, "/session/", 400, upload("files")),
    ("DELETE", "/session/{session_id}"): Row(USER, "/session/nobody", 404),
    ("POST", "/reload"): Row(NOBODY, "/reload", 403),
    ("GET", "/dfqsam/"): Row(ANYONE, "/dfqsam/", 200),
    ("GET", "/dfqsam/page.css"): Row(ANYONE, "/dfqsam/page.css", 200),
    ("GET", "/dfqsam/page.js"): Row(ANYONE, "/dfqsam/page.js", 200),
    ("GET", "/dfqsam/status"): Row(USER, "/dfqsam/status", 200),
    ("GET", "/dfqsam/runs/{run}"): Row(USER, "/dfqsam/runs/nobody", 404),
    ("GET", "/dfqsam/pictures/{key}"): Row(USER, "/dfqsam/pictures/0123456789abcdef", 404),
    ("GET", "/dfqsam/report/{key}"): Row(USER, "/dfqsam/report/0123456789abcdef", 404),
    ("POST", "/dfqsam/choose/{key}"): Row(ADMIN, "/dfqsam/choose/0123456789abcdef", 404),
}


PROXIES = ("proxy", "proxy_qido", "proxy_stow", "proxy_wado")


@pytest.mark.parametrize(("method", "path"), ROWS)
def test_each_role_may_do_what_is_its_own(server: Server, method: str, path: str) -> None:
    row = ROWS[method, path]
    for role in (None, *ROLES):
        may = row.least == ANYONE or (role is not None and row.least in ROLES[: ROLES.index(role) + 1])
        expected = row.status if may or row.least == NOBODY else 401 if role is None else 403
        headers = {"Authorization": f"Bearer {token(role)}"} if role else {}
        answer = requests.request(method, server.url + row.target, headers=headers, timeout=60, **row.options)
        assert answer.status_code == expected, (role, answer.text[:300])


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory, realm: HTTPServer) -> list[tuple[str, str, list[str]]]:
    """The routes of an application made as the server makes it, those outside of its description too."""
    folder = tmp_path_factory.mktemp("routes")
    made, log = new_server(folder, volumes=0), folder / "log"
    line = ["tests.list_routes", str(made.app), made.studies]
    process = forked.start(line, {**os.environ, **environment(realm)}, log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    return [(method, path, on_loop) for method, path, on_loop in json.loads(log.read_text().splitlines()[-1])]


def test_no_route_of_monai_label_runs_on_the_event_loop(listed: list[tuple[str, str, list[str]]]) -> None:
    """But the way to the archive, which reads bodies there and asks in threads of its own."""
    found = {name for _, _, names in listed for name in names}
    assert found == {f"monailabel.endpoints.proxy.{name}" for name in PROXIES}


def test_the_table_has_a_row_for_every_route(listed: list[tuple[str, str, list[str]]]) -> None:
    routes = {(method, path) for method, path, _ in listed}
    # Starlette answers HEAD wherever it answers GET, by the same rules.
    routes -= {(method, path) for method, path in routes - ROWS.keys() if method == "HEAD"}
    assert routes == ROWS.keys()
