"""Every recorded shape of an engine beside the same pass run eager, bit for bit, on made-up batches that fill it.

Owns: the batches and the comparison. Must never know how passes are recorded, nor time anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor

from speculator.engine import Engine
from speculator.recorded import RecordedPasses
from target.batch import Batch, causal_positions

REACH = 320  # tokens of a row's own pages; capture saw none
ROOM = 128  # of those for the tokens of the pass and of a draft
SAMPLING = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}


@torch.inference_mode()
def compare(engine: Engine, passes: RecordedPasses) -> dict[str, dict[str, bool]]:
    """Name of a pass -> recorded shape -> whether its replay gives what running it eager gives.

    Writes into the pages of the cache, so no session may be open.
    """
    made = MadeUp(engine, passes)
    rounds: list[Any] = [passes.verifying] + ([passes.catching_up, passes.drafting] if engine.head else [])
    found = {m.name: {str(shape): _same_round(passes, m, g, made) for shape, g in m.graphs.items()} for m in rounds}
    prompts: list[tuple[Any, Callable[[Any, Batch], Any]]] = [(passes.feeding, lambda p, batch: p.feed(batch))]
    if engine.head:
        prompts.append((passes.feeding_head, lambda p, batch: p.feed_head(batch, made.features(batch), batch.tokens)))
    for manager, run in prompts:
        found[manager.name] = {str(shape): _same_prompt(passes, shape.tokens, run, made) for shape in manager.graphs}
    return found


def _same_round(passes: RecordedPasses, manager: Any, graph: Any, made: MadeUp) -> bool:
    made.fill(graph)
    outputs = graph.replay(graph.decisions)  # first, so that it cannot live on what an eager pass stored
    replayed = _copies(outputs[-1] if manager is passes.drafting else outputs)
    return _equal(replayed, _copies(passes.twin(manager, graph)))


def _same_prompt(passes: RecordedPasses, tokens: int, run: Callable[[Any, Batch], Any], made: MadeUp) -> bool:
    batch = made.prompt(tokens)
    draws = made.draw.get_state()
    replayed = _copies(run(passes, batch))
    made.draw.set_state(draws)  # for the same features
    return _equal(replayed, _copies(run(passes.eager, batch)))


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return bool(one) and len(one) == len(other) and all(map(torch.equal, one, other))


def _copies(nest: Any) -> list[Tensor]:
    """The tensors of a result; the next replay writes over them."""
    if isinstance(nest, Tensor):
        return [nest.clone()]
    return [leaf for part in nest for leaf in _copies(part)] if isinstance(nest, tuple | list) else []


class MadeUp:
    """Random batches at random lengths, each row in pages of its own, with random numbers in the cache."""

    def __init__(self, engine: Engine, passes: RecordedPasses) -> None:
        self._engine, self._sizes, self._eager = engine, passes.sizes, passes.eager
        self.draw = torch.Generator(engine.device).manual_seed(1)

    def fill(self, graph: Any) -> None:
        """Make a recorded pass of a round ready for its replay."""
        rows, queries = graph.shape.rows, graph.shape.query_len
        pages = self._pages(rows, REACH)
        context = self._below(max(pages.shape[1] * self._sizes.page_size - ROOM, 2), rows) + 1
        values = {"context": context, "pages": self._table(pages), **self._tokens(graph, context, queries)}
        graph.state.refresh({name: values[name] for name in graph.state.buffers})
        graph.load({name: self._input(name, buffer, values) for name, buffer in graph.inputs.items()})

    def _tokens(self, graph: Any, context: Tensor, queries: int) -> Mapping[str, Tensor]:
        rows, buffers = len(context), graph.state.buffers
        tokens = self._below(self._engine.info.vocab_size, rows, queries)
        counts = self._below(queries, rows) + 1
        if "ancestors" not in buffers:
            return {"tokens": tokens, "positions": causal_positions(context, queries), "counts": counts}
        ancestors, depth = self._tree(rows, queries)
        return {"tokens": tokens, "positions": context[:, None] + depth, "counts": counts, "ancestors": ancestors}

    def _tree(self, rows: int, queries: int) -> tuple[Tensor, Tensor]:
        """Ancestor masks and depths [R, T] of random trees."""
        ancestors, depth = (torch.zeros(rows, queries, dtype=torch.int64, device=self.draw.device) for _ in range(2))
        ancestors[:, 0] = 1
        for node in range(1, queries):
            parent = self._below(node, rows, 1)
            ancestors[:, node] = ancestors.gather(1, parent)[:, 0] | (1 << node)
            depth[:, node] = depth.gather(1, parent)[:, 0] + 1
        return ancestors, depth

    def _input(self, name: str, buffer: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        if name in SAMPLING:
            return torch.full_like(buffer, SAMPLING[name])
        if name in values:
            return values[name]
        if buffer.is_floating_point():
            return self._normal(buffer.shape, buffer.dtype)
        states = self._eager.states
        most = {"seed": 1 << 40, "slots": states.slots if states else 1}
        return self._below(most.get(name, self._engine.info.vocab_size), *buffer.shape)

    def prompt(self, tokens: int) -> Batch:
        """A prompt chunk of so many tokens, over as few rows as their page tables hold."""
        rows = next(r for r in count(1) if tokens % r == 0 and tokens // r <= self._sizes.capacity)
        length = tokens // rows
        pages, context = self._pages(rows, length), torch.zeros(rows, dtype=torch.int64, device=self.draw.device)
        ids = self._below(self._engine.info.vocab_size, rows, length)
        positions, counts = causal_positions(context, length), torch.full_like(context, length)
        return Batch(ids, positions, context, counts, pages, longest=length)

    def features(self, batch: Batch) -> Tensor:
        """[R, T, F] for the head."""
        head = self._engine.head
        assert head is not None
        return self._normal((*batch.tokens.shape, head.record.feature_size), head.embedding_table.dtype)

    def _pages(self, rows: int, tokens: int) -> Tensor:
        """[R, P] that no other row has, for up to so many tokens each; what they hold becomes random."""
        width = min(-(-tokens // self._sizes.page_size), self._sizes.pages, (self._engine.cache.pages - 1) // rows)
        order = torch.randperm(self._engine.cache.pages - 1, generator=self.draw, device=self.draw.device)
        pages = order[: rows * width].view(rows, width) + 1
        size = self._sizes.page_size
        slots = (pages.flatten()[:, None] * size + torch.arange(size, device=pages.device)).flatten()
        for layer in self._engine.cache.layers:  # one by one: the cache may fill the device
            layer[slots] = self._normal((len(slots), *layer.shape[1:]), layer.dtype)
        return pages

    def _table(self, pages: Tensor) -> Tensor:
        return torch.nn.functional.pad(pages, (0, self._sizes.pages - pages.shape[1]))

    def _below(self, most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=self.draw, device=self.draw.device)

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.draw, device=self.draw.device, dtype=dtype)
