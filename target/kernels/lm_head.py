"""Triton kernels that answer what is asked about logits: multiplied here and never written, or written by others.

Owns: device code and its launches. Must never know sampling parameters beyond a temperature, a key of noise and the
least value that is kept.

The product is that of `target.kernels.skinny` in one run of K: the same instructions, so the same logits bit for bit,
rounded to the model's type as a written logit would be. A program owns BLOCK_N tokens and TILE rows; of each row it
keeps its best tokens and the sum of its exponentials. Of written logits a program owns a block of one row. A second
launch has a row to itself and merges the blocks in the order of the vocabulary. Nothing in either order depends on
other rows or on how many there are.

Noise is that of `speculator.sampling.gumbel`: one SplitMix64 sequence (Steele, Lea, Flood 2014) for each key, indexed
by token ids, through the same functions in the same widths. Both logarithms are libdevice's, as torch's are on CUDA.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from target.kernels.dependent import ask_behind, ask_for, asking, dependent, last_block, part_of, release, settled, wait
from target.kernels.skinny import _descriptor, _room, fitted, tile_of
from target.products import Behind, Config
from target.readout import Asked, Readout

WRITTEN = 2048  # written logits that a program reads
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the score of what is excluded, while blocks are merged: above nothing
LARGEST_TILE = 64  # rows; a score of every token of a block and every row of a tile lies in registers
GOLDEN, MIX_1, MIX_2 = (
    tl.constexpr(odd - 2**64) for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@triton.jit
def _shifted(bits, by: tl.constexpr):
    """A logical shift of int64."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


@triton.jit
def _mixed(bits):
    """SplitMix64's finaliser."""
    bits = (bits ^ _shifted(bits, 30)) * MIX_1
    bits = (bits ^ _shifted(bits, 27)) * MIX_2
    return bits ^ _shifted(bits, 31)


