"""The passes of a target in fixed order: a token's results follow from its own path, not from what shares its pass.

Owns: which attention they run on, and on a CPU the passes of one token each. Must never know sessions or rules. The
head runs as in any other engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from speculator.heads.base import DraftHead
from speculator.passes import EagerPasses, Fed, Verified
from target.attention.base import bind
from target.attention.choose import grouped_attention
from target.attention.paths import PathAttention
from target.batch import Batch
from target.cache import PagedCache
from target.model import Hidden, Target
from target.states import StatePass

Read = Callable[[Hidden], tuple[Tensor, ...]]


class OneByOne(EagerPasses):
    """Every token of the target in a pass of its own, in the order of the batch: the oracle on a CPU.

    There the library's order of summation changes with the shape of almost every operation, so the shape is fixed.
    """

    def feed(self, batch: Batch, states: StatePass | None = None) -> Fed:
        return Fed(*self._assembled(batch, lambda hidden: (self.features(hidden), hidden.final)))

    def verify(self, batch: Batch, states: StatePass | None = None) -> Verified:
        features, logits = self._assembled(batch, self._answers)
        return Verified(features, logits)

    def _answers(self, hidden: Hidden) -> tuple[Tensor, Tensor]:
        return self.features(hidden), self.model.logits(hidden.final)

    def _assembled(self, batch: Batch, read: Read) -> tuple[Tensor, ...]:
        """What `read` takes from each token's pass, each as [R, T, ...]; zeros for padding."""
        found: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        for row, query, one in tokens_of(batch):
            found[row, query] = read(self.target(one.tokens, one.positions, bind(self.attention, one)))
        shape = tuple(batch.tokens.shape)
        parts = [first.new_zeros(*shape, first.shape[-1]) for first in next(iter(found.values()))]
        for (row, query), values in found.items():
            for part, value in zip(parts, values, strict=True):
                part[row, query] = value[0, 0]
        return tuple(parts)


def tokens_of(batch: Batch) -> Iterator[tuple[int, int, Batch]]:
    """Row, query, and the pass of that token alone, which follows the passes of the ones before it."""
    for row, (context, count) in enumerate(zip(batch.context.tolist(), batch.counts.tolist(), strict=True)):
        for query in range(count):
            here = slice(row, row + 1), slice(query, query + 1)
            yield (
                row,
                query,
                Batch(
                    tokens=batch.tokens[here],
                    positions=batch.positions[here],
                    context=batch.context[here[0]],
                    counts=torch.ones_like(batch.counts[here[0]]),
                    pages=batch.pages[here[0]],
                    ancestors=None if batch.ancestors is None else batch.ancestors[here],
                    offset=batch.offset + query,
                    longest=context + batch.offset + query + 1,
                ),
            )


def fixed_passes(model: Target, head: DraftHead | None, cache: PagedCache) -> EagerPasses:
    """Passes of a target whose products are in fixed order. PlanError where its attention cannot be."""
    head_attention = grouped_attention(cache)
    if cache.layers[0].device.type == "cpu":
        return OneByOne(model, head, PathAttention(cache), head_attention)
    from target.attention.fixed import FixedAttention

    return EagerPasses(model, head, FixedAttention(cache), head_attention)
