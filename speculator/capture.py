"""Records the passes and rounds of an engine at start-up, on all of its ranks or on none.

Owns: what happens when a capture fails. Must never know configurations or how models are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from graphs.errors import GraphError
from graphs.memory import GraphEstimate, compare, cuda_meter, difference
from graphs.recorder import CudaRecorder, Recorder
from graphs.tape import TapeRecorder
from speculator.engine import Engine
from speculator.passes import EagerPasses
from speculator.ranks.team import Team
from speculator.recorded import Sizes
from speculator.round import Rounds
from speculator.staged import recorded_passes

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # what is recorded, shapes done, shapes in all


def record_passes(
    engine: Engine,
    sizes: Sizes,
    estimate: GraphEstimate,
    progress: Progress | None = None,
    depths: Sequence[int] | None = None,
    team: Team | None = None,
) -> None:
    """Capture every shape of every pass, and whole rounds too where `depths` says which shorter chains they draft.

    Where that fails, the engine runs eager and says why.
    """
    assert isinstance(engine.passes, EagerPasses)
    cuda = engine.device.type == "cuda"
    recorder: Recorder = CudaRecorder(engine.device) if cuda else TapeRecorder()
    meter = cuda_meter(engine.device) if cuda else None
    passes = recorded_passes(engine.passes, recorder, sizes, engine.device)
    before = meter() if meter else None
    if why := _captured(passes.capture, progress, team):
        log.error("passes run eager, graphs could not be captured: %s", why)
    if depths is not None:
        record_rounds(engine, engine.passes, recorder, sizes, depths, progress, team)
    engine.passes = passes
    graphs = sum(len(manager.graphs) for manager in passes.managers)
    log.info("%d graphs captured in %.1f s", graphs, passes.capture_seconds)
    passes.bytes_expected = estimate.bytes
    passes.bytes_taken = difference(before, meter()).taken if meter and before else recorder.pool_bytes
    if meter:
        compare(estimate, passes.bytes_taken)


def record_rounds(
    engine: Engine,
    eager: EagerPasses,
    recorder: Recorder,
    sizes: Sizes,
    depths: Sequence[int],
    progress: Progress | None = None,
    team: Team | None = None,
) -> None:
    """Capture whole rounds over the engine's rows; where that fails, they run pass by pass and say why."""
    rounds = Rounds(eager, recorder, sizes, engine.cache, engine.rows, engine.lookback, depths)
    engine.rounds = rounds
    if eager.states is not None:
        return  # each round is then counted with this reason
    if why := _captured(rounds.capture, progress, team):
        log.error("rounds run pass by pass, their graphs could not be captured: %s", why)
    log.info("%d whole rounds captured in %.1f s", len(rounds.manager.graphs), rounds.capture_seconds)


def _captured(capture: Callable[[Progress | None], None], progress: Progress | None, team: Team | None) -> str:
    """Why nothing was captured, "" where all was; over several ranks on all of them or on none."""

    def told(vote: Progress) -> None:
        def tick(what: str, done: int, total: int) -> None:
            vote(what, done, total)
            if progress:
                progress(what, done, total)

        capture(tick)

    if team is not None:
        return team.capture(told)
    try:
        capture(progress)
    except GraphError as error:
        return str(error)
    return ""
