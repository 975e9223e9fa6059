"""How a row's cached tokens are cut into splits for attention, which program takes which, and how results are joined.

Owns: the rule, in one place for all kernels, and the arithmetic of joining. Must never know where keys lie.

How long a split is follows from the row's own length alone, and so does the result: it is the fold of all splits from
the first to the last, each step with the same operations wherever it is taken. A program takes a run of consecutive
splits, so many that the batch just fills the device; that number may follow from the batch, as it changes no bit. The
first program of a row folds in registers and leaves its fold in the place of its last split; the others leave every
split as it is, since a fold that begins in the middle would round otherwise. A row of one run needs no memory at all.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment,misc,unused-ignore"

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from target.kernels.dependent import settled

FAR = tl.constexpr(0x3FFFFFFF)
CHUNK = tl.constexpr(8)  # splits whose loads are on their way together
MULTIPROCESSORS = 132  # where there is no device to ask
SPECIAL = ("offset", "window", "bound", "queries", "shortest", "parts", "run_blocks")  # any value


@triton.jit
def row_splits(
    request, context_ptr, counts_ptr, positions_ptr, position_row, position_column, offset, window, queries,
    shortest, parts, run_blocks, QUERIES_PAD: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    TREE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """context, count, first block that any query sees, end of the last, blocks a split, splits, and splits a run."""
    context = tl.load(context_ptr + request).to(tl.int32)
    count = tl.load(counts_ptr + request).to(tl.int32)
    last = tl.where(count > 0, (context + offset + count + BLOCK - 1) // BLOCK, 0)
    first = tl.zeros([], tl.int32)
    if WINDOWED:
        lowest = context + offset
        if TREE:
            query = tl.arange(0, QUERIES_PAD)
            at = positions_ptr + request * position_row + query * position_column
            known = (query < count) & (query < queries)
            lowest = tl.min(tl.load(at, mask=known, other=FAR).to(tl.int32), 0)
        lowest = tl.maximum(lowest + 1 - window, 0)
        if TREE:  # the nodes' indices say nothing of their depth
            lowest = tl.minimum(lowest, context)
        first = lowest // BLOCK
    blocks = tl.maximum(last - first, 0)
    share = tl.maximum((blocks + SPLITS - 1) // SPLITS, shortest)
    splits = tl.maximum((blocks + share - 1) // share, 1)
    span = tl.minimum((splits + parts - 1) // parts, tl.maximum(run_blocks // share, 1))
    return context, count, first, last, share, splits, span


@triton.jit
def fold(acc, top, mass, more, more_top, more_mass):
    """One more split's values, largest score and mass (base 2, not divided) on the right of those before.

    Where nothing was seen the largest score is -inf and the rest zero, which changes nothing on either side.
    """
    new = tl.maximum(top, more_top)
    base = tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2(top - base)
    gain = tl.exp2(more_top - base)
    # said outright: the compiler must not choose anew in each kernel what is fused
    mass = tl.fma(mass, keep, more_mass * gain)
    if len(acc.shape) == 2:
        keep, gain = keep[:, None], gain[:, None]
    acc = tl.fma(acc, keep, more * gain)
    return acc, new, mass


@triton.jit
def leave(
    at, acc, top, mass, live, inside, partial_ptr, peaks_ptr, DIM: tl.constexpr, DIM_PAD: tl.constexpr
):  # fmt: skip
    """Store what a split, or a fold of several, came to in places `at` [BLOCK_M]; nothing where not `live`."""
    column = tl.arange(0, DIM_PAD)[None, :]
    acc = tl.where(live[:, None], acc, 0.0)
    tl.store(partial_ptr + at[:, None] * DIM + column, acc, mask=inside[:, None] & (column < DIM))
    tl.store(peaks_ptr + 2 * at, tl.where(live, top, float("-inf")), mask=inside)
    tl.store(peaks_ptr + 2 * at + 1, tl.where(live, mass, 0.0), mask=inside)


@triton.jit
def join(
    number, inside, splits, span, partial_ptr, peaks_ptr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The fold [BLOCK_M, DIM_PAD] and its mass of what was left in places from `number` [BLOCK_M] on."""
    column = tl.arange(0, DIM_PAD)[None, :]
    stored = inside[:, None] & (column < DIM)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for split in tl.range(span - 1, splits, num_stages=STAGES):
        at = number + split
        # past the first-level cache, which may hold what lay there before
        part = tl.load(partial_ptr + at[:, None] * DIM + column, mask=stored, other=0.0, cache_modifier=".cg")
        part_top = tl.load(peaks_ptr + 2 * at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        part_mass = tl.load(peaks_ptr + 2 * at + 1, mask=inside, other=0.0, cache_modifier=".cg")
        acc, top, mass = fold(acc, top, mass, part, part_top, part_mass)
    return acc, mass


@triton.jit(do_not_specialize=[*SPECIAL, "position_row", "position_column"])
def combine_kernel(
    partial_ptr,  # [R, T, heads, bound, dim] float32
    peaks_ptr,  # [R, T, heads, bound, 2] float32: largest score and mass
    context_ptr,  # [R] int64
    counts_ptr,  # [R] int64
    positions_ptr,  # [R, T] int64, where TREE and WINDOWED
    out_ptr,  # [R, T, heads, dim]
    offset,
    window,
    bound,
    queries,
    position_row,
    position_column,
    shortest,
    parts,
    run_blocks,
    QUERIES_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    TREE: tl.constexpr,
    WINDOWED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Join the splits of one (query, head) pair; a row of one run is complete."""
    number = tl.program_id(0)
    request = number // (queries * HEADS)
    settled(PDL)
    _, _, _, _, _, splits, span = row_splits(
        request, context_ptr, counts_ptr, positions_ptr, position_row, position_column, offset, window, queries,
        shortest, parts, run_blocks, QUERIES_PAD, BLOCK, SPLITS, TREE, WINDOWED,
    )  # fmt: skip
    if span >= splits:
        return
    column = tl.arange(0, DIM_PAD)
    acc = tl.zeros([DIM_PAD], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.zeros([], tl.float32)
    for some in tl.range(span - 1, splits, CHUNK):
        found = ()  # all of them are asked for before one is waited for
        for step in tl.static_range(CHUNK):
            known = some + step < splits
            at = number.to(tl.int64) * bound + some + step
            part = tl.load(partial_ptr + at * DIM + column, mask=known & (column < DIM), other=0.0)
            part_top = tl.load(peaks_ptr + 2 * at, mask=known, other=float("-inf"))
            part_mass = tl.load(peaks_ptr + 2 * at + 1, mask=known, other=0.0)
            found = found + ((part, part_top, part_mass),)
        for step in tl.static_range(CHUNK):
            acc, top, mass = fold(acc, top, mass, found[step][0], found[step][1], found[step][2])
    result = acc / tl.where(mass > 0, mass, 1.0)
    tl.store(out_ptr + number.to(tl.int64) * DIM + column, result.to(out_ptr.dtype.element_ty), mask=column < DIM)


# ---- what the host knows ----


class Cut(NamedTuple):
    """What follows for a launch from the bounds that the host knows."""

    bound: int  # splits of a row at most
    parts: int  # programs that take a row's splits, where rows are alike
    programs: int  # that take a row's splits, at most


@lru_cache(maxsize=4096)
def cut(longest: int, block: int, splits: int, shortest: int, run: int, parts: int) -> Cut:
    """For rows of up to `longest` tokens, each for `parts` programs; the others as in `gqa.Config`."""
    blocks = max(1, -(-longest // block))
    bound = max(1, min(splits, -(-blocks // shortest)))
    if parts >= bound:
        return Cut(bound, parts, bound)
    return Cut(bound, parts, max(_runs(n, splits, shortest, parts, run // block) for n in range(1, blocks + 1)))


def _runs(blocks: int, most_splits: int, shortest: int, parts: int, run_blocks: int) -> int:
    """Runs of a row, as `row_splits` has them."""
    share = max(-(-blocks // most_splits), shortest)
    splits = -(-blocks // share)
    return -(-splits // min(-(-splits // parts), max(run_blocks // share, 1)))


def room(device: torch.device, resident: int, others: int) -> int:
    """Programs that each of `others` tiles may have so that all are on the device at once; one at least."""
    return max(1, resident * _multiprocessors(device) // max(others, 1))


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
