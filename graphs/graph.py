"""Graph: one prepared pass, its recording, and the conditions under which a replay may stand for running it.

Owns: what a pass consists of, loading its inputs, refusing replays that would lie, and counting. Must never know how
passes are warmed up or captured.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from graphs.errors import GraphMismatchError
from graphs.recorder import Recording
from graphs.shape import GraphShape
from graphs.state import AttentionState, fill

log = logging.getLogger(__name__)

Decisions = tuple[Any, ...]
Forward = Callable[[AttentionState, Mapping[str, Tensor]], Any]
BuildState = Callable[[GraphShape], AttentionState]
BuildInputs = Callable[[GraphShape], Mapping[str, Tensor]]
Decide = Callable[[GraphShape], Decisions]


class Stage(Enum):
    """What a pass is prepared for. Each gets a state of its own, built immediately before it."""

    WARMUP = auto()  # runs: workspaces grow, kernels are tuned
    DISPOSABLE = auto()  # runs exactly what will be recorded, so that nothing happens there for the first time
    CAPTURED = auto()  # is recorded


class Prepared(NamedTuple):
    """A pass of one shape, ready to run or to be recorded."""

    state: AttentionState
    inputs: Mapping[str, Tensor]  # static tensors that the pass reads, their addresses are recorded
    run: Callable[[], Any]
    decisions: Decisions = ()  # what the host decided while building it, and what would change the recorded kernels


def no_decisions(shape: GraphShape) -> Decisions:
    """For passes whose kernels depend on the shape alone."""
    return ()


class Releasable(Protocol):
    """What holds recordings."""

    def release(self) -> None: ...


class Counts:
    """Passes by how they ran."""

    def __init__(self) -> None:
        self.replayed = 0
        self.eager: Counter[str] = Counter()  # by reason

    @property
    def share(self) -> float:
        """Replayed passes of all, 0 where there were none."""
        total = self.replayed + self.eager.total()
        return self.replayed / total if total else 0.0


class Graph:
    """One recorded pass. Use: `state.refresh(...)`, `load(...)`, `replay(...)`, read `outputs`."""

    def __init__(self, prepared: Prepared, outputs: Any, recording: Recording, tally: Tally) -> None:
        self.shape, self.state, self.inputs = prepared.state.shape, prepared.state, prepared.inputs
        self.outputs, self.decisions, self.recording = outputs, prepared.decisions, recording
        self._tally = tally
        self._addresses = self._current()

    def load(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy a batch of this shape or smaller into the inputs, in place, the rest of each becomes 0.

        Inputs that are not named keep what they hold. StateError, with nothing written, for one that is unknown, larger
        or of another type.
        """
        fill(self.inputs, inputs, {})

    def replay(self, decisions: Decisions = ()) -> Any:
        """Replay and return `outputs`, which the next replay overwrites.

        Raises GraphMismatchError, and counts an eager pass, when the host decided otherwise than at capture, or when a
        tensor that is refreshed no longer lies where it was recorded.
        """
        self._check(decisions)
        self.recording.replay()
        self._tally.replay()
        return self.outputs

    def release(self) -> None:
        """Give the recording back; CaptureError from a replay afterwards."""
        self.recording.release()

    def _check(self, decisions: Decisions) -> None:
        if decisions != self.decisions:
            self._refuse("host decisions differ", f"recorded with {self.decisions}, now {decisions}")
        if self._current() != self._addresses:
            self._refuse("addresses differ", "an input or a buffer was moved after capture")

    def _refuse(self, reason: str, detail: str) -> None:
        self._tally.eager(reason, detail)
        raise GraphMismatchError(f"graph {self.shape} cannot stand for this pass: {detail}")

    def _current(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self.inputs.values(), *self.state.buffers.values())]


class Tally:
    """Counts, and logs each reason for eager passes once; quietly where graphs are not wanted."""

    def __init__(self, name: str, level: int = logging.WARNING) -> None:
        self.name, self.counts, self._level = name, Counts(), level

    def replay(self) -> None:
        self.counts.replayed += 1

    def eager(self, reason: str, detail: str = "") -> None:
        if reason not in self.counts.eager:
            log.log(self._level, "%s runs eager: %s%s", self.name, reason, f" ({detail})" if detail else "")
        self.counts.eager[reason] += 1
