"""Reference attention over the paged cache with torch's scaled_dot_product_attention.

Owns: gathering pages and building masks, on any device. Must never know models or drafting. It is the oracle of every
faster backend.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from target.batch import Batch
from target.cache import PagedCache
from target.errors import PlanError


class SdpaPlan:
    """Where a pass writes and reads, and what each query sees; made on first use and shared by the layers.

    So it may be made outside a recorded pass and is recorded with its first use. A used one is stale for new lengths.
    """

    def __init__(self, batch: Batch, cache: PagedCache) -> None:
        if batch.longest < 1:
            raise PlanError("a batch must say how long its longest row is")
        self.batch, self.length, self._cache = batch, batch.longest, cache
        self.span = None if batch.static else _contiguous(batch, cache.page_size)
        self._masks: dict[tuple[int | None, int], Tensor | None] = {}

    @cached_property
    def write(self) -> Tensor:
        """[R * T] slots of the pass's own tokens."""
        if self.span is not None:
            return torch.arange(self.span.stop - self.batch.tokens.shape[1], self.span.stop)
        return self.batch.slots(self._cache.page_size, self._cache.pad_slot).flatten()

    @cached_property
    def read(self) -> Tensor:
        """[R * L] slots of all that the rows may see."""
        return _read_slots(self.batch, self.length, self._cache.page_size)

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [R, 1, T * groups, L], None where every query sees everything."""
        key = (window, groups)
        if key not in self._masks:
            self._masks[key] = self._build(window, groups, dtype)
        return self._masks[key]

    def _build(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor | None:
        if self.span and self.batch.tokens.shape[1] == 1 and self.batch.ancestors is None and window is None:
            return None  # one row, one query, its own pages only
        if self.span and self.batch.ancestors is None and window is None:
            own = torch.full((1, self.batch.tokens.shape[1], self.length), float("-inf"), dtype=dtype)
            mask = own.triu_(1 + self.length - own.shape[1])
        else:
            seen = visible(self.batch, self.length, window)
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
        return mask.repeat_interleave(groups, dim=1)[:, None]


class SdpaAttention:
    """Paged attention by gathering each row's keys and values; `run` is pure torch.

    A pass reads only slots that one of the row's valid queries sees, so what lies in other pages cannot reach it, not
    even NaN. The exception is a single row in contiguous pages: all its slots below `longest` are read, and those
    that earlier passes did not write must be finite.
    """

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache

    def plan(self, batch: Batch) -> SdpaPlan:
        return SdpaPlan(batch, self.cache)

    def run(self, plan: SdpaPlan, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [R, T, heads, dim], k and v [R, T, kv_heads, dim] -> [R, T, heads, dim]."""
        store = self.cache.layers[layer]
        store.index_copy_(0, plan.write, torch.stack((k, v), dim=2).flatten(0, 1))
        rows, length, heads, dim = q.shape
        kv_heads, groups = k.shape[2], heads // k.shape[2]
        keys, values = _gather(store, plan, rows).permute(2, 0, 3, 1, 4).unbind()  # each [R, kv_heads, L, dim]
        # the query heads of one kv head become queries of it: nothing is repeated
        grouped = q.view(rows, length, kv_heads, groups, dim).permute(0, 2, 1, 3, 4)
        grouped = grouped.reshape(rows, kv_heads, length * groups, dim)
        mask = plan.mask(window, groups, q.dtype)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.view(rows, kv_heads, length, groups, dim).transpose(1, 2).reshape(rows, length, heads, dim)


def _gather(store: Tensor, plan: SdpaPlan, rows: int) -> Tensor:
    """[R, L, 2, kv_heads, dim]; a view when a single row's pages lie side by side."""
    if plan.span is not None:
        return store[plan.span.start : plan.span.stop][None]
    return store.index_select(0, plan.read).view(rows, plan.length, *store.shape[1:])


def visible(batch: Batch, length: int, window: int | None = None) -> Tensor:
    """[R, T, L] bool: which stored indices each query sees; padding sees something too.

    With a window, only what lies less than `window` positions back. The position of an index below the context is the
    index, that of a drafted node follows from its depth below the query, which counts ancestors stored after it.
    """
    index = torch.arange(length, device=batch.tokens.device)
    own = batch.context[:, None] + batch.offset + torch.arange(batch.tokens.shape[1], device=index.device)
    own = own.clamp(max=length - 1)[..., None]  # a padded query may lie beyond the end
    if batch.ancestors is None:
        seen = index <= own
        return seen if window is None else seen & (index > own - window)
    node = (index - batch.context[:, None])[:, None]  # [R, 1, L]
    bit = (batch.ancestors[..., None] >> node.clamp(0, 63)) & 1
    path = bit.bool() & (node < 64) | (index == own)  # says nothing where node < 0
    seen = path | (node < 0)
    if window is None:
        return seen
    below = path.flip(-1).cumsum(-1).flip(-1) - 1
    back = torch.where(node < 0, batch.positions[..., None] - index, below)
    return seen & (back < window)


def _read_slots(batch: Batch, length: int, page_size: int) -> Tensor:
    """[R * L] slots of all stored indices; what no valid query of the row sees reads the zero slot."""
    index = torch.arange(length, device=batch.tokens.device)
    page = (index // page_size).clamp(max=batch.pages.shape[1] - 1)
    slots = batch.pages[:, page] * page_size + index % page_size
    valid = torch.arange(batch.tokens.shape[1], device=index.device) < batch.counts[:, None]
    seen = (visible(batch, length) & valid[..., None]).any(1)
    return slots.masked_fill(~seen, 0).flatten()


def _contiguous(batch: Batch, page_size: int) -> range | None:
    """The slots of a single unpadded row on the CPU whose pages follow each other, else None."""
    rows, queries = batch.tokens.shape
    if rows != 1 or batch.tokens.device.type != "cpu":
        return None
    length = int(batch.context) + batch.offset + queries
    if length != batch.longest or int(batch.counts) != queries:
        return None
    count = -(-length // page_size)
    pages = batch.pages[0, :count].tolist()
    if len(pages) < count:
        raise PlanError(f"{len(pages)} pages of {page_size} tokens do not hold {length} tokens")
    first = pages[0]
    if pages != list(range(first, first + count)):
        return None
    return range(first * page_size, first * page_size + length)
