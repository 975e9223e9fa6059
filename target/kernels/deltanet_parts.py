"""Triton kernels of what lies around the gated delta rule: its rows out of a product, its gates, the norm after it.

Owns: device code and its launches. Must never know layers or who holds a slot. The oracles are `target.deltanet`'s
`delta_rows` and the torch pieces of `target.layers`. A program has a token to itself, or one head of a token, so its
bits depend on nothing else that shares the launch.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from target.deltanet import NORM_EPS, DeltaInputs, DeltaRows
from target.kernels.dependent import dependent, settled


@triton.jit(do_not_specialize=["tokens", "mixed_row", "mixed_token"])
def rows_kernel(
    mixed_ptr,  # [R, T, channels], any strides in R and T
    past_ptr,  # [slots, KERNEL - 1, channels]
    slots_ptr,  # [R] int64
    conv_ptr,  # [channels, KERNEL]
    q_ptr,  # [R, T, KEY_HEADS, KEYS] float32, as k
    k_ptr,
    v_ptr,  # [R, T, HEADS, VALUES] float32
    window_ptr,  # [R, KERNEL - 1 + T, channels]
    tokens,
    mixed_row,
    mixed_token,
    eps,
    scale,
    KEY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KERNEL: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token and one head, queries first, then keys, then values: convolved, silu, queries and keys of length 1."""
    PAST: tl.constexpr = KERNEL - 1
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * KEYS + HEADS * VALUES
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, t = token // tokens, token % tokens
    of_values = head >= 2 * KEY_HEADS
    first = tl.where(of_values, 2 * KEY_HEADS * KEYS + (head - 2 * KEY_HEADS) * VALUES, head * KEYS)
    column = tl.arange(0, WIDTH)
    inside = column < tl.where(of_values, VALUES, KEYS)
    channel = first + column
    settled(PDL)
    past = past_ptr + tl.load(slots_ptr + row) * PAST * CHANNELS + channel
    mixed = mixed_ptr + row * mixed_row + channel
    window = window_ptr + row * (PAST + tokens) * CHANNELS + channel
    total = tl.zeros((WIDTH,), tl.float32)
    for tap in tl.static_range(KERNEL):
        at = t + tap - PAST
        new = tl.load(mixed + at * mixed_token, mask=inside & (at >= 0), other=0.0)
        old = tl.load(past + (at + PAST) * CHANNELS, mask=inside & (at < 0), other=0.0)
        x = tl.where(at >= 0, new, old)
        weight = tl.load(conv_ptr + channel * KERNEL + tap, mask=inside, other=0.0)
        total += x.to(tl.float32) * weight.to(tl.float32)
        if tap == PAST:
            tl.store(window + (t + PAST) * CHANNELS, x, mask=inside)
        else:
            tl.store(window + tap * CHANNELS, x, mask=inside & (t == 0))
    out = total / (1.0 + tl.exp(-total))
    if of_values:
        tl.store(v_ptr + (token * HEADS + head - 2 * KEY_HEADS) * VALUES + column, out, mask=inside)
    else:
        unit = out * tl.rsqrt(tl.sum(out * out, 0) + eps)
        if head < KEY_HEADS:
            tl.store(q_ptr + (token * KEY_HEADS + head) * KEYS + column, unit * scale, mask=inside)
        else:
            tl.store(k_ptr + (token * KEY_HEADS + head - KEY_HEADS) * KEYS + column, unit, mask=inside)


def launch_rows(inputs: DeltaInputs, windows: Tensor, slots: Tensor, pdl: bool = False) -> tuple[Tensor, DeltaRows]:
    """`delta_rows` of `inputs` after the inputs in `slots` [R] of windows [slots, kernel - 1, channels]."""
    s, mixed = inputs.sizes, inputs.mixed if inputs.mixed.stride(-1) == 1 else inputs.mixed.contiguous()
    count, length = mixed.shape[:2]
    q, k = (mixed.new_empty(count, length, s.key_heads, s.key_dim, dtype=torch.float32) for _ in range(2))
    v = mixed.new_empty(count, length, s.value_heads, s.value_dim, dtype=torch.float32)
    window = mixed.new_empty(count, s.kernel - 1 + length, s.channels)
    rows_kernel[(count * length, 2 * s.key_heads + s.value_heads)](
        mixed, windows, slots, inputs.conv.contiguous(), q, k, v, window, length, mixed.stride(0), mixed.stride(1),
        NORM_EPS, s.key_dim**-0.5, KEY_HEADS=s.key_heads, HEADS=s.value_heads, KEYS=s.key_dim, VALUES=s.value_dim,
        KERNEL=s.kernel, WIDTH=triton.next_power_of_2(max(s.key_dim, s.value_dim)), num_warps=1,
        **dependent(pdl, mixed),
    )  # fmt: skip
    return q, DeltaRows(window, k, v, inputs.decay, inputs.beta)


