"""Gated DeltaNet over whole sequences, chunk by chunk in matrix products: for training, where no state is kept.

Owns: the chunked form of the recurrence (arXiv 2412.06464, section 3.3), which autograd follows. Must never know slots
or commits: its rounding depends on where chunks begin, so what is served runs token by token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from target.attention.base import Attend
from target.deltanet import DeltaInputs, DeltaRows, HybridAttend, delta_rows, spread

CHUNK = 64
FLOOR = 1e-30  # smaller decays forget as much, and their logarithms would have infinite gradients


def whole_sequences(attend: Attend) -> HybridAttend:
    """The attend of a hybrid for whole sequences that begin with the pass, without any cache."""
    return HybridAttend(attend, _recur)


def _recur(layer: int, inputs: DeltaInputs) -> Tensor:
    s = inputs.sizes
    q, rows = delta_rows(inputs, inputs.mixed.new_zeros(len(inputs.mixed), s.kernel - 1, s.channels))
    return chunked_delta_rule(q, rows)


def chunked_delta_rule(q: Tensor, rows: DeltaRows) -> Tensor:
    """`delta_rule` from a state of zeros: q [R, T, key_heads, key_dim] -> [R, T, value_heads, value_dim]."""
    heads, length = rows.v.shape[2], rows.v.shape[1]
    state, results = rows.v.new_zeros(len(q), heads, q.shape[-1], rows.v.shape[-1]), []
    parts = (spread(q, heads), spread(rows.k, heads), rows.v, rows.decay.clamp(min=FLOOR).log(), rows.beta)
    for chunk in zip(*(_chunks(part) for part in parts), strict=True):
        result, state = _chunk(state, *chunk)
        results.append(result)
    return torch.cat(results, dim=2)[:, :, :length].transpose(1, 2)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """[R, T, heads, ...] -> pieces [R, heads, CHUNK, ...]; the padding is zero, which neither decays nor writes."""
    x = x.transpose(1, 2)
    missing = -x.shape[2] % CHUNK
    padding = (0, 0, 0, missing) if x.dim() == 4 else (0, missing)
    return F.pad(x, padding).split(CHUNK, dim=2)  # type: ignore[no-any-return]


def _chunk(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk's results [R, heads, CHUNK, value_dim] and the state after it.

    What each token writes, its corrected error, depends linearly on what the earlier ones of the chunk wrote: one
    unit triangular system.
    """
    since = log_decay.cumsum(-1)  # since the chunk began
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (since[..., :, None] - since[..., None, :]).masked_fill(later, float("-inf")).exp()
    seen = beta[..., None] * between * (k @ k.mT)  # its diagonal counts as ones
    error = beta[..., None] * (v - since.exp()[..., None] * (k @ state))
    written = torch.linalg.solve_triangular(seen, error, upper=False, unitriangular=True)
    result = since.exp()[..., None] * (q @ state) + (between * (q @ k.mT)) @ written
    until = (since[..., -1:] - since).exp()[..., None]  # from each token to the chunk's end
    return result, since[..., -1:].exp()[..., None] * state + (k * until).mT @ written
