"""`dfqsam serve`: MONAI Label's own server on this app, safe by default.

MONAI Label's options follow after `--`. Passed on are those of TLS, logging and limits, and `--conf`; refused
with a sentence are those that `dfqsam serve` has itself, and those that would not do what they promise.
Logins and other origins are MONAI Label's environment variables, which the server inherits.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import ssl
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

logger = logging.getLogger(__name__)

MAIN_PY = '''"""MONAI Label app: DFQ-SAM."""

from monailabel_dfqsam.server.app import DFQSamApp

__all__ = ["DFQSamApp"]
'''

# Upstream keeps only CT series of an archive; the model takes any modality.
_SERIES_FILTER = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER"


_OWN = "stands before --, as an option of dfqsam serve"
_REFUSED = {
    ("-a", "--app"): _OWN,
    ("-s", "--studies"): _OWN,
    ("-i", "--host"): _OWN,
    ("-p", "--port"): _OWN,
    ("--uvicorn_app",): "would serve another application, without what makes this one safe",
    ("--workers",): "cannot be: quantizations and sessions are known to one process alone",
    (
        "--dryrun",
    ): "would write all settings, passwords among them, into a file .env that the next start reads",
    (
        "--ssl_keyfile_password",
    ): "would stand in the log and in the list of processes: give the key without one",
    ("--ssl_ca_certs",): "would have no effect: MONAI Label asks for no client certificates",
}
_PASSED = (
    ("-v", "--verbose"), ("-l", "--log_config"), ("--log_level",), ("--limit_concurrency",),
    ("--root_path",), ("--ssl_keyfile",), ("--ssl_certfile",),
)  # fmt: skip


class ServeError(ValueError):
    """A server that cannot be started as asked; the message says why."""


def default_app_dir() -> Path:
    """Where models and logs go when nothing else is said: the user's data folder."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "dfqsam" / "app"


def prepare_app(app_dir: Path) -> Path:
    """Makes an app folder for MONAI Label, readable by its owner alone; keeps one that is there.

    Raises:
        ServeError: when the folder is there, holds something, and is no app.
    """
    main = app_dir / "main.py"
    if app_dir.is_dir() and any(app_dir.iterdir()) and not main.is_file():
        raise ServeError(f"'{app_dir}' is no app folder: it has no main.py, but is not empty")
    app_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not main.is_file():
        main.write_text(MAIN_PY)
    return app_dir


def check_studies(studies: str) -> None:
    """Refuses what can be no datastore, a folder of images or the URL of an archive; raises ServeError."""
    if studies.startswith(("http://", "https://")):
        return
    folder = Path(studies)
    if not folder.exists():
        raise ServeError(f"there is no folder '{studies}': make it, or name the one with your images")
    if not folder.is_dir():
        raise ServeError(f"'{studies}' is a file: expected is the folder of the images, or an archive's URL")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ServeError(
            f"the folder '{studies}' cannot be written to ({error.strerror}): labels are kept there"
        ) from None


def command(
    studies: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    checkpoint: Path | None = None,
    app_dir: Path | None = None,
    extra: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of the server.

    Args:
        studies: a folder of images, or the URL of a DICOMweb archive.
        checkpoint: full-precision weights, as `find_checkpoint` takes them; None takes the embedded ones.
        app_dir: app folder, made when missing; None takes `default_app_dir()`.
        extra: further options of `monailabel start_server`.

    Raises:
        ServeError: when the studies, the app folder, the checkpoint or a further option cannot be used.
    """
    check_options(extra)
    check_studies(studies)
    if checkpoint is not None:
        checkpoint = _found(checkpoint)
    app = prepare_app(app_dir or default_app_dir())
    line = [sys.executable, "-m", "monailabel_dfqsam.server.upstream.start", "start_server", *extra]
    line += ["--app", str(app), "--studies", studies, "--host", host, "--port", str(port)]
    if checkpoint is not None:
        line += ["--conf", "checkpoint", str(checkpoint.resolve())]
    environment = dict(os.environ)
    # Upstream calls `python` by name.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment.setdefault("MONAI_LABEL_TRACKING_ENABLED", "false")
    environment.setdefault(_SERIES_FILTER, "{}")
    return line, environment


def _found(checkpoint: Path) -> Path:
    """The checkpoint's file; raises ServeError without one."""
    from monailabel_dfqsam.sam.checkpoint import CheckpointError, find_checkpoint  # loads torch

    try:
        path = find_checkpoint(checkpoint)
    except CheckpointError as error:
        raise ServeError(str(error)) from None
    if not path.is_file():
        raise ServeError(f"there is no checkpoint file '{checkpoint}'")
    return path


def serve(
    studies: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    checkpoint: Path | None = None,
    app_dir: Path | None = None,
    extra: Sequence[str] = (),
) -> None:
    """Becomes the server; arguments as for `command`. Does not return."""
    line, environment = command(studies, host, port, checkpoint, app_dir, extra)
    if warning := exposure(host, environment, any(word.startswith("--ssl_certfile") for word in extra)):
        banner = "!" * 78
        print(f"{banner}\n!! {warning}\n{banner}", file=sys.stderr, flush=True)
    os.execve(line[0], line, environment)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ServeError(f"MONAI Label's options after --: {message}")


class _Refuse(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: object, option: str | None = None) -> None:
        raise ServeError(f"{option} {self.help}")


def check_options(extra: Sequence[str]) -> None:
    """Refuses options of MONAI Label that must not be passed on.

    Raises:
        ServeError: saying why; also for unknown options, and for a certificate that cannot be used.
    """
    # Abbreviations would pass by the names that are refused.
    parser = _Parser(add_help=False, allow_abbrev=False)
    for names, reason in _REFUSED.items():
        parser.add_argument(*names, nargs="?", action=_Refuse, help=reason)
    for names in _PASSED:
        parser.add_argument(*names)
    parser.add_argument("-c", "--conf", nargs=2, action="append")
    parser.add_argument("--access_log", action="store_true")
    options = parser.parse_args(list(extra))
    if options.ssl_keyfile and not options.ssl_certfile:
        raise ServeError("--ssl_keyfile needs the certificate, --ssl_certfile, beside it")
    if options.ssl_certfile:
        _check_certificate(options.ssl_certfile, options.ssl_keyfile)


def _check_certificate(certificate: str, key: str | None) -> None:
    try:
        # A password that is wrong, since for none OpenSSL would ask at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, "")
    except OSError as error:  # SSLError is one
        raise ServeError(f"the certificate '{certificate}' cannot be used with its key: {error}") from None


def exposure(host: str, environment: dict[str, str], encrypted: bool) -> str | None:
    """What others on the network can do to a server that listens on `host`; None for nothing.

    Args:
        environment: of the server, with MONAI Label's settings.
        encrypted: whether it has a certificate.
    """
    if is_exposed(host, environment):
        return (
            f"{host}: everyone on this network can read the images and change the labels, for\n"
            "!! there is no login. Listen on 127.0.0.1, or set MONAI_LABEL_AUTH_ENABLE=true."
        )
    if is_exposed(host, {}) and not encrypted:
        return (
            f"{host}: images and logins cross this network unencrypted. Add -- --ssl_keyfile KEY\n"
            "!! --ssl_certfile CERTIFICATE, or put a proxy with TLS in front."
        )
    return None


def is_exposed(host: str, environment: dict[str, str]) -> bool:
    """Whether others than this machine reach the server, and without a login."""
    if environment.get("MONAI_LABEL_AUTH_ENABLE", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
