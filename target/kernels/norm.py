"""Triton kernel of RMSNorm, alone or after the addition to the residual stream that comes before it.

Owns: device code and its launch. Must never know layers. One program has a row to itself, so a row's bits depend on
nothing else; values round where torch rounds them: the sum to the stream's type, the norm once at its end.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from target.kernels.dependent import dependent, settled

LARGEST = 1 << 14  # values of a row, which lives in registers


@triton.jit
def norm_kernel(
    x_ptr,  # [N, SIZE], rows any distance apart
    more_ptr,  # [N, SIZE], where ADD
    weight_ptr,  # [SIZE]
    total_ptr,  # [N, SIZE], where ADD
    out_ptr,  # [N, SIZE]
    x_row,
    more_row,
    eps,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    CENTRED: tl.constexpr,
    PDL: tl.constexpr,
):
    """total = x + more; out = total / rms(total) * weight, or * (1 + weight) where CENTRED."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    settled(PDL)
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(more_ptr + row * more_row + column, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * SIZE + column, total, mask=inside)
        x = total.to(tl.float32)
    if CENTRED:
        weight += 1
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    tl.store(out_ptr + row * SIZE + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def beside_kernel(
    tokens_ptr,  # [N] int64
    table_ptr,  # [V, SIZE], rows of the first half
    x_ptr,  # [N, SIZE], rows of the second half, any distance apart
    first_ptr,  # [SIZE], weight of the first norm, where NORM_FIRST
    second_ptr,  # [SIZE]
    out_ptr,  # [N, 2 * SIZE]
    x_row,
    first_eps,
    second_eps,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = [norm of the token's row in the table, norm of x]; a program has one half of one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = column < SIZE
    settled(PDL)
    if tl.program_id(1) == 0:
        x = tl.load(table_ptr + tl.load(tokens_ptr + row) * SIZE + column, mask=inside, other=0.0).to(tl.float32)
        if NORM_FIRST:
            weight = tl.load(first_ptr + column, mask=inside, other=0.0).to(tl.float32)
            x = _scaled(x, weight, first_eps, SIZE)
        tl.store(out_ptr + row * 2 * SIZE + column, x.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(second_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = _scaled(x, weight, second_eps, SIZE)
        tl.store(out_ptr + (row * 2 + 1) * SIZE + column, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scaled(x, weight, eps, SIZE: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight


def launch_beside(
    tokens: Tensor, table: Tensor, first: Tensor | None, first_eps: float, x: Tensor, second: Tensor, eps: float,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """tokens [...] int64, table [V, size], x [..., size] of one type -> [norm(table[tokens]), norm(x)], [..., 2 size].

    Without `first`, its weight, rows of the table are taken as they are.
    """
    size = x.shape[-1]
    rows = _rows(x)
    out = torch.empty(*x.shape[:-1], 2 * size, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        beside_kernel[(rows.shape[0], 2)](
            tokens.contiguous(), table, rows, second if first is None else first, second, out, rows.stride(0),
            first_eps, eps, SIZE=size, WIDTH=triton.next_power_of_2(size), NORM_FIRST=first is not None,
            num_warps=warps(size), **dependent(pdl, x),
        )  # fmt: skip
    return out


def launch_norm(
    x: Tensor, more: Tensor | None, weight: Tensor, eps: float, centred: bool = False, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """x and more [..., size] of one type -> x + more (x itself without `more`) and its norm, of x's type."""
    size = x.shape[-1]
    rows = _rows(x)
    added = rows if more is None else _rows(more)
    total = x if more is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        norm_kernel[(rows.shape[0],)](
            rows, added, weight, total, out, rows.stride(0), added.stride(0), eps, SIZE=size,
            WIDTH=triton.next_power_of_2(size), ADD=more is not None, CENTRED=centred,
            num_warps=warps(size), **dependent(pdl, x),
        )  # fmt: skip
    return total, out


def warps(size: int) -> int:
    """Of a program that norms rows of `size` values: 512 values each, and as many as Triton takes, a power of two."""
    return int(min(max(triton.next_power_of_2(size) // 512, 1), 16))


def _rows(x: Tensor) -> Tensor:
    """[N, size] with the values of a row side by side."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return rows if rows.stride(-1) == 1 else rows.contiguous()
