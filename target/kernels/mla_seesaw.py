"""The MLA split-KV pass for Hopper with two warpgroups that take turns: one scores a block while the other multiplies.

Owns: the pass for the same latents as `target.kernels.mla_hopper`, whose pieces it uses, with the labour divided in
another way. Must never know plans beyond their layout.

Both warpgroups share a tile of 64 rows. Each scores every other block alone, over all 64 tokens, so that an instruction
reads as much of q as of the block; the maximum, the sum and the probabilities go to the other through shared memory.
Each keeps half of the result's columns, multiplies them by every block, and copies these columns of the block after
the next as soon as its own products are done: what a warpgroup overwrites only itself has read last. The idea is that
of FlashMLA's "seesaw" schedule; the order of steps is ours.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

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
from target.kernels.mla_hopper import LOG2E, ROPE, ROWS, _blank, _has_gaps, _softmax

WARPS = 4  # of each of the two
LEFT, RIGHT = gl.constexpr(0), gl.constexpr(1)


@gluon.jit
def _copy(latent_blocks, rope_blocks, part, rope, ready, page, block, PAGE: gl.constexpr, SIDE: gl.constexpr):
    """Start copying this side's columns of a block; the right side brings the rope's along."""
    row = (page * PAGE + block * part.shape[0] % PAGE).to(gl.int32)
    half: gl.constexpr = part.shape[1]
    if SIDE == 0:
        mbarrier.expect(ready, latent_blocks.block_type.nbytes)
    else:
        mbarrier.expect(ready, latent_blocks.block_type.nbytes + rope_blocks.block_type.nbytes)
        tma.async_copy_global_to_shared(rope_blocks, [row, 2 * half], ready, rope)
    tma.async_copy_global_to_shared(latent_blocks, [row, SIDE * half], ready, part)


@gluon.jit
def _score(shared, block_ready, SIDE: gl.constexpr, SCORES: gl.constexpr):
    """Start the scores of this side's block as its halves arrive: three groups of products."""
    q_left, q_right, q_rope, left, right, rope = shared[:6]
    left_ready, right_ready = shared[10:12]
    scores = gl.full([q_left.shape[0], left.shape[1]], 0.0, gl.float32, SCORES)
    mbarrier.wait(left_ready.index(SIDE), block_ready)
    scores = warpgroup_mma(q_left, left.index(SIDE).permute((1, 0)), scores, use_acc=False, is_async=True)
    mbarrier.wait(right_ready.index(SIDE), block_ready)
    scores = warpgroup_mma(q_right, right.index(SIDE).permute((1, 0)), scores, is_async=True)
    return warpgroup_mma(q_rope, rope.index(SIDE).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _multiply(weights, part, result, keep, RESULT: gl.constexpr):
    """Start this side's products of a block with its probabilities, in shared memory or in registers."""
    result = result * gl.convert_layout(keep, gl.SliceLayout(1, RESULT))[:, None]
    return warpgroup_mma(weights, part, result, is_async=True)


@gluon.jit
def _other_s(
    shared, part, ready, place, result, block, phase, TREE: gl.constexpr, OTHER: gl.constexpr, RESULT: gl.constexpr,
    ROW: gl.constexpr,
):  # fmt: skip
    """Start the products of a block that the other side has scored: (products, maximum, sum) with it."""
    weights, tops, masses, keeps = shared[6:10]
    whole, length, context, offset, count, union = place
    mbarrier.wait(shared[12].index(OTHER), phase)
    mbarrier.wait(ready.index(OTHER), phase)
    if _has_gaps(block, whole, length, part.shape[1], TREE):
        _blank(part.index(OTHER), length, context, offset, count, union, block, TREE)
    top, mass, keep = tops.index(OTHER).load(ROW), masses.index(OTHER).load(ROW), keeps.index(OTHER).load(ROW)
    return _multiply(weights, part.index(OTHER), result, keep, RESULT), top, mass


@gluon.jit
def _own(
    shared, part, place, rows, scores, result, top, mass, block, scale, TREE: gl.constexpr, SIDE: gl.constexpr,
    SCORES: gl.constexpr, RESULT: gl.constexpr,
):  # fmt: skip
    """From the scores of this side's block: tell the other side, and take the block in: (result, maximum, sum)."""
    weights, tops, masses, keeps = shared[6:10]
    whole, length, context, offset, count, union = place
    own, live, masks = rows
    p, top, keep = _softmax(
        scores, top, block, whole, context, offset, own, live, masks, scale, part.shape[1], TREE, SCORES
    )
    mass = mass * keep + gl.sum(p, 1)
    p = p.to(part.dtype)
    weights.store(p)
    tops.index(SIDE).store(top)
    masses.index(SIDE).store(mass)
    keeps.index(SIDE).store(keep)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(shared[12].index(SIDE), count=1)
    if _has_gaps(block, whole, length, part.shape[1], TREE):
        _blank(part.index(SIDE), length, context, offset, count, union, block, TREE)
    p = gl.convert_layout(p, gl.DotOperandLayout(0, RESULT, 2))  # the other side may soon overwrite what was stored
    products = _multiply(p, part.index(SIDE), result, keep, RESULT)
    return warpgroup_mma_wait(0, deps=[products]), top, mass


@gluon.jit
def _take(
    copies, shared, part, ready, table, first, number, place, rows, result, mine, others, scale, PAGE: gl.constexpr,
    TREE: gl.constexpr, SIDE: gl.constexpr, SCORES: gl.constexpr, RESULT: gl.constexpr,
):  # fmt: skip
    """All blocks of a request's share, whose first two are on their way: (result, maximum, sum)."""
    OTHER: gl.constexpr = 1 - SIDE
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    BLOCK: gl.constexpr = part.shape[1]
    latent_blocks, rope_blocks = copies[2:]
    rope = shared[5]
    last = first + number
    top = gl.full([shared[0].shape[0]], float("-inf"), gl.float32, ROW)
    mass = gl.full([shared[0].shape[0]], 0.0, gl.float32, ROW)
    if SIDE == 0:
        page = gl.load(table + gl.minimum(first + 2, last - 1) * BLOCK // PAGE)
        scores = warpgroup_mma_wait(0, deps=[_score(shared, mine % 2, SIDE, SCORES)])
        result, top, mass = _own(
            shared, part, place, rows, scores, result, top, mass, first, scale, TREE, SIDE, SCORES, RESULT
        )
        gl.thread_barrier()
        if number > 2:
            _copy(latent_blocks, rope_blocks, part.index(0), rope.index(0), ready.index(0), page, first + 2, PAGE, SIDE)
    for turn in range(OTHER, (number + OTHER) // 2):
        block = first + 2 * turn + SIDE
        page = gl.load(table + gl.minimum(block + 1, last - 1) * BLOCK // PAGE)
        later = gl.load(table + gl.minimum(block + 2, last - 1) * BLOCK // PAGE)
        phase = (others + turn - OTHER) % 2
        products, top, mass = _other_s(shared, part, ready, place, result, block - 1, phase, TREE, OTHER, RESULT, ROW)
        started = _score(shared, (mine + turn) % 2, SIDE, SCORES)
        result = warpgroup_mma_wait(3, deps=[products])
        gl.thread_barrier()  # this side's products of the block before are done: its columns there are free
        if block + 1 < last:
            _copy(
                latent_blocks, rope_blocks, part.index(OTHER), rope.index(OTHER), ready.index(OTHER), page, block + 1,
                PAGE, SIDE,
            )  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=[started])
        result, top, mass = _own(
            shared, part, place, rows, scores, result, top, mass, block, scale, TREE, SIDE, SCORES, RESULT
        )
        gl.thread_barrier()
        if block + 2 < last:
            _copy(
                latent_blocks, rope_blocks, part.index(SIDE), rope.index(SIDE), ready.index(SIDE), later, block + 2,
                PAGE, SIDE,
            )  # fmt: skip
    if number % 2 == SIDE:  # the other side has scored the last block
        phase = (others + (number - 1) // 2) % 2
        products, top, mass = _other_s(shared, part, ready, place, result, last - 1, phase, TREE, OTHER, RESULT, ROW)
        result = warpgroup_mma_wait(0, deps=[products])
    return result, top, mass


@gluon.jit
def _begin(
    copies, shared, part, ready, table, first, number, row, served, PAGE: gl.constexpr, SIDE: gl.constexpr
):  # fmt: skip
    """Start copying this side's columns of a request's first two blocks, and on the left its queries."""
    q_blocks, q_rope_blocks, latent_blocks, rope_blocks = copies
    q_left, q_right, q_rope, _, _, rope = shared[:6]
    q_ready, over = shared[13:]
    HALF: gl.constexpr = part.shape[2]
    BLOCK: gl.constexpr = part.shape[1]
    gl.thread_barrier()  # every warp of this side is done with the buffers
    if SIDE == 0:
        if served > 0:
            mbarrier.wait(over, (served - 1) % 2)
        mbarrier.expect(q_ready, 2 * q_blocks.block_type.nbytes + q_rope_blocks.block_type.nbytes)
        tma.async_copy_global_to_shared(q_blocks, [row, 0], q_ready, q_left)
        tma.async_copy_global_to_shared(q_blocks, [row, HALF], q_ready, q_right)
        tma.async_copy_global_to_shared(q_rope_blocks, [row, 2 * HALF], q_ready, q_rope)
    page = gl.load(table + first * BLOCK // PAGE)
    later = gl.load(table + gl.minimum(first + 1, first + number - 1) * BLOCK // PAGE)
    _copy(latent_blocks, rope_blocks, part.index(0), rope.index(0), ready.index(0), page, first, PAGE, SIDE)
    if number > 1:
        _copy(latent_blocks, rope_blocks, part.index(1), rope.index(1), ready.index(1), later, first + 1, PAGE, SIDE)
    mbarrier.wait(q_ready, served % 2)


@gluon.jit
def _side(
    copies, shared, inputs, outputs, sizes,
    QUERIES: gl.constexpr, HEADS: gl.constexpr, PAGE: gl.constexpr, TREE: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """One warpgroup: scores blocks SIDE, SIDE + 2, ... of each request's share, and owns the columns of its side."""
    left, right = shared[3:5]
    left_ready, right_ready = shared[10:12]
    over = shared[14]
    pages_ptr, context_ptr, counts_ptr, ancestors_ptr, plan_ptr, splits_ptr = inputs
    out_ptr, partial_ptr, lse_ptr = outputs
    scale, offset, requests, parts, columns = sizes
    TILE: gl.constexpr = shared[0].shape[0]
    HALF: gl.constexpr = left.shape[2]
    RANK: gl.constexpr = 2 * HALF
    BLOCK: gl.constexpr = left.shape[1]
    PAIRS: gl.constexpr = QUERIES * HEADS
    OTHER: gl.constexpr = 1 - SIDE
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    part = left if SIDE == 0 else right
    ready = left_ready if SIDE == 0 else right_ready
    record = plan_ptr + gl.program_id(1) * 8
    begin_request = gl.maximum(gl.load(record), 0)
    end_request = gl.minimum(gl.load(record + 1), requests - 1)
    begin_block, end_block = gl.maximum(gl.load(record + 2), 0), gl.load(record + 3)
    begin_split = gl.load(record + 4)
    begin_is_split, end_is_split = gl.load(record + 5) != 0, gl.load(record + 6) != 0
    tile = gl.program_id(0) * TILE
    query_row = tile + gl.arange(0, TILE, ROW)
    query = query_row // HEADS
    inside = query_row < PAIRS
    served = gl.to_tensor(0)  # requests with blocks, for the phases of q's barriers
    mine = gl.to_tensor(0)  # blocks that went through the buffer of this side's own blocks
    others = gl.to_tensor(0)  # and through the other
    for request in range(begin_request, end_request + 1):
        context = gl.load(context_ptr + request).to(gl.int32)
        count = gl.load(counts_ptr + request).to(gl.int32)
        length = gl.where(count > 0, context + offset + count, 0)
        blocks = (length + BLOCK - 1) // BLOCK
        begins, ends = request == begin_request, request == end_request
        first = gl.where(begins, begin_block, 0)
        number = gl.where(ends, gl.minimum(blocks, end_block), blocks) - first
        table = pages_ptr + request * columns
        live = inside & (query < count)
        masks = gl.full([TILE], 0, gl.int64, ROW)
        union = gl.to_tensor(0).to(gl.int64)
        if TREE:
            masks = gl.load(ancestors_ptr + request * QUERIES + query, mask=live, other=0)
            for t in gl.static_range(QUERIES):
                union = union | gl.load(ancestors_ptr + request * QUERIES + t, mask=count > t, other=0)
        top = gl.full([TILE], float("-inf"), gl.float32, ROW)
        mass = gl.full([TILE], 0.0, gl.float32, ROW)
        result = gl.full([TILE, HALF], 0.0, gl.float32, RESULT)
        if number > 0:
            place = (context // BLOCK, length, context, offset, count, union)
            rows = (context + offset + query, live, masks)
            _begin(copies, shared, part, ready, table, first, number, request * PAIRS + tile, served, PAGE, SIDE)
            result, top, mass = _take(
                copies, shared, part, ready, table, first, number, place, rows, result, mine, others, scale, PAGE,
                TREE, SIDE, SCORES, RESULT,
            )  # fmt: skip
            if SIDE == 1:
                gl.thread_barrier()
                mbarrier.arrive(over, count=1)
            served += 1
            mine += (number + OTHER) // 2
            others += (number + SIDE) // 2
        live = live & (mass > 0)
        mass = gl.where(live, mass, 1.0)
        factor = gl.convert_layout(gl.where(live, 1 / mass, 0.0), gl.SliceLayout(1, RESULT))
        result = result * factor[:, None]
        at = tile + gl.arange(0, TILE, gl.SliceLayout(1, RESULT))
        stored = (at < PAIRS)[:, None]
        rank = SIDE * HALF + gl.arange(0, HALF, gl.SliceLayout(0, RESULT))[None, :]
        if (begins & begin_is_split) | (ends & end_is_split):
            split = gl.load(splits_ptr + request) + gl.where(begins, begin_split, 0)
            split = gl.minimum(gl.maximum(split, 0), requests + parts - 1).to(gl.int64)
            gl.store(partial_ptr + (split * PAIRS + at)[:, None] * RANK + rank, result, mask=stored)
            if SIDE == 0:
                lse = gl.where(live, top + gl.log2(mass), float("-inf"))
                gl.store(lse_ptr + split * PAIRS + query_row, lse, mask=inside)
        else:
            at_out = (request * PAIRS + at).to(gl.int64)[:, None] * RANK + rank
            gl.store(out_ptr + at_out, result.to(out_ptr.dtype.element_ty), mask=stored)


@gluon.jit
def _idle():
    """The warps that set up the barriers: they give their registers to the two sides."""


@gluon.jit(do_not_specialize=["offset", "requests", "parts", "columns"])
def decode_kernel(
    q_blocks,  # descriptor of q [R * T * H, rank + rope] in [ROWS, rank / 2]
    q_rope_blocks,  # and [ROWS, rope]
    latent_blocks,  # of the latents [slots, rank + rope] in [BLOCK, rank / 2]
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
    HALF: gl.constexpr = q_blocks.block_type.shape[1]
    ROPE: gl.constexpr = q_rope_blocks.block_type.shape[1]
    BLOCK: gl.constexpr = latent_blocks.block_type.shape[0]
    DTYPE: gl.constexpr = latent_blocks.dtype
    q_left = gl.allocate_shared_memory(DTYPE, [TILE, HALF], q_blocks.layout)
    q_right = gl.allocate_shared_memory(DTYPE, [TILE, HALF], q_blocks.layout)
    q_rope = gl.allocate_shared_memory(DTYPE, [TILE, ROPE], q_rope_blocks.layout)
    left = gl.allocate_shared_memory(DTYPE, [2, BLOCK, HALF], latent_blocks.layout)
    right = gl.allocate_shared_memory(DTYPE, [2, BLOCK, HALF], latent_blocks.layout)
    rope = gl.allocate_shared_memory(DTYPE, [2, BLOCK, ROPE], rope_blocks.layout)
    weights = gl.allocate_shared_memory(DTYPE, [TILE, BLOCK], gl.NVMMASharedLayout(128, 16, 2))
    tops = gl.allocate_shared_memory(gl.float32, [2, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    masses = gl.allocate_shared_memory(gl.float32, [2, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    keeps = gl.allocate_shared_memory(gl.float32, [2, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    left_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    right_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    over = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(left_ready.index(buffer), count=1)
        mbarrier.init(right_ready.index(buffer), count=1)
        mbarrier.init(scored.index(buffer), count=1)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(over, count=1)
    fence_async_shared()
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    copies = (q_blocks, q_rope_blocks, latent_blocks, rope_blocks)
    shared = (
        q_left, q_right, q_rope, left, right, rope, weights, tops, masses, keeps,
        left_ready, right_ready, scored, q_ready, over,
    )  # fmt: skip
    inputs = (pages_ptr, context_ptr, counts_ptr, ancestors_ptr, plan_ptr, splits_ptr)
    outputs = (out_ptr, partial_ptr, lse_ptr)
    sizes = (scale, offset, requests, parts, columns)
    gl.warp_specialize(
        [
            (_idle, ()),
            (_side, (copies, shared, inputs, outputs, sizes, QUERIES, HEADS, PAGE, TREE, LEFT)),
            (_side, (copies, shared, inputs, outputs, sizes, QUERIES, HEADS, PAGE, TREE, RIGHT)),
        ],
        [4, 4],
        [240, 240],
    )


def launch(
    batch: Batch, plan: Splits, q: Tensor, latents: Tensor, page_size: int, scale: float,
    out: Tensor, partial: Tensor, lse: Tensor, chained: bool = False,
) -> None:  # fmt: skip
    """One pass over contiguous q [R, T, H, rank + rope]; fills out [R, T, H, rank] and the partial results."""
    requests, queries, heads, dim = q.shape
    half, parts = out.shape[-1] // 2, plan.plan.shape[0]
    layout = gl.NVMMASharedLayout(128, 16, 2)

    def blocks(of: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(of, [rows, columns], layout)

    pairs = q.view(-1, dim)
    decode_kernel[(triton.cdiv(queries * heads, ROWS), parts)](
        blocks(pairs, ROWS, half), blocks(pairs, ROWS, ROPE),
        blocks(latents, BLOCK, half), blocks(latents, BLOCK, ROPE),
        batch.pages, batch.context, batch.counts, batch.context if batch.ancestors is None else batch.ancestors,
        plan.plan, plan.splits, out, partial, lse, scale * LOG2E, batch.offset, requests, parts, batch.pages.shape[1],
        QUERIES=queries, HEADS=heads, PAGE=page_size, TREE=batch.ancestors is not None, CHAINED=chained,
        num_warps=WARPS, **pdl(chained),
    )  # fmt: skip
