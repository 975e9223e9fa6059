"""The head's draft steps as graphs: all steps in one where metadata can be refreshed on the device, else one a step.

Owns: the order of steps and of what is refreshed between them, and what belongs to one draft depth. Must never know
the head or how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from graphs.graph import BuildInputs, BuildState, Decide, Graph, Prepared, Stage, no_decisions
from graphs.manager import GraphManager
from graphs.recorder import Recorder, Recording
from graphs.shape import GraphShape, Ladder, Variant
from graphs.state import AttentionState

# forward(state, inputs, step, outputs of the step before or None) -> outputs
StepForward = Callable[[AttentionState, Mapping[str, Tensor], int, Any], Any]
RefreshStep = Callable[[AttentionState, int], None]


class DraftBundle(NamedTuple):
    """All that changes with the draft depth: graphs with their states, and how wide a verified row is."""

    depth: int
    width: int  # tokens of a verified row: the last committed one and the draft
    manager: DraftDecodeGraphManager

    def pick(self, rows: int, variant: Variant = ()) -> Graph | None:
        """A graph whose outputs are one entry a step; None at depth 0, where there is nothing to run."""
        if self.depth == 0:
            return None
        return self.manager.pick(rows, self.manager.query_len, (*variant, self.depth))


class DraftDecodeGraphManager(GraphManager):
    """Shapes: R rows of `query_len` tokens (1 for a chain), the variant ends with the depth K, which is K steps.

    Between two steps `refresh_step(state, step)` brings the state's buffers from the last step to `step`, with
    operations on the device, and the state gets a new plan, so that a lazily planned backend plans again: a plan of the
    step before would leave out the tokens stored since, which changes no result's shape and only lowers acceptance.
    `fused`: this happens inside the one recording. Otherwise each step is a recording and `refresh_step` runs between
    replays, where it may also use the host. Either way a replay leaves the buffers at the last step, and they must be
    refreshed before the next.
    """

    def __init__(
        self,
        recorder: Recorder | None,
        rows: Sequence[int],
        depths: Sequence[int],
        forward: StepForward,
        build_state: BuildState,
        build_inputs: BuildInputs,
        refresh_step: RefreshStep,
        *,
        variants: Sequence[Variant] = ((),),
        query_len: int = 1,
        fused: bool = True,
        decide: Decide = no_decisions,
        name: str = "draft decode",
    ) -> None:
        self.query_len = query_len
        self._passes = _Passes(forward, build_state, build_inputs, refresh_step, decide)
        ladder = Ladder.grid(rows, (query_len,), [(*v, depth) for v in variants for depth in depths if depth > 0])
        record = self._passes.record_fused if fused else self._passes.record_steps
        super().__init__(name, recorder, ladder, self._passes.prepare, record)

    def bundle(self, depth: int) -> DraftBundle:
        """What a round of this depth uses; a depth without graphs runs eager, counted when a batch is picked."""
        return DraftBundle(depth, depth + 1, self)


def depth_of(shape: GraphShape) -> int:
    """K of a draft shape."""
    return int(shape.variant[-1])


class _Passes:
    def __init__(
        self,
        forward: StepForward,
        build_state: BuildState,
        build_inputs: BuildInputs,
        refresh_step: RefreshStep,
        decide: Decide,
    ) -> None:
        self._forward, self._build_state, self._build_inputs = forward, build_state, build_inputs
        self._refresh_step, self._decide = refresh_step, decide

    def prepare(self, shape: GraphShape, stage: Stage) -> Prepared:
        state, inputs = self._build_state(shape), self._build_inputs(shape)
        return Prepared(state, inputs, lambda: self._all(state, inputs), self._decide(shape))

    def _all(self, state: AttentionState, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        outputs: list[Any] = []
        for step in range(depth_of(state.shape)):
            self._between(state, step)
            outputs.append(self._forward(state, inputs, step, outputs[-1] if outputs else None))
        return tuple(outputs)

    def _between(self, state: AttentionState, step: int) -> None:
        if step:
            self._refresh_step(state, step)
            state.replan()

    def record_fused(self, recorder: Recorder, prepared: Prepared) -> tuple[Any, Recording]:
        return recorder.record(prepared.run)

    def record_steps(self, recorder: Recorder, prepared: Prepared) -> tuple[Any, Recording]:
        """A recording a step; the buffers are refreshed between them as they will be between replays."""
        state, steps = prepared.state, _Steps(prepared.state, self._refresh_step)
        outputs: list[Any] = []
        try:
            for step in range(depth_of(state.shape)):
                self._between(state, step)
                above = outputs[-1] if outputs else None
                body = partial(self._forward, state, prepared.inputs, step, above)
                made, recording = recorder.record(body)
                outputs.append(made)
                steps.recordings.append(recording)
        except BaseException:
            steps.release()
            raise
        return tuple(outputs), steps


class _Steps:
    """One recording a step, and what the host does between them."""

    def __init__(self, state: AttentionState, refresh_step: RefreshStep) -> None:
        self.recordings: list[Recording] = []
        self._state, self._refresh_step = state, refresh_step

    def replay(self) -> None:
        for step, recording in enumerate(self.recordings):
            if step:
                self._refresh_step(self._state, step)
            recording.replay()

    def release(self) -> None:
        for recording in self.recordings:
            recording.release()