@triton.jit(do_not_specialize=["b_token", "a_token"])
def gates_kernel(
    b_ptr,  # [N, HEADS], tokens any distance apart, as a
    a_ptr,
    a_log_ptr,  # [HEADS] float32, as the bias
    bias_ptr,
    decay_ptr,  # [N, HEADS] float32, as beta
    beta_ptr,
    b_token,
    a_token,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """decay = exp(-exp(a_log) * softplus(a + bias)), beta = sigmoid(b) of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = head < HEADS
    rate = tl.exp(tl.load(a_log_ptr + head, mask=inside, other=0.0))
    bias = tl.load(bias_ptr + head, mask=inside, other=0.0)
    settled(PDL)
    a = tl.load(a_ptr + token * a_token + head, mask=inside, other=0.0).to(tl.float32) + bias
    b = tl.load(b_ptr + token * b_token + head, mask=inside, other=0.0).to(tl.float32)
    soft = tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))
    tl.store(decay_ptr + token * HEADS + head, tl.exp(-rate * soft), mask=inside)
    tl.store(beta_ptr + token * HEADS + head, 1.0 / (1.0 + tl.exp(-b)), mask=inside)


def launch_gates(b: Tensor, a: Tensor, a_log: Tensor, bias: Tensor, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """b and a [..., heads], a_log and bias [heads] float32 -> decay and beta [..., heads] float32."""
    heads = b.shape[-1]
    decay, beta = (torch.empty(b.shape, dtype=torch.float32, device=b.device) for _ in range(2))
    b, a = (x if x.stride(-1) == 1 else x.contiguous() for x in (b.flatten(0, -2), a.flatten(0, -2)))
    gates_kernel[(b.shape[0],)](
        b, a, a_log, bias, decay, beta, b.stride(0), a.stride(0), HEADS=heads, WIDTH=triton.next_power_of_2(heads),
        num_warps=1, **dependent(pdl, b),
    )  # fmt: skip
    return decay, beta


@triton.jit(do_not_specialize=["gate_token"])
def gated_norm_kernel(
    x_ptr,  # [N, HEADS, SIZE] float32
    gate_ptr,  # [N, HEADS, SIZE], tokens any distance apart
    weight_ptr,  # [SIZE]
    out_ptr,  # [N, HEADS, SIZE] of the gate's type
    gate_token,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """x / rms(x) * weight * silu(gate) of one head; rounds where torch rounds."""
    token, head, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WIDTH)
    inside = column < SIZE
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    settled(PDL)
    at = (token * HEADS + head) * SIZE + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + token * gate_token + head * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)).to(dtype).to(tl.float32)
    weighed = (weight * normed).to(dtype).to(tl.float32)
    tl.store(out_ptr + at, (weighed * (gate / (1.0 + tl.exp(-gate)))).to(dtype), mask=inside)


def launch_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, pdl: bool = False) -> Tensor:
    """x [..., heads, size] float32, gate of one shape -> [..., heads, size] of the gate's type."""
    heads, size = x.shape[-2:]
    gates = gate.flatten(0, -3)
    gates = gates if gates.stride()[1:] == (size, 1) else gates.contiguous()
    out = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    gated_norm_kernel[(gates.shape[0], heads)](
        x.contiguous(), gates, weight, out, gates.stride(0), eps, HEADS=heads, SIZE=size,
        WIDTH=triton.next_power_of_2(size), num_warps=1, **dependent(pdl, x),
    )  # fmt: skip
    return out
