"""The kernels between matrix products, run thread by thread on the CPU by their own source.

`build` makes a library of them with the address and undefined-behaviour sanitizers and the same C interface
as the real one. `main` calls it as the ops do, argument by argument, and compares with the references; it
runs in a process of its own, because the address sanitizer must be loaded first.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from monailabel_dfqsam.engines.cutlass_layers import window_tables
from monailabel_dfqsam.ops import cuda, cuda_attention, cuda_library, pack_int4

SOURCES = Path(__file__).parents[1] / "kernels" / "cuda"
SCORE_TOLERANCE = 2**-10  # of the largest, one rounding of fp16 in another place
_LAUNCH = re.compile(r"(\w+)<<<(.*?), (kWarps \* 32|kThreads), 0, stream>>>\((.*?)\);", re.DOTALL)
_FAMILIES = {"sm75": "native int8", "sm80": "native int8", "sm90": "int8", "sm100": "int8"}


def host_source() -> str:
    """The kernels as one C++ file: launches become loops, matrix products are refused."""
    text = f'#include "{Path(__file__).with_name("kernels_on_cpu.hpp")}"\n'
    for name in (
        "layout.cuh",
        "linear.h",
        "rows.h",
        "quantize.cu",
        "layer_norm.cu",
        "attention.cu",
        "api.cu",
    ):
        part = re.sub(
            r"^#(include|pragma once).*\n", "", (SOURCES / name).read_text("utf-8"), flags=re.MULTILINE
        )
        talk = "true" if "__shfl" in part else "false"
        part, launches = _LAUNCH.subn(rf"run_grid(\2, \3, {talk}, [&] {{ \1(\4); }});", part)
        assert "<<<" not in part, f"{name}: a launch of another form"
        assert launches or not name.endswith(".cu") or name == "api.cu", f"{name}: no launch"
        # In one file, names that are local to a file need a namespace each.
        stem = name.split(".")[0]
        part = part.replace("namespace {\n", f"namespace local_{stem} {{\n", 1)
        part = part.replace("}  // namespace\n", f"}}\nusing namespace local_{stem};\n", 1)
        text += re.sub(r"\b(kThreads|launch|blocks_for)\b", rf"\1_{stem}", part)
    for family, kinds in _FAMILIES.items():
        names = ["linear_u8s8"] + ["linear_u4s4_native"] * kinds.startswith("native")
        refusals = "".join(
            f"cudaError_t {name}(const Linear&) {{ return cudaErrorNoDevice; }}" for name in names
        )
        text += f"namespace dfqsam::{family} {{ {refusals} }}\n"
    return text


def build(folder: Path, cuda_headers: Path) -> Path:
    """Compiles `host_source`; the library lies in `folder`."""
    source, library = folder / "kernels.cpp", folder / "libkernels_on_cpu.so"
    source.write_text(host_source(), encoding="utf-8")
    command = ["g++", "-std=c++20", "-O1", "-g", "-w", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-pthread"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", f"-I{cuda_headers}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, timeout=300)
    return library


def compare(
    name: str, launch: object, op: object, arguments: tuple[object, ...], packed: bool = False
) -> None:
    """Raises AssertionError where kernel and reference differ; both are given the same CPU tensors."""
    assert callable(launch)
    assert callable(op)
    outputs, expected = launch(*arguments), op(*arguments)
    pairs = zip(outputs, expected, strict=True) if isinstance(outputs, tuple) else [(outputs, expected)]
    for actual, reference in pairs:
        assert actual.shape == reference.shape, name
        assert actual.dtype == reference.dtype, name
        if actual.is_floating_point():
            error = (actual.float() - reference.float()).abs().max() / reference.abs().max()
            assert error <= SCORE_TOLERANCE, (name, float(error))
        else:
            # LayerNorm sums its statistics in another order: one value in a thousand may be a level off.
            nibbles = [(x >> 4, x & 15) if packed else (x,) for x in (actual.int(), reference.int())]
            difference = torch.stack([(a - b).abs() for a, b in zip(*nibbles, strict=True)])
            assert difference.max() <= ("layer_norm" in name), name
            assert (difference > 0).float().mean() <= 1e-3, name


def check_rows() -> None:
    for packed in (True, False):
        end = (0.3, 6, 4 if packed else 8, packed)
        for dtype in (torch.float16, torch.float32):
            for width in (5, 36, 144, 768):
                x = (torch.randn(37, width) * 3).to(dtype)
                compare("quantize_rows", cuda.launch_quantize_rows, cuda.quantize_rows, (x, *end), packed)
            for view in (x[:, 8:152], x[:, 3:150]):
                compare("quantize_rows", cuda.launch_quantize_rows, cuda.quantize_rows, (view, *end), packed)
            for width in (144, 256, 1280, 2048):
                x = (torch.randn(6, width) * 4 + 2).to(dtype)
                arguments = (x, torch.rand(width), torch.randn(width), 1e-6, *end)
                compare(
                    "layer_norm", cuda.launch_layer_norm_quantize, cuda.layer_norm_quantize, arguments, packed
                )
    weight = pack_int4(torch.randint(-8, 8, (9, 64), dtype=torch.int8))
    compare("unpack_signed", cuda.launch_unpack_signed, cuda.unpack_signed, (weight,))


def check_attention(grid: int, side: int, heads: int, depth: int, relative: bool, batch: int) -> None:
    windows = window_tables(grid, side, torch.device("cpu"))
    qkv = torch.randn(batch * grid**2, 3 * heads * depth).half()
    padding = torch.randn(3 * heads * depth).half() if grid % side else None
    tables = [torch.randn(2 * side - 1, depth).half() if relative else None for _ in range(2)]
    results: list[Tensor | None] = []
    for group in windows.groups:
        arguments = (qkv, padding, *tables, *group, grid**2, side, heads)
        compare(
            "attention_inputs",
            cuda_attention.launch_attention_inputs,
            cuda_attention.attention_inputs,
            arguments,
        )
        width = cuda_attention.head_width(depth, side, relative)
        # In the order in memory in which flash attention leaves them.
        shape = (batch * len(group.key), group.query.shape[1], heads, width)
        results.append(torch.randn(shape).half().transpose(1, 2))
    full, partial = (*results, None)[:2]
    for packed in (True, False):
        arguments = (full, partial, windows.slot, batch, depth, 0.3, 6, 4, packed)
        launch, op = cuda_attention.launch_attention_output, cuda_attention.attention_output
        compare("attention_output", launch, op, arguments, packed)


def main(path: str) -> None:
    library = ctypes.CDLL(path)
    for name, types in cuda_library.SIGNATURES.items():
        getattr(library, name).argtypes = [*types, ctypes.c_void_p]

    def run(function: str, *arguments: Tensor | int | float | None) -> None:
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        status = getattr(library, function)(*plain, None)
        assert status == 0, (function, status)

    cuda.run = cuda_attention.run = run
    torch.manual_seed(0)
    check_rows()
    check_attention(5, 3, 2, 8, relative=True, batch=2)
    check_attention(16, 14, 12, 64, relative=True, batch=1)
    check_attention(16, 16, 2, 64, relative=True, batch=1)
    check_attention(16, 16, 4, 36, relative=False, batch=2)
    check_attention(8, 5, 3, 80, relative=True, batch=1)


if __name__ == "__main__":
    main(sys.argv[1])
