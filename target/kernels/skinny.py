"""Triton kernels of x W^T for few rows: the weights are streamed once, and every result is summed in one fixed order.

Owns: device code, its launches and their configurations. Must never know models or which configuration is best.

A program owns BLOCK_N columns of the result, TILE rows and one run of K. The weights are the left operand of the matrix
product and the rows of x its columns, so a row of x is one column of an accumulator: other columns, a wider TILE and
rows of padding change nothing about it. What fixes its bits is the run of K (`split`) and the instruction that the left
operand gets, which follows from BLOCK_N: 64 and more take Hopper's wgmma, less take mma.sync. Within a run the
instructions go along K 16 at a time into one float32 accumulator, whatever BLOCK_K, stages or warps are. Runs end at
multiples of RUN, and are added first to last, by a second launch or, where JOINED, by the run that arrives last.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from target.kernels.dependent import ask_behind, ask_for, asking, dependent, last_block, part_of, release, settled, wait
from target.products import Behind, Config

LARGEST_TILE = 128  # rows of x; more of them take several tiles, each of which streams the weights
LONGEST_BLOCK = 256  # of K: what a box of the copy engine holds, and every run of K is a multiple of it
RUN = tl.constexpr(LONGEST_BLOCK)
SUM_BLOCK = 1024  # values of a row that one program of the second launch adds up


@triton.jit
def _total(at, step, inside, SPLIT: tl.constexpr):
    """The runs of K, `step` apart, first to last. Past the first-level cache, which may hold what lay there before."""
    total = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    for run in tl.static_range(1, SPLIT):
        total += tl.load(at + run * step, mask=inside, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _finish(total, line, inside, bias_ptr, at, N: tl.constexpr, BIAS: tl.constexpr):
    """Add the bias, round and store: total [BLOCK_N, TILE]."""
    if BIAS:
        total += tl.load(bias_ptr + line, mask=line < N, other=0.0).to(tl.float32)[:, None]
    tl.store(at, total.to(at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x_ptr,  # [rows, K], rows any distance apart
    w_ptr,  # [N, K]
    w_blocks,  # its descriptor in blocks [BLOCK_N, BLOCK_K], where TMA
    bias_ptr,  # [N], where BIAS
    out_ptr,  # [rows, N]
    partial_ptr,  # [SPLIT, rows, N] float32, where SPLIT is above 1
    arrived_ptr,  # [blocks of N, tiles] int32, zero before and after, where JOINED
    rows,
    x_row,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
    JOINED: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    next_ptr,  # weights of the product after this one, as [NEXT_ROWS, NEXT_RUN]
    NEXT_ROWS: tl.constexpr,
    NEXT_RUN: tl.constexpr,
    NEXT_BYTES: tl.constexpr,
    NEXT_EACH: tl.constexpr,
    NEXT_PAD: tl.constexpr,
):
    """The programs of one block of weights lie side by side, so that further tiles find it in the L2 cache."""
    first, start, run = tl.program_id(0) * TILE, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    SHARE: tl.constexpr = (K + SPLIT * RUN - 1) // (SPLIT * RUN) * RUN
    row = first + tl.arange(0, TILE)
    line = start + tl.arange(0, BLOCK_N)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row
    acc = tl.zeros([BLOCK_N, TILE], tl.float32)
    w_row = w_ptr + line.to(tl.int64)[:, None] * K
    begin, end = run * SHARE, tl.minimum((run + 1) * SHARE, K)
    ask_for(w_row, line < N, begin, end, AHEAD, PDL)
    wait(PDL)  # the launch before this one makes x, but not the weights
    last = last_block(begin, end, BLOCK_K, STAGES)
    part = part_of(tl.program_id(1) * SPLIT + run, tl.num_programs(1) * SPLIT)
    for block in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        release(block, last, PDL)
        ask_behind((block == last) & (first == 0), part, next_ptr, NEXT_ROWS, NEXT_RUN, NEXT_BYTES, NEXT_EACH, NEXT_PAD)
        column = block + tl.arange(0, BLOCK_K)
        if TMA:
            w = w_blocks.load([start, block])
        else:
            inside = (line < N)[:, None] & (column < K)[None, :]
            w = tl.load(w_row + column[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        inside = (row < rows)[:, None] & (column < K)[None, :]
        x = tl.load(x_at + column[None, :], mask=inside, other=0.0, eviction_policy="evict_last")
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    inside = (line < N)[:, None] & (row < rows)[None, :]
    own = row.to(tl.int64)[None, :] * N + line[:, None]
    step = rows.to(tl.int64) * N
    if SPLIT == 1:
        _finish(acc, line, inside, bias_ptr, out_ptr + own, N, BIAS)
    else:
        tl.store(partial_ptr + run * step + own, acc, mask=inside)
    if JOINED:
        tl.debug_barrier()  # all of this run is written before it is counted
        counter = arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            tl.store(counter, 0)
            total = _total(partial_ptr + own, step, inside, SPLIT)
            _finish(total, line, inside, bias_ptr, out_ptr + own, N, BIAS)


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(
    partial_ptr,  # [SPLIT, rows, N] float32
    bias_ptr,  # [N], where BIAS
    out_ptr,  # [rows, N]
    rows,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the runs of K, first to last."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    settled(PDL)
    total = _total(partial_ptr + row * N + column, rows.to(tl.int64) * N, column < N, SPLIT)
    if BIAS:
        total += tl.load(bias_ptr + column, mask=column < N).to(tl.float32)
    tl.store(out_ptr + row * N + column, total.to(out_ptr.dtype.element_ty), mask=column < N)


def tile_of(rows: int) -> int:
    """Rows of a tile: 16, 32, 64 or 128."""
    return min(max(16, int(triton.next_power_of_2(rows))), LARGEST_TILE)


def shared_bytes(config: Config, tile: int, itemsize: int) -> int:
    """Shared memory that the stages take; wgmma reads the block it works on from there, mma.sync from registers."""
    blocks = config.stages if config.block_n >= 64 else max(config.stages - 1, 1)
    return blocks * (config.block_n + tile) * config.block_k * itemsize


@lru_cache(maxsize=1024)
def fitted(config: Config, tile: int, itemsize: int, room: int) -> Config:
    """`config` with as many of its stages as `room` bytes of shared memory hold, and shorter blocks where one is too
    large; its order stays."""
    while config.stages > 1 and shared_bytes(config, tile, itemsize) > room:
        config = config._replace(stages=config.stages - 1)
    while config.block_k > 16 and shared_bytes(config, tile, itemsize) > room:
        config = config._replace(block_k=config.block_k // 2)
    return config


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: Config, arrived: Tensor | None = None,
    behind: Behind | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K], weight [N, K], bias [N] of one type -> x W^T + b [M, N] of that type, summed in float32.

    Rows of x may lie any distance apart; everything else is contiguous. The bits of a result's row follow from its row
    of x, the weights, N, K and `config.order` alone. `arrived` are zeros [many] int32 that nobody else uses at the
    time; without enough of them a second launch adds the runs of K. `behind` is fetched while this ends.
    """
    rows, (n, k) = x.shape[0], weight.shape
    tile = tile_of(rows)
    config = fitted(config, tile, x.element_size(), _room(x.device))
    split = config.split
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    parts = out if split == 1 else torch.empty(split, rows, n, dtype=torch.float32, device=x.device)
    blocks = _descriptor(weight, config)
    bias_or_any = weight if bias is None else bias
    grid = (triton.cdiv(rows, tile), triton.cdiv(n, config.block_n), split)
    joined = config.joined and split > 1 and arrived is not None and arrived.numel() >= grid[0] * grid[1]
    product_kernel[grid](
        x, weight, weight if blocks is None else blocks, bias_or_any, out, parts, arrived if joined else out, rows,
        x.stride(0), N=n, K=k,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, TILE=tile, SPLIT=split, STAGES=config.stages,
        BIAS=bias is not None, TMA=blocks is not None, JOINED=joined, num_warps=config.warps,
        **asking(config, config.block_n, grid[1] * split, x, behind),
    )  # fmt: skip
    if split > 1 and not joined:
        sum_kernel[(triton.cdiv(n, SUM_BLOCK), rows)](
            parts, bias_or_any, out, rows, N=n, SPLIT=split, BIAS=bias is not None,
            BLOCK=SUM_BLOCK, num_warps=4, **dependent(config.pdl, x),
        )  # fmt: skip
    return out


def _descriptor(weight: Tensor, config: Config) -> TensorDescriptor | None:
    """Blocks of the weights for the tensor memory accelerator, where the device has one and the sizes suit it."""
    n, k = weight.shape
    fits = config.tma and k * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    if not fits or not _has_tma(weight.device):
        return None
    return TensorDescriptor(weight, [n, k], [k, 1], [config.block_n, config.block_k])


@lru_cache(maxsize=16)
def _has_tma(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache(maxsize=16)
def _room(device: torch.device) -> int:
    """Shared memory of a program, less what the compiler takes for itself."""
    if device.type != "cuda":
        return 227 << 10
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"]) - (4 << 10)
