"""Triton kernels of grouped-query attention in one fixed order: a query's bits follow from its own path alone.

Owns: device code and its launches. Must never know plans or models.

A query's path is the context, then its ancestors from the root down, then itself; index i of a path lies at slot i of
the row's pages where i is below the context, and at the slot of the path's node otherwise. Splits and
blocks end at fixed indices of the path, whatever the length of the row, the shape of the draft or the
other queries of the pass; tiles are of one size, so every pass takes the same matrix instruction. What a query does not
see adds zeros to its sums, which changes nothing. Nothing is left to the compiler to fuse, for variants of a kernel
that fuse differently round differently.

Below the context all queries of a tile share the blocks they read. Above it a tree's queries have different keys at one
index: each walks its own last blocks, with the other queries of the tile masked out.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from target.batch import Batch
from target.kernels.gqa import LOG2E, _absorb, _ones, _pad, _shared_memory, packed

FAR = tl.constexpr(0x3FFFFFFF)
# a layer is served by as few variants as possible, so that it is known beforehand whether all of them compile
LENGTHS = ("pages_ptr", "context_ptr", "counts_ptr", "masks_ptr")
PAIRS = 64  # (query, head) pairs of a tile: what wgmma takes at least
SPAN, NEAR, FAR_SPAN = 256, 8192, 2048  # tokens of a split up to index NEAR, and of those after
CHUNK = 16  # splits that are joined at a time
SLICE_TOKENS = 256  # queries of a launch, rows together: bounds the memory of partial results


@triton.jit
def _nth_node(mask, wanted):
    """The `wanted`-th set bit of a path's mask, counted from the root's 0: [N] int32; 0 where there is none."""
    bit = tl.arange(0, 64)
    one = tl.full([64], 1, tl.uint64)
    below = _ones(mask & ((one << bit.to(tl.uint64)) - 1))
    there = ((mask >> bit.to(tl.uint64)) & 1) != 0
    return tl.sum(tl.where(there[None, :] & (below[None, :] == wanted[:, None]), bit[None, :], 0), 1)


@triton.jit
def _begin(split, SPAN: tl.constexpr, NEAR: tl.constexpr, FAR_SPAN: tl.constexpr):
    """The first index of a split."""
    return tl.minimum(split, NEAR // SPAN) * SPAN + tl.maximum(split - NEAR // SPAN, 0) * FAR_SPAN


@triton.jit
def _split_of(index, SPAN: tl.constexpr, NEAR: tl.constexpr, FAR_SPAN: tl.constexpr):
    """The split that an index lies in."""
    return tl.minimum(index, NEAR) // SPAN + tl.maximum(index - NEAR, 0) // FAR_SPAN


@triton.jit
def _path(request, query, used, context, offset, masks_ptr, mask_row, mask_column, TREE: tl.constexpr):
    """A query's mask of nodes, its own included, and its index on its path; of queries that are not used -1."""
    node = offset + query
    mask = node.to(tl.uint64) * 0
    own = context + node
    if TREE:
        mask = tl.load(masks_ptr + request * mask_row + query * mask_column, mask=used, other=0).to(tl.uint64)
        mask = mask | (((node * 0 + 1).to(tl.uint64)) << node.to(tl.uint64))
        own = context + _ones(mask) - 1
    return mask, tl.where(used, own, -1)


