"""Triton kernel of the gated delta rule: a whole pass of every sequence in one launch, states read and moved by slot.

Owns: device code and its launch. Must never know layers or who holds a slot. `target.states.TorchRule` is its oracle.

A program holds a tile of one matrix, all its keys and BLOCK values, in the registers of one warp, and goes over the
tokens. There is one variant for reading and for committing, whatever the number of tokens: what a commit writes are the
bits that decoding token by token writes (ReplaySSM's way). A verify pass reads each state once; its commit reads it
again and writes it.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from target.deltanet import DeltaInputs, DeltaRows
from target.kernels.deltanet_parts import launch_rows
from target.kernels.dependent import dependent, settled

LARGEST_BLOCK = 16  # values of a tile: 64 registers a thread hold it beside 128 keys


@triton.jit(do_not_specialize=["tokens", "counted", "writes", "v_row", "v_token"])
def rule_kernel(
    store_ptr,  # [slots, heads, KEYS, VALUES] float32
    slots_ptr,  # [R] int64
    q_ptr,  # [R, T, key heads, KEYS] float32, as k
    k_ptr,
    v_ptr,  # [R, T, heads, VALUES] float32, any strides in R and T
    decay_ptr,  # [R, T, heads] float32, as beta
    beta_ptr,
    counts_ptr,  # [R] int64, read where `counted`
    out_ptr,  # [R, T, heads, VALUES] float32
    end_ptr,  # [R or slots, heads, KEYS, VALUES] float32, written where `writes` is not 0
    tokens,
    counted,
    writes,  # 1: row r of `end`, 2: the slot of row r, unless nothing is counted
    v_row,
    v_token,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEYS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row, head and block of values; results past the counted tokens are 0."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key = tl.arange(0, KEYS_PAD)
    value = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    here = value < VALUES
    tile = key[:, None] * VALUES + value
    inside = (key < KEYS)[:, None] & here
    settled(PDL)
    slot = tl.load(slots_ptr + row)
    state = tl.load(store_ptr + (slot * HEADS + head) * KEYS * VALUES + tile, mask=inside, other=0.0)
    limit = tokens
    if counted:
        limit = tl.load(counts_ptr + row).to(tl.int32)
    for t in range(tokens):
        at = (row * tokens + t) * HEADS + head
        result = tl.zeros((BLOCK,), tl.float32)
        if t < limit:
            side = ((row * tokens + t) * (HEADS // RATIO) + head // RATIO) * KEYS + key
            k = tl.load(k_ptr + side, mask=key < KEYS, other=0.0)[:, None]
            q = tl.load(q_ptr + side, mask=key < KEYS, other=0.0)[:, None]
            v = tl.load(v_ptr + row * v_row + t * v_token + head * VALUES + value, mask=here, other=0.0)
            kept = state * tl.load(decay_ptr + at)
            error = (v - tl.sum(kept * k, axis=0)) * tl.load(beta_ptr + at)
            state = kept + k * error[None, :]
            result = tl.sum(state * q, axis=0)
        tl.store(out_ptr + at * VALUES + value, result, mask=here)
    if writes == 1:
        tl.store(end_ptr + (row * HEADS + head) * KEYS * VALUES + tile, state, mask=inside)
    if writes == 2 and limit > 0:
        tl.store(end_ptr + (slot * HEADS + head) * KEYS * VALUES + tile, state, mask=inside)


class TritonRule:
    """`target.states.Rule` in one launch each; with `pdl` they begin while the launch before still ends."""

    def __init__(self, pdl: bool = False) -> None:
        self.pdl = pdl

    def rows(self, inputs: DeltaInputs, windows: Tensor, slots: Tensor) -> tuple[Tensor, DeltaRows]:
        return launch_rows(inputs, windows, slots, self.pdl)

    def read(
        self, store: Tensor, slots: Tensor, q: Tensor, rows: DeltaRows, counts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if counts is None:
            return _launch(store, slots, q, rows, None, store, 0, self.pdl), None
        end = store.new_empty(len(slots), *store.shape[1:])
        return _launch(store, slots, q, rows, counts, end, 1, self.pdl), end

    def replay(self, store: Tensor, slots: Tensor, rows: DeltaRows, counts: Tensor) -> None:
        _launch(store, slots, rows.k, rows, counts, store, 2, self.pdl)


def _launch(
    store: Tensor, slots: Tensor, q: Tensor, rows: DeltaRows, counts: Tensor | None, end: Tensor, writes: int, pdl: bool
) -> Tensor:
    """The results [R, T, heads, VALUES]; those of a replay answer the keys, and nobody reads them."""
    heads, keys, values = store.shape[1:]
    length, v = rows.v.shape[1], _unit_heads(rows.v)
    out = torch.empty(len(slots), length, heads, values, dtype=torch.float32, device=store.device)
    block = min(LARGEST_BLOCK, triton.next_power_of_2(values))
    rule_kernel[(len(slots), heads, triton.cdiv(values, block))](
        store, slots, q.contiguous(), rows.k.contiguous(), v, rows.decay.contiguous(), rows.beta.contiguous(),
        slots if counts is None else counts, out, end,
        length, int(counts is not None), writes, v.stride(0), v.stride(1),
        HEADS=heads, RATIO=heads // rows.k.shape[2], KEYS=keys, VALUES=values,
        KEYS_PAD=triton.next_power_of_2(keys), BLOCK=block, num_warps=1, **dependent(pdl, store),
    )  # fmt: skip
    return out


def _unit_heads(v: Tensor) -> Tensor:
    """Values whose heads lie side by side."""
    return v if v.stride(-1) == 1 and v.stride(-2) == v.shape[-1] else v.contiguous()
