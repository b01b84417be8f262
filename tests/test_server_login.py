"""The real server with logins: tokens of a realm, their roles, and what upstream got wrong about both."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from monailabel_dfqsam.slicer_session import SlicerSession
from tests.server_fixtures import OBJECT, Server, checkpoint, new_server

KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PUBLIC = KEY.public_key().public_bytes(
    serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
)
USER, ADMIN = "monailabel-user", "monailabel-admin"


class Realm(BaseHTTPRequestHandler):
    """What Keycloak answers about a realm, as far as the server asks."""

    def do_GET(self) -> None:
        body = json.dumps({"public_key": base64.b64encode(PUBLIC).decode()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    realm = HTTPServer(("127.0.0.1", 0), Realm)
    threading.Thread(target=realm.serve_forever, daemon=True).start()
    folder: Path = tmp_path_factory.mktemp("login")
    server = new_server(folder)
    environment = {
        "MONAI_LABEL_AUTH_ENABLE": "true",
        "MONAI_LABEL_AUTH_REALM_URI": f"http://127.0.0.1:{realm.server_port}",
    }
    try:
        server.start({"quantize": "false", "checkpoint": checkpoint(folder)}, environment, path="/auth/")
        yield server
    finally:
        server.stop()
        realm.shutdown()


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


@pytest.mark.parametrize("path", ["/info/", "/train/", "/datastore/", "/logs/", "/proxy/dicom/x"])
def test_without_a_token_there_is_nothing(server: Server, path: str) -> None:
    assert status(server, "GET", path, None) == 401


def test_a_click_needs_a_token(server: Server) -> None:
    answer = requests.post(
        f"{server.url}/infer/dfqsam?image=phantom0", files={"params": (None, "{}")}, timeout=60
    )
    assert answer.status_code == 401


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


def test_an_administrator_may_do_what_users_may_and_not_the_other_way_round(server: Server) -> None:
    assert status(server, "GET", "/info/", token(ADMIN)) == 200
    assert status(server, "POST", "/train/dfqsam", token(ADMIN)) == 400  # allowed, but 5 bits are not
    assert status(server, "POST", "/train/dfqsam", token(USER)) == 403
    assert status(server, "GET", "/info/", token("somebody")) == 403


def test_nobody_reloads_the_app(server: Server) -> None:
    assert status(server, "POST", "/reload", None) == 403
    assert status(server, "POST", "/reload", token(ADMIN)) == 403
