"""The GPU ops: references against obvious versions, opcheck, and on a GPU kernels against references."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.engines.cutlass_layers import window_tables
from monailabel_dfqsam.ops import cuda_library, pack_int4
from monailabel_dfqsam.ops.cuda import (
    layer_norm_quantize,
    linear,
    linear_gelu_quantize,
    quantize_rows,
    unpack_signed,
)
from monailabel_dfqsam.ops.cuda_attention import attention_inputs, attention_output
from monailabel_dfqsam.sam.vit import relative_position_bias
from tests.models import relative_error

FLOAT_TOLERANCE = 1e-6
HALF_TOLERANCE = 1e-3
# Of values that lie on the edge between two levels for a float32 sum in another order.
FLIPPED_SHARE = 1e-3

unavailable = cuda_library.why_unavailable()
needs_gpu = pytest.mark.skipif(unavailable is not None, reason=f"the kernels cannot run here: {unavailable}")


def integers(top: int, *shape: int, low: int = 0, seed: int = 0) -> Tensor:
    return torch.randint(low, top + 1, shape, generator=torch.Generator().manual_seed(seed))


def unpack(rows: Tensor, packed: bool) -> Tensor:
    """Quantized rows as [M, K'] integers, by the drawing of the layout."""
    if not packed:
        return rows.long()
    return torch.tensor(
        [[nibble for byte in row for nibble in (byte & 15, byte >> 4)] for row in rows.tolist()]
    )


def product_arguments(
    packed: bool, m: int = 70, n: int = 96, k: int = 160
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    top = 15 if packed else 255
    values = integers(top, m, k).to(torch.uint8)
    weight = integers(7 if packed else 127, n, k, low=-8 if packed else -128, seed=1).to(torch.int8)
    x = values[:, 0::2] | (values[:, 1::2] << 4) if packed else values
    scale = torch.rand(n, generator=torch.Generator().manual_seed(2)) / (k * top)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3))
    return x, pack_int4(weight) if packed else weight, scale, bias


def exact_product(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """In int64 and float64, from the drawing of the layout."""
    packed = weight.dtype == torch.uint8
    w = unpack(weight, packed) if packed else weight.long()
    w = torch.where(w > 7, w - 16, w) if packed else w
    accumulator = unpack(x, packed).numpy() @ w.numpy().T
    y: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (
        accumulator * scale.double().numpy() + bias.double().numpy()
    )
    return y


GRID, SIDE, HEADS, DEPTH = 5, 3, 2, 8  # windows of 3² on 5² tokens: one whole, three that stick out


class AttentionArguments(NamedTuple):
    """q, k, v of two images, and what a block has for all images."""

    qkv: Tensor
    padding: Tensor
    table_h: Tensor
    table_w: Tensor


def attention_arguments() -> AttentionArguments:
    g = torch.Generator().manual_seed(4)
    return AttentionArguments(
        torch.randn(2 * GRID**2, 3 * HEADS * DEPTH, generator=g),
        torch.randn(3 * HEADS * DEPTH, generator=g),
        torch.randn(2 * SIDE - 1, DEPTH, generator=g),
        torch.randn(2 * SIDE - 1, DEPTH, generator=g),
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("width", [5, 32, 36, 144])
def test_quantize_rows_is_equation_1_in_the_drawn_layout(packed: bool, width: int) -> None:
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(width)) * 3
    bits = 4 if packed else 8
    rows = quantize_rows(x, 0.25, 6, bits, packed)
    expected = np.clip(np.round(x.numpy() / 0.25) + 6, 0, 2**bits - 1)
    actual = unpack(rows, packed)
    assert actual.shape[1] % 32 == 0
    assert (actual[:, :width].numpy() == expected).all()
    assert not actual[:, width:].any()


@pytest.mark.parametrize("packed", [True, False])
def test_layer_norm_quantize(packed: bool) -> None:
    x = torch.randn(9, 144, generator=torch.Generator().manual_seed(5)) * 4 + 2
    weight, bias = torch.rand(144), torch.randn(144)
    rows = layer_norm_quantize(x, weight, bias, 1e-6, 0.3, 7, 4, packed)
    exact = x.double().numpy()
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-6)
    levels = (exact * weight.double().numpy() + bias.double().numpy()) / 0.3
    difference = np.abs(unpack(rows, packed)[:, :144].numpy() - np.clip(np.round(levels) + 7, 0, 15))
    assert difference[np.abs(levels % 1 - 0.5) > 1e-4].max() == 0


