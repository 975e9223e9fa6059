"""What is attended to: made-up sequences in a backend's cache, batches over them, and the right answers.

Owns: queries, keys and values as a function of (row, index), page tables in random order, and NaN wherever nobody may
read. Must never know graphs or recorders. The same token at the same index is the same numbers, however many passes
it took to get there, so eager passes, replays and the oracle can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphs.conformance.backend import Backend, Batch
from graphs.conformance.oracle import attend_heads, attend_latent, visible

NULL_PAGE = 0
PADDING = 1e3  # queries and entries of padding: finite, and loud where they reach a result
QUERIES = 61  # different queries; with many heads one for each token would not fit


class World:
    """`rows` sequences of up to `capacity` tokens (whole pages), in a cache of `backend`."""

    def __init__(self, backend: Backend, device: torch.device, page_size: int, rows: int, longest: int) -> None:
        self.backend, self.traits, self.page_size, self.rows = backend, backend.traits, page_size, rows
        self.each = -(-longest // page_size) + 1  # pages of a row, one to spare
        self.capacity = self.each * page_size
        self.device = device
        self._draw = torch.Generator(device).manual_seed(0)
        order = torch.randperm(rows * self.each, generator=self._draw, device=self.device)
        self.table = (order + 1).view(rows, self.each)
        traits = self.traits
        self.entries = self._numbers(traits.layers, rows, self.capacity, traits.parts, traits.kv_heads, traits.head_dim)
        self.queries = self._numbers(traits.layers, QUERIES, traits.heads, traits.head_dim)
        self.cache: Any = backend.make_cache(rows * self.each + 1, page_size)
        self.scale = traits.head_dim**-0.5

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._draw, device=self.device).to(self.traits.dtype)

    def batch(
        self,
        context: Sequence[int],
        query_len: int,
        counts: Sequence[int] | None = None,
        *,
        padded_to: int = 0,
        ancestors: Sequence[Sequence[int]] | None = None,
        offset: int = 0,
        longest: int = 0,
    ) -> Batch:
        """Rows with these contexts, all T queries valid unless `counts` says fewer; `padded_to` rows in all.

        `longest` is what the batch claims as its bound; 0 claims the whole page table, so that it never differs.
        """
        rows = max(padded_to, len(context))
        given = [query_len] * len(context) if counts is None else list(counts)
        start = self._column(context, rows)
        table = torch.zeros(rows, self.each, dtype=torch.int64, device=self.device)
        table[: len(context)] = self.table[: len(context)]
        masks = None if ancestors is None else self._masks(ancestors, rows)
        steps = torch.arange(query_len, device=self.device)
        positions = start[:, None] + offset + steps
        bound = longest or self.capacity
        return Batch(positions.clone(), positions, start, self._column(given, rows), table, masks, offset, bound)

    def _column(self, values: Sequence[int], rows: int) -> Tensor:
        padded = [*values, *[0] * (rows - len(values))]
        return torch.tensor(padded, dtype=torch.int64, device=self.device)

    def _masks(self, ancestors: Sequence[Sequence[int]], rows: int) -> Tensor:
        masks = [*ancestors, *[[0] * len(ancestors[0])] * (rows - len(ancestors))]
        return torch.tensor(masks, dtype=torch.int64, device=self.device)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """`q` [layers, R, T, heads, dim] and `own` [layers, R, T, parts, kv_heads, dim] of a batch's queries."""
        rows, steps = batch.tokens.shape
        row = torch.arange(rows, device=self.device)[:, None].clamp(max=self.rows - 1)
        valid = torch.arange(steps, device=self.device) < batch.counts[:, None]
        index = (batch.context + batch.offset)[:, None] + torch.arange(steps, device=self.device)
        index = index.clamp(max=self.capacity - 1)
        q, own = self.queries[:, (13 * row + index) % QUERIES], self.entries[:, row, index]
        q[:, ~valid], own[:, ~valid] = PADDING, PADDING
        return {"q": q, "own": own}

    def fill(self, batch: Batch) -> None:
        """The cache as it is before the batch: what earlier passes stored, and NaN in all else but the null page."""
        every = torch.arange(self.page_size, (self.rows * self.each + 1) * self.page_size, device=self.device)
        stored = (batch.context + batch.offset * (batch.counts > 0)).tolist()
        for layer in range(self.traits.layers):
            nothing = torch.full_like(self.entries[layer, 0, :1], float("nan"))
            self.backend.write(self.cache, layer, every, nothing.expand(len(every), -1, -1, -1).contiguous())
            for row, length in enumerate(stored):
                if length:
                    self.backend.write(self.cache, layer, self.slots(row, length), self.entries[layer, row, :length])

    def slots(self, row: int, length: int) -> Tensor:
        """[length] int64 slots of a row's first tokens."""
        index = torch.arange(length, device=self.device)
        return self.table[row, index // self.page_size] * self.page_size + index % self.page_size

    def expected(self, batch: Batch) -> Tensor:
        """What the oracle says: [layers, R, T, heads, dim or rank] float64, NaN for padding."""
        rows, steps = batch.tokens.shape
        width = self.traits.rank or self.traits.head_dim
        shape = (self.traits.layers, rows, steps, self.traits.heads, width)
        out = torch.full(shape, float("nan"), dtype=torch.float64, device=self.device)
        starts, counts = (batch.context + batch.offset).tolist(), batch.counts.tolist()
        for row in range(rows):
            for step in range(counts[row]):
                own = starts[row] + step
                mask = None if batch.ancestors is None else int(batch.ancestors[row, step])
                seen = visible(own, int(batch.context[row]), mask)
                for layer in range(self.traits.layers):
                    out[layer, row, step] = self._attend(layer, row, own, seen)
        return out

    def _attend(self, layer: int, row: int, own: int, seen: Sequence[int]) -> Tensor:
        query, history = self.queries[layer, (13 * row + own) % QUERIES], self.entries[layer, row]
        if self.traits.latent:
            return attend_latent(query, history, seen, self.traits.rank, self.scale)
        return attend_heads(query, history, seen)


def given_to(backend: Backend, own: Tensor, scale: float) -> tuple[Any, ...]:
    """What `run` takes after q: k, v and window, or the latent and its scale; own [R, T, parts, kv_heads, dim]."""
    if backend.traits.latent:
        return own[:, :, 0, 0], scale
    keys, values = own.unbind(2)
    return keys, values, None
