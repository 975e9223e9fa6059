"""Triton kernels of absorbed MLA decoding over a paged latent cache: planner, split-KV pass, combine.

Owns: device code and its launches. Must never know when a plan is made, kept or replaced. The plan's layout and rule
are those of `target.attention.splits`.

A row of a request is one (query, head) pair, numbered query * heads + head; a tile is BLOCK_M rows, a block BLOCK
cached tokens. Grid of the pass: (tiles, parts). Whatever a plan holds, nothing is read or written out of bounds: a plan
that was never filled gives wrong numbers, not an illegal access.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from target.attention.splits import BLOCK, Splits, aligned, gap
from target.batch import Batch

FAR = tl.constexpr(0x3FFFFFFF)
LOG2E = 1.4426950408889634


@triton.jit
def _spans(context_ptr, counts_ptr, requests, first, carry, offset, BLOCK, GAP, CHUNK: tl.constexpr):
    """Where each of CHUNK requests begins its blocks and ends on the line of costs, and the end of the last.

    The line starts GAP below zero, so that nothing lies before the first request.
    """
    request = first + tl.arange(0, CHUNK)
    context = tl.load(context_ptr + request, mask=request < requests, other=0).to(tl.int32)
    count = tl.load(counts_ptr + request, mask=request < requests, other=0).to(tl.int32)
    blocks = tl.where(count > 0, (context + offset + count + BLOCK - 1) // BLOCK, 0)
    end = carry + tl.cumsum(tl.where(blocks > 0, blocks + GAP, 0), 0)
    return request, end - blocks, end, tl.max(end, 0)


@triton.jit
def _piece(place, length, parts):
    """Which of the equal pieces of the line of costs a unit lies in."""
    return ((place + 1) * parts - 1) // length


@triton.jit(do_not_specialize=["requests", "parts", "offset", "grain"])
def plan_kernel(
    context_ptr,  # [R] int64
    counts_ptr,  # [R] int64
    plan_ptr,  # [parts, 8] int32
    splits_ptr,  # [R + 1] int32
    requests,
    parts,
    offset,
    grain,
    BLOCK: tl.constexpr,
    GAP: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program plans for all parts at once; each number is a count, a minimum or a maximum over the requests."""
    if CHAINED:
        gdc_launch_dependents()
    total = tl.zeros([], tl.int32) - GAP
    for at in range(0, requests, CHUNK):
        _, _, _, total = _spans(context_ptr, counts_ptr, requests, at, total, offset, BLOCK, GAP, CHUNK)
    length = tl.maximum(total, grain * parts)
    part = tl.arange(0, PARTS)
    begins, stops = part * length // parts, (part + 1) * length // parts
    low, high = begins[:, None], stops[:, None]
    first = tl.full([PARTS], FAR, tl.int32)
    first_begin, first_end = first, first
    last = tl.full([PARTS], -1, tl.int32)
    last_begin, last_end = last, last
    carry = tl.zeros([], tl.int32) - GAP
    before = tl.zeros([], tl.int32)
    tl.store(splits_ptr, 0)
    for at in range(0, requests, CHUNK):
        request, begin, end, carry = _spans(context_ptr, counts_ptr, requests, at, carry, offset, BLOCK, GAP, CHUNK)
        pieces = _piece(end - 1, length, parts) - _piece(begin, length, parts) + 1
        spread = tl.where(end > begin, pieces, 0)
        tl.store(splits_ptr + 1 + request, before + tl.cumsum(spread, 0), mask=request < requests)
        before += tl.sum(spread, 0)
        used, request, begin, end = (end > begin)[None, :], request[None, :], begin[None, :], end[None, :]
        ahead, reached = used & (end > low), used & (begin < high)
        first = tl.minimum(first, tl.min(tl.where(ahead, request, FAR), 1))
        first_begin = tl.minimum(first_begin, tl.min(tl.where(ahead, begin, FAR), 1))
        first_end = tl.minimum(first_end, tl.min(tl.where(ahead, end, FAR), 1))
        last = tl.maximum(last, tl.max(tl.where(reached, request, -1), 1))
        last_begin = tl.maximum(last_begin, tl.max(tl.where(reached, begin, -1), 1))
        last_end = tl.maximum(last_end, tl.max(tl.where(reached, end, -1), 1))
    head, tail = _piece(first_begin, length, parts), _piece(last_begin, length, parts)
    busy = (first < FAR) & (last >= first)
    record = plan_ptr + part * 8
    real = part < parts
    tl.store(record, tl.where(busy, first, 0), mask=real)
    tl.store(record + 1, tl.where(busy, last, -1), mask=real)
    tl.store(record + 2, tl.where(busy, tl.maximum(begins - first_begin, 0), 0), mask=real)
    tl.store(record + 3, tl.where(busy, tl.minimum(last_end, stops) - last_begin, 0), mask=real)
    tl.store(record + 4, tl.where(busy, part - head, 0), mask=real)
    tl.store(record + 5, (busy & (_piece(first_end - 1, length, parts) > head)).to(tl.int32), mask=real)
    tl.store(record + 6, (busy & (_piece(last_end - 1, length, parts) > tail)).to(tl.int32), mask=real)
    tl.store(record + 7, tl.zeros([PARTS], tl.int32), mask=real)


