"""Paged grouped-query attention in one fixed order: the same bits for a token however it comes to be run.

Owns: the hand-over from a batch to launches. Must never know models or drafting. Alone, in a
draft, in a tree or in a prompt chunk, a token that sees the same path gets the same result, to the bit. Its price is
that splits have one length for all rows, and that the queries of a tree read the end of their paths one by one.

Layers whose kernels cannot be compiled or started on a device go along paths in torch, in every pass: correct, as
invariant, slow, and not recorded.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from triton import CompilationError, OutOfResources, TritonError
from triton.runtime.errors import PTXASError

from target.attention.base import FusedAttention, Turn
from target.attention.paths import PathAttention
from target.attention.triton import _check, _side_by_side, takes
from target.batch import Batch
from target.cache import PagedCache
from target.errors import PlanError
from target.kernels import fixed_gqa as kernels
from target.kernels.gqa import launch_store, packed
from target.kernels.rope_write import launch_rope_write

MASK_BITS = 64
Kind = tuple[int, torch.Size, bool]  # query heads, a layer's storage, windowed
REFUSALS = (CompilationError, OutOfResources, PTXASError)  # of a launch
log = logging.getLogger(__name__)


class FixedAttention(FusedAttention):
    """`plan` and `run` over the paged cache, neither reads the host; a plan may be recorded. Padding gives zeros."""

    def __init__(self, cache: PagedCache) -> None:
        """Raises PlanError for a cache whose keys and values the kernels cannot read."""
        if not any(takes(layer) for layer in cache.layers):
            raise PlanError("attention of fixed order reads keys and values of 256 or less a head, and no latents")
        self.cache = cache
        self._paths = PathAttention(cache)
        self._served: dict[Kind, bool] = {}  # by the kernels; layers of a kind alike, whatever the pass

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
        return self._attend(plan, layer, q, window)

    def run_fused(self, plan: Batch, layer: int, qkv: Tensor, turn: Turn, window: int | None) -> Tensor:
        """`run` over a qkv product; one more kernel before it turns and stores."""
        store, plan = self.cache.layers[layer], _side_by_side(plan)
        _check(store, layer, qkv[:, :, : -2 * store.shape[2]], store.shape[2:])
        q = launch_rope_write(plan, packed(qkv), turn, store, self.cache.page_size)
        return self._attend(plan, layer, q, window)

    def _attend(self, plan: Batch, layer: int, q: Tensor, window: int | None) -> Tensor:
        store, page_size = self.cache.layers[layer], self.cache.page_size
        kind = (q.shape[2], store.shape, window is not None)
        if kind not in self._served:
            self._served[kind] = self._compiled(kind, store)
        if self._served[kind]:
            try:
                return kernels.launch_attend(plan, q, store, page_size, window)
            except REFUSALS as error:
                self._served[kind] = _given_up(kind, error)
        return self._along_paths(plan, layer, q, window)

    def _compiled(self, kind: Kind, store: Tensor) -> bool:
        try:
            kernels.compile_all(kind[0], store, self.cache.page_size, kind[2])
        except (TritonError, RuntimeError) as error:  # the compiler's passes raise the latter
            return _given_up(kind, error)
        return True

    def _along_paths(self, plan: Batch, layer: int, q: Tensor, window: int | None) -> Tensor:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("attention of fixed order has no kernels here, and along paths it cannot be recorded")
        store = self.cache.layers[layer]
        k, v = store[plan.slots(self.cache.page_size, self.cache.pad_slot)].unbind(2)
        return self._paths.run(plan, layer, q, k, v, window)


def _given_up(kind: Kind, error: Exception) -> bool:
    """False, said once with its reason."""
    heads, (_, _, kv_heads, dim), windowed = kind
    log.warning(
        "attention of fixed order over %d and %d heads of %d%s runs along paths in torch, slowly: %s",
        heads, kv_heads, dim, ", windowed," if windowed else "", (str(error).splitlines() or [type(error).__name__])[0],
    )  # fmt: skip
    return False
