"""A chain round between its passes as a few kernels: one before the target, two after, one a drafted token.

Owns: the hand-over from passes to launches, and which kinds of round, trees too, kernels take. Must never know device
code or recordings. `round_glue.TorchGlue` is the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from speculator.heads.base import DraftHead
from speculator.kernels.chain import launch_begin, launch_judge, launch_note, launch_settle
from speculator.passes import EagerPasses, Verified
from speculator.readout import kept
from speculator.round_glue import Glue, Kind, Memory, TorchGlue
from speculator.round_state import EVERY, FILTERED, GREEDY
from speculator.round_tree import TreeGlue
from speculator.sampling import gumbel_of
from target.attention.base import Attention, bind
from target.batch import Batch
from target.readout import Asked, Keep, Readout, read_logits


def fused_glue(memory: Memory, kind: Kind) -> Glue:
    """The kernels, or torch's operations where these do not serve: all rules, heads of several modules."""
    if kind.mode == EVERY or memory.lookback:
        return TorchGlue(memory, kind)
    return ChainGlue(memory, kind) if kind.drafted.is_chain else TreeGlue(memory, kind)


class ChainGlue:
    """`Glue` of chains, and of rounds without drafts."""

    def __init__(self, memory: Memory, kind: Kind) -> None:
        self.memory, self.kind, rows = memory, kind, memory.rows
        self.depth = 0 if kind.plain else kind.drafted.depth
        self.state = memory.state.memory | {"cached": rows.cached, "root": rows.root}

    def begin(self, orders: Tensor) -> Batch:
        noise = self.kind.mode != GREEDY
        self.begun = launch_begin(orders, self.state, self.memory.state.spare, self.kind.queries, noise)
        self.batch = self.begun.batch._replace(longest=self.memory.capacity)
        if self.kind.mode == FILTERED:
            self.filters = self.memory.state.sampling(self.begun.whole[0, : len(orders)], FILTERED)
        return self.batch

    def judge(self, verified: Verified) -> None:
        begun = self.begun
        asked = Asked(temperature=begun.temperature, keys=begun.keys, keep=self._keep(begun.tokens.shape))
        found = verified.read(asked)
        if found is None:
            found = _written(verified.logits, asked)
        self.features, self.judged = verified.features, launch_judge(found, self.begun, self.state, self.depth)

    def catch_up(self, passes: EagerPasses) -> None:
        judged = self.judged
        batch = self.batch._replace(tokens=judged.tokens, positions=judged.positions, counts=judged.kept)
        outputs = passes.outputs(batch, self.features, judged.tokens)
        self.output = launch_settle(*outputs, self.begun, judged, self.memory.rows.output)

    def draft(self, passes: EagerPasses) -> None:
        assert passes.head is not None
        head, output = passes.head, self.output
        tokens = self._draw(head, output, head.read(output, self._asked(head, 1)), 1)
        for depth in range(1, self.depth):
            parts = self._follow(head, passes.head_attention, output, tokens, depth)
            output, found = head.read_sum(*parts, self._asked(head, depth + 1))
            tokens = self._draw(head, output, found, depth + 1)

    def _follow(
        self, head: DraftHead, attention: Attention[Any], above: Tensor, tokens: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Outputs of drafted tokens [R, 1] of `depth` below outputs `above` [R, 1, H], two parts [R, 1, H]."""
        judged, positions = self.judged, self.judged.levels[depth - 1][:, None]
        batch = self.batch._replace(
            tokens=tokens, positions=positions, context=judged.context, counts=judged.live, offset=depth - 1
        )
        return head.advance(head.recycle(above), tokens, positions, bind(attention, batch))

    def _asked(self, head: DraftHead, level: int) -> Asked:
        judged = self.judged
        keys = None if judged.keys is None else judged.keys[level - 1]
        # only the values' own total is needed, which is that of the logits where all rows are greedy
        asked = Asked(temperature=judged.temperature, keys=keys, ids=head.target_ids, ranked=keys is not None)
        return asked._replace(keep=self._keep(self.output.shape[:2]))

    def _draw(self, head: DraftHead, output: Tensor, found: Readout | None, level: int) -> Tensor:
        """The tokens [R, 1] after outputs [R, 1, H], about which that was found, noted."""
        if found is None:
            found = _written(head.logits(output), self._asked(head, level))
        judged = self.judged
        return launch_note(found, head.target_ids, level, self.begun, judged, self.state["tokens"], self.depth)

    def _keep(self, places: Sequence[int]) -> Keep | None:
        """What the rows' filters keep at R x T places."""
        return kept(self.filters, places) if self.kind.mode == FILTERED else None

    def result(self) -> Tensor:
        return self.judged.result


def _written(logits: Tensor, asked: Asked) -> Readout:
    """About written logits [R, T, V]."""
    return read_logits(logits.flatten(0, 1), asked, gumbel_of)