@triton.jit
def _gumbel(key, ids):
    """-log(-log(u)), u the number of `ids` in the sequence of `key`: the outer logarithm in float32."""
    uniform = (_shifted(_mixed(key + ids * GOLDEN), 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log((-tl.log(uniform)).to(tl.float32))


@triton.jit
def _exponentials(values, sound):
    """Largest of values [BLOCK_N, TILE] by row, and the sum of exponentials below it; NaN where not all are sound."""
    largest = tl.max(values, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.where(sound, tl.sum(tl.exp(values - base[None, :]), 0), float("nan"))


@triton.jit
def _say(
    logits,  # [BLOCK_N, TILE] float32
    block,
    blocks,
    line,  # [BLOCK_N] their columns
    row,  # [TILE]
    rows,
    temperature_ptr,
    keys_ptr,
    ids_ptr,
    least_ptr,  # [rows] float32, where KEEP
    scores_ptr,
    logits_ptr,
    columns_ptr,
    sums_ptr,
    N: tl.constexpr,
    BEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TEMPERED: tl.constexpr,
    NOISE: tl.constexpr,
    NAMED: tl.constexpr,
    RANKED: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Leave what a block says to its rows; pointers as in `read_kernel`."""
    live, there = row < rows, (line < N)[:, None]
    sound = tl.min(((tl.abs(logits) < float("inf")) | (line >= N)[:, None]).to(tl.int32), 0) > 0
    logits = tl.where((logits == logits) & there, logits, float("-inf"))
    values = logits
    if TEMPERED:
        temperature = tl.load(temperature_ptr + row, mask=live, other=0.0)
        values = tl.math.div_rn(logits, tl.where(temperature > 0, temperature, 1.0)[None, :] + tl.zeros_like(logits))
    scores = values
    if NOISE:
        ids = line.to(tl.int64)
        if NAMED:
            ids = tl.load(ids_ptr + line, mask=line < N, other=0)
        noise = _gumbel(tl.load(keys_ptr + row, mask=live, other=0)[None, :], ids[:, None])
        scores += tl.where((temperature > 0)[None, :], noise, 0.0)
    if KEEP:
        excluded = values < tl.load(least_ptr + row, mask=live, other=0.0)[None, :]
        scores, values = tl.where(excluded, float("-inf"), scores), tl.where(excluded, float("-inf"), values)
    at = row.to(tl.int64) * blocks + block
    step = rows.to(tl.int64) * blocks
    largest, total = _exponentials(values if RANKED else logits, sound)
    tl.store(sums_ptr + at, largest, mask=live)
    tl.store(sums_ptr + step + at, total, mask=live)
    if RANKED:
        largest, total = _exponentials(scores, sound)
        tl.store(sums_ptr + 2 * step + at, largest, mask=live)
        tl.store(sums_ptr + 3 * step + at, total, mask=live)
    if KEEP:
        logits = tl.where(excluded, float("-inf"), logits)
        scores = tl.where(there, tl.maximum(scores, LOWEST), float("-inf"))
    place = tl.arange(0, BLOCK_N)[:, None]
    for rank in tl.static_range(BEST):
        best, found = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
        chosen = place == found[None, :]
        tl.store(scores_ptr + rank * step + at, best, mask=live)
        tl.store(logits_ptr + rank * step + at, tl.max(tl.where(chosen, logits, float("-inf")), 0), mask=live)
        tl.store(columns_ptr + rank * step + at, block * BLOCK_N + found, mask=live)
        scores = tl.where(chosen, float("-inf"), scores)


@triton.jit(do_not_specialize=["rows"])
def read_kernel(
    x_ptr,  # [rows, K], rows any distance apart
    w_ptr,  # [N, K]
    w_blocks,  # its descriptor in blocks [BLOCK_N, BLOCK_K], where TMA
    temperature_ptr,  # [rows] float32, where TEMPERED
    keys_ptr,  # [rows] int64, where NOISE
    ids_ptr,  # [N] int64, where NAMED
    scores_ptr,  # [BEST, rows, blocks] float32
    logits_ptr,  # [BEST, rows, blocks] float32
    columns_ptr,  # [BEST, rows, blocks] int32
    sums_ptr,  # [2, rows, blocks] float32; [4, rows, blocks] where RANKED
    rows,
    x_row,
    N: tl.constexpr,
    K: tl.constexpr,
    BEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    TEMPERED: tl.constexpr,
    NOISE: tl.constexpr,
    NAMED: tl.constexpr,
    RANKED: tl.constexpr,
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
    """What a block of the vocabulary says to a tile of rows."""
    block, blocks = tl.program_id(1), tl.num_programs(1)
    start = block * BLOCK_N
    row, line = tl.program_id(0) * TILE + tl.arange(0, TILE), start + tl.arange(0, BLOCK_N)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_row
    w_at = w_ptr + line.to(tl.int64)[:, None] * K
    live, there = row < rows, (line < N)[:, None]
    acc = tl.zeros([BLOCK_N, TILE], tl.float32)
    ask_for(w_at, line < N, 0, K, AHEAD, PDL)
    wait(PDL)
    last, asks = last_block(0, K, BLOCK_K, STAGES), tl.program_id(0) == 0
    part = part_of(block, blocks)
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        release(begin, last, PDL)
        ask_behind((begin == last) & asks, part, next_ptr, NEXT_ROWS, NEXT_RUN, NEXT_BYTES, NEXT_EACH, NEXT_PAD)
        column = begin + tl.arange(0, BLOCK_K)
        if TMA:
            w = w_blocks.load([start, begin])
        else:
            inside = there & (column < K)[None, :]
            w = tl.load(w_at + column[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        inside = live[:, None] & (column < K)[None, :]
        x = tl.load(x_at + column[None, :], mask=inside, other=0.0, eviction_policy="evict_last")
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    logits = acc.to(x_ptr.dtype.element_ty).to(tl.float32)
    _say(
        logits, block, blocks, line, row, rows, temperature_ptr, keys_ptr, ids_ptr, temperature_ptr, scores_ptr,
        logits_ptr, columns_ptr, sums_ptr, N, BEST, BLOCK_N, TEMPERED, NOISE, NAMED, RANKED, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def written_kernel(
    written_ptr,  # [rows, N], rows any distance apart
    temperature_ptr,  # [rows] float32, where TEMPERED
    keys_ptr,  # [rows] int64, where NOISE
    ids_ptr,  # [N] int64, where NAMED
    least_ptr,  # [rows] float32, where KEEP
    scores_ptr,  # [BEST, rows, blocks] float32
    logits_ptr,  # [BEST, rows, blocks] float32
    columns_ptr,  # [BEST, rows, blocks] int32
    sums_ptr,  # [2, rows, blocks] float32; [4, rows, blocks] where RANKED
    rows,
    stride,
    N: tl.constexpr,
    BEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TEMPERED: tl.constexpr,
    NOISE: tl.constexpr,
    NAMED: tl.constexpr,
    RANKED: tl.constexpr,
    KEEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """What a block of the vocabulary says to one row."""
    block, blocks = tl.program_id(1), tl.num_programs(1)
    row, line = tl.program_id(0) + tl.arange(0, 1), block * BLOCK_N + tl.arange(0, BLOCK_N)
    settled(PDL)
    at = written_ptr + tl.program_id(0).to(tl.int64) * stride + line
    logits = tl.load(at, mask=line < N, other=0.0).to(tl.float32)[:, None]
    _say(
        logits, block, blocks, line, row, rows, temperature_ptr, keys_ptr, ids_ptr, least_ptr, scores_ptr,
        logits_ptr, columns_ptr, sums_ptr, N, BEST, BLOCK_N, TEMPERED, NOISE, NAMED, RANKED, KEEP,
    )  # fmt: skip


@triton.jit
def _joined(sums_ptr, at, step, there):
    """Logarithm of all blocks' sums of exponentials."""
    largest = tl.load(sums_ptr + at, mask=there, other=float("-inf"))
    totals = tl.load(sums_ptr + step + at, mask=there, other=0.0)
    base = tl.max(largest, 0)
    base = tl.where(base == float("-inf"), 0.0, base)
    return base + tl.log(tl.sum(totals * tl.exp(largest - base), 0))


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    scores_ptr,  # [BEST, rows, BLOCKS] float32, the best of a block first
    logits_ptr,  # [BEST, rows, BLOCKS] float32
    columns_ptr,  # [BEST, rows, BLOCKS] int32
    sums_ptr,  # [2, rows, BLOCKS] float32; [4, rows, BLOCKS] where RANKED
    column_ptr,  # [rows, BEST] int64
    score_ptr,  # [rows, BEST] float32
    logit_ptr,  # [rows, BEST] float32
    total_ptr,  # [rows] float32
    score_total_ptr,  # [rows] float32, where RANKED
    finite_ptr,  # [rows] bool
    rows,
    BEST: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the sorted lists of a row's blocks; among equals the block that comes first wins."""
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there, at = block < BLOCKS, row * BLOCKS + block
    step = rows.to(tl.int64) * BLOCKS
    settled(PDL)
    total = _joined(sums_ptr, at, step, there)
    tl.store(total_ptr + row, total)
    tl.store(finite_ptr + row, total == total)
    if RANKED:
        tl.store(score_total_ptr + row, _joined(sums_ptr + 2 * step, at, step, there))
    heads = tl.load(scores_ptr + at, mask=there, other=float("-inf"))
    taken = tl.zeros([WIDTH], tl.int32)
    for rank in tl.static_range(BEST):
        best, winner = tl.max(heads, 0, return_indices=True, return_indices_tie_break_left=True)
        mine = block == winner
        place = tl.sum(tl.where(mine, taken, 0), 0)
        source = place.to(tl.int64) * step + row * BLOCKS + winner
        tl.store(score_ptr + row * BEST + rank, tl.where(best > LOWEST, best, float("-inf")))
        tl.store(logit_ptr + row * BEST + rank, tl.load(logits_ptr + source))
        tl.store(column_ptr + row * BEST + rank, tl.load(columns_ptr + source).to(tl.int64))
        following = tl.load(scores_ptr + source + step, mask=place + 1 < BEST, other=float("-inf"))
        heads = tl.where(mine, following, heads)
        taken += mine.to(tl.int32)


def launch_read(x: Tensor, weight: Tensor, asked: Asked, config: Config, behind: Behind | None = None) -> Readout:
    """What `asked` of the logits x W^T: x [N, H], rows any distance apart, weight [V, H] of its type -> Readout.

    `config.split` must be 1; fewer of its stages are taken where shared memory is short. `behind` is fetched while
    this ends.
    """
    rows, (n, k) = x.shape[0], weight.shape
    tile = min(tile_of(rows), LARGEST_TILE)
    config = fitted(config, tile, x.element_size(), _room(x.device))
    if rows == 0:
        return _empty_readout(rows, asked, x.device)
    w_blocks = _descriptor(weight, config)
    parts = _parts(rows, triton.cdiv(n, config.block_n), asked, x.device)
    inputs, kinds = _asked(asked, x)
    read_kernel[(triton.cdiv(rows, tile), parts.blocks)](
        x, weight, weight if w_blocks is None else w_blocks, *inputs, *parts, rows, x.stride(0),
        N=n, K=k, BEST=asked.best, BLOCK_N=config.block_n, BLOCK_K=config.block_k, TILE=tile, STAGES=config.stages,
        **kinds, TMA=w_blocks is not None, num_warps=config.warps,
        **asking(config, config.block_n, parts.blocks, x, behind),
    )  # fmt: skip
    return _merged(parts, asked, 8, dependent(config.pdl, x))


def launch_written(
    logits: Tensor, asked: Asked, least: Tensor | None = None, pdl: bool = False, block: int = WRITTEN
) -> Readout:
    """What `asked` of logits [N, V] of any type, rows any distance apart -> Readout.

    `least` [N] or [N, 1] float32 are the least values that `asked.keep` keeps, which has to be None where that is.
    The logits are taken as they were written: rounded to their type, as `launch_read` rounds its own, but of sums in
    the order of whoever multiplied. A row's answer follows from that row alone.
    """
    rows, n = logits.shape
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if rows == 0:
        return _empty_readout(rows, asked, logits.device)
    parts = _parts(rows, triton.cdiv(n, block), asked, logits.device)
    inputs, kinds = _asked(asked, logits)
    options = dependent(pdl, logits)
    written_kernel[(rows, parts.blocks)](
        logits, *inputs, logits if least is None else least.contiguous(), *parts, rows, logits.stride(0),
        N=n, BEST=asked.best, BLOCK_N=block, **kinds, KEEP=least is not None, num_warps=4, **options,
    )  # fmt: skip
    return _merged(parts, asked, 2, options)


class _Parts(NamedTuple):
    """What the blocks of the vocabulary say, to be merged."""

    scores: Tensor  # [best, N, blocks] float32
    logits: Tensor  # [best, N, blocks] float32
    columns: Tensor  # [best, N, blocks] int32
    sums: Tensor  # [2, N, blocks] float32, [4, N, blocks] where ranked

    @property
    def blocks(self) -> int:
        return self.scores.shape[2]


def _parts(rows: int, blocks: int, asked: Asked, device: torch.device) -> _Parts:
    best = asked.best
    reals = torch.empty(2 * best + (4 if asked.ranked else 2), rows, blocks, dtype=torch.float32, device=device)
    columns = torch.empty(best, rows, blocks, dtype=torch.int32, device=device)
    return _Parts(reals[:best], reals[best : 2 * best], columns, reals[2 * best :])


def _asked(asked: Asked, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, bool]]:
    """The question as both kernels take it: tensors, `x` in place of those that are not read, and what is in it."""
    tempered, named = asked.temperature is not None, asked.ids is not None
    noise = tempered and asked.keys is not None
    given = ((asked.temperature, tempered), (asked.keys, noise), (asked.ids, named))
    inputs = tuple(values if there and values is not None else x for values, there in given)
    return inputs, {"TEMPERED": tempered, "NOISE": noise, "NAMED": named, "RANKED": asked.ranked}  # type: ignore[return-value]


def _merged(parts: _Parts, asked: Asked, warps: int, options: dict[str, bool]) -> Readout:
    _, rows, blocks = parts.scores.shape
    out = _empty_readout(rows, asked, parts.scores.device)
    merge_kernel[(rows,)](
        *parts, out.columns, out.scores, out.logits, out.total,
        out.total if out.score_total is None else out.score_total, out.finite, rows, BEST=asked.best, BLOCKS=blocks,
        WIDTH=triton.next_power_of_2(blocks), RANKED=asked.ranked, num_warps=warps, **options,
    )  # fmt: skip
    return out


def _empty_readout(rows: int, asked: Asked, device: torch.device) -> Readout:
    reals = torch.empty(2, rows, asked.best, dtype=torch.float32, device=device)
    totals = torch.empty(2 if asked.ranked else 1, rows, dtype=torch.float32, device=device)
    return Readout(
        columns=torch.empty(rows, asked.best, dtype=torch.int64, device=device),
        scores=reals[0],
        logits=reals[1],
        total=totals[0],
        score_total=totals[1] if asked.ranked else None,
        finite=torch.empty(rows, dtype=torch.bool, device=device),
    )
