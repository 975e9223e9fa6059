"""The head's catch-up pass as graphs: true features of the verified tokens overwrite what was guessed.

Owns: which attention state this pass uses at which stage. Must never know the head or the target.
"""

from __future__ import annotations

from collections.abc import Callable

from graphs.errors import ShapeError, StateError
from graphs.graph import BuildInputs, BuildState, Decide, Forward, Prepared, Stage, no_decisions
from graphs.manager import GraphManager, StatePairs, plain_factory
from graphs.recorder import Recorder
from graphs.shape import GraphShape, Ladder
from graphs.state import AttentionState, MakePlan

SourceShape = Callable[[GraphShape], GraphShape]


def same_shape(shape: GraphShape) -> GraphShape:
    return shape


class PrefillEagleGraphManager(GraphManager):
    """Shapes: R rows of T = depth + 1 tokens as the target verified them; rejected tokens stay in and are inert.

    With `pairs`, the target's, states are not built but taken: passes that run use `.warmup`, the recorded one uses
    `.captured`. What is taken are the buffers, so that one refresh holds for the target's graph and for this one. The
    plan is never taken: after its own capture the target's plan is marked as initialised, and recorded here a second
    time it would not be planned again; run in a warm-up, it would be read although no kernel ever filled it. Each
    pass gets a new plan over the shared buffers (`make_plan`, or the one that the target's states were built with),
    and the buffers are put back to what they held when built, in case an earlier pass changed them.

    With `build_state` the states are this manager's own, and each graph's state is refreshed by itself.
    """

    def __init__(
        self,
        recorder: Recorder | None,
        ladder: Ladder,
        forward: Forward,
        build_inputs: BuildInputs,
        *,
        pairs: StatePairs | None = None,
        source: SourceShape = same_shape,
        make_plan: MakePlan | None = None,
        build_state: BuildState | None = None,
        decide: Decide = no_decisions,
        name: str = "head prefill",
    ) -> None:
        if build_state is not None and pairs is None:
            factory = plain_factory(forward, build_state, build_inputs, decide)
        elif pairs is not None and build_state is None:
            taken = Taken(pairs, source, make_plan)

            def factory(shape: GraphShape, stage: Stage) -> Prepared:
                state, inputs = taken.state(shape, stage), build_inputs(shape)
                return Prepared(state, inputs, lambda: forward(state, inputs), decide(shape))

        else:
            raise StateError(f"{name}: give either the target's pairs or build_state")
        super().__init__(name, recorder, ladder, factory)


class Taken:
    """The target's states as this pass may use them."""

    def __init__(self, pairs: StatePairs, source: SourceShape, make_plan: MakePlan | None) -> None:
        self._pairs, self._source, self._make_plan = pairs, source, make_plan

    def state(self, shape: GraphShape, stage: Stage) -> AttentionState:
        states = self._pairs.captured if stage is Stage.CAPTURED else self._pairs.warm
        source = self._source(shape)
        if source not in states:
            raise ShapeError(
                f"the target has no {stage.name.lower()} state of shape {source}; warm up and capture it first"
            )
        state = states[source].fresh(self._make_plan, shape)
        state.reset()
        return state
