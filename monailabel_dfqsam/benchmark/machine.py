"""What a measurement was made on and with: machine, versions, commit, date, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from monailabel_dfqsam import __version__
from monailabel_dfqsam.machine import machine

_PACKAGES = ("torch", "openvino", "nncf", "numpy", "monai", "monailabel")


def describe_run() -> dict[str, Any]:
    """Machine, versions, commit, date, command line and load average, as JSON values.

    Call it before anything is computed: the load is that of others.
    """
    return {
        "machine": machine(),
        "versions": {
            "monailabel-dfqsam": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        **commit(Path(__file__).parent),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "load_average_before": list(os.getloadavg()),
    }


def commit(folder: Path) -> dict[str, Any]:
    """{commit, dirty} of the git checkout that a folder lies in; both None outside of one."""
    try:
        head = _output("git", "-C", str(folder), "rev-parse", "HEAD")
        changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(changes)}


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
