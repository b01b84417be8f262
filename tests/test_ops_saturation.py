"""Sums of 8-bit products that saturate: when they can, what halves are, what engines prove and compute."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines import candidates, load_encoder, onednn, why_not
from monailabel_dfqsam.engines.kernels import Kernel
from monailabel_dfqsam.machine import cpu
from monailabel_dfqsam.ops import QuantizedLayer, StaticRange, int_accumulate
from monailabel_dfqsam.ops.saturation import WRONG, halves, is_exact, may_saturate, needs_halves
from tests.test_engines import make_artifact

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN quantized linear")

# By oneDNN's names, in torch and in OpenVINO; what a processor has by Linux's. None leaves the choice to it.
INSTRUCTION_SETS = {
    None: None, "SSE41": None, "AVX2": "avx2", "AVX2_VNNI": "avx_vnni", "AVX512_CORE": "avx512f",
    "AVX512_CORE_VNNI": "avx512_vnni", "AVX512_CORE_AMX": "amx_int8",
}  # fmt: skip


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_products_of_extremes_are_exact_under_every_instruction_set(isa: str | None) -> None:
    flag = INSTRUCTION_SETS[isa]
    if flag is not None and flag not in cpu()[1]:
        pytest.skip(f"this processor has no {flag}")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("MAX_CPU_ISA")}
    if isa is not None:
        environment["ONEDNN_MAX_CPU_ISA"] = isa
    done = subprocess.run(
        [sys.executable, "-m", "tests.extreme_products"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout)
    assert [told.get(name, []) for name in ("onednn", "openvino", "export")] == [[], [], []]
    if isa in ("SSE41", "AVX2"):  # which have nothing better anywhere
        assert told.get("onednn_halves") is not False
        assert told.get("openvino_halves") is not False


def layer_of(weight: Tensor, activation_bits: int) -> QuantizedLayer:
    return QuantizedLayer(
        weight, torch.ones(len(weight)), torch.zeros(len(weight)), StaticRange(1.0, 0), 8, activation_bits
    )


@pytest.mark.parametrize(
    ("activation_bits", "weight", "expected"),
    [(8, 64, False), (8, 65, True), (8, -65, True), (8, -128, True), (7, -128, False), (4, 127, False)],
)
def test_what_may_saturate(activation_bits: int, weight: int, expected: bool) -> None:
    values = torch.tensor([[0, weight], [1, 2]], dtype=torch.int8)
    assert may_saturate(layer_of(values, activation_bits)) is expected
    largest = 2 * ((1 << activation_bits) - 1) * abs(weight)
    assert (largest > torch.iinfo(torch.int16).max) is expected


def test_halves_sum_to_the_weight_and_do_not_saturate() -> None:
    weight = torch.arange(-128, 128).to(torch.int8).view(4, 16, 2, 2)
    both = halves(weight)
    assert (both.shape, both.dtype) == ((4, 32, 2, 2), torch.int8)
    assert torch.equal(both[:, :16].int() + both[:, 16:].int(), weight.int())
    assert not may_saturate(layer_of(both.flatten(1), 8))
    assert may_saturate(layer_of(weight.flatten(1), 8))


def pairwise(limit: int, layer: QuantizedLayer, q: Tensor) -> Tensor:
    """[M, N] float32: sums of neighbouring pairs of products, each kept within ±limit."""
    pairs = q.int()[:, None] * layer.weight.int()[None]
    if pairs.shape[2] % 2:
        pairs = torch.nn.functional.pad(pairs, (0, 1))
    return pairs.unflatten(2, (-1, 2)).sum(3).clamp(-limit - 1, limit).sum(2).float()


def split(limit: int, halved: bool, layer: QuantizedLayer, rows: Tensor) -> Tensor:
    if not halved:
        return pairwise(limit, layer, rows)
    return pairwise(limit, replace(layer, weight=halves(layer.weight)), torch.cat([rows, rows], 1))


@pytest.mark.parametrize(("limit", "expected"), [(1 << 20, False), ((1 << 15) - 1, True), (1 << 13, None)])
def test_a_proof_finds_the_form_that_is_exact(
    limit: int, expected: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    def proof(halved: bool) -> bool:
        return is_exact(lambda layer, rows: split(limit, halved, layer, rows))

    caplog.set_level(logging.INFO)
    assert needs_halves("ours", proof) is expected
    said = {False: "", True: "ours: sums of 8-bit products saturate on this", None: f"not used: {WRONG}"}
    assert said[expected] in caplog.text
    assert bool(caplog.text) == (expected is not False)


def test_a_single_wrong_sum_is_found() -> None:
    def nearly(layer: QuantizedLayer, rows: Tensor) -> Tensor:
        y = int_accumulate(rows, layer.weight).float()
        y[-1, -1] += 1
        return y

    assert not is_exact(nearly)


def test_a_library_without_such_a_product_is_no_crash(caplog: pytest.LogCaptureFixture) -> None:
    def missing(halved: bool) -> bool:
        raise RuntimeError("could not create a primitive")

    caplog.set_level(logging.INFO)
    assert needs_halves("ours", missing) is None
    assert "ours: could not create a primitive" in caplog.text


@needs_onednn
def test_an_engine_that_saturates_all_the_same_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(layer: QuantizedLayer, halved: bool) -> Kernel:
        return lambda rows, residual=None: split(1 << 13, halved, layer, rows.q)

    monkeypatch.setattr(onednn, "_kernel", saturating)
    onednn.in_halves.cache_clear()
    try:
        artifact = make_artifact("tiny")
        assert why_not(EngineKind.ONEDNN) == WRONG
        assert EngineKind.ONEDNN not in candidates(artifact)
        with pytest.raises(ValueError, match=f"'onednn' cannot run here: {WRONG}"):
            load_encoder(artifact, EngineKind.ONEDNN)
    finally:
        onednn.in_halves.cache_clear()


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize(("top", "columns"), [(255, 500), (255, 2304), (15, 3072)])
def test_the_reference_engine_sums_exactly_whatever_torch_rounds_to(
    precision: str, top: int, columns: int
) -> None:
    """Factors of 8 bits are whole numbers in bfloat16 and TF32, too."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randint(0, top + 1, (33, columns), generator=g, dtype=torch.uint8)
    weight = torch.randint(-128, 128, (17, columns), generator=g, dtype=torch.int8)
    x[0], weight[0], weight[1] = top, -128, 127
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(int_accumulate(x, weight), x.long() @ weight.long().T)
    finally:
        torch.set_float32_matmul_precision(before)
