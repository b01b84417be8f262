"""A DICOMweb archive of a few lines that can be slow, broken or away, in the test's own process."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydicom
from pydicom.dataset import Dataset

_SERIES = re.compile(r"/studies/[0-9.]+/series/([0-9.]+)(/metadata)?")
_BOUNDARY = "stub-archive"


@dataclass
class StubArchive:
    """An archive's series and its mood.

    Attributes:
        series: the instances of each by SeriesInstanceUID, in the order in which they are sent.
        listed: the series that searches find, whether or not they are there.
        answer: asked before every answer, with the method, the path and the handler; one that has answered
            itself returns true.
        asked: method and path of every request.
    """

    url: str = ""
    series: dict[str, list[Dataset]] = field(default_factory=dict)
    listed: dict[str, Dataset] = field(default_factory=dict)
    answer: Callable[[str, str, BaseHTTPRequestHandler], bool] = lambda method, path, handler: False
    asked: list[tuple[str, str]] = field(default_factory=list)

    def add(self, paths: list[Path]) -> None:
        """Takes in the DICOM files of one series."""
        instances = [pydicom.dcmread(path) for path in paths]
        self._take(instances)

    def _take(self, instances: list[Dataset]) -> None:
        first, uid = instances[0], str(instances[0].SeriesInstanceUID)
        self.series[uid] = instances
        entry = Dataset()
        for name in ("SeriesInstanceUID", "StudyInstanceUID", "Modality", "PatientID"):
            setattr(entry, name, getattr(first, name))
        entry.NumberOfSeriesRelatedInstances = len(instances)
        self.listed[uid] = entry

    def found(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        """What a search for series answers."""
        return [
            entry.to_json_dict()
            for entry in self.listed.values()
            if all(str(entry.get(key)) == value[0] for key, value in query.items() if key in entry)
        ]


class Patience:
    """Sends a series only when told: `asked` is set when one is wanted, `release` lets it go."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked, self.release = seconds, threading.Event(), threading.Event()

    def __call__(self, method: str, path: str, handler: BaseHTTPRequestHandler) -> bool:
        """`StubArchive.answer`."""
        if is_retrieval(method, path) or method == "POST":
            self.asked.set()
            self.release.wait(self.seconds)
        return False


def is_retrieval(method: str, path: str) -> bool:
    """Whether a request asks for a whole series."""
    found = _SERIES.fullmatch(urlsplit(path).path)
    return method == "GET" and found is not None and not found[2]


@contextmanager
def stub_archive() -> Iterator[StubArchive]:
    """One that listens on loopback."""
    archive = StubArchive()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(archive))
    server.daemon_threads = True
    archive.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield archive
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler: BaseHTTPRequestHandler, status: int, kind: str, body: bytes, cut: int = 0) -> None:
    """One answer; `cut` bytes fewer are sent than are announced."""
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) - cut])
    handler.close_connection = handler.close_connection or cut > 0


def multipart(instances: list[Dataset]) -> bytes:
    """The body of a series."""
    parts = []
    for instance in instances:
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, instance, write_like_original=False)
        head = f"\r\n--{_BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n"
        parts.append(head.encode() + buffer.getvalue())
    return b"".join(parts) + f"\r\n--{_BOUNDARY}--\r\n".encode()


KIND = f'multipart/related; type="application/dicom"; boundary={_BOUNDARY}'
_JSON = "application/dicom+json"


def _handler(archive: StubArchive) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            archive.asked.append(("GET", self.path))
            if archive.answer("GET", self.path, self):
                return
            url = urlsplit(self.path)
            matched = _SERIES.fullmatch(url.path)
            if not matched:
                found = archive.found(parse_qs(url.query))
                send(self, 200, _JSON, json.dumps(found).encode())
            elif matched[1] not in archive.series:
                send(self, 404, "text/plain", b"no such series")
            elif matched[2]:
                headers = [d.to_json_dict() for d in archive.series[matched[1]]]
                for header in headers:
                    del header["7FE00010"]
                send(self, 200, _JSON, json.dumps(headers).encode())
            else:
                send(self, 200, KIND, multipart(archive.series[matched[1]]))

        def do_POST(self) -> None:
            archive.asked.append(("POST", self.path))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if archive.answer("POST", self.path, self):
                return
            part = body[body.index(b"\r\n\r\n") + 4 : body.rindex(b"\r\n--")]
            stored = pydicom.dcmread(io.BytesIO(part))
            archive._take([stored])
            answer = Dataset()
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = (
                stored.SOPClassUID,
                stored.SOPInstanceUID,
            )
            item.RetrieveURL = (
                f"{archive.url}/studies/{stored.StudyInstanceUID}/series/{stored.SeriesInstanceUID}"
                f"/instances/{stored.SOPInstanceUID}"
            )
            answer.ReferencedSOPSequence = [item]
            send(self, 200, _JSON, json.dumps(answer.to_json_dict()).encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