@triton.jit(
    do_not_specialize=[
        "offset", "window", "bound", "first", "after", "queries", "q_row", "q_token", "page_row", "mask_row",
        "mask_column", *LENGTHS,
    ]
)  # fmt: skip
def split_kernel(
    q_ptr,  # [R, T, heads * dim], rows and tokens whole heads apart
    store_ptr,  # [slots, 2, kv_heads * dim]
    pages_ptr,  # [R, columns] int64
    context_ptr,  # [R] int64
    counts_ptr,  # [R] int64
    masks_ptr,  # [R, T] int64, where TREE
    out_ptr,  # [R, T, heads, dim]
    partial_ptr,  # [R, after - first, heads, bound, dim] float32
    lse_ptr,  # [R, after - first, heads, bound] float32, base 2
    scale,
    offset,
    window,
    bound,
    first,
    after,
    queries,
    q_row,  # in heads
    q_token,
    page_row,
    mask_row,
    mask_column,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    NEAR: tl.constexpr,
    FAR_SPAN: tl.constexpr,
    TILE: tl.constexpr,
    TREE: tl.constexpr,
    WINDOWED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split of the paths of queries first..after for one tile of one kv head."""
    SIZE: tl.constexpr = KV_HEADS * DIM
    request, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    split = tl.program_id(2)
    context, count = tl.load(context_ptr + request).to(tl.int32), tl.load(counts_ptr + request).to(tl.int32)
    pair = tl.program_id(0) * TILE + tl.arange(0, TILE)
    query = first + pair // GROUPS
    inside = query < after
    live = inside & (query < count)
    _, own = _path(request, query, live, context, offset, masks_ptr, mask_row, mask_column, TREE)
    start, stop = _begin(split, SPAN, NEAR, FAR_SPAN), _begin(split + 1, SPAN, NEAR, FAR_SPAN)
    end = tl.minimum(stop, tl.max(own, 0) + 1)
    if (split > 0) & (start >= end):
        return
    begin = start // BLOCK
    shared = (context if TREE else end) // BLOCK  # blocks below the first that queries have for themselves
    whole = tl.minimum(tl.min(tl.where(live, own, FAR), 0) + 1, context if TREE else FAR) // BLOCK
    if WINDOWED:
        lowest = tl.min(tl.where(live, tl.maximum(own + 1 - window, 0), FAR), 0)
        begin = tl.maximum(begin, lowest // BLOCK)
        whole = begin
    last = (end + BLOCK - 1) // BLOCK
    if not TREE:
        shared = last
    whole, shared = tl.minimum(whole, last), tl.minimum(shared, last)
    column = tl.arange(0, DIM_PAD)[None, :]
    head = request.to(tl.int64) * q_row + query.to(tl.int64) * q_token + kv_head * GROUPS + pair % GROUPS
    q = tl.load(q_ptr + head[:, None] * DIM + column, mask=live[:, None] & (column < DIM), other=0.0)
    table = pages_ptr + request * page_row
    keys_ptr = store_ptr + kv_head * DIM
    acc = tl.zeros([TILE, DIM_PAD], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    if not WINDOWED:  # as a loop of no blocks its pipeline would leave a wait for nothing, on which ptxas crashes
        for block in tl.range(begin, whole, num_stages=STAGES):
            index = block * BLOCK + tl.arange(0, BLOCK)
            slots = tl.load(table + index // PAGE) * PAGE + index % PAGE
            at = keys_ptr + slots[:, None] * (2 * SIZE) + column
            keys = tl.load(at, mask=column < DIM, other=0.0)
            values = tl.load(at + SIZE, mask=column < DIM, other=0.0)
            acc, top, mass = _absorb(q, keys, values, live, acc, top, mass, scale, False)
    for block in tl.range(tl.maximum(begin, whole), shared, num_stages=1):
        index = block * BLOCK + tl.arange(0, BLOCK)
        seen = index[None, :] <= own[:, None]
        if WINDOWED:
            seen = seen & (index[None, :] > own[:, None] - window)
        used = tl.max(seen.to(tl.int32), 0) > 0
        slots = tl.load(table + index // PAGE, mask=used, other=0) * PAGE + index % PAGE
        at = keys_ptr + slots[:, None] * (2 * SIZE) + column
        keys = tl.load(at, mask=used[:, None] & (column < DIM), other=0.0)
        values = tl.load(at + SIZE, mask=used[:, None] & (column < DIM), other=0.0)
        acc, top, mass = _absorb(q, keys, values, seen, acc, top, mass, scale, True)
    if TREE:
        least = first + tl.program_id(0) * TILE // GROUPS
        tail = tl.minimum(first + (tl.program_id(0) * TILE + TILE - 1) // GROUPS + 1, tl.minimum(after, count))
        for one in tl.range(least, tail, num_stages=1):
            mask, mine = _path(
                request, one, one < count, context, offset, masks_ptr, mask_row, mask_column, TREE
            )  # fmt: skip
            until = tl.minimum(stop, mine + 1)
            for block in tl.range(tl.maximum(begin, shared), (until + BLOCK - 1) // BLOCK, num_stages=1):
                index = block * BLOCK + tl.arange(0, BLOCK)
                used = index <= mine
                if WINDOWED:
                    used = used & (index > mine - window)
                node = _nth_node(mask, index - context)
                stored = tl.where(index < context, index, context + node)
                slots = tl.load(table + stored // PAGE, mask=used, other=0) * PAGE + stored % PAGE
                at = keys_ptr + slots[:, None] * (2 * SIZE) + column
                keys = tl.load(at, mask=used[:, None] & (column < DIM), other=0.0)
                values = tl.load(at + SIZE, mask=used[:, None] & (column < DIM), other=0.0)
                seen = used[None, :] & (query == one)[:, None]
                acc, top, mass = _absorb(q, keys, values, seen, acc, top, mass, scale, True)
    found = live & (mass > 0)
    mass = tl.where(found, mass, 1.0)
    result = tl.where(found[:, None], acc / mass[:, None], 0.0)
    head_number = kv_head * GROUPS + pair % GROUPS
    number = (request * queries + query).to(tl.int64) * (KV_HEADS * GROUPS) + head_number
    alone = own < SPAN  # paths of one split are complete
    tl.store(
        out_ptr + number[:, None] * DIM + column,
        result.to(out_ptr.dtype.element_ty),
        mask=(inside & alone & (split == 0))[:, None] & (column < DIM),
    )
    part = inside & (own >= tl.maximum(start, SPAN))
    number = (request * (after - first) + query - first).to(tl.int64) * (KV_HEADS * GROUPS) + head_number
    number = number * bound + split
    tl.store(partial_ptr + number[:, None] * DIM + column, result, mask=part[:, None] & (column < DIM))
    tl.store(lse_ptr + number, tl.where(found, top + tl.log2(mass), float("-inf")), mask=part)


@triton.jit(
    do_not_specialize=["offset", "bound", "first", "after", "queries", "mask_row", "mask_column", *LENGTHS[1:]]
)  # fmt: skip
def combine_kernel(
    partial_ptr,  # [R, after - first, heads, bound, dim] float32
    lse_ptr,  # [R, after - first, heads, bound] float32, base 2
    context_ptr,  # [R] int64
    counts_ptr,  # [R] int64
    masks_ptr,  # [R, T] int64, where TREE
    out_ptr,  # [R, T, heads, dim]
    offset,
    bound,
    first,
    after,
    queries,
    mask_row,
    mask_column,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPAN: tl.constexpr,
    NEAR: tl.constexpr,
    FAR_SPAN: tl.constexpr,
    EACH: tl.constexpr,
    TREE: tl.constexpr,
):
    """Join the splits of one (query, head) pair, EACH at a time and in order; paths of one split are complete."""
    number = tl.program_id(0)
    token, head = number // HEADS, number % HEADS
    request, query = token // (after - first), first + token % (after - first)
    context = tl.load(context_ptr + request).to(tl.int32)
    used = query < tl.load(counts_ptr + request).to(tl.int32)
    _, own = _path(request, query, used, context, offset, masks_ptr, mask_row, mask_column, TREE)
    if own < SPAN:
        return
    splits = _split_of(own, SPAN, NEAR, FAR_SPAN) + 1
    at = number.to(tl.int64) * bound
    place = tl.arange(0, EACH)
    column = tl.arange(0, DIM_PAD)
    top = float("-inf")
    for begin in tl.range(0, splits, EACH):
        lse = tl.load(lse_ptr + at + begin + place, mask=begin + place < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse, 0))
    mass = 0.0
    acc = tl.zeros([DIM_PAD], tl.float32)
    for begin in tl.range(0, splits, EACH):
        lse = tl.load(lse_ptr + at + begin + place, mask=begin + place < splits, other=float("-inf"))
        found = lse > float("-inf")
        weights = tl.where(found, tl.exp2(lse - top), 0.0)
        values_at = partial_ptr + (at + begin + place)[:, None] * DIM + column[None, :]
        values = tl.load(values_at, mask=found[:, None] & (column < DIM)[None, :], other=0.0)
        mass += tl.sum(weights, 0)
        acc += tl.sum(values * weights[:, None], 0)
    out_at = out_ptr + ((request * queries + query).to(tl.int64) * HEADS + head) * DIM + column
    tl.store(out_at, (acc / mass).to(out_ptr.dtype.element_ty), mask=column < DIM)


def launch_attend(batch: Batch, q: Tensor, store: Tensor, page_size: int, window: int | None) -> Tensor:
    """q [R, T, heads, dim] over a layer's storage [slots, 2, kv_heads, dim] -> [R, T, heads, dim], of q's type.

    The pass's own keys and values are stored already. Padding gives zeros.
    """
    q = _whole_heads(packed(q))
    rows, queries = q.shape[:2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    step = max(1, SLICE_TOKENS // rows)
    for first in range(0, queries, step):
        _launch_slice(batch, q, store, out, page_size, window, first, min(first + step, queries))
    return out


def _launch_slice(
    batch: Batch, q: Tensor, store: Tensor, out: Tensor, page_size: int, window: int | None, first: int, after: int,
) -> None:  # fmt: skip
    rows, queries, heads, dim = q.shape
    kv_heads, bound, tree = store.shape[2], splits_below(batch.longest), batch.ancestors is not None
    some = (rows, after - first, heads, bound) if bound > 1 else (0,)
    partial = torch.empty(*some, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(some, dtype=torch.float32, device=q.device)
    masks = batch.positions if batch.ancestors is None else batch.ancestors
    numbers = (batch.offset, bound, first, after, queries)
    grid = (triton.cdiv((after - first) * (heads // kv_heads), PAIRS), rows * kv_heads, bound)
    split_kernel[grid](
        q, store, batch.pages, batch.context, batch.counts, masks, out, partial, lse, dim**-0.5 * LOG2E,
        batch.offset, window or 0, *numbers[1:], q.stride(0) // dim, q.stride(1) // dim, batch.pages.stride(0),
        *masks.stride(), **_split_constants(heads, store, page_size, tree, window is not None),
    )  # fmt: skip
    if bound > 1:
        combine_kernel[(rows * (after - first) * heads,)](
            partial, lse, batch.context, batch.counts, masks, out, *numbers, *masks.stride(),
            **_combine_constants(heads, dim, tree),
        )  # fmt: skip


def compile_all(heads: int, store: Tensor, page_size: int, windowed: bool) -> None:
    """Compile whatever launches over a layer's storage may need, and run nothing. What the compiler raises, it raises.

    OutOfResources where a program needs more shared memory than the device of `store` has.
    Passes with and without a tree must both have their kernels, or one of them would round unlike the other.
    """
    dtype, dim, lengths, sums = store.dtype, store.shape[3], [torch.int64] * 4, [torch.float32] * 2
    for tree in (False, True):
        split = split_kernel.warmup(
            dtype, dtype, *lengths, dtype, *sums, dim**-0.5 * LOG2E, *[0] * 11,
            **_split_constants(heads, store, page_size, tree, windowed), grid=(1,),
        )  # fmt: skip
        if split is not None and split.metadata.shared > _shared_memory(store.device):  # interpreted there is none
            raise triton.OutOfResources(split.metadata.shared, _shared_memory(store.device), "shared memory")
        combine_kernel.warmup(
            *sums, *lengths[1:], dtype, *[0] * 7, **_combine_constants(heads, dim, tree), grid=(1,)
        )  # fmt: skip


def _split_constants(heads: int, store: Tensor, page_size: int, tree: bool, windowed: bool) -> dict[str, Any]:
    kv_heads, dim, size = store.shape[2], store.shape[3], store.element_size()
    return dict(
        KV_HEADS=kv_heads, GROUPS=heads // kv_heads, PAGE=page_size, BLOCK=64 if size == 2 else 32, TILE=PAIRS,
        WINDOWED=windowed, STAGES=_stages(_pad(dim), size), num_warps=4 if _pad(dim) <= 128 else 8,
        **_constants(dim, tree),
    )  # fmt: skip


def _combine_constants(heads: int, dim: int, tree: bool) -> dict[str, Any]:
    return dict(HEADS=heads, EACH=CHUNK, num_warps=4, **_constants(dim, tree))


def _constants(dim: int, tree: bool) -> dict[str, Any]:
    return dict(
        DIM=dim, DIM_PAD=_pad(dim), SPAN=SPAN, NEAR=NEAR, FAR_SPAN=FAR_SPAN, TREE=tree, enable_fp_fusion=False
    )  # fmt: skip


def splits_below(length: int) -> int:
    """How many splits a path of `length` tokens has."""
    return int(triton.cdiv(min(length, NEAR), SPAN) + triton.cdiv(max(length - NEAR, 0), FAR_SPAN))


def _stages(dim_pad: int, itemsize: int) -> int:
    """The page number of a block is a load of its own, so the compiler gives each of the two half of the stages."""
    return 5 if dim_pad * itemsize <= 256 else 3 if itemsize == 2 else 1


def _whole_heads(q: Tensor) -> Tensor:
    """q with rows and tokens a whole number of heads apart."""
    return q.contiguous() if any(step % q.shape[3] for step in q.stride()[:2]) else q
