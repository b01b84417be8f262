"""The GPU ops at both ends of attention: schema, fake and CPU reference side by side, as in `cuda`.

`dfqsam_cuda::attention_inputs`  q, k, v of windows, relative position as further columns
`dfqsam_cuda::attention_output`  attention's results as tokens, quantized
"""

from __future__ import annotations

import ctypes
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from monailabel_dfqsam.ops.cuda import check, empty_rows, padded, quantize_rows
from monailabel_dfqsam.ops.cuda_library import run

HEAD_MULTIPLE = 8


def head_width(depth: int, side: int, relative_position: bool) -> int:
    """Columns of q, k and v of a head of `depth` with relative position in windows of `side`²."""
    width = depth + (2 * side if relative_position else 0)
    return -(-width // HEAD_MULTIPLE) * HEAD_MULTIPLE


@torch.library.custom_op("dfqsam_cuda::attention_inputs", mutates_args=(), device_types="cpu")
def attention_inputs(
    qkv: Tensor,
    padding: Tensor | None,
    table_h: Tensor | None,
    table_w: Tensor | None,
    query: Tensor,
    place: Tensor,
    key: Tensor,
    tokens: int,
    side: int,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of windows, for an attention without a mask that scales by 1/√d.

    SAM adds to a logit a score of the row offset and one of the column offset, both products of q with
    learned vectors. Here they are 2·side further columns of q, times √d, which meet one-hot columns of k.

    Args:
        qkv: [B·tokens, 3·heads·d] float, d a multiple of 4.
        padding: [3·heads·d] of a token outside the image; needed where `key` has -1.
        table_h, table_w: [2·side − 1, d] a vector an offset, both or neither.
        query: [W, Q] int32, token of each query, -1 for an empty slot, whose q is 0.
        place: [W, Q] int32, row·side + column of the query in its window.
        key: [W, side²] int32, token of each key, -1 for padding.

    Returns:
        q [B·W, heads, Q, D], k and v [B·W, heads, side², D], D = `head_width(d, side, ...)`; columns that
        have no use are 0.
    """
    batch, depth = qkv.shape[0] // tokens, qkv.shape[1] // (3 * heads)
    rows = torch.zeros_like(qkv[:1]) if padding is None else padding[None].to(qkv.dtype)
    rows = torch.cat((qkv.view(batch, tokens, -1), rows.expand(batch, 1, -1)), dim=1)
    parts = rows.view(batch, tokens + 1, 3, heads, depth).unbind(2)  # token -1 is the padding
    q = parts[0][:, query.long()] * (query >= 0)[..., None, None]
    k, v = (part[:, key.long()] for part in parts[1:])
    width = head_width(depth, side, table_h is not None)
    if table_h is not None and table_w is not None:
        every = torch.arange(side, device=qkv.device)
        offset_h = (place // side)[..., None] - every + side - 1
        offset_w = (place % side)[..., None] - every + side - 1
        root = math.sqrt(depth)
        scores = [
            torch.einsum("bwqhd,wqsd->bwqhs", q, table[offset.long()]) * root
            for table, offset in ((table_h, offset_h), (table_w, offset_w))
        ]
        q = torch.cat((q, *scores), dim=-1)
        own = torch.cat(
            (F.one_hot(every.repeat_interleave(side), side), F.one_hot(every.repeat(side), side)), 1
        )
        own = own.to(k.dtype)[:, None].expand(*k.shape[:2], -1, heads, -1)
        k = torch.cat((k, own), dim=-1)
    q, k, v = (
        F.pad(x, (0, width - x.shape[-1])).transpose(2, 3).flatten(0, 1).contiguous() for x in (q, k, v)
    )
    return q, k, v


@attention_inputs.register_fake
def _(
    qkv: Tensor,
    padding: Tensor | None,
    table_h: Tensor | None,
    table_w: Tensor | None,
    query: Tensor,
    place: Tensor,
    key: Tensor,
    tokens: int,
    side: int,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    windows = qkv.shape[0] // tokens * query.shape[0]
    width = head_width(qkv.shape[1] // (3 * heads), side, table_h is not None)
    q = qkv.new_empty(windows, heads, query.shape[1], width)
    k, v = (qkv.new_empty(windows, heads, side * side, width) for _ in range(2))
    return q, k, v


@attention_inputs.register_kernel("cuda")
def launch_attention_inputs(
    qkv: Tensor,
    padding: Tensor | None,
    table_h: Tensor | None,
    table_w: Tensor | None,
    query: Tensor,
    place: Tensor,
    key: Tensor,
    tokens: int,
    side: int,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, depth = qkv.shape[0] // tokens, qkv.shape[1] // (3 * heads)
    windows, queries = query.shape
    check(qkv.is_contiguous() and qkv.dtype == torch.float16, "qkv", qkv)
    for name, tensor, shape in (
        ("padding", padding, (qkv.shape[1],)),
        ("table_h", table_h, (2 * side - 1, depth)),
        ("table_w", table_w, (2 * side - 1, depth)),
    ):
        if tensor is not None:
            fits = tensor.is_contiguous() and tensor.dtype == torch.float16 and tensor.shape == shape
            check(fits, name, tensor)
    for name, tensor, width in (
        ("query", query, queries),
        ("place", place, queries),
        ("key", key, side * side),
    ):
        fits = tensor.is_contiguous() and tensor.dtype == torch.int32 and tensor.shape == (windows, width)
        check(fits, name, tensor)
    width = head_width(depth, side, table_h is not None)
    q = qkv.new_empty(batch * windows, heads, queries, width)
    k, v = (qkv.new_empty(batch * windows, heads, side * side, width) for _ in range(2))
    run(
        "dfqsam_attention_inputs", qkv, padding, table_h, table_w, query, place, key, q, k, v, batch, tokens,
        windows, queries, side, heads, depth, width, math.sqrt(depth),
    )  # fmt: skip
    return q, k, v


@torch.library.custom_op("dfqsam_cuda::attention_output", mutates_args=(), device_types="cpu")
def attention_output(
    full: Tensor,
    partial: Tensor | None,
    slot: Tensor,
    batch: int,
    depth: int,
    scale: float,
    zero_point: int,
    bits: int,
    packed: bool,
) -> Tensor:
    """Attention's results put back in the order of tokens, then `quantize_rows`.

    Args:
        full, partial: [B·W, heads, Q, D] float of two groups of windows, or one; the last
            dimension contiguous.
        slot: [tokens] int32, window·Q + query in `full`, or that plus full's W·Q in `partial`.
        batch, depth: B, and the columns of a head that count.

    Returns:
        quantized rows of [B·tokens, heads·depth].
    """
    groups = [full] if partial is None else [full, partial]
    slots = [g[..., :depth].transpose(1, 2).flatten(2).reshape(batch, -1, g.shape[1] * depth) for g in groups]
    in_order = torch.cat(slots, dim=1)[:, slot.long()].flatten(0, 1)
    rows: Tensor = quantize_rows(in_order, scale, zero_point, bits, packed)
    return rows


@attention_output.register_fake
def _(
    full: Tensor,
    partial: Tensor | None,
    slot: Tensor,
    batch: int,
    depth: int,
    scale: float,
    zero_point: int,
    bits: int,
    packed: bool,
) -> Tensor:
    return empty_rows(full, batch * slot.shape[0], full.shape[1] * depth, packed)


@attention_output.register_kernel("cuda")
def launch_attention_output(
    full: Tensor,
    partial: Tensor | None,
    slot: Tensor,
    batch: int,
    depth: int,
    scale: float,
    zero_point: int,
    bits: int,
    packed: bool,
) -> Tensor:
    strides, sizes = (ctypes.c_int64 * 6)(), (ctypes.c_int * 4)()
    for index, group in enumerate((full, partial)):
        if group is not None:
            check(group.stride(3) == 1 and group.dtype == torch.float16, "group", group)
            strides[3 * index : 3 * index + 3] = list(group.stride()[:3])
            sizes[2 * index : 2 * index + 2] = [group.shape[0] // batch, group.shape[2]]
    check(slot.is_contiguous() and slot.dtype == torch.int32, "slot", slot)
    tokens, heads = slot.shape[0], full.shape[1]
    out = empty_rows(full, batch * tokens, heads * depth, packed)
    run(
        "dfqsam_attention_output", full, partial, ctypes.addressof(strides), ctypes.addressof(sizes), slot,
        batch, tokens, heads, depth, 1.0 / scale, zero_point, bits, padded(heads * depth), packed, out,
    )  # fmt: skip
    return out
