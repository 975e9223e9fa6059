"""Attention the long way: one query at a time, over the tokens it may see, in double precision.

Owns: the numbers that every backend is compared with. Must never know pages or plans.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def visible(index: int, context: int, ancestors: int | None) -> list[int]:
    """Sequence indices that the query stored at `index` sees, ascending."""
    if ancestors is None:
        return list(range(index + 1))
    own = index - context
    return [*range(context), *(context + j for j in range(own) if ancestors >> j & 1), index]


def attend_heads(q: Tensor, history: Tensor, seen: Sequence[int]) -> Tensor:
    """One query q [heads, dim] over history [tokens, 2, kv_heads, dim] -> [heads, dim] float64."""
    keys, values = history[list(seen)].double().repeat_interleave(q.shape[0] // history.shape[2], dim=2).unbind(1)
    scores = torch.einsum("hd,nhd->hn", q.double(), keys) * q.shape[-1] ** -0.5
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), values)


def attend_latent(q: Tensor, history: Tensor, seen: Sequence[int], rank: int, scale: float) -> Tensor:
    """One absorbed query q [heads, rank + rope] over history [tokens, 1, 1, rank + rope] -> [heads, rank] float64."""
    latent = history[list(seen), 0, 0].double()
    weights = (q.double() @ latent.T * scale).softmax(-1)
    return weights @ latent[:, :rank]
