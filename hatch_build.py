"""Builds the CPU libraries into the package with the C++ compiler at hand.

What lies between two products is a file for each instruction set, the products are one for all of them.

Without a compiler the package installs all the same, and runs in plain torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_X86 = platform.machine().lower() in ("x86_64", "amd64")
# By the names that torch gives to a processor's abilities.
INSTRUCTION_SETS = {"avx512": "x86-64-v4", "avx2": "x86-64-v3"} if _X86 else {"default": None}
# Each of these is entered only on a processor that has what it is compiled for.
X86_PRODUCTS = {
    "product.cpp": (),
    "product_avx2.cpp": ("-mavx2",),
    "product_avx_vnni.cpp": ("-mavx2", "-mavxvnni"),
    "product_avx512.cpp": ("-mavx512f", "-mavx512bw"),
    "product_avx512_vnni.cpp": ("-mavx512f", "-mavx512bw", "-mavx512vnni"),
}
ARM_PRODUCTS = {"product.cpp": (), "product_neon.cpp": ("-march=armv8.2-a+dotprod",)}
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
        for old in (*folder.glob("libdfqsam_cpu_*.so"), *folder.glob("libdfqsam_product.so")):
            old.unlink()  # a stale one would be called with arguments it does not know
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            self.app.display_warning("no C++ compiler: without the CPU library clicks take longer")
            return
        try:
            sources = Path(self.root, "kernels", "cpu")
            built = [folder / f"libdfqsam_cpu_{name}.so" for name in INSTRUCTION_SETS]
            for library, march in zip(built, INSTRUCTION_SETS.values(), strict=True):
                build(compiler, {sources / name: flags(name, march) for name in CONTRACTION}, library)
            products = {
                sources / name: ["-ffp-contract=off", *known(compiler, own)]
                for name, own in (X86_PRODUCTS if _X86 else ARM_PRODUCTS).items()
            }
            built.append(folder / "libdfqsam_product.so")
            build(compiler, products, built[-1])
            build_data["artifacts"] += [str(library.relative_to(self.root)) for library in built]
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", None) or error
            self.app.display_warning(
                f"the CPU library could not be built, plain torch runs instead: {detail}"
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"


def flags(source: str, march: str | None) -> list[str]:
    """How a source of what lies between two products is compiled."""
    found = [f"-ffp-contract={CONTRACTION[source]}", *([f"-march={march}"] if march else [])]
    return [*found, "-mprefer-vector-width=512"] if march == "x86-64-v4" else found


def known(compiler: str, wanted: Sequence[str]) -> Sequence[str]:
    """All flags, or none where the compiler lacks one: the source is then empty."""
    tried = [*compiler.split(), *wanted, "-x", "c++", "-fsyntax-only", os.devnull]
    return wanted if subprocess.run(tried, capture_output=True, check=False).returncode == 0 else ()


def build(compiler: str, sources: Mapping[Path, Sequence[str]], library: Path) -> None:
    """Compiles and links; the library names no OpenMP of its own, it takes torch's when it is loaded."""
    objects = []
    for source, own in sources.items():
        target = library.with_name(f".{library.stem}.{source.name}.o")
        subprocess.run(
            [*compiler.split(), *COMMON, *own, "-c", str(source), "-o", str(target)],
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
