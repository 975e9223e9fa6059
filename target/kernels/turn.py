"""Triton kernel of rotary tables: cos and sin of given positions in one launch instead of ten.

Owns: device code and its launch. Must never know layers or how frequencies are scaled; `target.rope.Rope` is its twin.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from target.kernels.dependent import dependent, settled


@triton.jit(do_not_specialize=["count"])
def turn_kernel(
    positions_ptr,  # [N] int64
    inverse_ptr,  # [HALF] float32
    out_ptr,  # [2, N, 2 * HALF]: cos, then sin
    amplitude,
    count,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The two members of a pair have one angle; the sin of the first is negated."""
    row, pair = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = pair < HALF
    inverse = tl.load(inverse_ptr + pair, mask=inside, other=0.0)
    settled(PDL)
    angle = tl.load(positions_ptr + row).to(tl.float32) * inverse
    cos = (tl.cos(angle) * amplitude).to(out_ptr.dtype.element_ty)
    sin = tl.sin(angle) * amplitude
    first = row * 2 * HALF + (2 * pair if PAIRS else pair)
    second = first + (1 if PAIRS else HALF)
    tl.store(out_ptr + first, cos, mask=inside)
    tl.store(out_ptr + second, cos, mask=inside)
    out_ptr += count.to(tl.int64) * 2 * HALF
    tl.store(out_ptr + first, (-sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + second, sin.to(out_ptr.dtype.element_ty), mask=inside)


def launch_turn(
    positions: Tensor, inverse: Tensor, amplitude: float, interleaved: bool, dtype: torch.dtype, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """positions [...] int64, inverse frequencies [dim / 2] float32 -> cos, sin [..., 1, dim] of `dtype`."""
    half, count = inverse.shape[0], positions.numel()
    out = torch.empty(2, *positions.shape, 1, 2 * half, dtype=dtype, device=positions.device)
    if count:
        turn_kernel[(count,)](
            positions.contiguous(), inverse, out, amplitude, count,
            HALF=half, WIDTH=triton.next_power_of_2(half), PAIRS=interleaved, num_warps=1,
            **dependent(pdl, out),
        )  # fmt: skip
    return out[0], out[1]
