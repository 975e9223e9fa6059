"""A Triton kernel that stores a number: whether triton can compile and launch on a device at all.

Owns: that question. Must never know what else would run. A machine may have the package and lack a C compiler, the
headers of Python, or a driver that takes the compiler's output; each shows only when a kernel is launched.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

import torch
import triton
import triton.language as tl

STORED = tl.constexpr(7)


@triton.jit
def trial_kernel(out_ptr):
    tl.store(out_ptr, STORED)


def refusal(device: torch.device) -> str:
    """Why no kernel runs on a device, in one line; empty where one does. Waits for the device."""
    try:
        out = torch.zeros(1, dtype=torch.int32, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
            trial_kernel[(1,)](out)
        return "" if out.item() == STORED.value else "a kernel that stored nothing"
    except Exception as error:  # compilers, linkers and drivers raise what they like
        return (str(error).splitlines() or [type(error).__name__])[0]
