"""States of a hybrid target's sessions: row r has slot r + 1, moved on once a step's results count.

Owns: which states a pass reads, and that a step that failed, and is run again, leaves no trace in them. Must never know
sessions, rules or how a state is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor

from speculator.chains import WHY, is_tree
from speculator.errors import InvalidTreeError
from speculator.passes import EagerPasses, Fed, Passes, Relay, StatePasses, Verified
from speculator.recorded import RecordedPasses
from speculator.sampling import upload
from speculator.types import Step, StepResult
from target.batch import Batch
from target.decoder import Decoder
from target.errors import PlanError
from target.states import StateCache, StatePass

LOST = -1  # the length of a state that a commit left half written


class Recurrence(Protocol):
    """The parts of a step that move states, in order; for a target without recurrent layers just passes."""

    @property
    def cache(self) -> StateCache | None:
        """Where the states lie."""

    def clear(self, row: int) -> None:
        """The row starts over, or is given up."""

    def begin(self, steps: Sequence[Step]) -> None:
        """A step begins; what one that failed left behind is forgotten."""

    def feed(self, passes: Passes, batch: Batch, rows: Tensor) -> Fed:
        """Run prompt chunks of rows [R], whose valid tokens will all be committed."""

    def verify(self, passes: Passes, batch: Batch, rows: Tensor) -> Verified:
        """Run drafts of rows [R]; `accept` says next what of them is committed."""

    def accept(self, kept: Tensor) -> None:
        """The first `kept` [R] int64 tokens of each row just verified are committed."""

    def commit(self, steps: Sequence[Step], results: Sequence[StepResult]) -> None:
        """All results are on the host and count: states move on."""

    def anywhere(self) -> AbstractContextManager[None]:
        """Until the block ends steps may begin anywhere, to time made-up sequences: rows opened in it mean nothing."""


class Stateless:
    """A target whose layers all attend."""

    cache = None

    def clear(self, row: int) -> None:
        return None

    def begin(self, steps: Sequence[Step]) -> None:
        return None

    def feed(self, passes: Passes, batch: Batch, rows: Tensor) -> Fed:
        return passes.feed(batch)

    def verify(self, passes: Passes, batch: Batch, rows: Tensor) -> Verified:
        return passes.verify(batch)

    def accept(self, kept: Tensor) -> None:
        return None

    def commit(self, steps: Sequence[Step], results: Sequence[StepResult]) -> None:
        return None

    def anywhere(self) -> AbstractContextManager[None]:
        return nullcontext()


class RecurrentRows:
    """The states of `len(lengths)` rows over a StateCache of one slot more.

    Keys and values may be written again by a step that is run again; a state may not. So a commit waits until nothing
    of the step can fail any more, and each state's length is kept here: a step from anywhere else is refused.
    """

    def __init__(self, cache: StateCache) -> None:
        self.cache = cache
        self.lengths = [0] * (cache.slots - 1)
        self._pending: list[tuple[StatePass, Tensor | None]] = []
        self._anywhere = False

    def clear(self, row: int) -> None:
        self.cache.clear(upload(torch.tensor([row + 1]), self.cache.matrices.device))
        self.lengths[row] = 0

    def begin(self, steps: Sequence[Step]) -> None:
        """InvalidTreeError for a tree; PlanError for a step that does not go on where its row's state ends."""
        self._pending.clear()
        for step in steps:
            if (step.draft and not step.draft.is_chain) or (step.propose and is_tree(step.propose)):
                raise InvalidTreeError(WHY)
            if _advances(step) and not self._anywhere:
                self._check_length(step)

    def _check_length(self, step: Step) -> None:
        length = self.lengths[step.row]
        if length == LOST:
            raise PlanError(f"the state of row {step.row} was lost when a commit failed: create the session again")
        if length != step.cached:
            text = f"the state of row {step.row} stands after {length} tokens, the step begins after {step.cached}"
            raise PlanError(f"{text}; a recurrent state cannot go back")

    def feed(self, passes: Passes, batch: Batch, rows: Tensor) -> Fed:
        return _stateful(passes).feed(batch, self._pass(rows, batch.counts))

    def verify(self, passes: Passes, batch: Batch, rows: Tensor) -> Verified:
        return _stateful(passes).verify(batch, self._pass(rows, None))

    def _pass(self, rows: Tensor, counts: Tensor | None) -> StatePass:
        states = StatePass(self.cache, rows + 1, counts)
        self._pending.append((states, None))
        return states

    def accept(self, kept: Tensor) -> None:
        states, _ = self._pending.pop()
        self._pending.append((states, kept))

    def commit(self, steps: Sequence[Step], results: Sequence[StepResult]) -> None:
        moved = {s.row: s.cached + _tokens(s, r) for s, r in zip(steps, results, strict=True) if _advances(s)}
        for row in moved:
            self.lengths[row] = LOST
        for states, accepted in self._pending:
            states.commit(accepted)
        self._pending.clear()
        for row, length in moved.items():
            self.lengths[row] = length

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        self._anywhere = True
        try:
            yield
        finally:
            self._anywhere = False


def _stateful(passes: Passes) -> StatePasses:
    inner = passes
    while isinstance(inner, Relay):
        inner = inner.inner
    if isinstance(inner, EagerPasses | RecordedPasses):
        return cast(StatePasses, passes)
    raise PlanError(f"{type(passes).__name__} takes no recurrent states: a hybrid target cannot run through it")


def _advances(step: Step) -> bool:
    return step.feed is not None or step.draft is not None


def _tokens(step: Step, result: StepResult) -> int:
    return len(step.feed.tokens) if step.feed else len(result.tokens)


def state_cache(target: Decoder, rows: int) -> StateCache | None:
    """Slots for `rows` sessions and the null slot, beside a target's weights; None for one without recurrent layers."""
    weight = target.embed.weight
    return StateCache(target.state_layers, rows + 1, weight.dtype, weight.device) if target.state_layers else None


def state_bytes(target: Decoder, rows: int) -> int:
    """What `state_cache` takes."""
    return (rows + 1) * sum(shape.bytes(target.embed.weight.dtype) for shape in target.state_layers)


def recurrence(target: Decoder, rows: int, states: StateCache | None = None) -> Recurrence:
    """For an engine of `rows` rows, over `states` where they exist already."""
    states = states or state_cache(target, rows)
    return RecurrentRows(states) if states is not None else Stateless()
