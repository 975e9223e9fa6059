"""Triton kernels of the gated delta rule over whole sequences and of its gradient, chunk by chunk in registers.

Owns: device code, its launch, and the two as one operation that autograd and the compiler know. Must never know layers
or documents. `target.deltanet_chunks` is the oracle and says what the names mean.

A program goes over one head of one row, forwards or backwards, with the state or its gradient in registers. Forwards it
leaves the state before each chunk; all else is computed again on the way back. In a chunk, U = T (beta (V - b K S)) is
what its tokens write and b Q S + (D * Q K^T) U what they read, T the inverse of I + L and L = beta D * K K^T below the
diagonal; so the gradient of L is -(T^T dU) U^T there.
"""

# triton reads the annotations of kernels, and its decorators are untyped where it is installed
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16  # more would spill registers: a warp holds the tiles of a chunk beside the state
LEVELS = tl.constexpr(4)  # of blocks up to the size of a chunk
LARGEST = 1 << 12  # keys times values whose state and its gradient fit into the registers of two warps
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta"
FLOOR = tl.constexpr(1e-30)  # as in the oracle
UNSEEN = tl.constexpr(-1e30)


@triton.jit
def _tile(ptr, at, here, SIZE: tl.constexpr):
    """[CHUNK, SIZE] of [R, T, HEADS, SIZE]; `at` [CHUNK] counts tokens and heads."""
    return tl.load(ptr + at[:, None] * SIZE + tl.arange(0, SIZE)[None, :], mask=here[:, None], other=0.0)


@triton.jit
def _put(ptr, at, here, tile, SIZE: tl.constexpr):
    tl.store(ptr + at[:, None] * SIZE + tl.arange(0, SIZE)[None, :], tile, mask=here[:, None])


@triton.jit
def _decays(decay, index):
    """D [SIZE, SIZE], b and what is left of each token at the end [SIZE], what is left of the state, what forgets."""
    forgets = decay < FLOOR
    log = tl.log(tl.where(forgets, 1.0, decay))
    since, past = tl.cumsum(log, 0), tl.cumsum(forgets.to(tl.int32), 0)
    end, ends = tl.sum(log, 0), tl.sum(forgets.to(tl.int32), 0)
    seen = (index[:, None] >= index[None, :]) & (past[:, None] == past[None, :])
    between = tl.exp(tl.where(seen, since[:, None] - since[None, :], UNSEEN))
    before = tl.exp(tl.where(past == 0, since, UNSEEN))
    until = tl.exp(tl.where(past == ends, end - since, UNSEEN))
    left = tl.exp(tl.where(ends == 0, end, UNSEEN))
    return between, before, until, left, forgets


