"""A round between its passes: orders to what is verified, answers to verdict, draft and result.

Owns: these steps in torch, which take every kind of draft and are the oracle of the kernels. Must never know recordings
or the host's side of a round. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from speculator.drafting import Drafted, Start
from speculator.lookback import Lookback
from speculator.passes import EagerPasses, Verified
from speculator.round_parts import Report, judge_coupled, judge_each, keep_path, newest
from speculator.round_result import Layout
from speculator.round_state import EVERY, RoundState
from speculator.rows import Rows
from speculator.tree import Tree, below, chain, seen_tokens
from speculator.types import DraftShape
from speculator.verify import Verdict
from target.batch import Batch
from target.cache import PagedCache


class Order(NamedTuple):
    """What the host says about R rows; columns of the buffer `orders` [R, 4] int64."""

    row: Tensor  # [R] where the row's state lies
    have: Tensor  # [R] drafted nodes to verify; -1 for padding
    context: Tensor  # [R] cached tokens
    root: Tensor  # [R] the last committed token, -1: what the device knows itself

    @property
    def live(self) -> Tensor:
        """[R] bool: not padding."""
        return self.have >= 0


class Memory(NamedTuple):
    """What outlives a round."""

    state: RoundState
    rows: Rows
    cache: PagedCache
    lookback: Lookback | None
    capacity: int  # tokens of the longest sequence


class Kind(NamedTuple):
    """What a recorded shape does."""

    queries: int  # tokens verified in a row, root included
    mode: str  # of MODES
    drafted: DraftShape  # both what is verified and what is drafted
    plain: bool  # the target alone

    @property
    def nodes(self) -> int:
        return self.drafted.depth if self.drafted.is_chain else self.drafted.nodes

    @property
    def layout(self) -> Layout:
        return Layout(path=self.drafted.depth + 1, nodes=self.nodes)


class Glue(Protocol):
    """One round of one kind: every step once, in this order; a plain round ends with its verdict."""

    def begin(self, orders: Tensor) -> Batch:
        """What the target runs over for orders [R, 4] int64, see `Order`."""

    def judge(self, verified: Verified) -> None:
        """Accept by the rows' rules and bring what rows remember up to date."""

    def catch_up(self, passes: EagerPasses) -> None:
        """Run the head over what was committed."""

    def draft(self, passes: EagerPasses) -> None:
        """Draft, and hold it for the next round."""

    def result(self) -> Tensor:
        """[R, W] int64, see `Layout`."""


class TorchGlue:
    """`Glue` of any kind, one operation at a time."""

    def __init__(self, memory: Memory, kind: Kind) -> None:
        self.memory, self.kind = memory, kind
        self.rules: Tensor | None = None  # [R] of RULES, where they may differ
        self.sound: Tensor | None = None  # [] bool: the round counts, where that is asked

    def begin(self, orders: Tensor) -> Batch:
        state = self.memory.state
        self.order = Order(*self._awake(orders).unbind(1))
        self.sampling = state.sampling(self.order.row, self.kind.mode)
        if self.kind.mode == EVERY:
            self.rules = state.memory["rule"][self.order.row]
        self.pages = state.memory["tables"][self.order.row]
        self.tree, self.batch = self._below()
        return self.batch

    def _awake(self, orders: Tensor) -> Tensor:
        """The orders, where rows whose sequence the round before has ended are padding."""
        state = self.memory.state
        over = state.memory["ended"][orders[:, 0]] & (orders[:, 3] < 0)
        return torch.where(over[:, None], state.nobody, orders)

    def _below(self) -> tuple[Tree, Batch]:
        """The held drafts below their roots, and the target's pass over them."""
        order, rows = self.order, self.memory.rows
        known = order.root >= 0
        tree = self._tree(torch.where(known, order.root, rows.root[order.row]), known)
        context = torch.where(known, order.context, rows.cached[order.row])
        batch = Batch(
            tokens=tree.tokens,
            positions=context[:, None] + tree.depths,
            context=context,
            counts=tree.counts,
            pages=self.pages,
            ancestors=None if tree.chain else tree.ancestors,
            longest=self.memory.capacity,
            static=True,
        )
        return tree, batch

    def _tree(self, root: Tensor, known: Tensor) -> Tree:
        order, held, state = self.order, self.kind.queries - 1, self.memory.state.memory
        tokens = state["tokens"][order.row, :held]
        if not self.kind.drafted.is_chain:
            parents = state["parents"][order.row, :held]
            return below(root, tokens, parents, order.have + 1, self.kind.drafted.depth)
        have = order.have
        if held:  # a round ahead cannot know how near the end of its sequence is
            have = torch.where(known, have, torch.minimum(have, state["room"][order.row]))
        return chain(torch.cat((root[:, None], tokens), 1), have + 1, held)

    def judge(self, verified: Verified) -> None:
        memory, batch, order = self.memory, self.batch, self.order
        verdict, said = self._judged(verified)
        verdict = verdict._replace(kept=verdict.kept * order.live)  # padding commits nothing
        self.true_rows = keep_path(memory.cache, batch, verdict, verified.features)
        self.context = batch.context + verdict.kept
        memory.rows.cached[order.row] = self.context
        memory.rows.root[order.row] = newest(self.true_rows.following, verdict.kept)
        memory.state.end(order.row, batch.context, verdict)
        if self.rules is not None:
            self.sound = said.finite.all()
            memory.rows.mark(order.row, self.true_rows.following, verdict.kept * self.sound)
        self.parts: tuple[Tensor, ...] = (verdict.tokens, verdict.kept, verdict.path, said.logprobs, said.finite)

    def _judged(self, verified: Verified) -> tuple[Verdict, Report]:
        tree, sampling, base, row = self.tree, self.sampling, self.batch.context + 1, self.order.row
        if self.rules is None:
            return judge_coupled(tree, verified, sampling, base)
        seen, q = self.memory.rows.seen(row, sampling), self.memory.state.q(row, self.kind.queries)
        below = None if seen is None else seen_tokens(seen, tree)
        return judge_each(tree, verified.logits, sampling, base, self.rules, q, below)

    def catch_up(self, passes: EagerPasses) -> None:
        order, true_rows, lookback = self.order, self.true_rows, self.memory.lookback
        if lookback:
            true_rows = lookback.extend(order.row, true_rows)
        # padding starts every draft from nothing: what it made of its own garbage would grow from round to round
        self.output = passes.catch_up(*true_rows).masked_fill(~order.live[:, None, None], 0)
        self.memory.rows.output[order.row] = self.output

    def draft(self, passes: EagerPasses) -> None:
        start = Start(
            output=self.output,
            context=self.context,
            pages=self.pages,
            longest=self.memory.capacity,
            sampling=self.sampling,
            coupled=True,
            static=True,
            drawn=None if self.rules is None else self.rules > 0,
        )
        drafted: Drafted = passes.draft(start, self.kind.drafted)
        self.memory.state.hold(self.order.row, drafted, self.sound)
        self.parts += (drafted.tokens, drafted.parents, drafted.logprobs)

    def result(self) -> Tensor:
        return self.kind.layout.pack(self.parts)
