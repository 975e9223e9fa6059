"""One pass's view of the rows: what runs, where it sits, what it may see.

Owns: the rectangular batch record. Must never know sessions, drafts or weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """R rows of T queries; row r has `counts[r]` valid ones, the rest is padding.

    Query t of a row is stored at sequence index `context + offset + t` of its page table; `offset` counts the nodes
    that earlier passes stored above the context. It sees every index below `context`, the nodes of its ancestor mask,
    and itself. `ancestors` bit j stands for the node stored at `context + j`; None means a causal chain, which sees
    every index up to its own. Padding computes values nobody may use: finite ones, where weights are.

    The tensors of a `static` batch are refilled between the runs of a recorded pass: a plan may keep them, but neither
    read them on the host nor derive anything from them before the pass runs; `longest` is then a bound for all runs.
    """

    tokens: Tensor  # [R, T] int64
    positions: Tensor  # [R, T] int64, rotary positions
    context: Tensor  # [R] int64, stored indices visible to every query
    counts: Tensor  # [R] int64
    pages: Tensor  # [R, P] int64 page table, 0 is the null page
    ancestors: Tensor | None = None  # [R, T] int64
    offset: int = 0
    longest: int = 0  # host-known upper bound of context + offset + counts over the rows
    static: bool = False

    def slots(self, page_size: int, pad_slot: int) -> Tensor:
        """[R, T] int64 cache slots that the queries' keys and values are written to; padding goes to `pad_slot`."""
        step = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        index = self.context[:, None] + (self.offset + step)
        page = index.div(page_size, rounding_mode="floor").clamp(max=self.pages.shape[1] - 1)
        slot = self.pages.gather(1, page) * page_size + index % page_size
        return slot.masked_fill(step >= self.counts[:, None], pad_slot)


def causal_positions(context: Tensor, length: int) -> Tensor:
    """[R, T] positions of a chain that continues a context [R]."""
    return context[:, None] + torch.arange(length, device=context.device)