@triton.jit
def _inverse(lower, index):
    """The inverse of I + `lower`, from blocks of one element to blocks of twice the size: T - T B T, B below blocks."""
    inverse = (index[:, None] == index[None, :]).to(tl.float32)
    for level in range(LEVELS):  # not unrolled: that would spill registers
        together = (index[:, None] >> (level + 1)) == (index[None, :] >> (level + 1))
        apart = (index[:, None] >> level) != (index[None, :] >> level)
        below = tl.where(together & apart, lower, 0.0)
        inverse -= tl.dot(inverse, tl.dot(below, inverse, input_precision="tf32x3"), input_precision="tf32x3")
    return inverse


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    q_ptr,  # [R, T, key heads, KEYS] float32, as k
    k_ptr,
    v_ptr,  # [R, T, heads, VALUES] float32
    decay_ptr,  # [R, T, heads] float32, as beta
    beta_ptr,
    out_ptr,  # [R, T, heads, VALUES] float32
    states_ptr,  # [R, heads, N, KEYS, VALUES] float32, before each chunk
    tokens,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One row and head, from its first chunk to its last."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index, chunks = tl.arange(0, SIZE), tl.cdiv(tokens, SIZE)
    cell = tl.arange(0, KEYS)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
    state = tl.zeros((KEYS, VALUES), tl.float32)
    for n in range(chunks):
        tl.store(states_ptr + ((row * HEADS + head) * chunks + n) * KEYS * VALUES + cell, state)
        t = n * SIZE + index
        here = t < tokens
        at = (row * tokens + t) * HEADS + head
        side = (row * tokens + t) * (HEADS // RATIO) + head // RATIO
        q, k = _tile(q_ptr, side, here, KEYS), _tile(k_ptr, side, here, KEYS)
        v = _tile(v_ptr, at, here, VALUES)
        beta = tl.load(beta_ptr + at, mask=here, other=0.0)[:, None]
        between, before, until, left, _ = _decays(tl.load(decay_ptr + at, mask=here, other=1.0), index)
        lower = tl.where(index[:, None] > index[None, :], beta * between * tl.dot(k, tl.trans(k)), 0.0)
        error = beta * (v - before[:, None] * tl.dot(k, state))
        written = tl.dot(_inverse(lower, index), error)
        out = before[:, None] * tl.dot(q, state) + tl.dot(between * tl.dot(q, tl.trans(k)), written)
        _put(out_ptr, at, here, out, VALUES)
        state = left * state + tl.dot(tl.trans(until[:, None] * k), written)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    q_ptr,  # as forwards
    k_ptr,
    v_ptr,
    decay_ptr,
    beta_ptr,
    states_ptr,
    gradient_ptr,  # [R, T, heads, VALUES] float32, of the results
    dq_ptr,  # [R, T, heads, KEYS] float32, as dk: of each value head by itself
    dk_ptr,
    dv_ptr,  # [R, T, heads, VALUES] float32
    ddecay_ptr,  # [R, T, heads] float32, as dbeta
    dbeta_ptr,
    tokens,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One row and head, from its last chunk to its first."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index, chunks = tl.arange(0, SIZE), tl.cdiv(tokens, SIZE)
    cell = tl.arange(0, KEYS)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
    after = tl.zeros((KEYS, VALUES), tl.float32)  # the gradient of the state after the chunk
    for back in range(chunks):
        n = chunks - 1 - back
        state = tl.load(states_ptr + ((row * HEADS + head) * chunks + n) * KEYS * VALUES + cell)
        t = n * SIZE + index
        here = t < tokens
        at = (row * tokens + t) * HEADS + head
        side = (row * tokens + t) * (HEADS // RATIO) + head // RATIO
        q, k = _tile(q_ptr, side, here, KEYS), _tile(k_ptr, side, here, KEYS)
        v, asked = _tile(v_ptr, at, here, VALUES), _tile(gradient_ptr, at, here, VALUES)
        beta = tl.load(beta_ptr + at, mask=here, other=0.0)
        decay = tl.load(decay_ptr + at, mask=here, other=1.0)
        between, before, until, left, forgets = _decays(decay, index)
        below = index[:, None] > index[None, :]
        alike, scores = tl.dot(k, tl.trans(k)), tl.dot(q, tl.trans(k))
        inverse = _inverse(tl.where(below, beta[:, None] * between * alike, 0.0), index)
        recalled = tl.dot(k, state)
        missed = v - before[:, None] * recalled
        written = tl.dot(inverse, beta[:, None] * missed)
        # of what was written, and back through the triangular system
        dwritten = tl.dot(tl.trans(between * scores), asked) + until[:, None] * tl.dot(k, after)
        derror = tl.dot(tl.trans(inverse), dwritten)
        dlower = tl.where(below, -tl.dot(derror, tl.trans(written)), 0.0)
        dv = beta[:, None] * derror
        _put(dv_ptr, at, here, dv, VALUES)
        dbeta = tl.sum(derror * missed, 1) + tl.sum(dlower * between * alike, 1)
        tl.store(dbeta_ptr + at, dbeta, mask=here)
        # of queries and keys
        dseen = tl.dot(asked, tl.trans(written))
        dscores, dalike = dseen * between, dlower * beta[:, None] * between
        dasked = tl.dot(asked, tl.trans(state))
        _put(dq_ptr, at, here, before[:, None] * dasked + tl.dot(dscores, k), KEYS)
        drecalled = -tl.dot(dv, tl.trans(state))
        dleft_behind = tl.dot(written, tl.trans(after))
        dk = tl.dot(tl.trans(dscores), q) + tl.dot(dalike + tl.trans(dalike), k)
        dk += before[:, None] * drecalled + until[:, None] * dleft_behind
        _put(dk_ptr, at, here, dk, KEYS)
        # of decays: every factor is an exponential of sums of logarithms
        moved = between * (dseen * scores + dlower * beta[:, None] * alike)
        since = before * (tl.sum(q * dasked, 1) + tl.sum(k * drecalled, 1))
        lasted = until * tl.sum(k * dleft_behind, 1)
        since += tl.sum(moved, 1) - tl.sum(moved, 0) - lasted
        end = tl.sum(lasted, 0) + left * tl.sum(tl.sum(state * after, 1), 0)
        dlog = tl.sum(tl.where(index[:, None] >= index[None, :], since[:, None], 0.0), 0) + end
        tl.store(ddecay_ptr + at, tl.where(forgets, 0.0, dlog) / tl.where(forgets, 1.0, decay), mask=here)
        after = left * after + tl.dot(tl.trans(before[:, None] * q), asked)
        after -= tl.dot(tl.trans(before[:, None] * k), dv)


@torch.library.custom_op(
    "target_delta::chunks",
    mutates_args=(),
    schema=f"({INPUTS}) -> (Tensor, Tensor)",
)
def chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Results [R, T, heads, VALUES] of sequences that begin with the pass, and the state before each chunk.

    q and k [R, T, key heads, KEYS], v [R, T, heads, VALUES], decay and beta [R, T, heads], all float32.
    """
    out, states = _results(q, k, v, decay, beta)
    _launch(forward_kernel, (q, k, v, decay, beta, out, states), q, v)
    return out, states


@chunks.register_fake
def _results(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    rows, length, heads, values = v.shape
    return v.new_empty(v.shape), v.new_empty(rows, heads, -(-length // CHUNK), q.shape[-1], values)


@torch.library.custom_op(
    "target_delta::chunks_backward",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor states, Tensor gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def chunks_backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, states: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q and k, of each value head by itself [R, T, heads, KEYS], and of v, decay and beta."""
    found: tuple[Tensor, ...] = _gradients(q, k, v, decay, beta, states, gradient)
    _launch(backward_kernel, (q, k, v, decay, beta, states, gradient, *found), q, v)
    return found


@chunks_backward.register_fake
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, states: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    wide = (*v.shape[:3], q.shape[-1])
    return tuple(v.new_empty(shape) for shape in (wide, wide, v.shape, v.shape[:3], v.shape[:3]))


def fits(keys: int, values: int) -> bool:
    """Whether heads of these sizes are powers of two that the tensor cores and the registers take."""
    powers = all(n >= 16 and n & (n - 1) == 0 for n in (keys, values))
    return powers and keys * values <= LARGEST


def _launch(kernel: Any, tensors: tuple[Tensor, ...], q: Tensor, v: Tensor) -> None:
    rows, length, heads, values = v.shape
    kernel[(heads, rows)](
        *(x.contiguous() for x in tensors), length,
        HEADS=heads, RATIO=heads // q.shape[2], KEYS=q.shape[3], VALUES=values, SIZE=CHUNK,
        num_warps=1 if q.shape[3] * values <= LARGEST // 4 else 2,
    )  # fmt: skip


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    q = ctx.saved_tensors[0]
    dq, dk, *rest = chunks_backward(*ctx.saved_tensors, gradient)
    return *(x.unflatten(2, (q.shape[2], -1)).sum(3) for x in (dq, dk)), *rest


chunks.register_autograd(_backward, setup_context=_keep)
