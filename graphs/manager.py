"""GraphManager: one graph per shape of a pass, each recorded with an attention state of its own.

Owns: which state each pass of a capture gets, the pairs, and the checks that they are apart. Must never know models,
sessions, or what a pass computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from graphs.errors import CaptureError, StateError
from graphs.graph import (
    BuildInputs,
    BuildState,
    Decide,
    Forward,
    Graph,
    Prepared,
    Stage,
    no_decisions,
)
from graphs.lifecycle import Lifecycle
from graphs.recorder import Recorder, Recording
from graphs.shape import GraphShape, Ladder, Variant
from graphs.state import AttentionState, AttentionStatePair, check_apart

Factory = Callable[[GraphShape, Stage], Prepared]
# Records a prepared pass; most are one recording, a pass with host work inside is several.
Record = Callable[[Recorder, Prepared], tuple[Any, Recording]]


def plain_factory(
    forward: Forward, build_state: BuildState, build_inputs: BuildInputs, decide: Decide = no_decisions
) -> Factory:
    """Passes that build their own state and run `forward(state, inputs)` whatever the stage."""

    def prepare(shape: GraphShape, stage: Stage) -> Prepared:
        state, inputs = build_state(shape), build_inputs(shape)
        return Prepared(state, inputs, lambda: forward(state, inputs), decide(shape))

    return prepare


def record_whole(recorder: Recorder, prepared: Prepared) -> tuple[Any, Recording]:
    """The whole pass as one recording."""
    return recorder.record(prepared.run)


class GraphManager(Lifecycle[Graph]):
    """Graphs of one kind of pass, one for each shape of the ladder.

    `factory` is called immediately before each pass, and each pass has a state of its own.
    """

    def __init__(
        self, name: str, recorder: Recorder | None, ladder: Ladder, factory: Factory, record: Record = record_whole
    ) -> None:
        super().__init__(name, recorder, ladder)
        self._factory, self._record = factory, record
        self._states: dict[GraphShape, AttentionState] = {}
        self._pairs: dict[GraphShape, AttentionStatePair] = {}

    @property
    def pairs(self) -> StatePairs:
        """The states of every captured shape; a live view, which may be handed to another manager before capture."""
        return StatePairs(self._states, self._pairs)

    def pick(self, rows: int, query_len: int, variant: Variant = ()) -> Graph | None:
        """The smallest graph that holds the batch; None, counted and logged with its reason, when it must run eager."""
        return self._pick(rows, query_len, variant)

    def _warm(self, recorder: Recorder, shape: GraphShape) -> None:
        self._run(recorder, shape, Stage.WARMUP)

    def _capture(self, recorder: Recorder, shape: GraphShape) -> Graph:
        warm = self._run(recorder, shape, Stage.WARMUP)
        disposable = self._run(recorder, shape, Stage.DISPOSABLE)
        prepared = self._prepare(recorder, shape, Stage.CAPTURED)
        self._check_decisions(prepared, warm, disposable)
        _check_apart(prepared.state, warm.state, disposable.state)
        outputs, recording = self._record(recorder, prepared)
        try:
            _check_apart(prepared.state, warm.state, disposable.state)  # what is planned on first use exists only now
        except BaseException:
            recording.release()
            raise
        self._pairs[shape] = AttentionStatePair(warm.state, prepared.state)
        recorder.owners.hold(self._key(shape), prepared.state.plan_parts())
        return Graph(prepared, outputs, recording, self._tally)

    def _run(self, recorder: Recorder, shape: GraphShape, stage: Stage) -> Prepared:
        prepared = self._prepare(recorder, shape, stage)
        if stage is Stage.WARMUP:
            self._states[shape] = prepared.state
        recorder.warm(prepared.run)
        return prepared

    def _prepare(self, recorder: Recorder, shape: GraphShape, stage: Stage) -> Prepared:
        """Build a pass; its plan must not be one that a recorded pass of any manager holds."""
        prepared = self._factory(shape, stage)
        if prepared.state.shape != shape:
            raise StateError(f"{self.name}: asked for a state of shape {shape}, got one of {prepared.state.shape}")
        parts, names = prepared.state.plan_parts(), f"{self._key(shape)}, {stage.name.lower()}"
        for owner, held in recorder.owners:
            check_apart(parts, held, f"the states of {names}, and of {owner}, captured,")
        return prepared

    def _check_decisions(self, captured: Prepared, *ran: Prepared) -> None:
        for prepared in ran:
            if prepared.decisions != captured.decisions:
                both = f"{prepared.decisions} in warm-up, {captured.decisions} at capture"
                raise CaptureError(f"{self._key(captured.state.shape)}: the host decided {both}")

    def _key(self, shape: GraphShape) -> str:
        return f"{self.name} {shape}"

    def _forget(self) -> None:
        for shape in self._pairs:
            if self.recorder:
                self.recorder.owners.drop(self._key(shape))
        self._pairs.clear()

    def close(self) -> None:
        super().close()
        self._states.clear()


def _check_apart(captured: AttentionState, *ran: AttentionState) -> None:
    for state in ran:
        AttentionStatePair(state, captured).check()


class StatePairs(Mapping[GraphShape, AttentionStatePair]):
    """The pairs of captured shapes. `warm` also has the warm-up states of shapes that are not captured yet."""

    def __init__(
        self, warm: Mapping[GraphShape, AttentionState], pairs: Mapping[GraphShape, AttentionStatePair]
    ) -> None:
        self.warm = MappingProxyType(warm)
        self._pairs = pairs

    @property
    def captured(self) -> Mapping[GraphShape, AttentionState]:
        return {shape: pair.captured for shape, pair in self._pairs.items()}

    def __getitem__(self, shape: GraphShape) -> AttentionStatePair:
        return self._pairs[shape]

    def __iter__(self) -> Iterator[GraphShape]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)
