"""Paged grouped-query attention in one fixed order: the same bits for a token however it comes to be run.

Owns: the hand-over from a batch to launches. Must never know models or drafting. Alone, in a
draft, in a tree or in a prompt chunk, a token that sees the same path gets the same result, to the bit. Its price is
that splits have one length for all rows, and that the queries of a tree read the end of their paths one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from target.attention.base import FusedAttention, Turn
from target.attention.triton import _check, _side_by_side, takes
from target.batch import Batch
from target.cache import PagedCache
from target.errors import PlanError
from target.kernels import fixed_gqa as kernels
from target.kernels.gqa import launch_store, packed
from target.kernels.rope_write import launch_rope_write

MASK_BITS = 64


class FixedAttention(FusedAttention):
    """`plan` and `run` over the paged cache, neither reads the host; a plan may be recorded. Padding gives zeros."""

    def __init__(self, cache: PagedCache) -> None:
        """Raises PlanError for a cache whose keys and values the kernels cannot read."""
        if not any(takes(layer) for layer in cache.layers):
            raise PlanError("attention of fixed order reads keys and values of 256 or less a head, and no latents")
        self.cache = cache

    def plan(self, batch: Batch) -> Batch:
        """The batch itself. Raises PlanError for one that cannot be read."""
        if batch.longest < 1:
            raise PlanError("a batch must say how long its longest row is")
        if not (batch.context.dtype == batch.counts.dtype == batch.pages.dtype == torch.int64):
            raise PlanError("the attention kernels read int64 lengths and page tables")
        if batch.ancestors is not None and batch.offset + batch.tokens.shape[1] > MASK_BITS:
            raise PlanError(f"a tree of {batch.offset + batch.tokens.shape[1]} nodes has no path of {MASK_BITS} bits")
        return batch

    def run(self, plan: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [R, T, heads, dim], k and v [R, T, kv_heads, dim] -> [R, T, heads, dim]."""
        store, plan = self.cache.layers[layer], _side_by_side(plan)
        _check(store, layer, q, k.shape[2:])
        launch_store(plan, k, v, store, self.cache.page_size)
        return self._attend(plan, q, store, window)

    def run_fused(self, plan: Batch, layer: int, qkv: Tensor, turn: Turn, window: int | None) -> Tensor:
        """`run` over a qkv product; one more kernel before it turns and stores."""
        store, plan = self.cache.layers[layer], _side_by_side(plan)
        _check(store, layer, qkv[:, :, : -2 * store.shape[2]], store.shape[2:])
        q = launch_rope_write(plan, packed(qkv), turn, store, self.cache.page_size)
        return self._attend(plan, q, store, window)

    def _attend(self, plan: Batch, q: Tensor, store: Tensor, window: int | None) -> Tensor:
        return kernels.launch_attend(plan, q, store, self.cache.page_size, window)
