"""Passes of a target that all ranks run together, each over a batch of its own: an empty one where it has nothing.

Owns: that a rank takes part in every pass of an order, in its turn, whatever becomes of its own steps. Must never know
orders, sessions or how a pass is computed. The head is whole on every rank, and its passes are nobody else's concern.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speculator.drafting import Drafted, Start
from speculator.passes import EagerPasses, Fed, Verified
from speculator.ranks.shares import Passes as Asked
from speculator.recorded import RecordedPasses
from speculator.tree import chain
from speculator.types import DraftShape, Extent
from target.batch import Batch
from target.experts import Exchange

NOTHING = Asked(None, None)


class JointPasses:
    """`Passes` over those of one rank. `begin` says what all ranks will run, `finish` runs what was left out."""

    def __init__(self, own: EagerPasses | RecordedPasses, exchange: Exchange, device: torch.device) -> None:
        self._own, self._exchange, self._device = own, exchange, device
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

    def feed(self, batch: Batch) -> Fed:
        extent, self._left = self._left.feed, self._left._replace(feed=None)
        return self._together(self._own.feed, batch, extent)  # type: ignore[no-any-return]

    def verify(self, batch: Batch) -> Verified:
        self._skip_feed()
        extent, self._left = self._left.verify, self._left._replace(verify=None)
        return self._together(self._own.verify, batch, extent)  # type: ignore[no-any-return]

    def _together(self, run: Any, batch: Batch, extent: Extent | None) -> Any:
        assert extent is not None, "a pass that the other ranks do not know of"
        with self._exchange.of(extent.tokens):
            if not isinstance(self._own, RecordedPasses):
                return run(batch)
            if extent.trees and batch.ancestors is None:  # the graph of all is one of trees
                batch = batch._replace(ancestors=chain(batch.tokens, batch.counts, 0).ancestors)
            with self._own.together(extent):
                return run(batch)

    # the head: this rank's alone

    def feed_head(self, batch: Batch, features: Tensor, following: Tensor) -> Tensor:
        return self._own.feed_head(batch, features, following)

    def catch_up(self, batch: Batch, features: Tensor, following: Tensor) -> Tensor:
        return self._own.catch_up(batch, features, following)

    def draft(self, start: Start, shape: DraftShape) -> Drafted:
        return self._own.draft(start, shape)

    def tally(self) -> dict[str, tuple[int, int]]:
        return self._own.tally()
