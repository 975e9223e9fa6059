"""Triton kernel of what lies between the qkv product and attention: per-head norms, rotation, storing keys and values.

Owns: device code and its launch, and `turned`, which attention of few queries calls in its own kernel. Must never know
plans or models. Values round where torch rounds them: after the norm, after the product with cos, and at the end.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from target.attention.base import Turn
from target.batch import Batch
from target.kernels.dependent import dependent, settled

HEADS_EACH = 8  # of one program


@triton.jit
def turned(
    at,  # [M, 1] pointers to the beginnings of heads
    token,  # [M, 1] int64 their tokens' numbers among all of the pass
    used,  # [M, 1] bool; the others give anything
    cos_ptr,  # [R, T, ROTARY]
    sin_ptr,
    weight_ptr,  # [DIM], where NORMED
    eps,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    NORMED: tl.constexpr,
):
    """[M, DIM_PAD]: heads, normed where asked and rotated, in their own type."""
    column = tl.arange(0, DIM_PAD)[None, :]
    if PAIRS:
        other = tl.where(column < ROTARY, column ^ 1, column)
    else:
        other = tl.where(column < ROTARY, (column + ROTARY // 2) % ROTARY, column)
    inside = used & (column < DIM)
    dtype: tl.constexpr = at.dtype.element_ty
    x = tl.load(at + column, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(at + other, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        weight = tl.load(weight_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
        x = (x * scale * weight).to(dtype).to(tl.float32)
        weight = tl.load(weight_ptr + other, mask=column < DIM, other=0.0).to(tl.float32)
        partner = (partner * scale * weight).to(dtype).to(tl.float32)
    turning = used & (column < ROTARY)
    cos = tl.load(cos_ptr + token * ROTARY + column, mask=turning, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * ROTARY + column, mask=turning, other=0.0).to(tl.float32)
    rotated = (x * cos).to(dtype).to(tl.float32) + partner * sin
    return tl.where(column < ROTARY, rotated, x).to(dtype)


@triton.jit(do_not_specialize=["offset", "page_row", "queries"])
def rope_write_kernel(
    qkv_ptr,  # [R, T, (HEADS + 2 KV_HEADS) * DIM], any strides in R and T
    out_ptr,  # [R, T, HEADS * DIM]
    store_ptr,  # [slots, 2, KV_HEADS * DIM]
    pages_ptr,  # [R, columns] int64
    context_ptr,  # [R] int64
    counts_ptr,  # [R] int64
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    offset,
    page_row,
    queries,
    row_stride,
    token_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    NORMED: tl.constexpr,
    PAGE: tl.constexpr,
    EACH: tl.constexpr,
    PDL: tl.constexpr,
):
    """EACH heads of one token: queries go to `out`, keys and values to their slot; padding goes nowhere."""
    Q_PARTS: tl.constexpr = (HEADS + EACH - 1) // EACH
    KV_PARTS: tl.constexpr = (KV_HEADS + EACH - 1) // EACH
    number, part = tl.program_id(0), tl.program_id(1)
    settled(PDL)
    request, query = number // queries, number % queries
    if query >= tl.load(counts_ptr + request):
        return
    column = tl.arange(0, DIM_PAD)[None, :]
    each = tl.arange(0, EACH)[:, None]
    begin = qkv_ptr + request.to(tl.int64) * row_stride + query.to(tl.int64) * token_stride
    token = tl.zeros([EACH, 1], tl.int64) + number
    if part < Q_PARTS:
        head = part * EACH + each
        x = turned(
            begin + head * DIM, token, head < HEADS, cos_ptr, sin_ptr, q_weight_ptr, eps,
            DIM, DIM_PAD, ROTARY, PAIRS, NORMED,
        )  # fmt: skip
        at = out_ptr + number.to(tl.int64) * (HEADS * DIM) + head * DIM + column
        tl.store(at, x, mask=(head < HEADS) & (column < DIM))
    else:
        index = tl.load(context_ptr + request) + offset + query
        slot = tl.load(pages_ptr + request * page_row + index // PAGE) * PAGE + index % PAGE
        head = (part - Q_PARTS) % KV_PARTS * EACH + each
        inside = (head < KV_HEADS) & (column < DIM)
        at = store_ptr + slot * (2 * KV_HEADS * DIM) + head * DIM + column
        if part < Q_PARTS + KV_PARTS:
            x = turned(
                begin + (HEADS + head) * DIM, token, head < KV_HEADS, cos_ptr, sin_ptr, k_weight_ptr, eps,
                DIM, DIM_PAD, ROTARY, PAIRS, NORMED,
            )  # fmt: skip
            tl.store(at, x, mask=inside)
        else:
            value = tl.load(begin + (HEADS + KV_HEADS + head) * DIM + column, mask=inside, other=0.0)
            tl.store(at + KV_HEADS * DIM, value, mask=inside)


def turn_pointers(turn: Turn | None, other: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """cos, sin, both weights and eps as kernels take them; `other` stands for what is not there."""
    if turn is None:
        return other, other, other, other, 0.0
    q_weight, k_weight = (other if w is None else w for w in (turn.q_weight, turn.k_weight))
    return turn.cos.contiguous(), turn.sin.contiguous(), q_weight, k_weight, turn.eps


def turn_constants(turn: Turn | None) -> dict[str, int | bool]:
    if turn is None:
        return dict(ROTARY=0, PAIRS=False, NORMED=False)
    return dict(ROTARY=turn.cos.shape[-1], PAIRS=turn.pairs, NORMED=turn.q_weight is not None)


def launch_rope_write(
    batch: Batch, qkv: Tensor, turn: Turn, store: Tensor, page_size: int, pdl: bool = False
) -> Tensor:
    """qkv [R, T, heads + 2 kv_heads, dim] -> rotated queries [R, T, heads, dim], those of padding undefined.

    Keys and values go into a layer's storage [slots, 2, kv_heads, dim].
    """
    rows, queries, merged, dim = qkv.shape
    kv_heads = store.shape[2]
    heads = merged - 2 * kv_heads
    out = torch.empty(rows, queries, heads, dim, dtype=qkv.dtype, device=qkv.device)
    parts = triton.cdiv(heads, HEADS_EACH) + 2 * triton.cdiv(kv_heads, HEADS_EACH)
    rope_write_kernel[(rows * queries, parts)](
        qkv, out, store, batch.pages, batch.context, batch.counts, *turn_pointers(turn, qkv), batch.offset,
        batch.pages.stride(0), queries, *qkv.stride()[:2], HEADS=heads, KV_HEADS=kv_heads, DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim), PAGE=page_size, EACH=HEADS_EACH, num_warps=4, **turn_constants(turn),
        **dependent(pdl, qkv),
    )  # fmt: skip
    return out
