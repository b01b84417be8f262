"""What a measurement was made on and with: machine, versions, commit, date, command."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from monailabel_dfqsam import __version__

_PACKAGES = ("torch", "openvino", "nncf", "numpy", "monai", "monailabel")
# What decides which kernels a library chooses.
_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm",
    "sve",
)  # fmt: skip


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


def machine() -> dict[str, Any]:
    """CPU model, its flags that matter here, cores, memory in bytes, operating system, and GPUs by name."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "flags": flags,
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "gpus": _gpus(),
    }


def usable_cores() -> int:
    """Physical cores that this process may run on: two threads on a core share its arithmetic."""
    allowed = (
        len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    )
    return max(1, min(allowed or 1, psutil.cpu_count(logical=False) or 1))


def commit(folder: Path) -> dict[str, Any]:
    """{commit, dirty} of the git checkout that a folder lies in; both None outside of one."""
    try:
        head = _output("git", "-C", str(folder), "rev-parse", "HEAD")
        changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(changes)}


def _cpu() -> tuple[str, list[str]]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine(), []
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", platform.machine()), [flag for flag in _FLAGS if flag in present]


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        text = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        return []
    return text.splitlines()


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
