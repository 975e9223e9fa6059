"""Our own attention backends as the conformance kit drives them.

Each has its cache and its way to plan; what they share is that a refresh takes a new plan, as the engine does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphs.conformance.backend import Backend, Batch, Traits
from target import batch as ours
from target.attention.base import Attention
from target.attention.flash import FlashAttention3
from target.attention.mla import MlaAttention
from target.attention.sdpa import SdpaAttention
from target.cache import LayerShape, PagedCache


class Pool(NamedTuple):
    cache: PagedCache
    attention: Attention[Any]


class Held:
    """A plan that is replaced when lengths change."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan


class Own(Backend):
    """The seam of `target.attention.base` over a `PagedCache`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def attention(self, cache: PagedCache) -> Attention[Any]:
        raise NotImplementedError

    def make_cache(self, pages: int, page_size: int) -> Pool:
        traits = self.traits
        layers = [LayerShape(traits.kv_heads, traits.head_dim, traits.parts)] * traits.layers
        cache = PagedCache([layers], pages, page_size, traits.dtype, self.device)
        return Pool(cache, self.attention(cache))

    def write(self, cache: Pool, layer: int, slots: Tensor, entries: Tensor) -> None:
        cache.cache.layers[layer].index_copy_(0, slots, entries)

    def plan(self, cache: Pool, batch: Batch) -> Held:
        return Held((cache.attention, cache.attention.plan(self._bounded(batch, cache))))

    def run(self, plan: Held, layer: int, q: Tensor, *given: Any) -> Tensor:
        attention, made = plan.plan
        out: Tensor = attention.run(made, layer, q, *given)
        return out

    def refresh(self, plan: Held, batch: Batch) -> None:
        attention, made = plan.plan
        plan.plan = attention, attention.plan(ours.Batch(*batch)._replace(longest=made.batch.longest))

    def shared(self, cache: Pool) -> Iterable[object]:
        return (cache.attention,)

    def _bounded(self, batch: Batch, cache: Pool) -> ours.Batch:
        """What the host knows must hold for all replays: the page table's length."""
        return ours.Batch(*batch)._replace(longest=batch.pages.shape[1] * cache.cache.page_size)


class Sdpa(Own):
    traits = Traits(4, 2, 16, query_lens=(1, 4), page_sizes=(8, 16), trees=True, longest=130)

    def attention(self, cache: PagedCache) -> SdpaAttention:
        return SdpaAttention(cache)


class Mla(Own):
    """`backend` is what `MlaAttention` calls it."""

    traits = Traits(
        4, 1, 24, rank=16, query_lens=(1, 4), page_sizes=(16, 64), trees=True, longest=400, borders=(64, 128, 320)
    )
    backend = "torch"

    def attention(self, cache: PagedCache) -> Attention[Any]:
        return MlaAttention(cache, self.traits.rank, self.backend)


WIDE = Traits(
    16, 1, 576, rank=512, query_lens=(1, 2, 8), page_sizes=(64,), trees=True, longest=9000, borders=(640, 4096, 8448),
    dtype=torch.bfloat16, tolerance=2e-2,
)  # fmt: skip


class MlaTriton(Mla):
    traits = WIDE
    backend = "triton"


class RealFlashMla(Mla):
    traits = Traits(**{**vars(WIDE), "trees": False})
    backend = "flash_mla"


class RealFlash3(Own):
    traits = Traits(
        8, 2, 128, query_lens=(1, 4), page_sizes=(64,), longest=4000, dtype=torch.bfloat16, tolerance=2e-2,
        borders=(1024, 2048),
    )  # fmt: skip

    def attention(self, cache: PagedCache) -> FlashAttention3:
        return FlashAttention3(cache)

    def refresh(self, plan: Held, batch: Batch) -> None:
        """Its plan is kept and brought up to date in place."""
        attention, made = plan.plan
        attention.refresh(made, self.traits.heads, self.traits.kv_heads, self.traits.head_dim)
