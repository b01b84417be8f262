"""The CUDA library's machine code: every product on tensor cores, and on those that its name says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from monailabel_dfqsam.ops import cuda_library

ROOT = Path(__file__).parents[1]

# Per architecture the kernels that must be there, how many of each, and the one kind of MMA each may hold.
NATIVE_SM80 = {
    "linear_u4s4_native_kernel": (2, r"IMMA\.16864\.U4\.S4"),
    "linear_u8s8_kernel": (2, r"IMMA\.16832\.U8\.S8"),
}
REQUIRED = {
    "sm_75": {
        "linear_u4s4_native_kernel": (2, r"IMMA\.8832\.U4\.S4"),
        "linear_u8s8_kernel": (2, r"IMMA\.8816\.U8\.S8"),
    },
    "sm_80": NATIVE_SM80,
    "sm_86": NATIVE_SM80,
    "sm_89": NATIVE_SM80,
    "sm_90a": {"CollectiveMma": (4, r"IGMMA\.64x(64|128)x32\.U8\.S8")},
    "sm_100": {"linear_u8s8_kernel": (2, r"IMMA\.16832\.U8\.S8")},
    "sm_120": {"linear_u8s8_kernel": (2, r"IMMA\.16832\.U8\.S8")},
}
COMPILE_SECONDS = 3600  # for every architecture, on a busy machine
MMA = re.compile(r"\b[A-Z]*MMA\.[A-Za-z0-9.]+")


def tool(name: str) -> str | None:
    """A CUDA tool on the path, in CUDA's usual place, or among those that Triton brings."""
    import importlib.util

    spec = importlib.util.find_spec("triton")
    places = [Path("/usr/local/cuda/bin")]
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    found = [shutil.which(name), *(shutil.which(name, path=str(place)) for place in places)]
    return next((path for path in found if path), None)


cuobjdump, nvcc = tool("cuobjdump"), tool("nvcc")
needs_cuobjdump = pytest.mark.skipif(
    cuobjdump is None, reason="there is no cuobjdump to read machine code with"
)
needs_nvcc = pytest.mark.skipif(
    nvcc is None or tool("cmake") is None, reason="there is no nvcc here, or no cmake"
)


def disassemble(binary: Path) -> str:
    assert cuobjdump is not None
    # cuobjdump looks for nvdisasm on the path.
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [cuobjdump, "--dump-sass", str(binary)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "PATH": path},
    )
    return done.stdout


def functions(sass: str) -> dict[str, dict[str, Counter[str]]]:
    """Architecture → function → its MMA instructions and how often each stands there."""
    found: dict[str, dict[str, Counter[str]]] = defaultdict(dict)
    architecture = function = ""
    for line in sass.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            function = match[1]
            found[architecture][function] = Counter()
        elif match := MMA.search(line):
            found[architecture][function][match[0]] += 1
    return found


def faults(
    found: dict[str, dict[str, Counter[str]]], required: dict[str, dict[str, tuple[int, str]]]
) -> list[str]:
    """What is missing or should not be there, in words; nothing for a sound library."""
    wrong = [f"{arch}: not compiled" for arch in required if arch not in found]
    for arch, kernels in required.items():
        products = {name: mma for name, mma in found.get(arch, {}).items() if any(k in name for k in kernels)}
        for kernel, (count, pattern) in kernels.items():
            matching = [mma for name, mma in products.items() if kernel in name]
            if len(matching) != count:
                wrong.append(f"{arch}: {len(matching)} of {count} {kernel}")
            wrong += [f"{arch}: {kernel} has no MMA" for mma in matching if not mma]
            wrong += [
                f"{arch}: {kernel} has {name}, not {pattern}"
                for mma in matching
                for name in mma
                if not re.match(pattern, name)
            ]
    return wrong


@pytest.fixture(scope="module")
def sass() -> str:
    candidates = [cuda_library.LIBRARY, ROOT / "build" / "cuda" / "libdfqsam_cuda.so"]
    built = next((path for path in candidates if path.is_file()), None)
    if built is None:
        pytest.skip("libdfqsam_cuda.so is not built: `make kernels` does that")
    return disassemble(built)


@needs_cuobjdump
@pytest.mark.slow
def test_every_architecture_has_its_tensor_core_instructions(sass: str) -> None:
    assert faults(functions(sass), REQUIRED) == []


@needs_cuobjdump
@pytest.mark.slow
def test_no_product_is_compiled_for_an_architecture_that_nobody_checks(sass: str) -> None:
    with_products = {
        arch
        for arch, kernels in functions(sass).items()
        if any("linear" in name or "CollectiveMma" in name for name in kernels)
    }
    assert with_products == set(REQUIRED)


@needs_cuobjdump
@pytest.mark.slow
def test_the_check_of_machine_code_sees_what_it_is_for(sass: str) -> None:
    """Without MMA, with MMA of another kind, with an architecture left out, it complains."""
    without = functions(re.sub(r"\bIMMA\.8832\S*", "IMAD", sass))
    assert faults(without, REQUIRED) == ["sm_75: linear_u4s4_native_kernel has no MMA"] * 2
    in_software = functions(sass.replace("IMMA.16864.U4.S4", "IMMA.16832.S8.S8"))
    assert any(
        line.startswith("sm_86: linear_u4s4_native_kernel has IMMA.16832")
        for line in faults(in_software, REQUIRED)
    )
    on_old_path = functions(sass.replace("IGMMA.64x64x32", "IMMA.16832"))
    assert any(line.startswith("sm_90a") for line in faults(on_old_path, REQUIRED))
    left_out = functions(sass.replace("arch = sm_89", "arch = sm_87"))
    assert "sm_89: not compiled" in faults(left_out, REQUIRED)


@needs_nvcc
@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.timeout(COMPILE_SECONDS)
def test_make_kernels_builds_a_sound_library() -> None:
    subprocess.run(["make", "kernels", f"NVCC={nvcc}"], cwd=ROOT, check=True)
    assert faults(functions(disassemble(cuda_library.LIBRARY)), REQUIRED) == []


@needs_nvcc
@needs_cuobjdump
@pytest.mark.slow
def test_the_wrong_template_is_found_out(tmp_path: Path) -> None:
    """The Sm80 product compiled for sm_75 has no MMA, silently; its file refuses, and the check sees it."""
    headers = ROOT / "build" / "nvidia-cutlass==4.2.0.0" / "cutlass_library" / "source" / "include"
    if not headers.is_dir():
        pytest.skip("CUTLASS's headers are not here: `make kernels` brings them")
    source = ROOT / "kernels" / "cuda" / "linear_sm80.cu"
    guard = re.compile(r"^#if defined\(__CUDA_ARCH__\).*?^#endif\n", re.DOTALL | re.MULTILINE)
    unguarded = tmp_path / "unguarded.cu"
    unguarded.write_text(guard.sub("", source.read_text(encoding="utf-8")), encoding="utf-8")
    command = [str(nvcc), "-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_75", "-c"]
    command += ["-I", str(headers), "-I", str(source.parent)]
    refused = subprocess.run(
        [*command, "-o", str(tmp_path / "a"), str(source)], capture_output=True, text=True
    )
    assert refused.returncode != 0
    assert "is for sm_80 to sm_89" in refused.stderr
    built = tmp_path / "unguarded.o"
    subprocess.run([*command, "-o", str(built), str(unguarded)], check=True, capture_output=True, timeout=300)
    found = faults(functions(disassemble(built)), {"sm_75": REQUIRED["sm_75"]})
    assert "sm_75: linear_u4s4_native_kernel has no MMA" in found
