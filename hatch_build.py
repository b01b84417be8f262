"""Builds the CPU library into the package, a file for each instruction set, with the C++ compiler at hand.

Without a compiler the package installs all the same, and runs in plain torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# By the names that torch gives to a processor's abilities.
INSTRUCTION_SETS = (
    {"avx512": "x86-64-v4", "avx2": "x86-64-v3"}
    if platform.machine().lower() in ("x86_64", "amd64")
    else {"default": None}
)
COMMON = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
# Sums of the elementwise operations must round as torch rounds them.
CONTRACTION = {"attention.cpp": "fast", "window_attention.cpp": "fast", "elementwise.cpp": "off"}


class CpuLibrary(BuildHookInterface):
    """Runs for wheels and for editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles into the source tree, where an editable installation finds it too."""
        folder = Path(self.root, "monailabel_dfqsam", "ops")
        for old in folder.glob("libdfqsam_cpu_*.so"):
            old.unlink()  # a stale one would be called with arguments it does not know
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            self.app.display_warning("no C++ compiler: without the CPU library clicks take longer")
            return
        try:
            for name, march in INSTRUCTION_SETS.items():
                library = folder / f"libdfqsam_cpu_{name}.so"
                build(compiler, march, Path(self.root, "kernels", "cpu"), library)
                build_data["artifacts"].append(str(library.relative_to(self.root)))
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", None) or error
            self.app.display_warning(
                f"the CPU library could not be built, plain torch runs instead: {detail}"
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"


def build(compiler: str, march: str | None, sources: Path, library: Path) -> None:
    """Compiles and links; the library names no OpenMP of its own, it takes torch's when it is loaded."""
    objects = []
    for source, contraction in CONTRACTION.items():
        target = library.with_name(f".{library.stem}.{source}.o")
        flags = [*COMMON, f"-ffp-contract={contraction}", *([f"-march={march}"] if march else [])]
        if march == "x86-64-v4":
            flags.append("-mprefer-vector-width=512")
        subprocess.run(
            [*compiler.split(), *flags, "-c", str(sources / source), "-o", str(target)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        objects.append(target)
    partial = library.with_suffix(".partial")
    subprocess.run(
        [*compiler.split(), "-shared", *map(str, objects), "-o", str(partial)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    os.replace(partial, library)
    for target in objects:
        target.unlink()


def _platform_tag() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
