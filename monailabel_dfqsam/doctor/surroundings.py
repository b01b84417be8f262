"""What lies around the server: viewers, studies, settings."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import requests

from monailabel_dfqsam.doctor.finding import Finding, Level
from monailabel_dfqsam.files import IMAGE_ENDINGS, is_image_name
from monailabel_dfqsam.machine import usable_cores
from monailabel_dfqsam.server.serve import is_exposed

PORT = 8000
"""Where `dfqsam serve` listens unless told otherwise."""

_QIDO_SECONDS = 8.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_YES = ("1", "true", "t", "yes", "y", "on")


def is_archive(studies: str | None) -> bool:
    """Whether studies are a DICOMweb archive's, by its URL."""
    return studies is not None and studies.startswith(("http://", "https://"))


def viewers() -> Iterator[Finding]:
    """OHIF's pages, the program that MONAI Label calls by name, and the port."""
    spec = find_spec("monailabel")
    page = Path(spec.origin).parent / "endpoints/static/ohif/index.html" if spec and spec.origin else None
    yield Finding.judged(
        page is not None and page.is_file(),
        "viewers",
        "OHIF",
        "its pages" + (" are here" if page is not None and page.is_file() else " are missing"),
        Level.WARNING,
        "3D Slicer works; for OHIF install monailabel from its wheel, which has the pages.",
    )
    # As `dfqsam serve` calls them.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("python", path=path)
    yield Finding.judged(
        found is not None,
        "viewers",
        "python",
        found or "not found; it trains",
        Level.PROBLEM,
        "Put the environment's folder of programs on PATH.",
    )
    yield _port()


def _port() -> Finding:
    with socket.socket() as listener:
        # As a server that is started again sets it: old connections are no obstacle.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", PORT))
        except OSError as error:
            text = "taken" if error.errno == errno.EADDRINUSE else str(error.strerror)
            remedy = "Stop what listens there, perhaps a server already running, or serve with --port."
            return Finding("viewers", f"port {PORT}", text, Level.PROBLEM, remedy)
    return Finding("viewers", f"port {PORT}", "free")


def archive(url: str) -> Finding:
    """Asks a DICOMweb archive for one study; the one thing here that leaves the machine."""
    user = os.environ.get("MONAI_LABEL_DATASTORE_USERNAME") or os.environ.get("MONAI_LABEL_DICOMWEB_USERNAME")
    password = os.environ.get("MONAI_LABEL_DATASTORE_PASSWORD") or os.environ.get(
        "MONAI_LABEL_DICOMWEB_PASSWORD"
    )
    prefix = os.environ.get("MONAI_LABEL_QIDO_PREFIX")
    address = "/".join([url.rstrip("/"), *filter(None, [prefix]), "studies"])
    try:
        answer = requests.get(
            address, params={"limit": "1"}, headers={"Accept": "application/dicom+json"},
            auth=(user, password or "") if user else None, timeout=_QIDO_SECONDS,
        )  # fmt: skip
    except requests.RequestException as error:
        return _no_archive(
            url,
            f"does not answer ({type(error).__name__})",
            "Start it, and check address, port and firewall.",
        )
    if answer.status_code in (401, 403):
        remedy = "Set MONAI_LABEL_DATASTORE_USERNAME and MONAI_LABEL_DATASTORE_PASSWORD."
        return _no_archive(url, f"refuses this user ({answer.status_code})", remedy)
    if answer.status_code == 204:
        return Finding("studies", url, "answers; it is empty")
    try:
        studies = answer.json() if answer.ok else None
    except ValueError:
        studies = None
    if not isinstance(studies, list):
        remedy = "Give the address of its DICOMweb service, which often ends in /dicom-web."
        return _no_archive(
            url, f"is no DICOMweb service: it answers {answer.status_code} to /studies", remedy
        )
    return Finding("studies", url, "answers" if studies else "answers; it is empty")


def _no_archive(url: str, text: str, remedy: str) -> Finding:
    return Finding("studies", url, text, Level.PROBLEM, remedy)


def folder(path: Path) -> Finding:
    """A folder of images: whether it can be read, and labels written to it."""
    name = str(path)
    if not path.is_dir():
        text = "is a file" if path.exists() else "does not exist"
        remedy = "Give a folder of images, or the URL of a DICOMweb archive."
        return Finding("studies", name, text, Level.PROBLEM, remedy)
    if not os.access(path, os.R_OK | os.X_OK):
        return Finding("studies", name, "cannot be read", Level.PROBLEM, "Let this user read it.")
    if not os.access(path, os.W_OK):
        remedy = "Let this user write to it: MONAI Label keeps labels and its list of images there."
        return Finding("studies", name, "cannot be written to", Level.PROBLEM, remedy)
    count = sum(is_image_name(entry.name) for entry in path.iterdir())
    if not count:
        remedy = f"Put images there: {', '.join(IMAGE_ENDINGS)}; an annotator may also bring volumes along."
        return Finding("studies", name, "holds no image", Level.WARNING, remedy)
    return Finding("studies", name, f"can be read and written to; images in it: {count}")


def settings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that decide on speed, and those that open the server; of MONAI Label's others the names."""
    for name in _THREADS:
        if (text := environment.get(name)) is not None:
            yield _threads(name, text)
    names = sorted(name for name in environment if name.startswith("MONAI_LABEL_"))
    yield Finding("settings", "set for MONAI Label", ", ".join(names) or "nothing")
    if is_exposed("0.0.0.0", dict(environment)):
        yield Finding(
            "settings", "login", "none: for this machine alone, which is what `dfqsam serve` listens to"
        )
    if environment.get("MONAI_LABEL_CORS_ORIGINS"):
        yield Finding(
            "settings", "MONAI_LABEL_CORS_ORIGINS", environment["MONAI_LABEL_CORS_ORIGINS"], Level.WARNING,
            "Pages of these origins may read images and change labels: name no more than the viewers'.",
        )  # fmt: skip
    if environment.get("MONAI_LABEL_TRACKING_ENABLED", "").lower() in _YES:
        yield Finding(
            "settings", "MONAI_LABEL_TRACKING_ENABLED", "on", Level.WARNING,
            "MONAI Label reports to MLflow then: unset it unless that is wanted.",
        )  # fmt: skip


def _threads(name: str, text: str) -> Finding:
    cores = usable_cores()
    if not text.isdigit() or int(text) == 0:
        return Finding("settings", name, text, Level.WARNING, f"Set it to {cores}, or unset it.")
    if int(text) == cores:
        return Finding("settings", name, text)
    than = "More threads than cores wait for each other" if int(text) > cores else "Some cores stay idle"
    return Finding("settings", name, text, Level.WARNING, f"{than}: set it to {cores}, or unset it.")