@triton.jit
def _absorb(q, q_rope, latent, rope, seen, acc, top, mass, scale, MASKED: tl.constexpr):
    """Take one block into the running softmax: base 2, float32. The latent is key and value at once."""
    scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
    scores = tl.dot(q, tl.trans(latent), scores, input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    base = new
    if MASKED:  # a row that has seen nothing yet: exp(-inf - -inf) would be NaN
        base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    mass = mass * keep + tl.sum(weights, 1)
    acc = tl.dot(weights.to(latent.dtype), latent, acc * keep[:, None], input_precision="ieee")
    return acc, new, mass


@triton.jit(do_not_specialize=["offset", "requests", "parts", "columns"])
def decode_kernel(
    q_ptr,  # [R, T, H, rank + rope]
    latents_ptr,  # [slots, rank + rope]
    latent_blocks,  # descriptor of the latents in blocks [BLOCK, rank], where TMA
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
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TREE: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One part of the plan for one tile of rows.

    Blocks that lie below the context are seen by every query and are read through the pipeline; the few above are
    masked, and what no query of the tile sees is not read.
    """
    DIM: tl.constexpr = RANK + ROPE
    ROWS: tl.constexpr = QUERIES * HEADS
    record = plan_ptr + tl.program_id(1) * 8
    begin_request = tl.maximum(tl.load(record), 0)
    end_request = tl.minimum(tl.load(record + 1), requests - 1)
    begin_block, end_block = tl.maximum(tl.load(record + 2), 0), tl.load(record + 3)
    begin_split = tl.load(record + 4)
    begin_is_split, end_is_split = tl.load(record + 5) != 0, tl.load(record + 6) != 0
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = rows // HEADS
    inside = rows < ROWS
    step = tl.arange(0, BLOCK)
    rank, rope = tl.arange(0, RANK_PAD)[None, :], tl.arange(0, ROPE_PAD)[None, :]
    for request in range(begin_request, end_request + 1):
        context = tl.load(context_ptr + request).to(tl.int32)
        count = tl.load(counts_ptr + request).to(tl.int32)
        blocks = tl.where(count > 0, (context + offset + count + BLOCK - 1) // BLOCK, 0)
        begins, ends = request == begin_request, request == end_request
        first = tl.where(begins, begin_block, 0)
        last = tl.where(ends, tl.minimum(blocks, end_block), blocks)
        whole = tl.maximum(first, tl.minimum(last, context // BLOCK))
        table = pages_ptr + request * columns
        row = (request * ROWS + rows).to(tl.int64)[:, None]
        q = tl.load(q_ptr + row * DIM + rank, mask=inside[:, None] & (rank < RANK), other=0.0)
        q_rope = tl.load(q_ptr + row * DIM + RANK + rope, mask=inside[:, None] & (rope < ROPE), other=0.0)
        acc = tl.zeros([BLOCK_M, RANK_PAD], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        for block in tl.range(first, whole, num_stages=STAGES):
            if TMA:
                slot = tl.load(table + block * BLOCK // PAGE) * PAGE + block * BLOCK % PAGE
                latent = latent_blocks.load([slot.to(tl.int32), 0])
                key_rope = rope_blocks.load([slot.to(tl.int32), RANK])
            else:
                index = block * BLOCK + step
                slots = tl.load(table + index // PAGE) * PAGE + index % PAGE
                at = latents_ptr + slots[:, None] * DIM
                latent = tl.load(at + rank, mask=rank < RANK, other=0.0)
                key_rope = tl.load(at + RANK + rope, mask=rope < ROPE, other=0.0)
            acc, top, mass = _absorb(q, q_rope, latent, key_rope, inside, acc, top, mass, scale, False)
        live = inside & (query < count)
        own = (context + offset + query)[:, None]
        for block in tl.range(whole, last, num_stages=1):
            index = block * BLOCK + step
            seen = index[None, :] <= own
            if TREE:
                node = (index - context)[None, :]
                mask = tl.load(ancestors_ptr + request * QUERIES + query, mask=live, other=0)[:, None]
                bit = (mask >> tl.minimum(tl.maximum(node, 0), 63).to(tl.int64)) & 1
                seen = (node < 0) | ((node < 64) & (bit != 0)) | (index[None, :] == own)
            seen = seen & live[:, None]
            used = tl.max(seen.to(tl.int32), 0) > 0
            slots = tl.load(table + index // PAGE, mask=used, other=0) * PAGE + index % PAGE
            at = latents_ptr + slots[:, None] * DIM
            latent = tl.load(at + rank, mask=used[:, None] & (rank < RANK), other=0.0)
            key_rope = tl.load(at + RANK + rope, mask=used[:, None] & (rope < ROPE), other=0.0)
            acc, top, mass = _absorb(q, q_rope, latent, key_rope, seen, acc, top, mass, scale, True)
        live = live & (mass > 0)
        mass = tl.where(live, mass, 1.0)
        result = tl.where(live[:, None], acc / mass[:, None], 0.0)
        stored = inside[:, None] & (rank < RANK)
        if (begins & begin_is_split) | (ends & end_is_split):
            number = tl.load(splits_ptr + request) + tl.where(begins, begin_split, 0)
            number = tl.minimum(tl.maximum(number, 0), requests + parts - 1).to(tl.int64)
            at = number * ROWS + rows
            tl.store(partial_ptr + at[:, None] * RANK + rank, result, mask=stored)
            tl.store(lse_ptr + at, tl.where(live, top + tl.log2(mass), float("-inf")), mask=inside)
        else:
            tl.store(out_ptr + row * RANK + rank, result.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["rows", "capacity"])
def combine_kernel(
    partial_ptr,  # [R + parts, rows, rank] float32
    lse_ptr,  # [R + parts, rows] float32, base 2
    splits_ptr,  # [R + 1] int32
    out_ptr,  # [R, rows, rank]
    rows,
    capacity,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Join what the parts found for ROWS rows of one request; a request that one part did alone is complete."""
    if CHAINED:
        gdc_wait()
    request = tl.program_id(1)
    begin = tl.minimum(tl.maximum(tl.load(splits_ptr + request), 0), capacity)
    end = tl.minimum(tl.load(splits_ptr + request + 1), capacity)
    if end - begin != 1:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
        inside, within = (row < rows)[:, None], column < RANK
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        for at in range(begin, end, CHUNK):
            split = (at + tl.arange(0, CHUNK))[None, :]
            place = split.to(tl.int64) * rows + row[:, None]
            lse = tl.load(lse_ptr + place, mask=(split < end) & inside, other=float("-inf"))
            found = lse > float("-inf")  # what an empty split left in its place is not read
            values = tl.load(
                partial_ptr + place[:, :, None] * RANK + column[None, None, :],
                mask=found[:, :, None] & within[None, None, :],
                other=0.0,
            )
            new = tl.maximum(top, tl.max(lse, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            weights = tl.exp2(lse - base[:, None])
            keep = tl.exp2(top - base)
            acc = acc * keep[:, None] + tl.sum(values * weights[:, :, None], 1)
            mass = mass * keep + tl.sum(weights, 1)
            top = new
        result = acc / tl.where(mass > 0, mass, 1.0)[:, None]
        at_out = out_ptr + (request * rows + row).to(tl.int64)[:, None] * RANK + column[None, :]
        tl.store(at_out, result.to(out_ptr.dtype.element_ty), mask=inside & within[None, :])


class Config(NamedTuple):
    """How a pass is cut up and compiled; `bench mla --variants` times those that are worth it."""

    rows: int  # of a tile: 16, 32, 64 or 128
    warps: int
    stages: int
    grain: int = 1  # blocks that a part takes at least
    kernel: str = "portable"  # or one of HOPPER_KERNELS, whose tiles and warps are fixed
    chained: bool = False  # each launch may begin before the one before it has ended (programmatic dependent launch)


HOPPER = Config(64, 8, 2, kernel="hopper")
SEESAW = Config(64, 8, 2, kernel="seesaw")
HOPPER_KERNELS = {"hopper": "target.kernels.mla_hopper", "seesaw": "target.kernels.mla_seesaw"}

# (rows of a request at least, requests at least, what they get), the first that holds; set from `bench mla --variants`
CHOICES = ((0, 0, HOPPER),)


def pick(requests: int, rows: int, rank: int, latents: Tensor, page_size: int) -> Config:
    """The configuration for `requests` of `rows` (query, head) pairs each over these latents."""
    if hopper_takes(latents, rank, page_size):
        return chosen(requests, rows)
    if latents.dtype == torch.float32:
        return Config(16, 4, 2)
    if rank > 256:
        return Config(16 if rows <= 16 else 32, 8, 2)
    return Config(16 if rows <= 16 else 64, 4, 3)


def chosen(requests: int, rows: int) -> Config:
    """What CHOICES says."""
    return next(config for least, fewest, config in CHOICES if rows >= least and requests >= fewest)


def hopper_takes(latents: Tensor, rank: int, page_size: int) -> bool:
    """Whether `mla_hopper` can be used; it is not imported where triton or the device has another age."""
    if not (latents.is_cuda and triton.__version__.startswith("3.6.")):
        return False
    return bool(import_module(HOPPER_KERNELS["hopper"]).takes(latents, rank, page_size))


def parts_of(config: Config, requests: int, rows: int, processors: int) -> int:
    """Parts that keep `processors` multiprocessors busy when each request has so many rows."""
    return aligned(max(processors // -(-rows // config.rows), 1), requests)


def launch_plan(into: Splits, batch: Batch, config: Config) -> None:
    """Fill `into` from the batch's live lengths; nothing is read on the host."""
    requests, parts = batch.context.shape[0], into.plan.shape[0]
    chunk = min(triton.next_power_of_2(requests), 32)
    plan_kernel[(1,)](
        batch.context, batch.counts, into.plan, into.splits, requests, parts, batch.offset, config.grain,
        BLOCK=BLOCK, GAP=gap(parts, requests), PARTS=triton.next_power_of_2(parts), CHUNK=max(chunk, 2),
        CHAINED=config.chained, num_warps=8,
    )  # fmt: skip


def launch_decode(
    batch: Batch, plan: Splits, q: Tensor, latents: Tensor, page_size: int, rank: int, scale: float, config: Config
) -> Tensor:
    """q [R, T, H, rank + rope] over latents [slots, rank + rope] -> [R, T, H, rank], of q's type."""
    q = q.contiguous()
    requests, queries, heads, _ = q.shape
    rows, parts = queries * heads, plan.plan.shape[0]
    out = torch.empty(requests, queries, heads, rank, dtype=q.dtype, device=q.device)
    partial = torch.empty(requests + parts, rows, rank, dtype=torch.float32, device=q.device)
    lse = torch.empty(requests + parts, rows, dtype=torch.float32, device=q.device)
    if config.kernel in HOPPER_KERNELS:
        hopper = import_module(HOPPER_KERNELS[config.kernel])
        hopper.launch(batch, plan, q, latents, page_size, scale, out, partial, lse, config.chained)
    else:
        _launch_portable(batch, plan, q, latents, page_size, scale, out, partial, lse, config)
    launch_combine(partial, lse, plan.splits, out.view(requests, rows, rank), config.chained)
    return out


def _launch_portable(
    batch: Batch, plan: Splits, q: Tensor, latents: Tensor, page_size: int, scale: float,
    out: Tensor, partial: Tensor, lse: Tensor, config: Config,
) -> None:  # fmt: skip
    requests, queries, heads, dim = q.shape
    rank, parts = out.shape[-1], plan.plan.shape[0]
    blocks = _descriptors(latents, rank, page_size)
    decode_kernel[(triton.cdiv(queries * heads, config.rows), parts)](
        q, latents, *(blocks or (latents, latents)), batch.pages, batch.context, batch.counts,
        batch.context if batch.ancestors is None else batch.ancestors,
        plan.plan, plan.splits, out, partial, lse, scale * LOG2E, batch.offset, requests, parts,
        batch.pages.shape[1], QUERIES=queries, HEADS=heads, RANK=rank, ROPE=dim - rank,
        RANK_PAD=_pad(rank), ROPE_PAD=_pad(dim - rank), PAGE=page_size, BLOCK=BLOCK, BLOCK_M=config.rows,
        TREE=batch.ancestors is not None, TMA=blocks is not None, STAGES=config.stages,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def launch_combine(partial: Tensor, lse: Tensor, splits: Tensor, out: Tensor, chained: bool = False) -> None:
    """Complete the requests of out [R, rows, rank] that were spread over several parts, or over none."""
    requests, rows, rank = out.shape
    together, chunk, width = combine_tile(requests * rows, rank)
    combine_kernel[(triton.cdiv(rows, together), requests, triton.cdiv(rank, width))](
        partial, lse, splits, out, rows, partial.shape[0],
        RANK=rank, ROWS=together, CHUNK=chunk, WIDTH=width, CHAINED=chained, num_warps=4, **pdl(chained),
    )  # fmt: skip


def combine_tile(rows: int, rank: int) -> tuple[int, int, int]:
    """(rows, splits, columns) that one program joins at a time: few rows are spread over more programs."""
    width = _pad(rank)
    if rows <= 128:
        return 1, 32, min(width, 128)
    return (1, 8, width) if rows <= 1024 else (4, 2, width)


def pdl(chained: bool) -> dict[str, bool]:
    """The launch option of a kernel that waits inside for the one before it; other devices do not know it."""
    return {"launch_pdl": True} if chained else {}


def _descriptors(latents: Tensor, rank: int, page_size: int) -> tuple[TensorDescriptor, TensorDescriptor] | None:
    """Blocks for the tensor memory accelerator, where the device has one and the sizes suit it."""
    rope = latents.shape[1] - rank
    fits = page_size % BLOCK == 0 and _pad(rank) == rank and _pad(rope) == rope and latents.element_size() == 2
    if not fits or not _has_tma(latents.device):
        return None
    whole = TensorDescriptor.from_tensor(latents, [BLOCK, rank])
    return whole, TensorDescriptor.from_tensor(latents, [BLOCK, rope])


def _has_tma(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def _pad(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
