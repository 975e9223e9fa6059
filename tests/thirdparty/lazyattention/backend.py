"""Paged attention in torch whose metadata is planned by the first layer that uses it, as FlashMLA's is.

    pytest --pyargs graphs.conformance --backend lazyattention.backend:Heads

`Metadata` is empty until the first `run`; from then on it is taken as it is, whatever the lengths have become. What
`run` is given while a graph is recorded must therefore never have been used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from graphs.conformance.backend import Backend, Batch, Traits


class Metadata:
    """Where each query may look, planned from the lengths on first use."""

    def __init__(self) -> None:
        self.slots: Tensor | None = None  # [R, L] cache slots of the whole page table; unseen ones are 0
        self.mask: Tensor | None = None  # [R, T, L] what each query sees
        self.write: Tensor | None = None  # [R, T] slots of the pass's own tokens

    def plan(self, batch: Batch, page_size: int) -> None:
        if self.slots is not None:
            return
        reach = torch.arange(batch.pages.shape[1] * page_size, device=batch.pages.device)
        steps = torch.arange(batch.tokens.shape[1], device=reach.device)
        own = (batch.context + batch.offset)[:, None] + steps
        valid = steps < batch.counts[:, None]
        self.mask = self._seen(batch, reach, own) & valid[..., None]
        every = batch.pages[:, reach // page_size] * page_size + reach % page_size
        self.slots = every.masked_fill(~self.mask.any(1), 0)
        self.write = every.gather(1, own.clamp(max=len(reach) - 1)).masked_fill(~valid, page_size - 1)

    def _seen(self, batch: Batch, reach: Tensor, own: Tensor) -> Tensor:
        before = reach <= own[..., None]
        if batch.ancestors is None:
            return before
        node = (reach - batch.context[:, None]).clamp(0, 62)
        listed = (batch.ancestors[..., None] >> node[:, None]) & 1 == 1
        return before & (listed | (reach < batch.context[:, None])[:, None] | (reach == own[..., None]))


class Plan:
    """A batch and metadata that the first run fills."""

    def __init__(self, cache: Cache, batch: Batch) -> None:
        self.cache, self.batch, self.metadata = cache, batch, Metadata()


class Cache:
    """`layers` [layers, slots, parts, heads, dim]; slot 0 stays zero, the last slot of page 0 takes padding."""

    def __init__(self, layers: Tensor, page_size: int) -> None:
        self.layers, self.page_size = layers, page_size


class Heads(Backend):
    """Grouped queries over keys and values; trees too."""

    traits = Traits(heads=4, kv_heads=2, head_dim=8, query_lens=(1, 4), page_sizes=(8, 16), trees=True, longest=130)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def make_cache(self, pages: int, page_size: int) -> Cache:
        traits = self.traits
        shape = (traits.layers, pages * page_size, traits.parts, traits.kv_heads, traits.head_dim)
        return Cache(torch.zeros(shape, dtype=traits.dtype, device=self.device), page_size)

    def write(self, cache: Cache, layer: int, slots: Tensor, entries: Tensor) -> None:
        cache.layers[layer].index_copy_(0, slots, entries)

    def plan(self, cache: Cache, batch: Batch) -> Plan:
        return Plan(cache, batch)

    def run(self, plan: Plan, layer: int, q: Tensor, *given: Any) -> Tensor:
        metadata, store = plan.metadata, plan.cache.layers[layer]
        metadata.plan(plan.batch, plan.cache.page_size)
        assert metadata.write is not None and metadata.slots is not None and metadata.mask is not None
        store.index_copy_(0, metadata.write.flatten(), self.entries(*given).flatten(0, 1))
        return self.attend(q, store[metadata.slots], metadata.mask, *given)

    def entries(self, k: Tensor, v: Tensor, window: None) -> Tensor:
        """[R, T, 2, kv_heads, dim]"""
        return torch.stack([k, v], 2)

    def attend(self, q: Tensor, history: Tensor, mask: Tensor, k: Tensor, v: Tensor, window: None) -> Tensor:
        """q [R, T, H, dim] over history [R, L, 2, kv_heads, dim]; queries that see nothing give zeros."""
        keys, values = history.repeat_interleave(q.shape[2] // history.shape[3], 3).unbind(2)
        scores = torch.einsum("rthd,rlhd->rthl", q, keys) * q.shape[-1] ** -0.5
        return torch.einsum("rthl,rlhd->rthd", weights(scores, mask), values)

    def refresh(self, plan: Plan, batch: Batch) -> None:
        """The old metadata stays with the recordings that were made with it; the next run plans anew."""
        plan.batch, plan.metadata = batch, Metadata()


class Latent(Heads):
    """One latent per token for all heads (MLA)."""

    traits = Traits(heads=4, kv_heads=1, head_dim=12, rank=8, query_lens=(1, 4), page_sizes=(16,), longest=130)

    def entries(self, latent: Tensor, scale: float) -> Tensor:
        return latent[:, :, None, None]

    def attend(self, q: Tensor, history: Tensor, mask: Tensor, latent: Tensor, scale: float) -> Tensor:
        keys = history[:, :, 0, 0]
        scores = torch.einsum("rthd,rld->rthl", q, keys) * scale
        return torch.einsum("rthl,rld->rthd", weights(scores, mask), keys[..., : self.traits.rank])


class Planless(Heads):
    """Plans nothing: each layer looks at the batch as it then is."""

    def run(self, plan: Plan, layer: int, q: Tensor, *given: Any) -> Tensor:
        plan.metadata = Metadata()
        return super().run(plan, layer, q, *given)

    def refresh(self, plan: Plan, batch: Batch) -> None:
        pass


class Eager(Heads):
    """Plans at once, outside of any recording; `refresh` plans again into the same tensors."""

    def plan(self, cache: Cache, batch: Batch) -> Plan:
        plan = Plan(cache, batch)
        plan.metadata.plan(batch, cache.page_size)
        return plan

    def refresh(self, plan: Plan, batch: Batch) -> None:
        again = self.plan(plan.cache, batch).metadata
        for name, old in vars(plan.metadata).items():
            old.copy_(getattr(again, name))


class OnTheHost(Eager):
    """Plans from lengths that it reads back: right, but a refresh cannot be recorded."""

    traits = Traits(**{**vars(Heads.traits), "steps_in_graph": False})

    def refresh(self, plan: Plan, batch: Batch) -> None:
        batch = batch._replace(context=torch.tensor(batch.context.tolist(), device=self.device))
        super().refresh(plan, batch)


class Hopeful(OnTheHost):
    """Says that its refresh may be recorded, which it may not."""

    traits = Heads.traits


class Lagging(OnTheHost):
    """R5: what was read back when the plan was made serves for ever."""

    def refresh(self, plan: Plan, batch: Batch) -> None:
        pass


class Declared(Heads):
    """Chooses how far to look on the host, in steps of 64 tokens, and says so."""

    def plan(self, cache: Cache, batch: Batch) -> Plan:
        (pages,) = self.decisions(batch)
        return Plan(cache, batch._replace(pages=batch.pages[:, : pages * 64 // cache.page_size]))

    def refresh(self, plan: Plan, batch: Batch) -> None:
        plan.batch, plan.metadata = batch._replace(pages=batch.pages[:, : plan.batch.pages.shape[1]]), Metadata()

    def decisions(self, batch: Batch) -> tuple[int]:
        return (-(-batch.longest // 64),)


def weights(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over what is seen [R, T, H, L]; zeros where nothing is."""
    seen = mask[:, :, None]
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0)