@pytest.mark.parametrize("packed", [True, False])
def test_linear_is_exact_arithmetic(packed: bool) -> None:
    arguments = product_arguments(packed)
    residual = torch.randn(70, 96, generator=torch.Generator().manual_seed(6))
    expected = exact_product(*arguments)
    for extra in (None, residual):
        added = expected if extra is None else expected + extra.double().numpy()
        actual = linear(*arguments, extra, torch.float32).double().numpy()
        assert np.abs(actual - added).max() <= FLOAT_TOLERANCE * np.abs(added).max()


@pytest.mark.parametrize("packed", [True, False])
def test_linear_gelu_quantize(packed: bool) -> None:
    arguments = product_arguments(packed)
    bits = 4 if packed else 8
    levels = F.gelu(torch.from_numpy(exact_product(*arguments))).numpy() / 0.05
    expected = np.clip(np.round(levels) + 3, 0, 2**bits - 1)
    actual = unpack(linear_gelu_quantize(*arguments, 0.05, 3, bits), packed).numpy()
    assert np.abs(actual - expected)[np.abs(levels % 1 - 0.5) > 1e-3].max() == 0


def test_unpacking_undoes_packing() -> None:
    weight = integers(7, 6, 64, low=-8).to(torch.int8)
    assert torch.equal(unpack_signed(pack_int4(weight)), weight)


def test_attention_without_a_mask_is_attention_with_one() -> None:
    """The op's further columns against the published formula, one padded window at a time."""
    a = attention_arguments()
    windows = window_tables(GRID, SIDE, torch.device("cpu"))
    results = []
    for group in windows.groups:
        q, k, v = attention_inputs(*a, group.query, group.place, group.key, GRID**2, SIDE, HEADS)
        assert q.shape[-1] == 16
        results.append(F.scaled_dot_product_attention(q, k, v, scale=DEPTH**-0.5))
        for image in range(2):
            for window, key in enumerate(group.key):
                expected = _attend_slowly(a, image, key)
                kept = group.place[window][group.query[window] >= 0].long()
                actual = results[-1][image * len(group.key) + window, :, : len(kept), :DEPTH]
                assert torch.allclose(actual, expected[:, kept], atol=1e-5)


def _attend_slowly(a: AttentionArguments, image: int, key: Tensor) -> Tensor:
    """[heads, side², d] of one window whose padding asks too, with an additive mask."""
    tokens = a.qkv[image * GRID**2 : (image + 1) * GRID**2]
    rows = torch.stack([a.padding if token < 0 else tokens[token] for token in key.tolist()])
    q, k, v = rows.view(1, SIDE**2, 3, HEADS, DEPTH).permute(2, 0, 3, 1, 4)
    bias = relative_position_bias(q, a.table_h, a.table_w, SIDE)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)[0]


def test_attention_output_puts_every_token_in_its_place() -> None:
    windows = window_tables(GRID, SIDE, torch.device("cpu"))
    results = []
    for group in windows.groups:
        # Each token's own number, of both images, with rubbish where no token is and beyond the head's depth.
        numbers = torch.stack([group.query, group.query + GRID**2])
        numbers = numbers.masked_fill(group.query < 0, 200).flatten(0, 1).float()
        heads = torch.stack([numbers, numbers + 100], 1)[..., None].expand(-1, -1, -1, DEPTH)
        results.append(F.pad(heads, (0, 8), value=250))
    rows = attention_output(*results, windows.slot, 2, DEPTH, 1.0, 0, 8, False)
    expected = torch.arange(2 * GRID**2)[:, None].repeat(1, HEADS * DEPTH)
    expected[:, DEPTH:] += 100
    assert torch.equal(rows[:, : HEADS * DEPTH].long(), expected)


def test_heads_without_relative_position_are_padded_alone() -> None:
    windows = window_tables(4, 4, torch.device("cpu"))
    (group,) = windows.groups
    qkv = torch.randn(16, 3 * 2 * 36)
    q, k, v = attention_inputs(qkv, None, None, None, group.query, group.place, group.key, 16, 4, 2)
    for index, part in enumerate((q, k, v)):
        assert part.shape == (1, 2, 16, 40)
        assert torch.equal(part[0, 1, :, :36], qkv[:, (2 * index + 1) * 36 : (2 * index + 2) * 36])
        assert not part[..., 36:].any()


