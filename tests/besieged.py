"""A server with its surroundings watched: what hostile requests write or read there is seen."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from tests.server_fixtures import Server, checkpoint, new_server, write_volume

SECRET = "the secret of another file"
MAX_UPLOAD = 8 << 20
SECONDS = 60.0


class Evil:
    """What unpickles into a folder beside the secret."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder / "made by a pickle")

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._folder,)


@dataclass(frozen=True)
class Answer:
    """A reply; `headers` by lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        """The sentence or the list under 'detail'."""
        return str(json.loads(self.body)["detail"])


@dataclass
class Besieged:
    """The server, what lies beside it, and a listener that nobody should call.

    Attributes:
        outside: folder beside the server's own, with `secret.txt` and the volume `secret.nii.gz`.
        calls: what reached the listener at `elsewhere`.
    """

    server: Server
    folder: Path
    outside: Path
    elsewhere: str
    calls: list[str] = field(default_factory=list)

    def snapshot(self) -> dict[str, str]:
        """Each folder and file, with the file's digest, of all the server can write, without its logs."""
        found = {}
        for path in self.folder.rglob("*"):
            if path.parent == self.server.app / "logs" or path == self.server.log or path.name == ".lock":
                continue
            is_own = path.is_file() and path.parent != self.outside
            content = path.read_bytes() if is_own else b""
            found[str(path.relative_to(self.folder))] = hashlib.sha256(content).hexdigest()
        return found

    def send(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request whose address goes over the wire exactly as given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=SECONDS)
        try:
            connection.putrequest(method, target, skip_accept_encoding=True)
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            reply = connection.getresponse()
            return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def send_form(self, method: str, target: str, files: Any = None, data: Any = None) -> Answer:
        """One form: `files` and `data` as `requests` takes them."""
        made = requests.Request(method, self.server.url, files=files, data=data).prepare()
        body = made.body if isinstance(made.body, bytes) else str(made.body or "").encode()
        return self.send(
            method, target, body, {"Content-Type": made.headers.get("Content-Type", "text/plain")}
        )

    def send_raw(self, data: bytes) -> bytes:
        """Bytes on a socket, and all that is answered to them."""
        answered = b""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=SECONDS) as connection:
            # A server that refuses may stop reading before all was sent.
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            with contextlib.suppress(TimeoutError, ConnectionError):
                while block := connection.recv(65_536):
                    answered += block
                    if _is_whole(answered):
                        connection.settimeout(0.3)  # for a second answer, which there should not be
        return answered

    def watch(self) -> None:
        """Sets the secrets' times of reading back, to before their writing so that the next one counts."""
        for path in self.outside.iterdir():
            os.utime(path, (1, 2))

    def was_read(self) -> list[str]:
        """Names of secrets that were read since `watch`, where the file system tells."""
        return [path.name for path in self.outside.iterdir() if path.stat().st_atime != 1]

    def reading_is_seen(self) -> bool:
        """Whether the file system keeps times of reading."""
        self.watch()
        (self.outside / "secret.txt").read_bytes()
        return self.was_read() == ["secret.txt"]


def _is_whole(answer: bytes) -> bool:
    """Whether one answer with a length, or the end of its chunks, is there."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


def _listen(calls: list[str]) -> HTTPServer:
    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            calls.append(f"{self.command} {self.path}")
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    listener = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    return listener


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    """One server in full precision, with temporary files and sessions of its own."""
    folder = tmp_path_factory.mktemp("besieged")
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    write_volume(outside / "secret.nii.gz")
    weights = checkpoint(folder)
    server = new_server(folder)
    (server.app / "model").mkdir()
    torch.save({"weight": Evil(outside)}, server.app / "model" / "evil.pth")
    (folder / "tmp").mkdir()
    calls: list[str] = []
    listener = _listen(calls)
    environment = {
        "TMPDIR": str(folder / "tmp"), "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"),
        "HOME": str(folder / "home"), "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
    }  # fmt: skip
    try:
        server.start(
            {"quantize": "false", "checkpoint": weights, "max_upload_mb": MAX_UPLOAD >> 20}, environment
        )
        yield Besieged(server, folder, outside, f"http://127.0.0.1:{listener.server_port}", calls)
    finally:
        server.stop()
        listener.shutdown()