# ---- what goes wrong in practice ----


class SharesMetadata(Heads):
    """R1: one metadata object per shape, kept because making it is slow."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.kept: dict[object, Metadata] = {}

    def plan(self, cache: Cache, batch: Batch) -> Plan:
        plan = Plan(cache, batch)
        plan.metadata = self.kept.setdefault(batch.tokens.shape, plan.metadata)
        return plan


class BorrowsBuffers(Heads):
    """R2: lengths are kept as a view of one buffer of the builder."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.lengths = torch.zeros(64, dtype=torch.int64, device=device)

    def plan(self, cache: Cache, batch: Batch) -> Plan:
        view = self.lengths[: len(batch.context)]
        view.copy_(batch.context)
        return Plan(cache, batch._replace(context=view))

    def refresh(self, plan: Plan, batch: Batch) -> None:
        plan.batch.context.copy_(batch.context)
        plan.metadata = Metadata()

    def shared(self, cache: Cache) -> Iterable[object]:
        return (self.lengths,)


class CountsInPlace(Heads):
    """R2: lengths are moved on for the next step by the pass itself."""

    def run(self, plan: Plan, layer: int, q: Tensor, *given: Any) -> Tensor:
        out = super().run(plan, layer, q, *given)
        plan.batch.context.add_(plan.batch.counts if layer == self.traits.layers - 1 else 0)
        return out


class CopiesLengths(Heads):
    """R3: lengths are converted to another type while planning, which makes a copy that nobody refreshes."""

    def plan(self, cache: Cache, batch: Batch) -> Plan:
        return Plan(cache, batch._replace(context=batch.context.int().long()))

    def refresh(self, plan: Plan, batch: Batch) -> None:
        plan.metadata = Metadata()


class NarrowsTheTable(Heads):
    """R4: the page table is cut to what the host says is the longest row."""

    def plan(self, cache: Cache, batch: Batch) -> Plan:
        return Plan(cache, batch._replace(pages=batch.pages[:, : -(-batch.longest // cache.page_size)]))


class ForgetsToRefresh(Heads):
    """R5: the plan of the first draft step serves all of them."""

    def refresh(self, plan: Plan, batch: Batch) -> None:
        pass


class ReadsTheHost(Heads):
    """A pass that asks the device how long its rows are cannot be recorded."""

    def run(self, plan: Plan, layer: int, q: Tensor, *given: Any) -> Tensor:
        if int(plan.batch.context.max()) < 0:
            raise ValueError("negative lengths")
        return super().run(plan, layer, q, *given)


class ReadsUnused(Heads):
    """Gives tokens that nobody sees no weight, but reads them: zero times NaN is NaN."""

    def run(self, plan: Plan, layer: int, q: Tensor, *given: Any) -> Tensor:
        metadata, size = plan.metadata, plan.cache.page_size
        metadata.plan(plan.batch, size)
        reach = torch.arange(plan.batch.pages.shape[1] * size, device=q.device)
        metadata.slots = plan.batch.pages[:, reach // size] * size + reach % size
        return super().run(plan, layer, q, *given)


class OffByOne(Heads):
    """Does not see the last token before a page border."""

    def run(self, plan: Plan, layer: int, q: Tensor, *given: Any) -> Tensor:
        border = plan.batch.context % plan.cache.page_size == 0
        out = super().run(plan, layer, q, *given)
        return out * torch.where(border, 1.01, 1.0)[:, None, None, None].to(out.dtype)
