"""What `dfqsam serve` starts: options, and a real server with a certificate, other origins and an archive."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from monailabel_dfqsam.server.serve import (
    ServeError,
    check_options,
    command,
    default_app_dir,
    exposure,
    is_exposed,
    prepare_app,
)
from tests.server_fixtures import START_SECONDS, checkpoint, free_port, wait


def test_an_app_folder_is_made_once_for_its_owner(tmp_path: Path) -> None:
    app = prepare_app(tmp_path / "data" / "app")
    assert stat.S_IMODE(app.stat().st_mode) == 0o700
    main = app / "main.py"
    assert "DFQSamApp" in main.read_text()
    main.write_text("# mine\n")
    assert prepare_app(app).joinpath("main.py").read_text() == "# mine\n"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ServeError, match=r"main\.py"):
        prepare_app(tmp_path)


def test_the_command_is_upstreams_with_our_defaults(tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    weights.touch()
    extra = ["--verbose", "DEBUG"]
    line, environment = command(str(tmp_path), checkpoint=weights, app_dir=tmp_path / "app", extra=extra)
    assert line[:4] == [sys.executable, "-m", "monailabel_dfqsam.server.upstream.start", "start_server"]
    options = dict(zip(line[4::2], line[5::2], strict=False))
    assert options["--host"] == "127.0.0.1"
    assert options["--verbose"] == "DEBUG"
    assert options["--app"] == str(tmp_path / "app")
    assert line[-3:] == ["--conf", "checkpoint", str(weights)]
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))


def test_the_published_lite_medsam_is_passed_on_as_a_file(lite_medsam: Path, tmp_path: Path) -> None:
    line, _ = command(str(tmp_path), checkpoint=Path("lite-medsam"), app_dir=tmp_path / "app")
    assert line[-3:] == ["--conf", "checkpoint", str(lite_medsam.resolve())]


def test_a_missing_checkpoint_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="no checkpoint"):
        command(str(tmp_path), checkpoint=tmp_path / "none.pth", app_dir=tmp_path / "app")


UNUSABLE = {"a file": "is a file", "nothing": "there is no folder", "read-only": "cannot be written to"}


@pytest.fixture(params=UNUSABLE)
def unusable(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Studies that no server can have, and what it says."""
    kind = str(request.param)
    (tmp_path / "image.nii.gz").touch()
    # Linux lets nobody, not even root, make a file in /proc.
    place = {"a file": tmp_path / "image.nii.gz", "nothing": tmp_path / "absent", "read-only": Path("/proc")}
    return str(place[kind]), UNUSABLE[kind]


def test_unusable_studies_are_said_in_one_sentence(unusable: tuple[str, str], tmp_path: Path) -> None:
    studies, sentence = unusable
    line = [str(Path(sys.executable).with_name("dfqsam")), "serve", "--studies", studies]
    done = subprocess.run(
        [*line, "--app", str(tmp_path / "app")], capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert [sentence in row and studies in row for row in done.stderr.splitlines()] == [True]


@pytest.mark.parametrize("kind", ["a file", "read-only"])  # upstream makes what is not there
def test_monai_labels_own_command_ends_with_the_sentence_too(kind: str, tmp_path: Path) -> None:
    (tmp_path / "image.nii.gz").touch()
    studies = "/proc" if kind == "read-only" else str(tmp_path / "image.nii.gz")
    line = [
        sys.executable,
        "-m",
        "monailabel.main",
        "start_server",
        "--app",
        str(prepare_app(tmp_path / "app")),
    ]
    line += ["--studies", studies, "--port", str(free_port())]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert UNUSABLE[kind] in said
    assert "Traceback" not in said
    assert 'File "' not in said


def test_the_data_folder_follows_the_desktop_standard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_app_dir() == tmp_path / "dfqsam" / "app"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "pacs.example"])
def test_open_to_others_without_a_login_is_noticed(host: str) -> None:
    assert is_exposed(host, {})
    assert not is_exposed(host, {"MONAI_LABEL_AUTH_ENABLE": "true"})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_login(host: str) -> None:
    assert not is_exposed(host, {})


def write_certificate(folder: Path, password: bytes | None = None) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that trusts itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    )
    return paths


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--host", "0.0.0.0"], "before --"), (["--host=0.0.0.0"], "before --"),
        (["-i", "0.0.0.0"], "before --"), (["-i0.0.0.0"], "before --"),
        (["--port", "80"], "before --"), (["--app", "/x"], "before --"),
        (["-a", "/x"], "before --"), (["--studies", "/x"], "before --"), (["-s", "/x"], "before --"),
        (["--hos", "0.0.0.0"], "unrecognized"), (["--uvicorn_app", "x:y"], "another application"),
        (["--workers", "2"], "one process"), (["--dryrun"], "passwords"), (["--reload"], "unrecognized"),
        (["--ssl_keyfile_password", "x"], "in the log"), (["--ssl_ca_certs", "x"], "no effect"),
        (["--ssl_keyfile", "x"], "needs the certificate"), (["--ssl_certfile", "/no/file"], "cannot be used"),
        (["--conf", "bits"], "expected 2"), (["stray"], "unrecognized"),
    ],
)  # fmt: skip
def test_options_that_would_undo_what_is_safe_are_refused(option: list[str], sentence: str) -> None:
    with pytest.raises(ServeError, match=sentence):
        check_options(["--verbose", "INFO", *option])


