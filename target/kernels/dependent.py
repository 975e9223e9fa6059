"""What kernels under programmatic dependent launch do at their ends: ask for weights, wait, let the next one begin.

Owns: these device functions and the launch option. Must never know what is computed.

The rules that make it sound (CUDA C++ Programming Guide, "Programmatic Dependent Launch"; PTX `griddepcontrol`):
- Every kernel that is launched so waits, in every program, before it reads what an earlier launch may have written and
  before it writes anything. A launch that has ended then says the same of all launches before it, so a kernel need not
  know who wrote its inputs, and memory that is used again is safe.
- Before the wait only weights are touched, and those must not be written by the launch just before. Page tables,
  lengths and tokens are not constants: a round writes them on the device.
- Letting the next launch begin promises nothing about results, since that one waits as well. It is a matter of speed:
  after the own wait, so that no more than one launch asks for its weights ahead; a kernel that streams weights does it
  when its last ones are on their way, since those of the next launch would be driven out of the L2 cache again.
- A launch without the option waits for all before it, and may stand anywhere between.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from target.pdl import pdl_possible
from target.products import Config

LINE_BYTES = 64  # that one request brings into the L2 cache for certain


@triton.jit
def wait(PDL: tl.constexpr):
    """From here on everything of earlier launches can be read and anything written."""
    if PDL:
        cuda.gdc_wait()


@triton.jit
def settled(PDL: tl.constexpr):
    """`wait`, and the next launch may begin: for kernels that ask for no weights."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def ask_for(w_row, used, begin, end, AHEAD: tl.constexpr, PDL: tl.constexpr):
    """Have columns `begin` to `begin` + AHEAD, before `end`, fetched into the L2 cache; nothing waits for them.

    w_row [BLOCK_N, 1] are pointers to rows of weights, used [BLOCK_N] says which there are.
    """
    LINE: tl.constexpr = 512 // w_row.dtype.element_ty.primitive_bitwidth  # values of LINE_BYTES
    if PDL and AHEAD >= LINE:
        column = begin + tl.arange(0, AHEAD // LINE)[None, :] * LINE
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
            [w_row + column, (used[:, None] & (column < end)).to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def release(block, last, PDL: tl.constexpr):
    """In a loop: let the next launch begin from block `last` on. A branch would take the loop's pipeline apart."""
    if PDL:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ge.s32 p, $1, $2; @p griddepcontrol.launch_dependents; mov.u32 $0, 0; }", "=r,r,r",
            [block, last], tl.int32, False, 1,
        )  # fmt: skip


def dependent(pdl: bool, x: Tensor) -> dict[str, bool]:
    """The options of a launch that waits inside for the one before it; elsewhere than on a device that can, of any."""
    return {"PDL": True, "launch_pdl": True} if pdl and pdl_possible(x.device) else {"PDL": False}


def asking(config: Config, lines: int, x: Tensor) -> dict[str, int | bool]:
    """`dependent` for a kernel whose programs ask for `lines` rows of weights."""
    options = dependent(config.pdl, x)
    return {"AHEAD": columns_ahead(config.ahead, lines, x.element_size()) if options["PDL"] else 0, **options}


def columns_ahead(kib: int, lines: int, itemsize: int) -> int:
    """Columns of `lines` rows that `kib` KiB hold, a power of two; 0 where they are less than a request."""
    columns = (kib << 10) // (lines * itemsize)
    return 1 << (columns.bit_length() - 1) if columns * itemsize >= LINE_BYTES else 0
