"""Packages, processor, memory and engines."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.doctor.finding import Finding, Level
from monailabel_dfqsam.engines import onednn, openvino, why_not
from monailabel_dfqsam.machine import machine
from monailabel_dfqsam.memory import available
from monailabel_dfqsam.numbers import in_bytes
from monailabel_dfqsam.ops import compiled, product

_SHOWN = ("monailabel", "torch", "monai", "pydicom", "numpy", "SimpleITK")
# Of a disk: an artifact of the largest model with its report, uploads and volumes fetched from an archive.
_LEAST_DISK = 2_000_000_000
_FAST_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def packages() -> Iterator[Finding]:
    """Versions, and what of the requirements is not met."""
    yield Finding("software", "Python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("software", "monailabel-dfqsam", _version("monailabel-dfqsam") or "not installed")
    for name in _SHOWN:
        yield Finding("software", name, _version(name) or "not installed")
    for text in requires("monailabel-dfqsam") or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found = _version(needed.name)
        if found is None or not needed.specifier.contains(found, prereleases=True):
            text = f"{found or 'not installed'}, needed is {needed.specifier or 'any'}"
            remedy = f"Install it: pip install '{needed.name}{needed.specifier}'"
            yield Finding("software", needed.name, text, Level.PROBLEM, remedy)


def hardware(folders: tuple[Path, ...]) -> Iterator[Finding]:
    """Processor, memory, GPUs and room on disks.

    Args:
        folders: that are written to; of one that is missing, the nearest parent counts.
    """
    here = machine()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    yield Finding.judged(
        not x86 or "avx2" in here["flags"],
        "machine",
        "processor",
        f"{here['cpu']}, {here['cores_usable']} cores of {here['cores_physical']} usable",
        Level.WARNING,
        "Without AVX2 clicks take many times as long: use a processor made since 2015.",
    )
    quick = [flag for flag in here["flags"] if flag in _FAST_FLAGS]
    note = "" if quick else "; none of them sums products of 8-bit integers in 32 bit"
    yield Finding("machine", "instructions", (", ".join(here["flags"]) or "plain") + note)
    memory = f"{in_bytes(available())} free to this process, of {in_bytes(here['memory_bytes'])}"
    yield Finding("machine", "memory", memory)
    yield from _gpus(here["gpus"])
    for folder in (*folders, Path(tempfile.gettempdir())):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        yield Finding.judged(
            free >= _LEAST_DISK,
            "machine",
            f"disk of {folder}",
            f"{in_bytes(free)} free",
            Level.WARNING,
            f"Make room: less than {in_bytes(_LEAST_DISK)} may not do for models and images.",
        )


def engines() -> Iterator[Finding]:
    """Each engine: whether it works, and if not, why."""
    name = "compiled CPU operations"
    try:
        library = compiled.library()
        yield Finding.judged(
            library is not None,
            "engines",
            name,
            "none: plain torch in their place, slower" if library is None else "work",
            Level.WARNING,
            "Install a C++ compiler (Debian: g++), and then this package again, which compiles them.",
        )
    except OSError as error:
        remedy = "Install this package again, which compiles them for this machine."
        yield Finding("engines", name, f"cannot be loaded: {error}", Level.PROBLEM, remedy)
    for kind in EngineKind:
        yield _engine(kind)


def _engine(kind: EngineKind) -> Finding:
    try:
        reason = why_not(kind)
    except RuntimeError as error:  # there, but broken
        return Finding("engines", kind.value, str(error), Level.PROBLEM, "Build it again, or take it away.")
    if reason is None:
        notes = {
            EngineKind.REFERENCE: "works, slowly: the measure of the others' masks",
            EngineKind.NATIVE: f"works, by {product.instruction_set()}",
        }
        split = {EngineKind.ONEDNN: onednn.in_halves, EngineKind.OPENVINO: openvino.in_halves}
        if kind in split and split[kind]():
            notes[kind] = "works; large weights are multiplied in halves, whose sums do not saturate here"
        return Finding("engines", kind.value, notes.get(kind, "works"))
    if kind is EngineKind.CUTLASS and not torch.cuda.is_available():
        return Finding("engines", kind.value, f"not for this machine: {reason}")
    if kind is EngineKind.OPENVINO:
        return Finding("engines", kind.value, f"not in the race: {reason}")
    remedies = {
        EngineKind.NATIVE: "Install a C++ compiler (Debian: g++), and then this package again; until then "
        "other engines answer.",
        EngineKind.CUTLASS: "Build the GPU kernels with `make kernels`, which needs CUDA's compiler 12.8 or "
        "later; until then the processor answers.",
        EngineKind.ONEDNN: "Install an official build of torch for this processor; until then the slow "
        "reference engine answers.",
    }
    return Finding("engines", kind.value, reason, Level.WARNING, remedies.get(kind))


def _gpus(driver: list[str]) -> Iterator[Finding]:
    """GPUs as torch sees them, or as the driver alone does."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(index)
            text = f"{of.name}, compute capability {of.major}.{of.minor}, {in_bytes(of.total_memory)}"
            yield Finding("machine", f"GPU {index}", text)
    elif driver:
        text = f"{driver[0]}, which torch {torch.__version__} cannot use"
        remedy = "Install a build of torch for CUDA that this driver is new enough for."
        yield Finding("machine", "GPU", text, Level.WARNING, remedy)
    else:
        yield Finding("machine", "GPU", "none: the processor answers")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
