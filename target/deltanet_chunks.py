"""Gated DeltaNet over whole sequences, chunk by chunk in matrix products: for training, where no state is kept.

Owns: the chunked form of the recurrence (arXiv 2412.06464, section 3.3), which autograd follows. Must never know slots
or commits: its rounding depends on where chunks begin, so what is served runs token by token.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from target.attention.base import Attend
from target.attention.choose import OVERRIDE
from target.deltanet import DeltaInputs, DeltaRows, HybridAttend, convolved_rows, delta_rows, spread
from target.products import kernels_need

CHUNK = 32  # a power of two; about the size of a key keeps what is written per chunk and per pair of tokens least
SMALL = 8  # blocks below are multiplied element by element: as matrix products they would be millions of tiny ones
FLOOR = 1e-30  # smaller decays forget all: their logarithms would have infinite gradients, and drown the others
UNSEEN = -1e30  # a logarithm of 0 whose gradient is 0; -inf compiles into NaN where torch 2.11 masks scores with it
NOWHERE = -2  # the document of what lies before a row


def whole_sequences(attend: Attend) -> HybridAttend:
    """The attend of a hybrid for whole sequences that begin with the pass, without any cache."""
    return HybridAttend(attend, _recur)


def packed_sequences(attend: Attend, documents: Tensor) -> HybridAttend:
    """The same for rows of whole documents: neither state nor convolution passes from one to the next.

    `documents` [R, T] are their numbers; `attend` keeps them apart itself.
    """
    return HybridAttend(attend, partial(_recur_packed, documents))


def _recur(layer: int, inputs: DeltaInputs) -> Tensor:
    s = inputs.sizes
    q, rows = delta_rows(inputs, inputs.mixed.new_zeros(len(inputs.mixed), s.kernel - 1, s.channels))
    return chunked_delta_rule(q, rows)


def _recur_packed(documents: Tensor, layer: int, inputs: DeltaInputs) -> Tensor:
    before = F.pad(documents[:, :-1], (1, 0), value=NOWHERE)
    inputs = inputs._replace(decay=inputs.decay * (documents == before)[..., None])
    return chunked_delta_rule(*convolved_rows(inputs, _packed_conv(inputs, documents), inputs.mixed))


def _packed_conv(inputs: DeltaInputs, documents: Tensor) -> Tensor:
    """`causal_conv` that reads zeros in place of other documents."""
    length, reach = documents.shape[1], inputs.sizes.kernel - 1
    mixed, weight = F.pad(inputs.mixed.float(), (0, 0, reach, 0)), inputs.conv.float()
    owner = F.pad(documents, (reach, 0), value=NOWHERE)
    same = [(owner[:, tap : tap + length] == documents)[..., None] for tap in range(reach + 1)]
    taps = [mixed[:, tap : tap + length] * weight[:, tap] * same[tap] for tap in range(reach + 1)]
    return torch.stack(taps).sum(0)


def chunked_delta_rule(q: Tensor, rows: DeltaRows) -> Tensor:
    """Results [R, T, value_heads, value_dim] of sequences that begin with the pass; q [R, T, key_heads, key_dim].

    In float32 also under autocast: errors of a state add up over a sequence.
    """
    if _kernel_runs(q.device, q.shape[-1], rows.v.shape[-1]):
        return torch.ops.target_delta.chunks(q, rows.k, rows.v, rows.decay, rows.beta)[0]  # type: ignore[no-any-return]
    with torch.autocast(q.device.type, enabled=False):
        return _chunked(q, rows)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_runs(device: torch.device, keys: int, values: int) -> bool:
    """Whether the kernel can run heads of these sizes here and torch is not asked for; loads it if so."""
    if kernels_need(device) or os.environ.get(OVERRIDE) == "torch":
        return False
    from target.kernels.deltanet_chunks import fits

    return fits(keys, values)


def _chunked(q: Tensor, rows: DeltaRows) -> Tensor:
    """What each token writes, its corrected error, depends linearly on what the earlier ones of its chunk wrote.

    That is one unit triangular system a chunk, solved for all chunks at once. A chunk takes the state before it to
    `moved @ state + added`; only these small products go from chunk to chunk.
    """
    heads, length = rows.v.shape[2], q.shape[1]
    forgets = rows.decay < FLOOR
    log_decay = rows.decay.masked_fill(forgets, 1.0).log()
    parts = (spread(q, heads), spread(rows.k, heads), rows.v, log_decay, rows.beta, forgets.long())
    q, k, v, log_decay, beta, ends = (_chunks(part) for part in parts)
    since, past = log_decay.cumsum(-1), ends.cumsum(-1)  # since the chunk began
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    unseen = later | (past[..., :, None] != past[..., None, :])
    between = (since[..., :, None] - since[..., None, :]).masked_fill(unseen, UNSEEN).exp()
    before = since.exp() * (past == 0)  # what of the state before the chunk is left at each token
    alike = (beta[..., None] * between * (k @ k.mT)).tril(-1)
    solve: Tensor = UnitLowerInverse.apply(alike)  # type: ignore[no-untyped-call]
    solved = solve @ (beta[..., None] * torch.cat((before[..., None] * k, v), dim=-1))
    recalled, own = solved.split_with_sizes((k.shape[-1], v.shape[-1]), dim=-1)
    until = (between[..., -1, :, None] * k).mT  # what of each token is left at the chunk's end
    gone, added = (until @ solved).split_with_sizes((k.shape[-1], v.shape[-1]), dim=-1)
    left = before[..., -1, None, None] * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    states = _states_before(left - gone, added)
    written = own - recalled @ states
    results = before[..., None] * (q @ states) + (between * (q @ k.mT)) @ written
    return results.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _states_before(moved: Tensor, added: Tensor) -> Tensor:
    """The states [R, heads, N, key_dim, value_dim] that chunks begin with: 0, then moved @ state + added of the last.

    moved [R, heads, N, key_dim, key_dim], added [R, heads, N, key_dim, value_dim].
    """
    steps = zip(*(part.flatten(0, 1)[:, :-1].unbind(1) for part in (moved, added)), strict=True)
    states = [added.new_zeros(moved.shape[0] * moved.shape[1], *added.shape[3:])]
    for by, more in steps:
        states.append(torch.baddbmm(more, by, states[-1]))
    return torch.stack(states, dim=1).unflatten(0, moved.shape[:2])  # type: ignore[no-any-return]


def _chunks(x: Tensor) -> Tensor:
    """[R, T, heads, ...] -> [R, heads, N, CHUNK, ...]; the padding is zero, which neither decays nor writes."""
    x = x.transpose(1, 2)
    missing = -x.shape[2] % CHUNK
    padding = (0, 0, 0, missing) if x.dim() == 4 else (0, missing)
    return F.pad(x, padding).unflatten(2, (-1, CHUNK))  # type: ignore[no-any-return]


class UnitLowerInverse(torch.autograd.Function):
    """`unit_lower_inverse` whose gradient is two products of its result, instead of all its steps backwards."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        inverse = unit_lower_inverse(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        turned: Tensor = ctx.saved_tensors[0].mT
        return -(turned @ gradient @ turned).tril(-1)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """The inverse of I + `lower` [..., C, C], which is strictly lower triangular; C is a power of two.

    Blocks of twice the size from blocks, by substitution as elimination does it: a series in powers of `lower` would
    cancel where keys are alike.
    """
    size = lower.shape[-1]
    inverse = torch.ones(*lower.shape[:-2], size, 1, 1, dtype=lower.dtype, device=lower.device)
    while (width := inverse.shape[-1]) < size:
        blocks = lower.unflatten(-1, (-1, 2, width)).unflatten(-4, (-1, 2, width))  # [..., B, 2, width, B, 2, width]
        below = blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # [..., B, width, width]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        top = F.pad(first, (0, width))
        corner = _product(_product(second, below), first)
        inverse = torch.cat((top, torch.cat((-corner, second), dim=-1)), dim=-2)
    return inverse.squeeze(-3)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of square blocks."""
    return a @ b if a.shape[-1] >= SMALL else (a[..., None] * b[..., None, :, :]).sum(-2)
