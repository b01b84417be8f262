"""Products on an emulated ARM processor, and under sanitizers: the same kernels as one program for each."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from monailabel_dfqsam.ops import QuantizedLayer, Rows, compiled, multiplied, plain
from monailabel_dfqsam.ops.product import _form, has_dot, library
from tests.forms import KINDS, Kind
from tests.test_ops_product import SETS, layer_and_input

SOURCES = Path(__file__).parents[1] / "kernels" / "cpu"
# As hatch_build.py has them.
X86 = {
    "product": (),
    "product_avx2": ("-mavx2",),
    "product_avx_vnni": ("-mavx2", "-mavxvnni"),
    "product_avx512": ("-mavx512f", "-mavx512bw"),
    "product_avx512_vnni": ("-mavx512f", "-mavx512bw", "-mavx512vnni"),
}
ARM = {"product": (), "product_neon": ("-march=armv8.2-a+dotprod",)}
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

Run = Callable[[str, QuantizedLayer, Rows], Tensor]


def build(folder: Path, compiler: str, sources: dict[str, tuple[str, ...]], flags: tuple[str, ...]) -> Path:
    """The program of `product_main.cpp`."""
    program, objects = folder / "product", []
    main = Path(__file__).with_name("product_main.cpp")
    for source, own in ({SOURCES / f"{name}.cpp": own for name, own in sources.items()} | {main: ()}).items():
        objects.append(str(folder / f"{source.stem}.o"))
        command = [compiler, "-std=c++17", "-ffp-contract=off", *flags, *own, "-c", str(source)]
        subprocess.run([*command, "-o", objects[-1]], check=True, timeout=300)
    subprocess.run([compiler, *flags, *objects, "-o", str(program)], check=True, timeout=300)
    return program


def run(command: list[str], instructions: str, layer: QuantizedLayer, rows: Rows) -> Tensor:
    """What the program makes of a layer's rows."""
    how, weight, multiplier = _form(layer, has_dot(instructions))
    scale, zero_point = rows.scale, rows.zero_point
    if layer.input_range is not None:
        scale = torch.tensor([layer.input_range.scale])
        zero_point = torch.tensor([layer.input_range.zero_point], dtype=torch.int32)
    elif zero_point is None and rows.multiplier is None:
        zero_point = torch.full((len(rows.q),), 128, dtype=torch.int32)
    optional = (multiplier, zero_point, rows.multiplier, rows.term)
    arguments = [how.value, *weight.shape, layer.largest_input, len(rows.q)]
    arguments += [int(part is not None) for part in optional]
    arguments += [int(layer.input_range is not None)]
    parts = (weight, layer.weight_scale, layer.bias, rows.q, scale, *optional)
    data = b"".join(part.contiguous().numpy().tobytes() for part in parts if part is not None)
    done = subprocess.run(
        [*command, instructions, *map(str, arguments)], input=data, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy()).view(len(rows.q), -1)


CASES = [
    (kind, shape)
    for kind in (*KINDS, Kind(4, 4, False, True))
    for shape in ((1, 1, 1), (7, 33, 40), (20, 16, 129), (13, 50, 64))
]


def compare(command: list[str], instructions: str) -> None:
    for number, (kind, shape) in enumerate(CASES):
        layer, x = layer_and_input(number, kind, *shape)
        dot = has_dot(instructions)
        rows = plain.quantize_input(x, layer) if dot else compiled.quantize_input(x, layer, levels=True)
        expected = multiplied(plain.quantize_input(x, layer), layer)
        assert torch.equal(run(command, instructions, layer, rows), expected), (kind, shape)


@pytest.mark.slow
def test_arm_multiplies_as_the_reference_does(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    program = build(tmp_path, compiler, ARM, ("-O2", "-static"))
    compare([emulator, "-cpu", "max", str(program)], "neon_dot")
    without = subprocess.run(
        [emulator, "-cpu", "cortex-a53", str(program), "neon_dot", "0", "1", "1", "1", "1", *["0"] * 5],
        input=bytes(64), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert without.returncode == 4, "a processor without the instructions must be told"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    loaded = library()
    if loaded is None:
        pytest.skip("the CPU libraries were not built")
    program = build(tmp_path, "g++", X86, SANITIZED)
    for instructions in SETS:
        if loaded.dfqsam_has(instructions.encode()):
            compare([str(program)], instructions)
