"""How the blocks of a batch are shared out over the parts of a device: FlashMLA's plan layout, computed with torch.

Owns: the layout and the arithmetic, on any device and without reading the host. Must never know when a plan is made or
kept. `target.kernels.mla.plan_kernel` computes the same integers.

A plan is [parts, 8] int32, one record per part: begin_request, end_request (inclusive), begin_block, end_block
(exclusive), begin_split, begin_is_split, end_is_split, 0. Requests strictly between the two are the part's own from
first to last block. An idle part has end_request < begin_request. `splits` [R + 1] int32 is the prefix sum of how many
parts each request is spread over; partial results of request r lie at splits[r] + its split number.

The rule: requests lie one after the other on a line of costs, each with OVERHEAD units before its blocks (what starting
on a request costs), and the line is cut into pieces of equal length. So no part costs more than
ceil(total / parts) + OVERHEAD, the bound of FlashMLA's greedy walk, and every quantity is a count, a minimum or a
maximum over the requests: the device computes it in one step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from target.batch import Batch

BLOCK = 64  # tokens
OVERHEAD = 5  # blocks
RECORD = 8  # int32 per part


class Splits(NamedTuple):
    """One plan; see the top of this file."""

    plan: Tensor  # [parts, RECORD] int32
    splits: Tensor  # [R + 1] int32


def empty_splits(rows: int, parts: int, device: torch.device) -> Splits:
    """Storage of a plan, not filled."""
    plan = torch.empty(parts, RECORD, dtype=torch.int32, device=device)
    return Splits(plan, torch.empty(rows + 1, dtype=torch.int32, device=device))


def lengths(batch: Batch) -> Tensor:
    """[R] int64 stored tokens with the pass's own; 0 for a padded row."""
    return (batch.context + batch.offset + batch.counts).masked_fill(batch.counts == 0, 0)


def fill_splits(into: Splits, stored: Tensor, grain: int = 1) -> None:
    """Plan for `stored` [R] tokens; no part but the last of a request gets fewer than about `grain` blocks."""
    parts = into.plan.shape[0]
    begin, end = _spans(stored)
    share = (end[-1] + parts - 1).div(parts, rounding_mode="floor").clamp(min=grain)
    used = (end > begin).long()
    count = ((end - 1) // share - begin // share + 1) * used
    into.splits[0].fill_(0)
    into.splits[1:].copy_(count.cumsum(0))
    into.plan.copy_(_records(begin, end, share, parts))


def _spans(stored: Tensor) -> tuple[Tensor, Tensor]:
    """[R] each: where a request's blocks begin and end on the line of costs."""
    blocks = (stored + BLOCK - 1) // BLOCK
    end = torch.where(blocks > 0, blocks + OVERHEAD, 0).cumsum(0)
    return end - blocks, end


def _records(begin: Tensor, end: Tensor, share: Tensor, parts: int) -> Tensor:
    """[parts, RECORD] int64."""
    part = torch.arange(parts, device=begin.device)
    low, high = part * share, (part + 1) * share
    last_request = end.shape[0] - 1
    used = end > begin
    first = (~(used & (end > low[:, None]))).long().cumprod(1).sum(1).clamp(max=last_request)
    reached = used & (begin < high[:, None])
    last = last_request - (~reached.flip(1)).long().cumprod(1).sum(1)  # -1 where none is
    busy = (low < end[-1]) & (last >= first)
    to = last.clamp(min=0)

    def is_split(request: Tensor) -> Tensor:
        return (end[request] - 1) // share > begin[request] // share

    columns = (
        first,
        (low - begin[first]).clamp(min=0),
        torch.minimum(end[to], high) - begin[to],
        part - begin[first] // share,
        is_split(first),
        is_split(to),
    )
    at, from_block, to_block, split, head, tail = (c.long() * busy for c in columns)
    idle = torch.zeros_like(part)
    return torch.stack((at, last.masked_fill(~busy, -1), from_block, to_block, split, head, tail, idle), 1)
