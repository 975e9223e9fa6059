"""A Triton kernel that finds the least value of a row that top-k, top-p and min-p keep, without sorting the row.

Owns: device code and its launch. Must never know what is asked about the values that are kept.

`speculator.sampling.lowest_kept` is the twin. Every filter keeps what is at least some value of the row, and what that
value is follows from sums over all that is at least a candidate: how many there are, or their exponentials. The bits of
a logit order as a whole number, two of which are settled by each pass over the row. A program has a row to itself, and
nothing in it depends on other rows. Exponentials are float32 and blocks' sums of them too, sums over blocks float64: a
nucleus may end one value apart from the twin's where its mass is within about 1e-6 of what is wanted.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from target.kernels.dependent import dependent, settled

BLOCK = 4096  # logits that a program reads at once
STAGES = 4  # blocks on their way while one is looked at


@triton.jit
def _order(bits, BITS: tl.constexpr):
    """Whole numbers in the order of the real ones whose `bits` these are, as signed numbers; its own inverse."""
    return bits ^ ((bits >> (BITS - 1)) & ((1 << (BITS - 1)) - 1))


@triton.jit
def _value(place, dtype: tl.constexpr, BITS: tl.constexpr, divisor):
    """The value of the logit at a place [1] of the order."""
    bits = _order(place, BITS)
    bits = bits.to(tl.int16) if BITS == 16 else bits
    return tl.math.div_rn(bits.to(dtype, bitcast=True).to(tl.float32), divisor)


@triton.jit
def _read(row_ptr, begin, N: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Logits [BLOCK], their places in the order, and which count: no NaN does."""
    column = begin + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + column, mask=column < N, other=float("-inf"))
    bits = logits.to(tl.int16 if BITS == 16 else tl.int32, bitcast=True).to(tl.int32)
    logits = logits.to(tl.float32)
    return logits, _order(bits, BITS), (column < N) & (logits == logits)


@triton.jit
def _last(
    row_ptr, wanted, divisor, best,
    N: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, STAGES: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The highest place such that all from there on are `wanted`, as a count or as exponentials below `best`."""
    edge = tl.arange(0, 4)
    low = tl.full([1], -(2 ** (BITS - 1)), tl.int32)
    step = tl.full([1], 2 ** (BITS - 2), tl.int32)
    for _ in range(BITS // 2):
        found = tl.zeros([4], tl.float64)
        for begin in tl.range(0, N, BLOCK, num_stages=STAGES):
            logits, place, there = _read(row_ptr, begin, N, BLOCK, BITS)
            weight = tl.where(there, 1.0, 0.0)
            if not COUNT:
                weight = tl.where(there, tl.exp(tl.math.div_rn(logits, divisor + tl.zeros_like(logits)) - best), 0.0)
            above = place[None, :] >= (low + step * edge)[:, None]
            found += tl.sum(tl.where(above, weight[None, :], 0.0), 1).to(tl.float64)
        low += step * tl.sum(((found >= wanted) & (edge > 0)).to(tl.int32), 0)
        step = step >> 2
    return low


@triton.jit
def floor_kernel(
    logits_ptr,  # [rows, N], rows any distance apart
    temperature_ptr,  # [rows] float32
    top_k_ptr,  # [rows // EACH] int64, 0 is off
    top_p_ptr,  # [rows // EACH] float32, 1 is off
    ratio_ptr,  # [rows // EACH] float32, the logarithm of min-p
    floor_ptr,  # [rows] float32
    stride,
    N: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    settled(PDL)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    dtype = logits_ptr.dtype.element_ty
    one = tl.zeros([1], tl.int32) + row
    temperature, owner = tl.load(temperature_ptr + one), one // EACH
    divisor = tl.where(temperature > 0, temperature, 1.0)
    top_k, top_p = tl.load(top_k_ptr + owner), tl.load(top_p_ptr + owner)
    ranked_k, ranked_p = tl.max(top_k, 0) > 0, tl.min(top_p, 0) < 1
    best = tl.full([1], float("-inf"), tl.float32)
    for begin in tl.range(0, N, BLOCK, num_stages=STAGES):
        logits, _, there = _read(row_ptr, begin, N, BLOCK, BITS)
        best = tl.maximum(best, tl.max(tl.where(there, logits, float("-inf")), 0))
    best = tl.math.div_rn(best, divisor)
    floor = best + tl.load(ratio_ptr + owner)
    last = tl.full([1], -(2 ** (BITS - 1)), tl.int32)
    limit = tl.where(top_k > 0, tl.minimum(top_k, N), N).to(tl.float64)
    if ranked_k:
        last = _last(row_ptr, limit, divisor, best, N, BLOCK, BITS, STAGES, True)
        floor = tl.maximum(floor, _value(last, dtype, BITS, divisor))
    if ranked_p:
        count, mass = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
        for begin in tl.range(0, N, BLOCK, num_stages=STAGES):
            logits, place, there = _read(row_ptr, begin, N, BLOCK, BITS)
            weight = tl.exp(tl.math.div_rn(logits, divisor + tl.zeros_like(logits)) - best)
            above = there & (place > last)
            count += tl.sum(tl.where(above, 1.0, 0.0), 0).to(tl.float64)
            mass += tl.sum(tl.where(above, weight, 0.0), 0).to(tl.float64)
        if ranked_k:  # of several that tie with the last of the best, so many are among them
            mass += (limit - count) * tl.exp(_value(last, dtype, BITS, divisor) - best).to(tl.float64)
        wanted = tl.maximum(mass * top_p.to(tl.float64), 1e-300)  # of the best one something, were top-p to round to 0
        last = _last(row_ptr, wanted, divisor, best, N, BLOCK, BITS, STAGES, False)
        floor = tl.maximum(floor, _value(last, dtype, BITS, divisor))
    tl.store(floor_ptr + one, floor)


def launch_floor(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor, top_p: Tensor, ratio: Tensor, each: int,
    pdl: bool = False, block: int = BLOCK,
) -> Tensor:  # fmt: skip
    """The least values [N, 1] float32 kept of logits [N, V] / temperature [N], of which `each` in turn share a filter.

    top_k [N / each] int64, 0 is off; top_p [N / each] float32, 1 is off; ratio [N / each] float32 is the least that a
    kept value may be above the best one. Values that tie with the last one kept are kept. Where NaN is among a row's
    logits, what its floor is means nothing.
    """
    rows, n = logits.shape
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if temperature is None:
        temperature = torch.zeros(rows, dtype=torch.float32, device=logits.device)
    floor = torch.empty(rows, 1, dtype=torch.float32, device=logits.device)
    if rows:
        floor_kernel[(rows,)](
            logits, temperature, top_k, top_p, ratio, floor, logits.stride(0), N=n, EACH=each, BLOCK=block,
            BITS=8 * logits.element_size(), STAGES=STAGES, num_warps=16, **dependent(pdl, logits),
        )  # fmt: skip
    return floor
