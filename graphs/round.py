"""A whole round as one graph: several passes and what lies between them, over state that stays on the device.

Owns: what its shapes and states are, and that every plan made inside is known to the checks. Must never know models,
rules or sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from graphs.graph import Decide, Prepared, Stage, no_decisions
from graphs.manager import GraphManager
from graphs.recorder import Recorder
from graphs.shape import GraphShape, Ladder, Variant
from graphs.state import AttentionState

# body(state, attentions through `state.plan`) -> result
RoundBody = Callable[[AttentionState], Any]


class Planning(Protocol):
    """What of an attention backend matters here: `plan` once per pass, `run` once per layer."""

    @property
    def plan(self) -> Callable[[Any], Any]: ...

    @property
    def run(self) -> Callable[..., Tensor]: ...


class Plans:
    """The plan of a state that many passes share: each plan that they made, in order.

    A round cannot be planned outside its graph, because its later passes depend on what its earlier ones decide. So
    every pass plans inside, on the device, and what it made is noted here, where the checks of identity (R1) find it.
    """

    def __init__(self) -> None:
        self.made: list[Any] = []

    def noting(self, attention: Planning) -> Noting:
        """The same attention; what it plans is noted."""
        return Noting(attention, self.made)


class Noting:
    """An attention backend whose plans are noted."""

    def __init__(self, attention: Planning, made: list[Any]) -> None:
        self._attention, self._made = attention, made
        self.run = attention.run

    def plan(self, batch: Any) -> Any:
        plan = self._attention.plan(batch)
        self._made.append(plan)
        return plan


class RoundGraphManager(GraphManager):
    """Shapes: R rows of T verified tokens; the variant says what is drafted and how tokens are drawn.

    `orders(shape)` are the buffers that say which rows run, in padding; a round writes them before every replay.
    `memory` is everything else that a round reads and writes and that outlives it, by name: its addresses are recorded,
    and a replay is refused when one of them has moved (R3). `shared` is what plans may have in common.
    """

    def __init__(
        self,
        recorder: Recorder | None,
        ladder: Ladder,
        body: RoundBody,
        orders: Callable[[GraphShape], Mapping[str, Tensor]],
        memory: Callable[[], Mapping[str, Tensor]],
        *,
        shared: Iterable[object] = (),
        decide: Decide = no_decisions,
        name: str = "round",
    ) -> None:
        self._body, self._orders, self._memory = body, orders, memory
        self._shared, self._decide = tuple(shared), decide
        super().__init__(name, recorder, ladder, self._prepare_round)

    def _prepare_round(self, shape: GraphShape, stage: Stage) -> Prepared:
        state = AttentionState(shape, self._orders(shape), _no_plans, shared=self._shared)
        return Prepared(state, self._memory(), lambda: self._body(state), self._decide(shape))

    def holds(self, rows: int, query_len: int, variant: Variant) -> bool:
        """Whether `pick` would find a graph; counts nothing."""
        return self.ready and self.ladder.fit(rows, query_len, variant) is not None

    def refuse(self, reason: str) -> None:
        """Count a round that its passes run one by one."""
        self._tally.eager(reason)


def _no_plans(buffers: Mapping[str, Tensor]) -> Plans:
    return Plans()
