"""Which steps of an order are a rank's own where each has its own sessions, and what all ranks run because of them.

Owns: that every rank comes to the same passes of the same extent from the same order. Must never import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from speculator.types import Extent, Step


class Passes(NamedTuple):
    """The passes of the target that an order asks of every rank, in this order; None where no rank has such steps."""

    feed: Extent | None
    verify: Extent | None


class Share(NamedTuple):
    """One rank's part: it is `rank` of `size`, each of which has `rows` rows."""

    rank: int
    size: int
    rows: int

    def owner(self, row: int) -> int:
        return row // self.rows

    def own(self, steps: Sequence[Step]) -> list[Step]:
        """This rank's steps, by its own rows."""
        return [step._replace(row=self.local(step.row)) for step in steps if self.owner(step.row) == self.rank]

    def local(self, row: int) -> int:
        """A row of this rank, as the rank itself counts it."""
        return row % self.rows

    def passes(self, steps: Sequence[Step]) -> Passes:
        """Of all ranks, from the steps of all."""
        rounds = [step for step in steps if step.draft is not None]
        trees = any(step.draft and not step.draft.is_chain for step in rounds)
        verify = self._extent(rounds, lambda step: 1 + len(step.draft.tokens) if step.draft else 0)
        feeds = [step for step in steps if step.feed is not None]
        feed = self._extent(feeds, lambda step: len(step.feed.tokens) if step.feed else 0)
        return Passes(feed, verify and verify._replace(trees=trees))

    def _extent(self, steps: Sequence[Step], width: Callable[[Step], int]) -> Extent | None:
        if not steps:
            return None
        batches = [[width(step) for step in steps if self.owner(step.row) == rank] for rank in range(self.size)]
        sizes = [(len(batch), max(batch, default=0)) for batch in batches]
        rows, queries = (max(column) for column in zip(*sizes, strict=True))
        return Extent(rows, queries, max(count * longest for count, longest in sizes))