class Call(NamedTuple):
    """An op with arguments; `packed` where it takes or makes packed rows."""

    name: str
    arguments: tuple[object, ...]
    packed: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{'packed' if self.packed else 'bytes'}"


def every_op(device: str) -> list[Call]:
    """Every op with each kind of arguments; floats as the device takes them."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    windows = window_tables(GRID, SIDE, torch.device(device))
    x = torch.randn(37, 144, generator=torch.Generator().manual_seed(7)).to(device, dtype)
    norm = (torch.rand(144).to(device), torch.randn(144).to(device))
    results = [
        torch.randn(2 * len(g.key), HEADS, g.query.shape[1], 16).to(device, dtype) for g in windows.groups
    ]
    calls = [Call("unpack_signed", (product_arguments(True)[1].to(device),))]
    for group in windows.groups:
        tensors = [t.to(device, dtype) for t in attention_arguments()]
        tables = (group.query, group.place, group.key)
        calls.append(Call("attention_inputs", (*tensors, *tables, GRID**2, SIDE, HEADS)))
    for packed in (True, False):
        bits = 4 if packed else 8
        product = tuple(t.to(device) for t in product_arguments(packed))
        residual = torch.randn(70, 96).to(device, dtype)
        calls += [
            Call("quantize_rows", (x, 0.2, 5, bits, packed), packed),
            Call("quantize_rows", (x.float()[:, :37], 0.2, 5, bits, packed), packed),
            Call("layer_norm_quantize", (x, *norm, 1e-6, 0.2, 5, bits, packed), packed),
            Call("linear", (*product, None, dtype), packed),
            Call("linear", (*product, residual, dtype), packed),
            Call("linear_gelu_quantize", (*product, 0.05, 3, bits), packed),
            Call("attention_output", (*results, windows.slot, 2, DEPTH, 0.2, 5, bits, packed), packed),
        ]
    return calls


@pytest.mark.parametrize("call", every_op("cpu"), ids=str)
def test_ops_pass_opcheck(call: Call) -> None:
    torch.library.opcheck(getattr(torch.ops.dfqsam_cuda, call.name), call.arguments)


@needs_gpu
@pytest.mark.parametrize("index", range(len(every_op("cpu"))))
def test_gpu_ops_match_their_references(index: int, record_property: Callable[[str, object], None]) -> None:
    call = every_op("cuda")[index]
    op = getattr(torch.ops.dfqsam_cuda, call.name)
    record_property("op", str(call))
    if call.packed and call.name.startswith("linear") and not native_4bit():
        with pytest.raises(RuntimeError, match="no kernel of this kind"):
            op(*call.arguments)
        return
    torch.library.opcheck(op, call.arguments)
    outputs = op(*call.arguments)
    expected = op(*(x.cpu() if isinstance(x, Tensor) else x for x in call.arguments))
    pairs = zip(outputs, expected, strict=True) if isinstance(outputs, tuple) else [(outputs, expected)]
    for actual, reference in pairs:
        if actual.dtype == torch.uint8:
            difference = (unpack(actual.cpu(), call.packed) - unpack(reference, call.packed)).abs()
            share = float((difference > 0).float().mean())
            record_property("flipped_share", share)
            assert difference.max() <= 1
            assert share <= FLIPPED_SHARE
        else:
            error = relative_error(actual.cpu(), reference)
            record_property("relative_error", error)
            assert error <= (0 if actual.dtype == torch.int8 else HALF_TOLERANCE)


def native_4bit() -> bool:
    return cuda_library.native_4bit(torch.device("cuda"))


@needs_gpu
@pytest.mark.parametrize("m", [1, 63, 64, 257, 4096])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (144, 160), (768, 768), (2304, 768), (3072, 768), (768, 3072)])
@pytest.mark.parametrize("packed", [True, False])
def test_gpu_products_of_every_size(m: int, n: int, k: int, packed: bool) -> None:
    """Both tiles, their edges, and the smallest sizes."""
    if packed and not native_4bit():
        pytest.skip("this GPU multiplies 4-bit values in 8-bit containers")
    arguments = [t.cuda() for t in product_arguments(packed, m, n, k)]
    x, weight, scale, bias = (t.double() if t.is_floating_point() else t for t in arguments)
    if packed:
        x = torch.stack((x & 15, x >> 4), -1).flatten(1)
        weight = unpack_signed(weight)
    expected = x.double() @ weight.double().T * scale + bias
    actual = linear(*arguments, None, torch.float16)
    assert relative_error(actual, expected) <= HALF_TOLERANCE
