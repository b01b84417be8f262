"""The hardware and the operating system under this process, as plain values."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

# What decides which kernels a library chooses.
_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm",
    "sve",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """CPU model, its flags that matter here, cores, memory in bytes, operating system, and GPUs by name."""
    model, flags = cpu()
    return {
        "cpu": model,
        "flags": flags,
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "gpus": _gpus(),
    }


def cpu() -> tuple[str, list[str]]:
    """The processor's name and its instruction sets that matter here, by Linux's names."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine(), []
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", platform.machine()), [flag for flag in _FLAGS if flag in present]


def usable_cores() -> int:
    """Physical cores that this process may run on: two threads on a core share its arithmetic."""
    allowed = (
        len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    )
    return max(1, min(allowed or 1, psutil.cpu_count(logical=False) or 1))


def own_memory(entry: str) -> int:
    """A line of this process's status in bytes: VmRSS is what it holds, VmHWM the most it ever held."""
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, which has no /proc
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024


def _gpus() -> list[str]:
    """NVIDIA GPUs by the driver's own word, whether or not torch can use them: name, driver, memory."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()
