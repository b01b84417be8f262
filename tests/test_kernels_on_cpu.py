"""The CUDA sources between matrix products, executed without a GPU and without an access out of bounds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import kernels_on_cpu

ROOT = Path(__file__).parents[1]


def cuda_headers() -> Path | None:
    """The folder of cuda_fp16.h: beside nvcc, in CUDA's usual place, or among torch's own packages."""
    nvcc, nvidia = shutil.which("nvcc"), importlib.util.find_spec("nvidia")
    places = [Path(nvcc).parents[1] / "include"] if nvcc else []
    places.append(Path("/usr/local/cuda/include"))
    for folder in nvidia.submodule_search_locations or () if nvidia else ():
        places += Path(folder).glob("cu*/include")
    return next((place for place in places if (place / "cuda_fp16.h").is_file()), None)


def sanitizers() -> list[str]:
    """The sanitizers' libraries, to be loaded before all others."""
    if shutil.which("g++") is None:
        return []
    found = [
        subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    return found if all(os.path.isabs(path) for path in found) else []


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    headers = cuda_headers()
    if headers is None:
        pytest.skip("CUDA's headers are not here")
    if not sanitizers():
        pytest.skip("there is no g++ with sanitizers here")
    return kernels_on_cpu.build(tmp_path_factory.mktemp("kernels"), headers)


def run(library: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(sanitizers()),
        # Python does not free everything at exit.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, "-m", "tests.kernels_on_cpu", str(library)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_kernels_are_their_references_within_bounds(library: Path) -> None:
    done = run(library)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_kernel_that_writes_out_of_bounds_is_found_out(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row too many in quantize_rows, and only there."""
    source = kernels_on_cpu.host_source()
    wrong = source.replace("if (index >= rows * groups) return;", "if (index > rows * groups) return;", 1)
    assert wrong != source
    monkeypatch.setattr(kernels_on_cpu, "host_source", lambda: wrong)
    headers = cuda_headers()
    assert headers is not None
    done = run(kernels_on_cpu.build(tmp_path, headers))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
