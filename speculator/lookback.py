"""Heads of several modules: the rows they run again once guessed tokens are known, and how they draft chains.

Module k reads token t + 1 + k in row t, so its last k rows rest on drafted tokens. Kept rows are run again before the
next true ones, which overwrites those. Must never know sessions, sampling or a particular head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from speculator.heads.base import DraftHead
from target.attention.base import Attention, bind
from target.batch import Batch, causal_positions

if TYPE_CHECKING:
    from speculator.drafting import Start


class TrueRows(NamedTuple):
    """A pass over R sessions: row t holds the target's feature at position t and the token t + 1."""

    batch: Batch
    features: Tensor  # [R, T, F]
    following: Tensor  # [R, T] int64


class Lookback:
    """The last `size` true rows of each of `count` sessions, the newest at the end."""

    def __init__(self, count: int, size: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        self.features = torch.zeros(count, size, width, dtype=dtype, device=device)
        self.following = torch.zeros(count, size, dtype=torch.int64, device=device)
        self.end = torch.zeros(count, dtype=torch.int64, device=device)  # row after the newest one kept
        self.held = torch.zeros(count, dtype=torch.int64, device=device)  # rows kept, at most `size`

    def extend(self, sessions: Tensor, new: TrueRows) -> TrueRows:
        """Put what is kept of `sessions` [R] before the rows that continue it; keep the last ones of both.

        Rows that do not continue what is kept (a session that starts over) stand alone.
        """
        continues = self.end[sessions] == new.batch.context
        held = self.held[sessions].where(continues, torch.zeros_like(sessions))
        features = torch.cat((self.features[sessions], new.features), dim=1)
        following = torch.cat((self.following[sessions], new.following), dim=1)
        index = _window(self.size - held, following.shape[1])
        batch = _extended(new.batch, held, following.gather(1, index))
        whole = TrueRows(batch, gather_rows(features, index), batch.tokens)
        self._keep(sessions, whole)
        return whole

    def _keep(self, sessions: Tensor, whole: TrueRows) -> None:
        counts = whole.batch.counts
        last = (counts[:, None] + torch.arange(-self.size, 0, device=counts.device)).clamp(min=0)
        self.features[sessions] = gather_rows(whole.features, last)
        self.following[sessions] = whole.following.gather(1, last)
        self.held[sessions] = counts.clamp(max=self.size)
        self.end[sessions] = whole.batch.context + counts


def _extended(batch: Batch, held: Tensor, tokens: Tensor) -> Batch:
    """The pass that starts `held` [R] rows earlier."""
    context = batch.context - held
    positions = causal_positions(context, tokens.shape[1])
    return batch._replace(tokens=tokens, positions=positions, context=context, counts=batch.counts + held)


def _window(first: Tensor, width: int) -> Tensor:
    """[R, width] places from first [R] on; what would lie past the end repeats the last place."""
    return (first[:, None] + torch.arange(width, device=first.device)).clamp(max=width - 1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [R, T, W] at index [R, D] -> [R, D, W]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def module_step(
    head: DraftHead, attention: Attention[object], start: Start, above: Tensor, tokens: Sequence[Tensor], level: int
) -> Tensor:
    """Outputs [R, n, H] of the module that drafts after a chain of `level` tokens (each [R, 1]), the newest last.

    `above` are the outputs of the module before it. Module k = `level` runs the k rows that rest on drafted tokens;
    their first input is the newest true output of module k - 1. Past the last module, that one feeds itself.
    """
    fresh = level <= head.lookback
    count = level if fresh else 1
    if fresh:
        above = torch.cat((start.output[:, level - 1 : level], above[:, above.shape[1] - level + 1 :]), dim=1)
    first = start.context + (-level if fresh else level - head.lookback - 1)
    skipped = (-first).clamp(min=0)  # rows before the start of a sequence shorter than the chain of modules
    index = _window(skipped, count)
    hidden = head.stage(level - 1).recycle(gather_rows(above[:, -count:], index))
    fed = torch.cat(list(tokens[-count:]), dim=1).gather(1, index)
    context = first + skipped
    batch = Batch(fed, causal_positions(context, count), context, (count - skipped) * start.live, start.pages)
    stored = 0 if start.static else max(0, level - head.lookback)
    batch = batch._replace(longest=start.longest + stored, static=start.static)
    outputs = head.stage(level)(hidden, fed, batch.positions, bind(attention, batch))
    places = (torch.arange(count, device=first.device) - skipped[:, None]).clamp(min=0)
    return gather_rows(outputs, places)
