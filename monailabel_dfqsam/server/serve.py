"""`dfqsam serve`: MONAI Label's own server on this app, safe by default."""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

MAIN_PY = '''"""MONAI Label app: DFQ-SAM."""

from monailabel_dfqsam.server.app import DFQSamApp

__all__ = ["DFQSamApp"]
'''

# Upstream keeps only CT series of an archive; the model takes any modality.
_SERIES_FILTER = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER"


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
        checkpoint: full-precision weights; None takes the embedded ones.
        app_dir: app folder, made when missing; None takes `default_app_dir()`.
        extra: further options of `monailabel start_server`.

    Raises:
        ServeError: when the app folder or the checkpoint cannot be used.
    """
    if checkpoint is not None and not checkpoint.is_file():
        raise ServeError(f"there is no checkpoint file '{checkpoint}'")
    app = prepare_app(app_dir or default_app_dir())
    # Further options come first: of two the last one counts, and nobody is to listen elsewhere unwarned.
    line = [sys.executable, "-m", "monailabel.main", "start_server", *extra]
    line += ["--app", str(app), "--studies", studies, "--host", host, "--port", str(port)]
    if checkpoint is not None:
        line += ["--conf", "checkpoint", str(checkpoint.resolve())]
    environment = dict(os.environ)
    # Upstream calls `itkimage2segimage` and `python` by name.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment.setdefault("MONAI_LABEL_TRACKING_ENABLED", "false")
    environment.setdefault(_SERIES_FILTER, "{}")
    return line, environment


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
    if is_exposed(host, environment):
        banner = "!" * 78
        print(
            f"{banner}\n!! {host}: everyone on this network can read the images and change the labels, for\n"
            f"!! there is no login. Listen on 127.0.0.1, or set MONAI_LABEL_AUTH_ENABLE=true.\n{banner}",
            file=sys.stderr,
            flush=True,
        )
    os.execve(line[0], line, environment)


def is_exposed(host: str, environment: dict[str, str]) -> bool:
    """Whether others than this machine reach the server, and without a login."""
    if environment.get("MONAI_LABEL_AUTH_ENABLE", "").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
