"""Our own products: of every instruction set, form, shape and number of threads, against whole numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from monailabel_dfqsam.ops import GROUP, QuantizedLayer, Rows, StaticRange, compiled, multiplied, plain
from monailabel_dfqsam.ops.product import Product, Sums, _form, has_dot, instruction_set, library
from tests.forms import KINDS, Kind, hard_rows, nearest, run_time_reader, same_rows, static_range

pytestmark = pytest.mark.skipif(
    library() is None or compiled.library() is None, reason="the CPU libraries were not built"
)

SETS = ("avx2", "avx_vnni", "avx512", "avx512_vnni")
# A busy machine is no reason to fail.
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    loaded = library()
    assert loaded is not None
    if not loaded.dfqsam_has(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def layer_and_input(seed: int, kind: Kind, m: int, n: int, k: int) -> tuple[QuantizedLayer, Tensor]:
    """A layer [n, k] of a kind, and what it reads, [m, k] float32."""
    g = torch.Generator().manual_seed(seed)
    x = hard_rows(seed, m, k).clamp(-50, 50)
    weight, bias = torch.randn(n, k, generator=g), torch.randn(n, generator=g)
    return nearest(weight, bias, kind, None, static_range(x, kind) if kind.static else None), x


def rows_for(x: Tensor, layer: QuantizedLayer, instructions: str) -> Rows:
    return compiled.quantize_input(x, layer, levels=not has_dot(instructions))


@relaxed
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from((*KINDS, Kind(4, 4, False, True), Kind(6, 6, False, True))),
    m=st.integers(1, 50),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    threads=st.integers(1, 3),
)
def test_products_are_the_references_bit_for_bit(
    instructions: str, seed: int, kind: Kind, m: int, n: int, k: int, threads: int
) -> None:
    layer, x = layer_and_input(seed, kind, m, n, k)
    expected = multiplied(plain.quantize_input(x, layer), layer)
    product, rows = Product(layer, instructions), rows_for(x, layer, instructions)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(product(rows), expected)
        residual = torch.randn(m, n)
        assert torch.equal(product(rows, residual.clone()), residual + expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (4, 8), (6, 6), (8, 4), (8, 8)])
@pytest.mark.parametrize("k", [16, 1000, 3072])
def test_the_largest_sums_do_not_overflow(
    instructions: str, weight_bits: int, activation_bits: int, k: int
) -> None:
    highest, level = (1 << (weight_bits - 1)) - 1, (1 << activation_bits) - 1
    weight = torch.stack([torch.full((k,), v) for v in (highest, -highest - 1)]).to(torch.int8)
    bias = torch.zeros(2)
    layer = QuantizedLayer(weight, torch.ones(2), bias, StaticRange(1.0, 0), weight_bits, activation_bits)
    rows = Rows(torch.full((7, k), level, dtype=torch.uint8))
    assert (
        Product(layer, instructions)(rows).tolist() == [[level * highest * k, -level * (highest + 1) * k]] * 7
    )


@pytest.mark.parametrize("high", [True, False])
def test_the_largest_groups_do_not_overflow(instructions: str, high: bool) -> None:
    """Rows of 4 bit at the end of their range times weights of 8 bit at the end of theirs."""
    x = torch.full((3, 96), 2.0 if high else -2.0)
    layer = QuantizedLayer(
        torch.full((5, 96), 127, dtype=torch.int8), torch.ones(5), torch.zeros(5), None, 8, 4
    )
    expected = multiplied(plain.quantize_input(x, layer), layer)
    assert torch.equal(Product(layer, instructions)(rows_for(x, layer, instructions)), expected)
    assert float(expected[0, 0]) == pytest.approx(float(x[0, 0]) * 127 * 96, rel=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_rows_are_shared_among_threads(instructions: str, threads: int) -> None:
    layer, x = layer_and_input(3, Kind(4, 4, True), 1500, 96, 288)
    rows = rows_for(x, layer, instructions)
    product, before = Product(layer, instructions), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(product(rows), multiplied(plain.quantize_input(x, layer), layer))
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 400))
def test_levels_and_multipliers_are_what_whole_rows_are_made_of(seed: int, count: int, columns: int) -> None:
    x, layer = hard_rows(seed, count, columns), run_time_reader(4)
    expected, apart = plain.quantize_input(x, layer), compiled.quantize_input(x, layer, levels=True)
    assert apart.multiplier is not None
    assert apart.term is not None
    low, high = apart.multiplier & 0xFFFF, apart.multiplier >> 16
    assert torch.equal(low, high)
    levels = apart.q.view(torch.int8).to(torch.int32)
    assert int(levels.abs().max()) <= 15
    values = levels * low.repeat_interleave(GROUP, 1)[:, :columns]
    assert torch.equal((values + 128).to(torch.uint8), expected.q)
    assert torch.equal(apart.term, -128 * values.sum(1, dtype=torch.int32))
    assert torch.equal(apart.scale, expected.scale)  # type: ignore[arg-type]
    weight, bias = torch.ones(columns), torch.zeros(columns)
    normed, _ = compiled.layer_norm_quantize(x, weight, bias, 1e-6, layer, False, levels=True)
    _, floats = compiled.layer_norm_quantize(x, weight, bias, 1e-6, layer, True)
    assert floats is not None
    assert same_rows(normed, compiled.quantize_input(floats, layer, levels=True))


def test_4_bit_needs_no_wide_sums() -> None:
    forms = {
        kind: _form(layer_and_input(1, kind, 4, 8, 64)[0], dot=False)[0]
        for kind in (Kind(4, 4, True), Kind(4, 8, True), Kind(4, 4, False, True), Kind(8, 8))
    }
    assert list(forms.values()) == [Sums.LEVELS, Sums.PAIRS, Sums.PAIRS, Sums.WIDE]


def test_what_runs_is_what_the_processor_is_said_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, possible in (("AVX2", ("avx2", "avx_vnni")), ("DEFAULT", (None,)), ("AVX512", (*SETS, None))):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", functools.partial(str, said))
        assert instruction_set() in possible
