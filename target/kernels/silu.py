"""Triton kernels of SiLU-mul: over a merged gate and up product, or as the end of that product for few rows.

Owns: device code and its launches. Must never know layers or which of the two runs. Values round where torch rounds
them: gate and up, silu, and the result. A program of the product owns the same BLOCK_N columns of gate and of up; as in
`target.kernels.skinny`, K is summed in one order, so a row of x has the same bits whatever shares the call.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from target.kernels.dependent import ask_behind, ask_for, asking, dependent, last_block, part_of, release, settled, wait
from target.kernels.skinny import _descriptor, _room, tile_of
from target.products import Behind, Config

WIDTH = 1024
LARGEST_TILE = 64  # rows of x; more of them take several tiles, each of which streams the weights


@triton.jit
def silu(x, DTYPE: tl.constexpr):
    """x / (1 + exp(-x)) of float32, rounded as the type rounds it."""
    return (x / (1.0 + tl.exp(-x))).to(DTYPE).to(tl.float32)


@triton.jit
def silu_mul_kernel(
    both_ptr,  # [N, 2 * inner], rows any distance apart: gate, then up
    out_ptr,  # [N, inner]
    row_stride,
    inner,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    settled(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < inner
    at = both_ptr + row * row_stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + inner, mask=inside, other=0.0).to(tl.float32)
    out = silu(gate, out_ptr.dtype.element_ty) * up
    tl.store(out_ptr + row * inner + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def launch_silu_mul(both: Tensor, pdl: bool = False) -> Tensor:
    """both [..., 2 * inner] -> silu(first half) * second half [..., inner]."""
    inner = both.shape[-1] // 2
    rows = both.flatten(0, -2) if both.dim() > 1 else both[None]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(*both.shape[:-1], inner, dtype=both.dtype, device=both.device)
    if rows.shape[0]:
        grid = (rows.shape[0], triton.cdiv(inner, WIDTH))
        silu_mul_kernel[grid](
            rows, out, rows.stride(0), inner, WIDTH=WIDTH, num_warps=4, **dependent(pdl, rows)
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def gated_kernel(
    x_ptr,  # [rows, K], rows any distance apart
    w_ptr,  # [2 * INNER, K]: gate, then up
    w_blocks,  # its descriptor in blocks [BLOCK_N, BLOCK_K], where TMA
    bias_ptr,  # [2 * INNER], where BIAS
    out_ptr,  # [rows, INNER]
    rows,
    x_row,
    INNER: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    next_ptr,  # weights of the product after this one, as [NEXT_ROWS, NEXT_RUN]
    NEXT_ROWS: tl.constexpr,
    NEXT_RUN: tl.constexpr,
    NEXT_BYTES: tl.constexpr,
    NEXT_EACH: tl.constexpr,
    NEXT_PAD: tl.constexpr,
):
    """The weights are the left operand, so that a row of x is one column of an accumulator."""
    start = tl.program_id(1) * BLOCK_N
    row, line = tl.program_id(0) * TILE + tl.arange(0, TILE), start + tl.arange(0, BLOCK_N)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row
    w_at = w_ptr + line.to(tl.int64)[:, None] * K
    gate = tl.zeros([BLOCK_N, TILE], tl.float32)
    up = tl.zeros([BLOCK_N, TILE], tl.float32)
    ask_for(w_at, line < INNER, 0, K, AHEAD, PDL)
    ask_for(w_at + INNER * K, line < INNER, 0, K, AHEAD, PDL)
    wait(PDL)
    last, asks = last_block(0, K, BLOCK_K, STAGES), tl.program_id(0) == 0
    part = part_of(tl.program_id(1), tl.num_programs(1))
    for block in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        release(block, last, PDL)
        ask_behind((block == last) & asks, part, next_ptr, NEXT_ROWS, NEXT_RUN, NEXT_BYTES, NEXT_EACH, NEXT_PAD)
        column = block + tl.arange(0, BLOCK_K)
        if TMA:
            gate_w, up_w = w_blocks.load([start, block]), w_blocks.load([INNER + start, block])
        else:
            inside = (line < INNER)[:, None] & (column < K)[None, :]
            at = w_at + column[None, :]
            gate_w = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
            up_w = tl.load(at + INNER * K, mask=inside, other=0.0, eviction_policy="evict_first")
        inside = (row < rows)[:, None] & (column < K)[None, :]
        x = tl.load(x_at + column[None, :], mask=inside, other=0.0, eviction_policy="evict_last")
        gate = tl.dot(gate_w, tl.trans(x), gate, input_precision="ieee")
        up = tl.dot(up_w, tl.trans(x), up, input_precision="ieee")
    if BIAS:
        gate += tl.load(bias_ptr + line, mask=line < INNER, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + INNER + line, mask=line < INNER, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out = silu(gate.to(dtype).to(tl.float32), dtype) * up.to(dtype).to(tl.float32)
    at = out_ptr + row.to(tl.int64)[None, :] * INNER + line[:, None]
    tl.store(at, out.to(dtype), mask=(line < INNER)[:, None] & (row < rows)[None, :])


def launch_gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: Config, behind: Behind | None = None
) -> Tensor:  # fmt: skip
    """silu(gate) * up of the product x W^T + b: x [..., K], weight [2 * inner, K], bias [2 * inner] -> [..., inner].

    `config.split` must be 1; fewer of its stages are taken where shared memory is short. `behind` is fetched while
    this ends.
    """
    inner, k = weight.shape[0] // 2, weight.shape[1]
    rows = x.flatten(0, -2)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    tile = min(tile_of(rows.shape[0]), LARGEST_TILE)
    out = torch.empty(*x.shape[:-1], inner, dtype=x.dtype, device=x.device)
    blocks = _descriptor(weight, config)
    if rows.shape[0]:
        programs = triton.cdiv(inner, config.block_n)
        gated_kernel[(triton.cdiv(rows.shape[0], tile), programs)](
            rows, weight, weight if blocks is None else blocks, weight if bias is None else bias, out, rows.shape[0],
            rows.stride(0), INNER=inner, K=k, BLOCK_N=config.block_n, BLOCK_K=config.block_k, TILE=tile,
            STAGES=_stages(config, tile, x), BIAS=bias is not None, TMA=blocks is not None, num_warps=config.warps,
            **asking(config, 2 * config.block_n, programs, x, behind),
        )  # fmt: skip
    return out


def _stages(config: Config, tile: int, x: Tensor) -> int:
    block = (2 * config.block_n + tile) * config.block_k * x.element_size()
    return max(1, min(config.stages, _room(x.device) // block)) if x.is_cuda else config.stages
