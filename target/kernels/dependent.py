"""What kernels do at their ends, so that memory is never idle: ask for weights, wait, let the next one begin.

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

Where one product ends and the next begins no weights are on their way for microseconds, and attention streams hardly
any. So a product whose own last weights are on their way has the first ones of the product after it brought into the
L2 cache: every program those of some rows, one request of the copy engine for each. It is a hint: no bit changes.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from target.pdl import pdl_possible
from target.products import Behind, Config

LAST_WAVE = tl.constexpr(256)  # programs: about those that a large device runs at once
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
def last_block(begin, end, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The block of a loop from `begin` to `end` while which its last one is asked for."""
    return begin + tl.maximum((end - begin + BLOCK - 1) // BLOCK - STAGES, 0) * BLOCK


@triton.jit
def part_of(program, programs):
    """The number of a program among those that run last; below 0 for the others, whose requests would be too early."""
    return program - tl.maximum(programs - LAST_WAVE, 0)


@triton.jit
def ask_behind(
    asks, part, next_ptr, ROWS: tl.constexpr, RUN: tl.constexpr, BYTES: tl.constexpr, EACH: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """Program number `part`, if it `asks`, has the first BYTES of EACH rows of the next weights fetched.

    next_ptr [ROWS, RUN]. No branch, as in `release`; threads that hold the same row again stay silent.
    """
    if BYTES > 0:
        own = tl.arange(0, PAD)
        row = part * EACH + own
        wanted = (asks & (part >= 0) & (own < EACH) & (row < ROWS)).to(tl.int32)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.s32 p, t, $4; setp.ne.and.s32 p, $2, 0, p;"
            " @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }", "=r,l,r,r,r",
            [next_ptr + row.to(tl.int64) * RUN, wanted, tl.full([PAD], BYTES, tl.int32), tl.full([PAD], PAD, tl.int32)],
            tl.int32, False, 1,
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


def asking(config: Config, lines: int, programs: int, x: Tensor, behind: Behind | None) -> dict[str, Any]:
    """`dependent` for a kernel of so many programs of which each asks for `lines` rows of its own weights."""
    options = dependent(config.pdl, x)
    ahead = columns_ahead(config.ahead, lines, x.element_size()) if options["PDL"] else 0
    return {"AHEAD": ahead, **_asking_behind(behind, programs, x), **options}


def _asking_behind(behind: Behind | None, programs: int, x: Tensor) -> dict[str, Any]:
    rows, run, size = (0, 0, 0) if behind is None or not _has_engine(x.device) else _requests(behind)
    if behind is None or not size:
        return _named(x, 0, 0, 0, 0, 1)
    each = triton.cdiv(rows, min(programs, LAST_WAVE.value))
    return _named(behind.weight, rows, run, size, each, max(32, triton.next_power_of_2(each)))


def _named(weight: Tensor, rows: int, run: int, size: int, each: int, pad: int) -> dict[str, Any]:
    sizes = {"NEXT_ROWS": rows, "NEXT_RUN": run, "NEXT_BYTES": size, "NEXT_EACH": each, "NEXT_PAD": pad}
    return {"next_ptr": weight, **sizes}


def _requests(behind: Behind) -> tuple[int, int, int]:
    """How many stretches of the weights programs begin at, values from one to the next, bytes to ask for of each."""
    n, k = behind.weight.shape
    runs = behind.runs if k % behind.runs == 0 else 1
    rows, run, itemsize = n * runs, k // runs, behind.weight.element_size()
    sound = behind.weight.data_ptr() % 16 == 0 and run * itemsize % 16 == 0  # as the copy engine asks for
    return rows, run, min(behind.size // rows, run * itemsize) // LINE_BYTES * LINE_BYTES if sound else 0


@lru_cache(maxsize=16)
def _has_engine(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def columns_ahead(kib: int, lines: int, itemsize: int) -> int:
    """Columns of `lines` rows that `kib` KiB hold, a power of two; 0 where they are less than a request."""
    columns = (kib << 10) // (lines * itemsize)
    return 1 << (columns.bit_length() - 1) if columns * itemsize >= LINE_BYTES else 0
