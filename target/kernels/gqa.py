"""Triton kernels of grouped-query attention over the paged cache: storing keys and values, and the split-KV pass.

Owns: device code, its launches and their configurations. Must never know plans or models.

A tile is BLOCK_M (query, head) pairs of one request and kv head, numbered query * groups + group; a block is BLOCK
cached tokens. How a request is split, and that the other requests of a batch change no bit of its result, is
`target.kernels.gqa_splits`. The grid is as large as the host's bound on lengths asks for; a run of splits that does not
exist ends at once.

The run of a tile that arrives last joins them all, in their order, or a kernel of its own does. FRESH passes read a
whole qkv product: a program norms and rotates its queries as it reads them, and stores those of the pass's own tokens
that it is about to see, so nothing runs between the product and attention.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from target.attention.base import Turn
from target.batch import Batch
from target.kernels.dependent import dependent, settled
from target.kernels.gqa_splits import FAR, SPECIAL, Cut, combine_kernel, cut, fold, join, leave, room, row_splits
from target.kernels.rope_write import turn_constants, turn_pointers, turned

LOG2E = 1.4426950408889634
LARGEST_DIM = 256
STRIDES = ("page_row", "ancestor_row", "ancestor_column", "position_row", "position_column")
JOINED_ROWS = 16  # of tiles whose last program joins; of larger ones it was 10 to 25 % slower than a kernel of its own
MOST_EACH = 16  # of a pass's own tokens that a program stores at once
SPLIT_QUERIES = 64  # tokens; longer passes have tiles enough to fill a device without splits


@triton.jit(do_not_specialize=["offset", "page_row"])
def store_kernel(
    k_ptr,  # [R, T, kv_heads * dim], any strides in R and T
    v_ptr,
    store_ptr,  # [slots, 2, kv_heads * dim]
    pages_ptr,  # [R, columns] int64
    context_ptr,  # [R] int64
    counts_ptr,  # [R] int64
    offset,
    page_row,
    k_row,
    k_token,
    v_row,
    v_token,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token's key and value, all heads; padding is not stored."""
    request, query = tl.program_id(0), tl.program_id(1)
    settled(PDL)
    if query < tl.load(counts_ptr + request):
        index = tl.load(context_ptr + request) + offset + query
        slot = tl.load(pages_ptr + request * page_row + index // PAGE) * PAGE + index % PAGE
        column = tl.arange(0, WIDTH)
        at = store_ptr + slot * 2 * SIZE + column
        row, token = request.to(tl.int64), query.to(tl.int64)
        key = tl.load(k_ptr + row * k_row + token * k_token + column, mask=column < SIZE)
        value = tl.load(v_ptr + row * v_row + token * v_token + column, mask=column < SIZE)
        tl.store(at, key, mask=column < SIZE)
        tl.store(at + SIZE, value, mask=column < SIZE)


@triton.jit
def _ones(bits):
    """How many bits of an uint64 are set."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (bits * 0x0101010101010101 >> 56).to(tl.int32)


@triton.jit
def _seen(index, own, near, masks, context, window, TREE: tl.constexpr, WINDOWED: tl.constexpr):
    """[BLOCK_M, BLOCK] bool, as `target.attention.sdpa.visible` has it; index [1, BLOCK], the others [BLOCK_M, 1]."""
    if TREE:
        node = index - context
        shift = tl.minimum(tl.maximum(node, 0), 63).to(tl.uint64)
        path = ((node >= 0) & (node < 64) & (((masks >> shift) & 1) != 0)) | (index == own)
        seen = path | (node < 0)
        if WINDOWED:  # a drafted node lies as far back as there are nodes of the path after it
            own_node = own - context
            one = tl.full(own_node.shape, 1, tl.uint64)
            own_bit = tl.where(own_node < 64, one << tl.minimum(own_node, 63).to(tl.uint64), 0)
            below = _ones((masks | own_bit) >> shift) - 1 + (own_node >= 64).to(tl.int32)
            below = tl.where(index == own, 0, below)
            seen = seen & tl.where(node < 0, index >= near, below < window)
    else:
        seen = index <= own
        if WINDOWED:
            seen = seen & (index >= near)
    return seen


@triton.jit
def _absorb(q, keys, values, seen, acc, top, mass, scale, MASKED: tl.constexpr):
    """Take one block into the running softmax: base 2, float32. A block seen in full gives the same bits masked."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1) * scale)
    base = new
    if MASKED:  # a pair that has seen nothing yet: exp(-inf - -inf) would be NaN
        base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2(top - base)
    weights = tl.exp2(tl.fma(scores, scale, -base[:, None]))  # said outright: fusing is not left to the compiler
    mass = tl.fma(mass, keep, tl.sum(weights, 1))
    acc = tl.dot(weights.to(values.dtype), values, acc * keep[:, None], input_precision="ieee")
    return acc, new, mass


@triton.jit
def _absorb_masked(
    block, q, acc, top, mass, scale, keys_ptr, table, own, near, masks, live, context, window,
    SIZE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    TREE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """A block that some queries of the tile see in part; what none of them sees is not read."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    seen = _seen(index[None, :], own, near, masks, context, window, TREE, WINDOWED) & live[:, None]
    used = tl.max(seen.to(tl.int32), 0) > 0
    slots = tl.load(table + index // PAGE, mask=used, other=0) * PAGE + index % PAGE
    column = tl.arange(0, DIM_PAD)[None, :]
    at = keys_ptr + slots[:, None] * (2 * SIZE) + column
    inside = used[:, None] & (column < DIM)
    keys = tl.load(at, mask=inside, other=0.0)
    values = tl.load(at + SIZE, mask=inside, other=0.0)
    return _absorb(q, keys, values, seen, acc, top, mass, scale, True)


@triton.jit
def _keep(
    begin, end, request, queries, start, keys_ptr, table, own_ptr, own_token, cos_ptr, sin_ptr, weight_ptr, eps,
    SIZE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, ROTARY: tl.constexpr,
    PAIRS: tl.constexpr, NORMED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Store the pass's own tokens `begin` to `end`, from the qkv product, their keys normed and rotated."""
    column = tl.arange(0, DIM_PAD)[None, :]
    for first in range(begin, end, EACH):
        query = first + tl.arange(0, EACH)
        used = (query < end)[:, None]
        index = start + query
        slots = tl.load(table + index // PAGE, mask=query < end, other=0) * PAGE + index % PAGE
        head = own_ptr + query.to(tl.int64)[:, None] * own_token
        token = (request.to(tl.int64) * queries + query)[:, None]
        keys = turned(head, token, used, cos_ptr, sin_ptr, weight_ptr, eps, DIM, DIM_PAD, ROTARY, PAIRS, NORMED)
        inside = used & (column < DIM)
        values = tl.load(head + SIZE + column, mask=inside, other=0.0)
        at = keys_ptr + slots[:, None] * (2 * SIZE) + column
        tl.store(at, keys, mask=inside)
        tl.store(at + SIZE, values, mask=inside)


@triton.jit
def _read_split(
    begin, end, clear, whole, low, q, scale, tiles, keys_ptr, table, kv_head, own, near, masks, live, context, window,
    SIZE: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, TREE: tl.constexpr, WINDOWED: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Running softmax over the blocks of one split, [begin, end): values, largest score and mass.

    No query of the tile sees a block before `low`; every query sees those from `clear` to `whole` in full.
    """
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    column = tl.arange(0, DIM_PAD)[None, :]
    head = begin
    if WINDOWED:
        begin = tl.maximum(begin, low)
        head = tl.minimum(tl.maximum(begin, clear), tl.maximum(end, begin))
        for block in tl.range(begin, head, num_stages=1):
            acc, top, mass = _absorb_masked(
                block, q, acc, top, mass, scale, keys_ptr, table, own[:, None], near[:, None], masks[:, None], live,
                context, window, SIZE, DIM, DIM_PAD, PAGE, BLOCK, TREE, WINDOWED,
            )  # fmt: skip
    whole = tl.maximum(head, tl.minimum(whole, end))
    # the page number of a block is a load of its own, so the compiler gives each of the two half of the stages
    for block in tl.range(head, whole, num_stages=STAGES):
        if TMA:
            slot = (tl.load(table + block * BLOCK // PAGE) * PAGE + block * BLOCK % PAGE).to(tl.int32)
            keys = tiles.load([slot, kv_head * DIM])
            values = tiles.load([slot, SIZE + kv_head * DIM])
        else:
            index = block * BLOCK + tl.arange(0, BLOCK)
            slots = tl.load(table + index // PAGE) * PAGE + index % PAGE
            at = keys_ptr + slots[:, None] * (2 * SIZE) + column
            keys = tl.load(at, mask=column < DIM, other=0.0)
            values = tl.load(at + SIZE, mask=column < DIM, other=0.0)
        acc, top, mass = _absorb(q, keys, values, live, acc, top, mass, scale, False)
    for block in tl.range(whole, end, num_stages=1):
        acc, top, mass = _absorb_masked(
            block, q, acc, top, mass, scale, keys_ptr, table, own[:, None], near[:, None], masks[:, None], live,
            context, window, SIZE, DIM, DIM_PAD, PAGE, BLOCK, TREE, WINDOWED,
        )  # fmt: skip
    return acc, top, mass


@triton.jit(do_not_specialize=[*SPECIAL, *STRIDES])
def split_kernel(
    q_ptr,  # [R, T, heads * dim], any strides in R and T; where FRESH the qkv product [R, T, merged * dim]
    store_ptr,  # [slots, 2, kv_heads * dim]
    tiles,  # descriptor of the same in blocks [BLOCK, dim], where TMA
    pages_ptr,  # [R, columns] int64
    context_ptr,  # [R] int64
    counts_ptr,  # [R] int64
    ancestors_ptr,  # [R, T] int64, where TREE
    positions_ptr,  # [R, T] int64, where TREE and WINDOWED
    out_ptr,  # [R, T, heads, dim]
    partial_ptr,  # [R, T, heads, bound, dim] float32, unless LONE
    peaks_ptr,  # [R, T, heads, bound, 2] float32, unless LONE: largest score, base 2, and mass
    arrived_ptr,  # [R, kv_heads, tiles] int32, zero before and after, where JOINED
    cos_ptr,  # [R, T, ROTARY], where FRESH
    sin_ptr,
    q_weight_ptr,  # [dim], where NORMED
    k_weight_ptr,
    eps,
    scale,
    offset,
    window,
    bound,
    queries,
    q_row,
    q_token,
    page_row,
    ancestor_row,
    ancestor_column,
    position_row,
    position_column,
    shortest,
    parts,
    run_blocks,
    QUERIES_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
    TREE: tl.constexpr,
    WINDOWED: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    SPANNED: tl.constexpr,  # a program may take several splits
    LONE: tl.constexpr,  # no row is so long that a second program takes splits of it
    JOINED: tl.constexpr,
    FRESH: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    NORMED: tl.constexpr,
    EACH: tl.constexpr,
    PDL: tl.constexpr,
):
    """A run of splits of one request for one tile of one kv head.

    Blocks that every query of the tile sees in full are read through the pipeline; those at the edges are masked.
    """
    SIZE: tl.constexpr = KV_HEADS * DIM
    request, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    run = tl.program_id(2)
    settled(PDL)
    context, count, first, last, share, splits, span = row_splits(
        request, context_ptr, counts_ptr, positions_ptr, position_row, position_column, offset, window, queries,
        shortest, parts, run_blocks, QUERIES_PAD, BLOCK, SPLITS, TREE, WINDOWED,
    )  # fmt: skip
    if LONE:
        span = splits
    elif not SPANNED:
        span = tl.full([], 1, tl.int32)
    if run * span >= splits:
        return
    least_split, end_split = run * span, tl.minimum(run * span + span, splits)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those of late queries see most, so they begin first
    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = pair // GROUPS
    inside = query < queries
    live = inside & (query < count)
    own = context + offset + query
    masks = tl.zeros([BLOCK_M], tl.uint64)
    if TREE:
        masks_at = ancestors_ptr + request * ancestor_row + query * ancestor_column
        masks = tl.load(masks_at, mask=live, other=0).to(tl.uint64)
    start = context + offset
    whole = context // BLOCK
    if not TREE:
        whole = (start + tile * BLOCK_M // GROUPS + 1) // BLOCK
        last = tl.minimum(last, (tl.max(tl.where(live, own + 1, 0), 0) + BLOCK - 1) // BLOCK)
    near = tl.zeros([BLOCK_M], tl.int32)
    low, clear = first, first
    if WINDOWED:
        near = own + 1 - window
        if TREE:
            positions_at = positions_ptr + request * position_row + query * position_column
            near = tl.load(positions_at, mask=live, other=0).to(tl.int32) + 1 - window
        lowest = tl.where(live, tl.maximum(near, 0), FAR)
        if TREE:
            lowest = tl.minimum(lowest, context)
        low = tl.min(lowest, 0) // BLOCK
        clear = (tl.max(tl.where(live, tl.maximum(near, 0), 0), 0) + BLOCK - 1) // BLOCK
    if FRESH:  # the copy engine does not wait for what this program writes
        whole = tl.minimum(whole, start // BLOCK)
    column = tl.arange(0, DIM_PAD)[None, :]
    row = request.to(tl.int64) * q_row + query.to(tl.int64) * q_token + (kv_head * GROUPS + pair % GROUPS) * DIM
    table = pages_ptr + request * page_row
    keys_ptr = store_ptr + kv_head * DIM
    if FRESH:
        token = (request.to(tl.int64) * queries + query)[:, None]
        q = turned(
            q_ptr + row[:, None], token, live[:, None], cos_ptr, sin_ptr, q_weight_ptr, eps,
            DIM, DIM_PAD, ROTARY, PAIRS, NORMED,
        )  # fmt: skip
        # whoever reads a token stores it first: two tiles may store the same bits, and neither waits for the other
        least = tl.maximum(first + least_split * share, low) * BLOCK - start
        most = tl.minimum(first + end_split * share, last) * BLOCK - start
        _keep(
            tl.maximum(least, 0), tl.minimum(most, count), request, queries, start,
            keys_ptr, table, q_ptr + request.to(tl.int64) * q_row + (KV_HEADS * GROUPS + kv_head) * DIM, q_token,
            cos_ptr, sin_ptr, k_weight_ptr, eps, SIZE, DIM, DIM_PAD, PAGE, ROTARY, PAIRS, NORMED, EACH,
        )  # fmt: skip
        tl.debug_barrier()
    else:
        q = tl.load(q_ptr + row[:, None] + column, mask=live[:, None] & (column < DIM), other=0.0)
    number = (request * queries + query).to(tl.int64) * (KV_HEADS * GROUPS) + kv_head * GROUPS + pair % GROUPS
    if SPANNED:
        acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        for split in tl.range(least_split, end_split, num_stages=1):
            begin = first + split * share
            more, more_top, more_mass = _read_split(
                begin, tl.minimum(begin + share, last), clear, whole, low, q, scale, tiles, keys_ptr, table, kv_head,
                own, near, masks, live, context, window, SIZE, DIM, DIM_PAD, PAGE, BLOCK, BLOCK_M, TREE, WINDOWED, TMA,
                STAGES,
            )  # fmt: skip
            if LONE:
                acc, top, mass = fold(acc, top, mass, more, more_top, more_mass)
            elif run == 0:
                acc, top, mass = fold(acc, top, mass, more, more_top, more_mass)
            else:
                at = number * bound + split
                leave(at, more, more_top, more_mass, live, inside, partial_ptr, peaks_ptr, DIM, DIM_PAD)
    else:
        begin = first + run * share
        acc, top, mass = _read_split(
            begin, tl.minimum(begin + share, last), clear, whole, low, q, scale, tiles, keys_ptr, table, kv_head, own,
            near, masks, live, context, window, SIZE, DIM, DIM_PAD, PAGE, BLOCK, BLOCK_M, TREE, WINDOWED, TMA, STAGES,
        )  # fmt: skip
    stored = inside[:, None] & (column < DIM)
    done = out_ptr + number[:, None] * DIM + column
    if span >= splits:
        live = live & (mass > 0)
        result = tl.where(live[:, None], acc / tl.where(live, mass, 1.0)[:, None], 0.0)
        tl.store(done, result.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        if not SPANNED or run == 0:
            at = number * bound + end_split - 1
            leave(at, acc, top, mass, live, inside, partial_ptr, peaks_ptr, DIM, DIM_PAD)
        if JOINED > 0:
            tl.debug_barrier()  # all of this run is written before it is counted
            counter = arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == (splits - 1) // span:
                tl.store(counter, 0)
                acc, mass = join(
                    number * bound, inside, splits, span, partial_ptr, peaks_ptr, DIM, DIM_PAD, BLOCK_M, JOINED
                )
                result = acc / tl.where(mass > 0, mass, 1.0)[:, None]
                tl.store(done, result.to(out_ptr.dtype.element_ty), mask=stored)


class Config(NamedTuple):
    """How a pass is cut up and compiled; `bench gqa --tune` prints the best for a shape."""

    rows: int  # (query, head) pairs of a tile: 16, 32, 64 or 128
    block: int  # tokens
    warps: int
    stages: int  # blocks on their way while one is worked on
    splits: int  # of a request at most
    shortest: int = 2  # blocks of a split at least
    tma: bool = True  # blocks through the copy engine, where it can read them
    joined: int = 4  # stages in which the last program of a tile joins all splits; 0 leaves it to a kernel of its own
    resident: int = 2  # programs of a multiprocessor at once
    parts: int = 0  # programs that take the splits of a row, where all rows are alike; 0: as many as fill the device
    run: int = 4096  # tokens that a program takes at most, but for a longer split: rows of a batch may differ


@lru_cache(maxsize=1024)
def pick(queries: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration for a shape; it depends neither on the number of rows nor on lengths."""
    pairs, narrow = queries * heads // kv_heads, dtype.itemsize == 2
    rows = _tile(pairs, queries <= SPLIT_QUERIES, 16 if not narrow else 64 if dim > 128 else 128)
    wide = rows == 128 or not narrow or (rows == 64 and dim > 128)
    splits = 1 if queries > SPLIT_QUERIES else splits_of(kv_heads * triton.cdiv(pairs, rows))
    fixed = Config(rows, 64 if narrow else 32, 8 if wide else 4, 3, splits, resident=2 if rows <= 32 else 1)
    if rows == 64 and splits > 1 and not wide:  # trees: two programs at once hide more than a third block on its way
        fixed = fixed._replace(stages=2, shortest=8, resident=2, parts=splits)
    return fixed._replace(stages=_stages(fixed, dim, dtype, device), joined=_join_stages(fixed, dim, device))


def _tile(pairs: int, few: bool, largest: int) -> int:
    """Rows of a tile. Where half of the largest leave less of the last tile empty, and few read keys again, those."""
    rows = min(max(16, triton.next_power_of_2(pairs)), largest)
    return 64 if few and rows == 128 and triton.cdiv(pairs, 64) % 2 else rows


def splits_of(programs: int) -> int:
    """Splits that give a lone request about 128 programs, one for each multiprocessor of a large device."""
    return min(max(128 // programs, 4), 64)


def _stages(config: Config, dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """As many of the wanted stages as shared memory holds beside the queries."""
    if device.type != "cuda":
        return config.stages
    token = 2 * _pad(dim) * dtype.itemsize
    room = _shared_memory(device) - config.rows * token
    room -= (config.block * token if config.rows >= 64 else 0) + (8 << 10)
    return int(max(1, min(config.stages, room // (config.block * token))))


def _join_stages(config: Config, dim: int, device: torch.device) -> int:
    """As many as fit beside nothing else: keys and values are done with by then."""
    if device.type != "cuda":
        return config.joined
    room = _shared_memory(device) - (16 << 10)
    return int(max(1, min(config.joined, 1 + room // (config.rows * _pad(dim) * 4))))


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def launch_store(batch: Batch, k: Tensor, v: Tensor, store: Tensor, page_size: int, pdl: bool = False) -> None:
    """Put k and v [R, T, kv_heads, dim] into a layer's storage [slots, 2, kv_heads, dim]."""
    k, v = packed(k), packed(v)
    rows, queries, kv_heads, dim = k.shape
    size = kv_heads * dim
    store_kernel[(rows, queries)](
        k, v, store, batch.pages, batch.context, batch.counts, batch.offset, batch.pages.stride(0),
        *k.stride()[:2], *v.stride()[:2], SIZE=size, WIDTH=triton.next_power_of_2(size), PAGE=page_size,
        num_warps=4, **dependent(pdl, k),
    )  # fmt: skip


def launch_attend(
    batch: Batch, q: Tensor, store: Tensor, page_size: int, window: int | None, config: Config,
    arrived: Tensor | None = None, turn: Turn | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """q [R, T, heads, dim] over a layer's storage [slots, 2, kv_heads, dim] -> [R, T, heads, dim], of q's type.

    With `turn`, q is a qkv product [R, T, heads + 2 kv_heads, dim] and the pass's own keys and values are stored.
    `arrived` are zeros [N] int32 that nobody else uses at the time; without enough of them a second kernel joins.
    """
    q = packed(q)
    rows, queries, heads, dim = q.shape
    kv_heads = store.shape[2]
    heads = heads if turn is None else heads - 2 * kv_heads
    tiles = triton.cdiv(queries * (heads // kv_heads), config.rows)
    way = cut(
        batch.longest, config.block, config.splits, config.shortest, config.run,
        config.parts or room(q.device, config.resident, rows * kv_heads * tiles),
    )  # fmt: skip
    lone = way.programs == 1
    out = torch.empty(rows, queries, heads, dim, dtype=q.dtype, device=q.device)
    partial = peaks = out
    if not lone:
        partial = torch.empty(rows, queries, heads, way.bound, dim, dtype=torch.float32, device=q.device)
        peaks = torch.empty(rows, queries, heads, way.bound, 2, dtype=torch.float32, device=q.device)
    tree, windowed = batch.ancestors is not None, window is not None
    ancestors = batch.positions if batch.ancestors is None else batch.ancestors
    blocks = _descriptor(store, page_size, config)
    constants = dict(
        QUERIES_PAD=triton.next_power_of_2(queries) if tree and windowed else 1, DIM=dim, DIM_PAD=_pad(dim),
        BLOCK=config.block, SPLITS=config.splits, TREE=tree, WINDOWED=windowed,
    )  # fmt: skip
    splitting = (config.shortest, way.parts, config.run // config.block)
    # the tiles of a request lie side by side: they read the same blocks, which are then in the L2 cache
    grid = (tiles, rows * kv_heads, way.programs)
    joined = _joined(config, way, arrived, grid[0] * grid[1])
    split_kernel[grid](
        q, store, store if blocks is None else blocks, batch.pages, batch.context, batch.counts, ancestors,
        batch.positions, out, partial, peaks, arrived if joined else out, *turn_pointers(turn, q), dim**-0.5 * LOG2E,
        batch.offset, window or 0, way.bound, queries, *q.stride()[:2], batch.pages.stride(0), *ancestors.stride(),
        *batch.positions.stride(), *splitting, KV_HEADS=kv_heads, GROUPS=heads // kv_heads, PAGE=page_size,
        BLOCK_M=config.rows, TMA=blocks is not None, STAGES=2 * config.stages + 1, SPANNED=way.parts < way.bound,
        LONE=lone, JOINED=joined, FRESH=turn is not None,
        EACH=min(triton.next_power_of_2(queries), MOST_EACH) if turn else 1, num_warps=config.warps,
        **turn_constants(turn), **constants, **dependent(pdl, q),
    )  # fmt: skip
    if not lone and not joined:
        combine_kernel[(rows * queries * heads,)](
            partial, peaks, batch.context, batch.counts, batch.positions, out, batch.offset, window or 0, way.bound,
            queries, *batch.positions.stride(), *splitting, HEADS=heads, num_warps=4, **constants,
            **dependent(pdl, q),
        )  # fmt: skip
    return out


def _joined(config: Config, way: Cut, arrived: Tensor | None, tiles: int) -> int:
    """Stages of joining by the last program of each of `tiles` tiles, or 0.

    It joins alone while the others are done: good for small tiles, and where so many rows fill the device that only
    one far longer than the others is joined at all.
    """
    if way.programs == 1 or arrived is None or arrived.numel() < tiles:
        return 0
    return config.joined if config.rows <= JOINED_ROWS or way.parts == 1 else 0


def packed(x: Tensor) -> Tensor:
    """x [R, T, H, D] with the heads of a token side by side; a slice of a wider product is taken as it is."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


def _descriptor(store: Tensor, page_size: int, config: Config) -> TensorDescriptor | None:
    """Blocks of one head for the tensor memory accelerator, where the device has one and the sizes suit it."""
    dim = store.shape[3]
    fits = config.tma and page_size % config.block == 0 and _pad(dim) == dim and store.element_size() == 2
    if not fits or not _has_tma(store.device):
        return None
    return TensorDescriptor.from_tensor(store.flatten(1), [config.block, dim])


@lru_cache(maxsize=16)
def _has_tma(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def _pad(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))
