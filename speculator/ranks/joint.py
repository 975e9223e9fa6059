"""Passes of a target that all ranks run together, each over a batch of its own: an empty one where it has nothing.

Owns: that a rank takes part in every pass of an order, in its turn, whatever becomes of its own steps. Must never know
orders, sessions or how a pass is computed. The head is whole on every rank, and its passes are nobody else's concern.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from speculator.passes import EagerPasses, Fed, Relay, Verified
from speculator.ranks.shares import Passes as Asked
from speculator.recorded import RecordedPasses
from speculator.tree import chain
from speculator.types import Extent
from target.batch import Batch
from target.experts import Exchange
from target.states import StatePass

NOTHING = Asked(None, None)
T = TypeVar("T")


class JointPasses(Relay):
    """`Passes` over those of one rank, whose head is its own.

    `begin` says what all ranks will run, `finish` runs what was left out.
    """

    def __init__(self, own: EagerPasses | RecordedPasses, exchange: Exchange, device: torch.device) -> None:
        super().__init__(own)
        self._exchange, self._device = exchange, device
        self._left = NOTHING

    def begin(self, asked: Asked) -> None:
        self._left = asked

    @torch.inference_mode()
    def finish(self) -> None:
        """Join the passes that this rank had no part in, or did not come to."""
        self._skip_feed()
        if self._left.verify is not None:
            self.verify(self._empty())

    def _skip_feed(self) -> None:
        if self._left.feed is not None:
            self.feed(self._empty())

    def _empty(self) -> Batch:
        """One row of padding, which stores to the null page."""
        zeros = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        return Batch(zeros, zeros, zeros[0], zeros[0], zeros, longest=1)

    def feed(self, batch: Batch, *states: StatePass | None) -> Fed:
        extent, self._left = self._left.feed, self._left._replace(feed=None)
        return self._together(self.inner.feed, batch, extent)

    def verify(self, batch: Batch, *states: StatePass | None) -> Verified:
        self._skip_feed()
        extent, self._left = self._left.verify, self._left._replace(verify=None)
        return self._together(self.inner.verify, batch, extent)

    def _together(self, run: Callable[[Batch], T], batch: Batch, extent: Extent | None) -> T:
        assert extent is not None, "a pass that the other ranks do not know of"
        with self._exchange.of(extent.tokens):
            if not isinstance(self.inner, RecordedPasses):
                return run(batch)
            if extent.trees and batch.ancestors is None:  # the graph of all is one of trees
                batch = batch._replace(ancestors=chain(batch.tokens, batch.counts, 0).ancestors)
            with self.inner.together(extent):
                return run(batch)
