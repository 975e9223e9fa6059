"""The passes of one stage of a pipeline: hidden states come from the stage before, or go to the next one.

Owns: what a stage's target pass reads and gives, eager and recorded. Must never know sessions, rules, or how a
hand-over travels. What was received is copied into a recorded pass's own input, and what is sent lies in its output.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphs.recorder import Recorder
from graphs.shape import GraphShape
from graphs.state import AttentionState
from speculator.heads.base import DraftHead
from speculator.passes import EagerPasses, Fed, Verified, eager_passes
from speculator.ranks.link import Link
from speculator.recorded import CHAIN, TREE, Buffers, RecordedPasses, Sizes
from target.attention.base import bind
from target.batch import Batch
from target.cache import PagedCache
from target.decoder import Decoder
from target.model import Hidden
from target.pipeline import pack, taps_before, unpack
from target.states import StatePass

ABOVE = "above"  # planes [P, R, T, H] that the stage before handed on


class StagedPasses(EagerPasses):
    """Eager passes of a stage. `taps` are those of the head, which only the last stage has.

    An earlier stage's passes hand on what they computed, and answer with nothing.
    """

    def __init__(self, link: Link, taps: tuple[int, ...], whole: EagerPasses) -> None:
        super().__init__(whole.model, whole.head, whole.attention, whole.head_attention)
        assert isinstance(whole.model, Decoder)
        self.link, self.taps, self.span = link, taps, whole.model.span
        self.width, self.dtype = whole.model.config.hidden_size, whole.model.embed.weight.dtype

    @property
    def planes(self) -> int:
        """How many planes this stage receives, 0 on the first."""
        return 0 if self.link.stage.first else 1 + taps_before(self.taps, self.span)

    def staged(self, tokens: Tensor, positions: Tensor, attend: Any, above: Tensor | None) -> Hidden | Tensor:
        """The stage's pass; on the last one what the target gives, else the planes for the next."""
        assert isinstance(self.model, Decoder)
        hidden: Hidden = self.model(tokens, positions, attend, self.taps, None if above is None else unpack(above))
        return hidden if self.link.stage.last else pack(hidden)

    def receive(self, batch: Batch) -> Tensor | None:
        """What the stage before computed for this batch."""
        rows, queries = batch.tokens.shape
        return self.link.receive((self.planes, rows, queries, self.width), self.dtype) if self.planes else None

    def feed(self, batch: Batch, states: StatePass | None = None) -> Fed:
        return self.fed_by(self._run(batch))

    def verify(self, batch: Batch, states: StatePass | None = None) -> Verified:
        return self.verified_by(self._run(batch))

    def _run(self, batch: Batch) -> Hidden | Tensor:
        return self.staged(batch.tokens, batch.positions, bind(self.attention, batch), self.receive(batch))

    def fed_by(self, found: Hidden | Tensor) -> Fed:
        """What a prompt pass leaves on this stage."""
        if isinstance(found, Tensor):
            self.link.send(found)
            return Fed(_nothing(found), _nothing(found))
        return Fed(self.features(found), found.final)

    def verified_by(self, found: Hidden | Tensor) -> Verified:
        """What a verify pass leaves on this stage."""
        if isinstance(found, Tensor):
            self.link.send(found)
            return Verified(_nothing(found), _nothing(found))
        return self.verified(found)


def _nothing(planes: Tensor) -> Tensor:
    """[R, T, 0]"""
    return planes[0, ..., :0]


class StagedRecorded(RecordedPasses):
    """Recorded passes of a stage: the whole verify pass is one graph, and so are the head's on the last stage.

    Prompts run eager.
    """

    eager: StagedPasses

    def __init__(
        self, eager: StagedPasses, recorder: Recorder, sizes: Sizes, device: torch.device, rung: int | None = None
    ) -> None:
        super().__init__(eager, recorder, sizes._replace(prompt_tokens=0), device, rung)

    def _verify_inputs(self, shape: GraphShape) -> Buffers:
        eager, size = self.eager, (shape.rows, shape.query_len)
        if not eager.planes:
            return {}
        return {ABOVE: torch.zeros(eager.planes, *size, eager.width, dtype=eager.dtype, device=self.device)}

    def _verify_body(self, state: AttentionState, inputs: Buffers) -> Any:
        attend = partial(self.eager.attention.run, state.plan)
        return self.eager.staged(state.buffers["tokens"], state.buffers["positions"], attend, inputs.get(ABOVE))

    def verify(self, batch: Batch, states: StatePass | None = None) -> Verified:
        rows, queries = batch.tokens.shape
        graph = self.verifying.pick(rows, queries, CHAIN if batch.ancestors is None else TREE)
        if graph is None:
            return self.eager.verify(batch)
        above = self.eager.receive(batch)
        graph.state.refresh(self._values(batch))
        if above is not None:
            graph.load({ABOVE: above})
        self.eager.link.drain()  # the replay writes over what it gave the last time
        return self.eager.verified_by(_cut(graph.replay(), rows, queries))


def _cut(found: Hidden | Tensor, rows: int, queries: int) -> Hidden | Tensor:
    """The batch at the beginning of a recorded shape; of planes a copy only where the batch is smaller."""
    if isinstance(found, Tensor):
        return found[:, :rows, :queries].contiguous()
    return Hidden(found.final[:rows, :queries], tuple(tap[:rows, :queries] for tap in found.taps))


def staged_passes(
    link: Link, taps: tuple[int, ...], model: Decoder, head: DraftHead | None, cache: PagedCache
) -> StagedPasses:
    """Eager passes of the stage that `model` is."""
    return StagedPasses(link, taps, eager_passes(model, head, cache))


def recorded_passes(
    eager: EagerPasses, recorder: Recorder, sizes: Sizes, device: torch.device, rung: int | None = None
) -> RecordedPasses:
    """The recorded form of eager passes, whole or of a stage."""
    kind = StagedRecorded if isinstance(eager, StagedPasses) else RecordedPasses
    return kind(eager, recorder, sizes, device, rung)  # type: ignore[arg-type]
