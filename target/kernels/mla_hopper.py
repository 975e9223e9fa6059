"""The MLA split-KV pass for Hopper, in Gluon: layouts, copies and matrix products are placed by hand.

Owns: the fast pass for 16-bit latents of rank 512 (or 256) and pages of whole blocks. Must never know plans beyond
their layout; planner and combine are those of `target.kernels.mla`.

Two warpgroups share a tile of 64 rows. Scores of a block are split between them by tokens, the result by columns; the
probabilities change hands through shared memory. A latent block is copied once and is key and value. Two blocks are in
shared memory: copying block i + 1 starts when the products of block i - 1 are done, so it has the scores, the softmax
and the products of block i to arrive in.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from target.attention.splits import BLOCK, Splits
from target.batch import Batch
from target.kernels.mla import pdl

ROWS = 64  # of a tile: what one wgmma instruction multiplies
WARPS = 8
LOG2E = 1.4426950408889634
ROPE = 64  # values: a row of 128 bytes, the widest swizzle


@gluon.jit
def _copy(latent_blocks, rope_blocks, latent, rope, ready, page, block, turn, RANK: gl.constexpr, PAGE: gl.constexpr):
    """Start copying a block into its half of the buffers."""
    half = turn % 2
    row = (page * PAGE + block * latent.shape[1] % PAGE).to(gl.int32)
    mbarrier.expect(ready.index(half), latent_blocks.block_type.nbytes + rope_blocks.block_type.nbytes)
    tma.async_copy_global_to_shared(latent_blocks, [row, 0], ready.index(half), latent.index(half))
    tma.async_copy_global_to_shared(rope_blocks, [row, RANK], ready.index(half), rope.index(half))


@gluon.jit
def _score(q, q_rope, latent, rope, half, SCORES: gl.constexpr):
    """Start the scores of a block that has arrived: two groups of products."""
    zeros = gl.full([q.shape[0], latent.shape[1]], 0.0, gl.float32, SCORES)
    scores = warpgroup_mma(q_rope, rope.index(half).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma(q, latent.index(half).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _has_gaps(block, whole, length, BLOCK: gl.constexpr, TREE: gl.constexpr):
    """Whether a block may have tokens that no query sees: above a chain's end, or anywhere above a tree's context."""
    if TREE:
        return block >= whole
    else:
        return (block + 1) * BLOCK > length


@gluon.jit
def _blank(latent, length, context, offset, count, union, block, TREE: gl.constexpr):
    """Zero the tokens of a block that no query sees: probability 0 times what lies in unwritten memory may be NaN."""
    BLOCK: gl.constexpr = latent.shape[0]
    RANK: gl.constexpr = latent.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    index = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))
    node = index - context
    used = index < length
    if TREE:
        bit = (union >> gl.minimum(gl.maximum(node, 0), 63).to(gl.int64)) & 1
        own = (node >= offset) & (node < offset + count)
        used = (node < 0) | own | ((node < 64) & (bit != 0))
    for column in gl.static_range(0, RANK, 64):
        piece = latent.slice(column, 64, dim=1)
        values = piece.load(LAYOUT)
        piece.store(gl.where(used[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _softmax(
    scores,
    top,
    block,
    whole,
    context,
    offset,
    own,
    live,
    masks,
    scale,
    BLOCK: gl.constexpr,
    TREE: gl.constexpr,
    SCORES: gl.constexpr,
):
    """Probabilities of a block over the running maximum, base 2: (weights, new maximum, factor for what was before)."""
    if block >= whole:
        index = (block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES)))[None, :]
        seen = index <= own[:, None]
        if TREE:
            node = index - context
            bit = (masks[:, None] >> gl.minimum(gl.maximum(node, 0), 63).to(gl.int64)) & 1
            seen = (node < 0) | ((node < 64) & (bit != 0)) | (index == own[:, None])
        scores = gl.where(seen & live[:, None], scores, float("-inf"))
    new = gl.maximum(top, gl.max(scores, 1) * scale)
    base = gl.where(new == float("-inf"), 0.0, new)
    return gl.exp2(scores * scale - base[:, None]), new, gl.exp2(top - base)


@gluon.jit(do_not_specialize=["offset", "requests", "parts", "columns"])
def decode_kernel(
    q_blocks,  # descriptor of q [R * T * H, rank + rope] in [ROWS, rank]
    q_rope_blocks,  # and [ROWS, rope]
    latent_blocks,  # of the latents [slots, rank + rope] in [BLOCK, rank]
    rope_blocks,  # and [BLOCK, rope]
    pages_ptr,  # [R, columns] int64
    context_ptr,  # [R] int64
    counts_ptr,  # [R] int64
    ancestors_ptr,  # [R, T] int64, where TREE
    plan_ptr,  # [parts, 8] int32
    splits_ptr,  # [R + 1] int32
    out_ptr,  # [R, T, H, rank]
    partial_ptr,  # [R + parts, T * H, rank] float32
    lse_ptr,  # [R + parts, T * H] float32, base 2
    scale,
    offset,
    requests,
    parts,
    columns,
    QUERIES: gl.constexpr,
    HEADS: gl.constexpr,
    PAGE: gl.constexpr,
    TREE: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """One part of the plan for one tile of rows, as `target.kernels.mla.decode_kernel`."""
    TILE: gl.constexpr = q_blocks.block_type.shape[0]
    RANK: gl.constexpr = q_blocks.block_type.shape[1]
    ROPE: gl.constexpr = q_rope_blocks.block_type.shape[1]
    BLOCK: gl.constexpr = latent_blocks.block_type.shape[0]
    DTYPE: gl.constexpr = latent_blocks.dtype
    PAIRS: gl.constexpr = QUERIES * HEADS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK // 2, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANK // 2, 16])
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q = gl.allocate_shared_memory(DTYPE, [TILE, RANK], q_blocks.layout)
    q_rope = gl.allocate_shared_memory(DTYPE, [TILE, ROPE], q_rope_blocks.layout)
    latent = gl.allocate_shared_memory(DTYPE, [2, BLOCK, RANK], latent_blocks.layout)
    rope = gl.allocate_shared_memory(DTYPE, [2, BLOCK, ROPE], rope_blocks.layout)
    weights = gl.allocate_shared_memory(DTYPE, [TILE, BLOCK], WEIGHTS)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(ready.index(half), count=1)
    mbarrier.init(q_ready, count=1)
    fence_async_shared()

    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    record = plan_ptr + gl.program_id(1) * 8
    begin_request = gl.maximum(gl.load(record), 0)
    end_request = gl.minimum(gl.load(record + 1), requests - 1)
    begin_block, end_block = gl.maximum(gl.load(record + 2), 0), gl.load(record + 3)
    begin_split = gl.load(record + 4)
    begin_is_split, end_is_split = gl.load(record + 5) != 0, gl.load(record + 6) != 0
    tile = gl.program_id(0) * TILE
    rows = tile + gl.arange(0, TILE, gl.SliceLayout(1, SCORES))
    query = rows // HEADS
    inside = rows < PAIRS
    turn = gl.to_tensor(0)  # blocks that went through the buffers
    loads = gl.to_tensor(0)  # of q
    for request in range(begin_request, end_request + 1):
        context = gl.load(context_ptr + request).to(gl.int32)
        count = gl.load(counts_ptr + request).to(gl.int32)
        length = gl.where(count > 0, context + offset + count, 0)
        blocks = (length + BLOCK - 1) // BLOCK
        begins, ends = request == begin_request, request == end_request
        first = gl.where(begins, begin_block, 0)
        last = gl.where(ends, gl.minimum(blocks, end_block), blocks)
        whole = context // BLOCK
        table = pages_ptr + request * columns
        live = inside & (query < count)
        own = context + offset + query
        masks = gl.full([TILE], 0, gl.int64, gl.SliceLayout(1, SCORES))
        union = gl.to_tensor(0).to(gl.int64)
        if TREE:
            masks = gl.load(ancestors_ptr + request * QUERIES + query, mask=live, other=0)
            for t in gl.static_range(QUERIES):
                union = union | gl.load(ancestors_ptr + request * QUERIES + t, mask=count > t, other=0)
        top = gl.full([TILE], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        mass = gl.full([TILE], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        zeros = gl.full([TILE, RANK], 0.0, gl.float32, RESULT)
        result = zeros
        if last > first:
            gl.thread_barrier()  # every warp is done with the buffers
            mbarrier.expect(q_ready, q_blocks.block_type.nbytes + q_rope_blocks.block_type.nbytes)
            tma.async_copy_global_to_shared(q_blocks, [request * PAIRS + tile, 0], q_ready, q)
            tma.async_copy_global_to_shared(q_rope_blocks, [request * PAIRS + tile, RANK], q_ready, q_rope)
            page = gl.load(table + first * BLOCK // PAGE)
            _copy(latent_blocks, rope_blocks, latent, rope, ready, page, first, turn, RANK, PAGE)
            page = gl.load(table + gl.minimum(first + 1, last - 1) * BLOCK // PAGE)
            if last - first > 1:
                _copy(latent_blocks, rope_blocks, latent, rope, ready, page, first + 1, turn + 1, RANK, PAGE)
            page = gl.load(table + gl.minimum(first + 2, last - 1) * BLOCK // PAGE)
            mbarrier.wait(q_ready, loads % 2)
            loads += 1
            mbarrier.wait(ready.index(turn % 2), turn // 2 % 2)
            if _has_gaps(first, whole, length, BLOCK, TREE):
                _blank(latent.index(turn % 2), length, context, offset, count, union, first, TREE)
            scores = warpgroup_mma_wait(0, deps=[_score(q, q_rope, latent, rope, turn % 2, SCORES)])
            for block in range(first, last - 1):
                p, top, keep = _softmax(
                    scores, top, block, whole, context, offset, own, live, masks, scale, BLOCK, TREE, SCORES
                )
                weights.store(p.to(DTYPE))
                fence_async_shared()
                gl.thread_barrier()
                result = result * gl.convert_layout(keep, gl.SliceLayout(1, RESULT))[:, None]
                products = warpgroup_mma(weights, latent.index(turn % 2), result, is_async=True)
                turn += 1
                mbarrier.wait(ready.index(turn % 2), turn // 2 % 2)
                if _has_gaps(block + 1, whole, length, BLOCK, TREE):
                    _blank(latent.index(turn % 2), length, context, offset, count, union, block + 1, TREE)
                started = _score(q, q_rope, latent, rope, turn % 2, SCORES)
                mass = mass * keep + gl.sum(p, 1)
                result = warpgroup_mma_wait(2, deps=[products])
                gl.thread_barrier()  # all products of the block are done: its buffer is free
                if block + 2 < last:
                    _copy(latent_blocks, rope_blocks, latent, rope, ready, page, block + 2, turn + 1, RANK, PAGE)
                page = gl.load(table + gl.minimum(block + 3, last - 1) * BLOCK // PAGE)
                scores = warpgroup_mma_wait(0, deps=[started])
            p, top, keep = _softmax(
                scores, top, last - 1, whole, context, offset, own, live, masks, scale, BLOCK, TREE, SCORES
            )
            weights.store(p.to(DTYPE))
            fence_async_shared()
            gl.thread_barrier()
            result = result * gl.convert_layout(keep, gl.SliceLayout(1, RESULT))[:, None]
            result = warpgroup_mma(weights, latent.index(turn % 2), result)
            mass = mass * keep + gl.sum(p, 1)
            turn += 1
        live = live & (mass > 0)
        mass = gl.where(live, mass, 1.0)
        factor = gl.convert_layout(gl.where(live, 1 / mass, 0.0), gl.SliceLayout(1, RESULT))
        result = result * factor[:, None]
        at = tile + gl.arange(0, TILE, gl.SliceLayout(1, RESULT))
        stored = (at < PAIRS)[:, None]
        rank = gl.arange(0, RANK, gl.SliceLayout(0, RESULT))[None, :]
        if (begins & begin_is_split) | (ends & end_is_split):
            number = gl.load(splits_ptr + request) + gl.where(begins, begin_split, 0)
            number = gl.minimum(gl.maximum(number, 0), requests + parts - 1).to(gl.int64)
            gl.store(partial_ptr + (number * PAIRS + at)[:, None] * RANK + rank, result, mask=stored)
            lse = gl.where(live, top + gl.log2(mass), float("-inf"))
            gl.store(lse_ptr + number * PAIRS + rows, lse, mask=inside)
        else:
            place = (request * PAIRS + at).to(gl.int64)[:, None] * RANK + rank
            gl.store(out_ptr + place, result.to(DTYPE), mask=stored)


def takes(latents: Tensor, rank: int, page_size: int) -> bool:
    """Whether the kernel is made for this cache, device and triton; Gluon changes with every release of triton."""
    built_for = triton.__version__.startswith("3.6.") and latents.is_cuda
    fits = rank in (256, 512) and latents.shape[1] - rank == ROPE and page_size % BLOCK == 0
    sixteen = latents.dtype in (torch.bfloat16, torch.float16)
    return built_for and fits and sixteen and torch.cuda.get_device_capability(latents.device)[0] == 9


def launch(
    batch: Batch, plan: Splits, q: Tensor, latents: Tensor, page_size: int, scale: float,
    out: Tensor, partial: Tensor, lse: Tensor, chained: bool = False,
) -> None:  # fmt: skip
    """One pass over contiguous q [R, T, H, rank + rope]; fills out [R, T, H, rank] and the partial results."""
    requests, queries, heads, dim = q.shape
    rank, parts = out.shape[-1], plan.plan.shape[0]
    layout = gl.NVMMASharedLayout(128, 16, 2)

    def blocks(of: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(of, [rows, columns], layout)

    pairs = q.view(-1, dim)
    decode_kernel[(triton.cdiv(queries * heads, ROWS), parts)](
        blocks(pairs, ROWS, rank), blocks(pairs, ROWS, ROPE), blocks(latents, BLOCK, rank),
        blocks(latents, BLOCK, ROPE),
        batch.pages, batch.context, batch.counts, batch.context if batch.ancestors is None else batch.ancestors,
        plan.plan, plan.splits, out, partial, lse, scale * LOG2E, batch.offset, requests, parts, batch.pages.shape[1],
        QUERIES=queries, HEADS=heads, PAGE=page_size, TREE=batch.ancestors is not None, CHAINED=chained,
        num_warps=WARPS, **pdl(chained),
    )  # fmt: skip
