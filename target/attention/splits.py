"""How the blocks of a batch are shared out over the parts of a device: FlashMLA's plan layout, computed with torch.

Owns: the layout and the arithmetic, on any device and without reading the host. Must never know when a plan is made or
kept. `target.kernels.mla.plan_kernel` computes the same integers.

A plan is [parts, 8] int32, one record per part: begin_request, end_request (inclusive), begin_block, end_block
(exclusive), begin_split, begin_is_split, end_is_split, 0. Requests strictly between the two are the part's own from
first to last block. An idle part has end_request < begin_request. `splits` [R + 1] int32 is the prefix sum of how many
parts each request is spread over; partial results of request r lie at splits[r] + its split number.

The rule: requests lie one after the other on a line of costs, with `gap` units between them (what starting on another
request costs), and the line is cut into `parts` pieces of equal length, up to rounding: piece k begins at
k * length // parts. So no part costs more than ceil(total / parts) + gap, the bound of FlashMLA's greedy walk, and
every quantity is a count, a minimum or a maximum over the requests: the device computes it in one step. Requests of
one length whose number divides that of the parts (or the other way round) are cut at their ends: see `aligned`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from target.batch import Batch

BLOCK = 64  # tokens
OVERHEAD = 5  # blocks
RECORD = 8  # int32 per part
SPARE = 8  # one part in so many may be given up for whole requests


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


def aligned(parts: int, requests: int) -> int:
    """At most `parts`, and not far below: as many as share out equal requests without a cut that is not needed.

    With 33 parts for 32 equal requests every request but the last is cut, and all results are joined from two pieces.
    """
    least = parts - parts // SPARE
    fits = (p for p in range(parts, least - 1, -1) if p % requests == 0 or requests % p == 0)
    return next(fits, parts)


def gap(parts: int, requests: int) -> int:
    """Units between requests: none where there are parts for all, which mostly hold one request and would lose them."""
    return OVERHEAD if requests > parts else 0


def fill_splits(into: Splits, stored: Tensor, grain: int = 1) -> None:
    """Plan for `stored` [R] tokens; no part but the last of a request gets fewer than about `grain` blocks."""
    parts = into.plan.shape[0]
    begin, end = _spans(stored, gap(parts, stored.shape[0]))
    length = end[-1].clamp(min=grain * parts)
    count = (_piece(end - 1, length, parts) - _piece(begin, length, parts) + 1) * (end > begin)
    into.splits[0].fill_(0)
    into.splits[1:].copy_(count.cumsum(0))
    into.plan.copy_(_records(begin, end, length, parts))


def _spans(stored: Tensor, between: int) -> tuple[Tensor, Tensor]:
    """[R] each: where a request's blocks begin and end on the line of costs."""
    blocks = (stored + BLOCK - 1) // BLOCK
    end = torch.where(blocks > 0, blocks + between, 0).cumsum(0) - between  # nothing before the first
    return end - blocks, end


def _piece(place: Tensor, length: Tensor, parts: int) -> Tensor:
    """Which piece of the line a unit lies in: the largest k with k * length // parts <= place."""
    return ((place + 1) * parts - 1) // length


def _records(begin: Tensor, end: Tensor, length: Tensor, parts: int) -> Tensor:
    """[parts, RECORD] int64."""
    part = torch.arange(parts, device=begin.device)
    low, high = part * length // parts, (part + 1) * length // parts
    last_request = end.shape[0] - 1
    used = end > begin
    first = (~(used & (end > low[:, None]))).long().cumprod(1).sum(1).clamp(max=last_request)
    reached = used & (begin < high[:, None])
    last = last_request - (~reached.flip(1)).long().cumprod(1).sum(1)  # -1 where none is
    busy = (low < end[-1]) & (last >= first)
    to = last.clamp(min=0)

    def is_split(request: Tensor) -> Tensor:
        return _piece(end[request] - 1, length, parts) > _piece(begin[request], length, parts)

    columns = (
        first,
        (low - begin[first]).clamp(min=0),
        torch.minimum(end[to], high) - begin[to],
        part - _piece(begin[first], length, parts),
        is_split(first),
        is_split(to),
    )
    at, from_block, to_block, split, head, tail = (c.long() * busy for c in columns)
    idle = torch.zeros_like(part)
    return torch.stack((at, last.masked_fill(~busy, -1), from_block, to_block, split, head, tail, idle), 1)
