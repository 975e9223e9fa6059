"""Attention along each query's own path, one query at a time: what fixed order means, in torch.

Owns: where the tokens of a path lie, and the oracle of the kernels of fixed order. Must never know models or drafting.
It reads lengths on the host, so it can be neither recorded nor fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from target.batch import Batch
from target.cache import PagedCache
from target.errors import PlanError


class PathAttention:
    """`plan` and `run` over a cache on a CPU. A query's bits follow from its path alone; padding gives zeros."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache

    def plan(self, batch: Batch) -> Batch:
        """The batch itself. Raises PlanError for one whose lengths the host must not read."""
        if batch.static:
            raise PlanError("attention along paths reads lengths on the host and cannot be recorded")
        return batch

    def run(self, plan: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [R, T, heads, dim], k and v [R, T, kv_heads, dim] -> [R, T, heads, dim]."""
        store, size = self.cache.layers[layer], self.cache.page_size
        slots = plan.slots(size, self.cache.pad_slot)
        store.index_copy_(0, slots.flatten(), torch.stack((k, v), dim=2).flatten(0, 1))
        out = torch.zeros_like(q)
        for row, count in enumerate(plan.counts.tolist()):
            for query in range(count):
                index = path_indices(plan, row, query)[-window if window else None :]
                path = plan.pages[row][index // size] * size + index % size
                out[row, query] = _one(q[row, query].clone(), store[path])
        return out


def path_indices(batch: Batch, row: int, query: int) -> Tensor:
    """Stored indices of a query's path: the context, its ancestors from the root down, itself."""
    context, own = int(batch.context[row]), batch.offset + query
    nodes = list(range(own + 1))
    if batch.ancestors is not None:
        mask = int(batch.ancestors[row, query])
        nodes = [node for node in range(own) if node < 64 and mask >> node & 1] + [own]
    return torch.tensor([*range(context), *(context + node for node in nodes)], device=batch.context.device)


def _one(q: Tensor, stored: Tensor) -> Tensor:
    """q [heads, dim] over stored [L, 2, kv_heads, dim] -> [heads, dim], in float32 within."""
    keys, values = stored.float().permute(1, 2, 0, 3).contiguous()  # each [kv_heads, L, dim]
    grouped = q.float().unflatten(0, (keys.shape[0], -1))
    scores = grouped @ keys.mT * q.shape[-1] ** -0.5
    out: Tensor = scores.softmax(-1) @ values
    return out.flatten(0, 1).to(q.dtype)