def test_a_certificate_is_tried_before_anything_starts(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    good = ["--ssl_certfile", str(certificate), "--ssl_keyfile", str(key), "--access_log", "-c", "bits", "4"]
    check_options([*good, "--limit_concurrency", "9", "--root_path", "/x", "-l", "log.json"])
    other = tmp_path / "other"
    other.mkdir()
    _, other_key = write_certificate(other)
    with pytest.raises(ServeError, match="cannot be used with its key"):
        check_options(["--ssl_certfile", str(certificate), "--ssl_keyfile", str(other_key)])
    locked = write_certificate(other, b"secret")
    with pytest.raises(ServeError, match="cannot be used with its key"):
        check_options(["--ssl_certfile", str(locked[0]), "--ssl_keyfile", str(locked[1])])


def test_what_others_can_do_is_said() -> None:
    login = {"MONAI_LABEL_AUTH_ENABLE": "true"}
    assert "there is no login" in (exposure("0.0.0.0", {}, True) or "").replace("\n!! ", " ")
    assert "unencrypted" in (exposure("0.0.0.0", login, False) or "")
    assert exposure("0.0.0.0", login, True) is None
    assert exposure("127.0.0.1", {}, False) is None


@dataclass
class Served:
    """A server that `dfqsam serve` started, and the archive beside it.

    Attributes:
        url: with https.
        certificate: what to trust.
        calls: what the archive was asked.
    """

    url: str
    certificate: Path
    calls: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, origin: str | None = None, **headers: str) -> requests.Response:
        """One request, from a page of `origin`."""
        sent = {**headers, **({"Origin": origin} if origin else {})}
        return requests.request(
            method, self.url + path, headers=sent, json={"bits": 5}, verify=str(self.certificate), timeout=60
        )


OHIF = "https://ohif.example"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The command line as a hospital gives it, until SIGTERM."""
    folder = tmp_path_factory.mktemp("serve")
    certificate, key = write_certificate(folder)
    port = free_port()
    found = Served(f"https://127.0.0.1:{port}", certificate)

    class Archive(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.calls.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: Any) -> None:
            pass

    archive = HTTPServer(("127.0.0.1", 0), Archive)
    threading.Thread(target=archive.serve_forever, daemon=True).start()
    line = [str(Path(sys.executable).with_name("dfqsam")), "serve", "--port", str(port)]
    line += ["--studies", f"http://127.0.0.1:{archive.server_port}/dicom-web"]
    line += [
        "--app",
        str(folder / "app"),
        "--checkpoint",
        str(checkpoint(folder)),
        "--",
        "--conf",
        "quantize",
    ]
    line += ["false", "--ssl_certfile", str(certificate), "--ssl_keyfile", str(key)]
    environment = {
        **os.environ, "MONAI_LABEL_CORS_ORIGINS": f'["{OHIF}"]', "OMP_NUM_THREADS": "1",
        "MONAI_LABEL_DATASTORE_CACHE_PATH": str(folder / "cache"),
        "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"),
    }  # fmt: skip
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(line, stdout=output, stderr=output, env=environment)
    try:
        wait(lambda: _answers(found) or process.poll() is not None, START_SECONDS)
        assert process.poll() is None, log.read_text()[-3000:]
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        archive.shutdown()


def _answers(served: Served) -> bool:
    try:
        return served.ask("GET", "/info/").status_code == 200
    except requests.ConnectionError:
        return False


def test_it_speaks_tls_alone(served: Served) -> None:
    assert served.ask("GET", "/info/").json()["name"] == "DFQ-SAM"
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{served.url}/info/", timeout=60)  # whose certificate nobody trusts
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{served.url.replace('https', 'http')}/info/", timeout=60)


def test_an_allowed_origin_may_read_and_post(served: Served) -> None:
    for method, path, status in (("GET", "/info/", 200), ("POST", "/train/dfqsam", 400), ("GET", "//", 400)):
        answer = served.ask(method, path, OHIF)
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (status, OHIF)
        assert answer.headers["Access-Control-Allow-Credentials"] == "true"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = served.ask("OPTIONS", "/infer/dfqsam", OHIF, **asked)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == OHIF
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    # Its pages may also show the server's within their own.
    assert f"frame-ancestors 'self' {OHIF}" in served.ask("GET", "/info/").headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://ohif.example", f"{OHIF}.evil.example", "null"]
)
def test_another_origin_may_not(served: Served, origin: str) -> None:
    assert "Access-Control-Allow-Origin" not in served.ask("GET", "/info/", origin).headers
    assert served.ask("POST", "/train/dfqsam", origin).status_code == 403
    asked = {"Access-Control-Request-Method": "POST"}
    answer = served.ask("OPTIONS", "/infer/dfqsam", origin, **asked)
    assert answer.status_code == 400
    assert "Access-Control-Allow-Origin" not in answer.headers


REFUSED_BY_THE_PROXY = (
    "//evil.example/x", "/../../system", "/%2e%2e/%2e%2e/system", "/%252e%252e/system", "/a/%2f/x",
    "/..%5csystem", "/a%0d%0aHost:%20evil.example", "/http://evil.example/", "/a%00",
)  # fmt: skip


def test_the_proxy_leads_to_the_archive_alone(served: Served) -> None:
    served.calls.clear()
    assert served.ask("GET", "/proxy/dicom/qido/studies?limit=1&image=/x").status_code == 200
    assert served.calls == ["/dicom-web/studies?limit=1&image=/x"]
    for path in REFUSED_BY_THE_PROXY:
        with requests.Session() as session:
            made = session.prepare_request(requests.Request("GET", served.url))
            made.url = f"{served.url}/proxy/dicom{path}"  # `requests` would tidy it
            assert session.send(made, timeout=60, verify=str(served.certificate)).status_code == 400, path
    for path in ("/@evil.example/x", "/:80/x", "/studies%3Flimit=1%23x"):
        assert served.ask("GET", f"/proxy/dicom{path}").status_code == 200, path
    assert all(call.startswith("/dicom-web/") for call in served.calls), served.calls
