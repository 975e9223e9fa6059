"""Paged grouped-query attention in Triton, for chains, trees and windows of any query length.

Owns: the hand-over from a batch to launches. Must never know models or drafting. Every launch reads the batch's live
lengths, page tables and masks on the device, so a plan holds nothing that could go stale and may be recorded and
replayed at any length up to `longest`. Passes of up to 64 queries split long rows, and a program takes as many of the
splits as the number of rows allows; longer ones (prompt chunks) run the same kernel in one split, cut at the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from target.attention.base import FusedAttention, Turn
from target.batch import Batch
from target.cache import PagedCache
from target.errors import PlanError
from target.kernels import gqa as kernels
from target.kernels.rope_write import launch_rope_write
from target.pdl import pdl_on

MOST_TILES = 1 << 14  # whose splits are joined by the last of them; of more, by a second kernel


class TritonAttention(FusedAttention):
    """`plan` and `run` over the paged cache; neither reads the host. Padding gives zeros and is not stored.

    What lies in slots that no valid query of a row sees cannot reach the results, not even NaN. A row's result has the
    same bits whatever the other rows of the batch are, and however many they are or loose `longest` is.
    """

    def __init__(self, cache: PagedCache, config: kernels.Config | None = None, pdl: bool | None = None) -> None:
        """`config` replaces the table's choice, for tuning, and `pdl` what SPECULATOR_PDL says.

        Raises PlanError for a cache without keys and values.
        """
        if not any(takes(layer) for layer in cache.layers):
            raise PlanError(f"no layer of the cache holds keys and values of {kernels.LARGEST_DIM} or less a head")
        self.cache, self._config = cache, config
        self._pdl = pdl_on(cache.layers[0].device) if pdl is None else pdl
        self._arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=cache.layers[0].device)

    def plan(self, batch: Batch) -> Batch:
        """The batch itself. Raises PlanError for one that cannot be read."""
        if batch.longest < 1:
            raise PlanError("a batch must say how long its longest row is")
        if not (batch.context.dtype == batch.counts.dtype == batch.pages.dtype == torch.int64):
            raise PlanError("the attention kernels read int64 lengths and page tables")
        return batch

    def run(self, plan: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [R, T, heads, dim], k and v [R, T, kv_heads, dim] -> [R, T, heads, dim]."""
        plan = _side_by_side(plan)
        self.store(plan, layer, q, k, v)
        return self.attend(plan, layer, q, window)

    def store(self, plan: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """What `run` does before it attends."""
        store = self.cache.layers[layer]
        _check(store, layer, q, k.shape[2:])
        kernels.launch_store(_side_by_side(plan), k, v, store, self.cache.page_size, self._pdl)

    def attend(self, plan: Batch, layer: int, q: Tensor, window: int | None) -> Tensor:
        """`run` over keys and values that are already stored."""
        store = self.cache.layers[layer]
        config = self._pick(store, q.shape[1], q.shape[2])
        return kernels.launch_attend(
            _side_by_side(plan), q, store, self.cache.page_size, window, config, self._arrived, None, self._pdl
        )  # fmt: skip

    def run_fused(self, plan: Batch, layer: int, qkv: Tensor, turn: Turn, window: int | None) -> Tensor:
        """`run` over a qkv product; one kernel up to 64 queries, and one more before it for longer passes."""
        if qkv.shape[1] > kernels.SPLIT_QUERIES:
            return self.attend(plan, layer, self.turn_and_store(plan, layer, qkv, turn), window)
        store, plan, qkv = self._fused(plan, layer, qkv)
        config = self._pick(store, qkv.shape[1], qkv.shape[2] - 2 * store.shape[2])
        return kernels.launch_attend(
            plan, qkv, store, self.cache.page_size, window, config, self._arrived, turn, self._pdl
        )  # fmt: skip

    def turn_and_store(self, plan: Batch, layer: int, qkv: Tensor, turn: Turn) -> Tensor:
        """What `run_fused` does before it attends in a long pass: the queries [R, T, heads, dim]."""
        store, plan, qkv = self._fused(plan, layer, qkv)
        return launch_rope_write(plan, qkv, turn, store, self.cache.page_size, self._pdl)

    def _fused(self, plan: Batch, layer: int, qkv: Tensor) -> tuple[Tensor, Batch, Tensor]:
        """Storage of a layer, batch and product as kernels take them."""
        store = self.cache.layers[layer]
        _check(store, layer, qkv[:, :, : -2 * store.shape[2]], store.shape[2:])
        return store, _side_by_side(plan), kernels.packed(qkv)

    def _pick(self, store: Tensor, queries: int, heads: int) -> kernels.Config:
        return self._config or kernels.pick(queries, heads, *store.shape[2:], store.dtype, store.device)


def takes(store: Tensor) -> bool:
    """Whether the kernels can serve a layer of this storage."""
    return store.shape[1] == 2 and store.shape[3] <= kernels.LARGEST_DIM


def _side_by_side(batch: Batch) -> Batch:
    """Lengths and page tables as kernels walk them. A copy, where one is needed, is recorded with the pass."""
    pages = batch.pages if batch.pages.stride(1) == 1 else batch.pages.contiguous()
    return batch._replace(context=batch.context.contiguous(), counts=batch.counts.contiguous(), pages=pages)


def _check(store: Tensor, layer: int, q: Tensor, own: torch.Size) -> None:
    fits = own == store.shape[2:] and q.shape[2] > 0 and q.shape[2] % own[0] == 0 and q.shape[3] == own[1]
    if not takes(store) or not fits or q.dtype != store.dtype:
        parts, heads, dim = store.shape[1:]
        raise PlanError(
            f"layer {layer} holds {parts} x {heads} heads of {dim} in {store.dtype} and cannot serve "
            f"{q.shape[2]} query heads of {q.shape[3]} over {own[0]} in {q.dtype}"
        )
