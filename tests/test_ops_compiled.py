"""The C++ forms against plain torch: integers bit for bit, attention against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monailabel_dfqsam.ops import Geometry, QuantizedLayer, Rows, StaticRange, compiled, plain
from monailabel_dfqsam.sam import tiny_vit
from monailabel_dfqsam.sam.vit import Attention
from tests.forms import hard_rows, run_time_reader, same_rows
from tests.models import relative_error

ATTENTION_TOLERANCE = 2e-6

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="the CPU library was not built")


@pytest.fixture(scope="module", autouse=True, params=["DEFAULT", "AVX2", "AVX512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each library that was built and that this processor can run."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    own = torch.backends.cpu.get_cpu_capability()
    if own not in order or order.index(request.param) > order.index(own):
        pytest.skip(f"this processor has {own}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
        compiled.library.cache_clear()
        if compiled.library() is None:
            compiled.library.cache_clear()
            pytest.skip(f"no library was built for {request.param}")
        yield
    compiled.library.cache_clear()


def reader(scale: float, zero_point: int, bits: int) -> QuantizedLayer:
    """A layer of which only the input range matters."""
    nothing = torch.empty(0)
    return QuantizedLayer(nothing, nothing, nothing, StaticRange(scale, zero_point), bits, bits)


def layers() -> st.SearchStrategy[QuantizedLayer]:
    return st.tuples(st.floats(1e-3, 3.0), st.integers(0, 15), st.sampled_from([4, 6, 8])).map(
        lambda t: reader(*t)
    )


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(1, 400), layers())
def test_integers_equal_plain_torch(seed: int, rows: int, channels: int, layer: QuantizedLayer) -> None:
    x = values(seed, rows, channels) + values(seed + 1, channels)
    assert same_rows(compiled.quantize_input(x, layer), plain.quantize_input(x, layer))
    weight, bias = values(seed + 2, channels), values(seed + 3, channels)
    for keep in (False, True):
        expected = plain.layer_norm_quantize(x, weight, bias, 1e-6, layer, keep)
        actual = compiled.layer_norm_quantize(x, weight, bias, 1e-6, layer, keep)
        assert same_rows(actual[0], expected[0])
        assert actual[1] is expected[1] is None or torch.equal(actual[1], expected[1])
    assert same_rows(compiled.gelu_quantize(x.clone(), layer), plain.gelu_quantize(x, layer))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 400), st.sampled_from([4, 8]))
def test_integers_and_ranges_equal_plain_torch(seed: int, count: int, columns: int, bits: int) -> None:
    x, layer = hard_rows(seed, count, columns), run_time_reader(bits)
    assert same_rows(compiled.quantize_input(x, layer), plain.quantize_input(x, layer))
    x[6::9, :1] = 5
    weight, bias = torch.randn(columns), torch.randn(columns)
    for keep in (False, True):
        expected = plain.layer_norm_quantize(x, weight, bias, 1e-6, layer, keep)
        actual = compiled.layer_norm_quantize(x, weight, bias, 1e-6, layer, keep)
        assert same_rows(actual[0], expected[0])
        assert actual[1] is expected[1] is None or torch.equal(actual[1], expected[1])
    assert same_rows(compiled.gelu_quantize(x.clone(), layer), plain.gelu_quantize(x, layer))


def test_images_have_a_range_each_in_any_order_of_memory() -> None:
    layer = run_time_reader(8, Geometry(3, 1, 1))
    x = hard_rows(3, 9, 5 * 6 * 7).view(9, 5, 6, 7)
    expected = plain.quantize_input(x, layer)
    assert expected.scale is not None
    assert len(expected.scale) == len(x)
    for view in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert same_rows(compiled.quantize_input(view, layer), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 100), st.booleans(), st.booleans())
def test_what_follows_a_product_equals_plain_torch(
    seed: int, count: int, columns: int, by_zero_point: bool, with_residual: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    sums = torch.randint(-(1 << 24), 1 << 24, (count, columns), generator=g).float()
    weights = torch.randint(-(1 << 18), 1 << 18, (columns,), generator=g, dtype=torch.int32)
    zero_point = torch.randint(0, 256, (count,), generator=g, dtype=torch.int32) if by_zero_point else None
    rows = Rows(torch.empty(0, dtype=torch.uint8), torch.rand(count, generator=g), zero_point)
    scale, bias = torch.rand(columns, generator=g), torch.randn(columns, generator=g)
    layer = QuantizedLayer(torch.empty(0, dtype=torch.int8), scale, bias, None, 8, 8)
    residual = torch.randn(count, columns, generator=g) if with_residual else None
    expected, actual = (
        form.rescale(sums.clone(), rows, weights, layer, None if residual is None else residual.clone())
        for form in (plain, compiled)
    )
    assert torch.equal(actual, expected)


def test_layer_norm_is_torchs() -> None:
    x, weight, bias = values(1, 33, 144), values(2, 144), values(3, 144)
    _, normed = compiled.layer_norm_quantize(x, weight, bias, 1e-6, reader(0.1, 8, 4), True)
    expected = torch.nn.functional.layer_norm(x.double(), (144,), weight.double(), bias.double(), 1e-6)
    assert normed is not None
    assert relative_error(normed, expected) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5000))
def test_gelu_is_its_definition_bit_for_bit_and_nearly_torchs(seed: int, count: int) -> None:
    x = values(seed, count) * 2
    mine = plain.gelu(x)
    assert torch.equal(compiled.gelu(x.clone()), mine)
    exact = torch.nn.functional.gelu(x.double())
    assert ((mine - exact).abs() / x.abs().clamp_min(1)).max() < 5e-7


def test_quantize_keeps_the_order_of_memory() -> None:
    x = values(4, 2, 5, 6, 7).to(memory_format=torch.channels_last)
    q = compiled.quantize_input(x, reader(0.3, 7, 4)).q
    assert q.is_contiguous(memory_format=torch.channels_last)
    for view in (x, x[:, :, 1:], x.transpose(0, 3)):
        assert same_rows(
            compiled.quantize_input(view, reader(0.3, 7, 4)), plain.quantize_input(view, reader(0.3, 7, 4))
        )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    grid=st.integers(1, 45),
    window=st.sampled_from([0, 3, 8, 14, 17]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([4, 16, 36, 64, 80]),
    position=st.booleans(),
)
def test_attention_equals_float64(
    seed: int, grid: int, window: int, heads: int, dim: int, position: bool
) -> None:
    attention, qkv = _attention(seed, grid, window, heads, dim, position)
    expected = attention.double().attend(qkv.double())
    actual = _compiled(attention.float(), qkv)
    assert relative_error(actual, expected) < ATTENTION_TOLERANCE
    assert torch.equal(actual, _compiled(attention, qkv))
    layer = reader(0.05, 7, 4)
    assert torch.equal(_compiled(attention, qkv, layer), plain.quantize_input(actual, layer).q)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 2), st.integers(1, 33), st.integers(1, 33)),
    window=st.sampled_from([1, 3, 7, 14, 17]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([4, 16, 32, 36, 80]),
)
def test_window_attention_equals_float64(
    seed: int, size: tuple[int, int, int], window: int, heads: int, dim: int
) -> None:
    attention, qkv = _window_attention(seed, size, window, heads, dim)
    actual = _compiled_window(attention, qkv)
    assert torch.equal(actual, _compiled_window(attention, qkv))
    layer = reader(0.05, 7, 4)
    assert torch.equal(_compiled_window(attention, qkv, layer), plain.quantize_input(actual, layer).q)
    assert relative_error(actual, attention.double().attend(qkv.double())) < ATTENTION_TOLERANCE


def test_large_logits_do_not_overflow() -> None:
    attention, qkv = _attention(5, 40, 0, 2, 64, True)
    actual = _compiled(attention, qkv * 30)
    assert relative_error(actual, attention.double().attend(qkv.double() * 30)) < 1e-4
    windowed, qkv = _window_attention(6, (1, 9, 8), 7, 2, 32)
    actual = _compiled_window(windowed, qkv * 30)
    assert relative_error(actual, windowed.double().attend(qkv.double() * 30)) < 1e-4


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="attention cannot run"):
        compiled.attention(torch.randn(1, 4, 5, 12), None, None, 1, 0)
    with pytest.raises(ValueError, match="attention cannot run"):
        compiled.attention(torch.randn(1, 4, 4, 12), None, None, 1, 3)
    with pytest.raises(ValueError, match="attention cannot run"):
        compiled.window_attention(torch.randn(1, 4, 4, 12), None, torch.zeros(1, 9), 3)


def _attention(
    seed: int, grid: int, window: int, heads: int, dim: int, position: bool
) -> tuple[Attention, Tensor]:
    attention = Attention(heads * dim, heads, grid, window, position).requires_grad_(False)
    if position:
        side = window or grid
        attention.rel_pos_h.data = values(seed, 2 * side - 1, dim) * 0.1
        attention.rel_pos_w.data = values(seed + 1, 2 * side - 1, dim) * 0.1
    attention.pad_qkv = values(seed + 2, 3 * heads * dim)
    return attention, values(seed + 3, 2, grid, grid, 3 * heads * dim)


def _compiled(attention: Attention, qkv: Tensor, layer: QuantizedLayer | None = None) -> Tensor:
    tables = (attention.rel_pos_h, attention.rel_pos_w) if attention.relative_position else None
    return compiled.attention(qkv, attention.pad_qkv, tables, attention.heads, attention.window, layer)


def _window_attention(
    seed: int, size: tuple[int, int, int], window: int, heads: int, dim: int
) -> tuple[tiny_vit.Attention, Tensor]:
    attention = tiny_vit.Attention(heads * dim, heads, window).requires_grad_(False)
    attention.attention_biases.data = values(seed, heads, window * window)
    attention.pad_qkv = values(seed + 1, 3 * heads * dim)
    return attention, values(seed + 2, *size, 3 * heads * dim)


def _compiled_window(
    attention: tiny_vit.Attention, qkv: Tensor, layer: QuantizedLayer | None = None
) -> Tensor:
    pad, biases = attention.pad_qkv, attention.attention_biases
    return compiled.window_attention(qkv, pad, biases, attention.window, layer)
