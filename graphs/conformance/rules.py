"""The five rules of recorded attention, each as checks that raise `Broken` with the reason.

Owns: what a backend must keep to, and the words in which a breach is told. Must never know pytest or the broken twins.
Why these rules: recording notes kernels and does not run them, so whatever Python remembers of a pass that ran (a flag
set, a plan made, a tensor taken) is wrong for a pass that is recorded, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from graphs.conformance.backend import Batch
from graphs.conformance.harness import (
    Kit,
    captured,
    close,
    eager,
    graph_of,
    layers,
    over,
    prepared,
    replayed,
    same,
    shape_of,
    state_of,
    update,
    values_of,
    worst,
)
from graphs.conformance.world import World
from graphs.errors import GraphError, GraphMismatchError, SharedStorageError
from graphs.graph import Graph, Prepared, Stage
from graphs.manager import GraphManager, record_whole
from graphs.recorder import Recorder, Recording
from graphs.shape import GraphShape, Ladder
from graphs.state import AttentionState, AttentionStatePair, fill

RULES = {
    "R1": "identity: nothing that is initialised on first use is shared between a pass that runs and one that is "
    "recorded, nor between two recorded ones",
    "R2": "contents: when a kernel runs or is recorded, the buffers it reads hold this pass's values",
    "R3": "addresses: what a recorded kernel reads are the tensors that are refreshed before a replay",
    "R4": "host decisions: a branch that Python took while recording is the same at every replay",
    "R5": "refresh: what depends on lengths is computed again before every pass, between draft steps too",
}
CAUSES = {
    "R1": "a cache of plans, workspaces or metadata by shape; `plan` must return a new, unused plan each time",
    "R2": "a plan made of views of one scratch buffer, or a kernel that writes into its inputs; copy what is kept",
    "R3": "`plan` copies a tensor of the batch and `refresh` does not copy it again into the same place",
    "R4": "a grid, a number of splits or a narrowed table taken from `batch.longest` or a value read on the host; "
    "derive it on the device, bound it by the page table, or return it from `decisions`",
    "R5": "metadata planned from the lengths of an earlier pass; `refresh` must plan again, or make planning due",
}
SHORT = (5, 0, 12)  # tokens before the pass when it is recorded; replays come with many more
STEPS = 3


class Wrong(AssertionError):
    """Something that needs no traceback: the text says it all."""


class Broken(Wrong):
    """A backend breaks a rule; the text says which, what was seen, and what usually causes it."""

    def __init__(self, rule: str, saw: str) -> None:
        super().__init__(f"{rule} is broken: {RULES[rule]}.\n  Seen: {saw}.\n  Usual cause: {CAUSES[rule]}.")


def far(world: World, tokens: int) -> tuple[int, ...]:
    """Contexts as long as the backend is tested, with room for `tokens` more, one of them just below a page border."""
    top = world.traits.longest - tokens
    return top, max(top // world.page_size * world.page_size - 1, 0), top // 2


def _judge(rule: str, got: Tensor, right: Tensor, batch: Batch, how: str) -> None:
    if not same(got, right, batch):
        raise Broken(rule, f"{how} gives other numbers than running it eager, {worst(got, right, batch)}")


# ---- R1 ----


def states_share_nothing(kit: Kit) -> None:
    """Warm-up, disposable and captured states of several shapes hold no object and no memory in common."""
    world, _ = kit.worlds(len(SHORT))
    batches = [world.batch(SHORT[:rows], kit.traits.query_lens[0]) for rows in (3, 1)]
    try:
        captured(kit, world, *batches)
    except SharedStorageError as error:
        raise Broken("R1", str(error)) from None


def recorded_after_a_run(kit: Kit) -> None:
    """A pass runs, then one of the same shape is recorded: the recording must contain its own planning."""
    world, judge = kit.worlds(len(SHORT))
    query_len, recorder = kit.traits.query_lens[0], kit.recorder()
    first = world.batch(SHORT, query_len)
    world.fill(first)
    recorder.warm(prepared(world, first).run)
    mine = prepared(world, first)
    outputs, recording = recorder.record(mine.run)
    later = world.batch(far(world, query_len), query_len)
    _load(world, mine, later)
    recording.replay()
    _judge("R1", torch.stack(outputs), eager(judge, later), later, "replaying a pass recorded after a warm-up")


def run_after_a_recording(kit: Kit) -> None:
    """A pass is recorded and never replayed, then one of the same shape runs: it must not find a plan made by it."""
    world, judge = kit.worlds(len(SHORT))
    query_len = kit.traits.query_lens[0]
    batch = world.batch(SHORT, query_len)
    world.fill(batch)
    kit.recorder().record(prepared(world, batch).run)
    how = "running a pass after one of its shape was recorded"
    with _never_filled(how):
        _judge("R1", eager(world, batch), eager(judge, batch), batch, how)


def two_recordings(kit: Kit) -> None:
    """Two passes of one shape are recorded (a target's and its drafter's); the second is right without the first."""
    world, judge = kit.worlds(len(SHORT))
    query_len, recorder = kit.traits.query_lens[0], kit.recorder()
    batch, later = world.batch(SHORT, query_len), world.batch(far(world, query_len), query_len)
    world.fill(batch)
    recorder.record(prepared(world, batch).run)
    mine = prepared(world, batch)
    outputs, recording = recorder.record(mine.run)
    _load(world, mine, later)
    how = "replaying the second of two recordings"
    with _never_filled(how):
        recording.replay()
        _judge("R1", torch.stack(outputs), eager(judge, later), later, how)


@contextmanager
def _never_filled(how: str) -> Iterator[None]:
    """A plan that only a recording was to fill holds no valid indices, so that it may also end in an error."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if isinstance(error, GraphError):
            raise
        raise Broken("R1", f"{how} ends in {type(error).__name__}: {str(error).splitlines()[0]}") from None


def _load(world: World, mine: Prepared, batch: Batch) -> None:
    """Bring a recorded pass to a batch, as a manager's graph would."""
    world.fill(batch)
    update(world, mine.state, batch)
    fill(mine.inputs, world.inputs(batch), {})


# ---- R2 ----


def states_keep_their_contents(kit: Kit) -> None:
    """Two states of different shapes are built, then both are used: the second must not have overwritten the first."""
    world, judge = kit.worlds(len(SHORT))
    query_len = kit.traits.query_lens[0]
    batches = [world.batch(SHORT, query_len), world.batch((9, 3), query_len)]
    states = [state_of(world, batch) for batch in batches]
    for batch, state in zip(batches, states, strict=True):
        world.fill(batch)
        got = torch.stack(layers(world, state.plan, world.inputs(batch)))
        how = f"using the state of {shape_of(batch)} after states of other shapes were built"
        _judge("R2", got, eager(judge, batch), batch, how)
    try:
        AttentionStatePair(*states).check()
    except SharedStorageError as error:
        raise Broken("R2", str(error)) from None


def passes_leave_their_inputs(kit: Kit) -> None:
    """A pass changes neither lengths nor page tables: a warm-up that does would spoil the pass after it."""
    world, _ = kit.worlds(len(SHORT))
    batch = world.batch(SHORT, kit.traits.query_lens[0])
    state = state_of(world, batch)
    world.fill(batch)
    layers(world, state.plan, world.inputs(batch))
    for name, value in values_of(batch).items():
        if not torch.equal(state.buffers[name], value):
            raise Broken("R2", f"after a pass `{name}` is not what it was before")


# ---- R3 and R4 ----


def replays_read_what_was_refreshed(kit: Kit) -> None:
    """Recorded at short lengths, replayed at long ones; all that the host knows is the same."""
    for query_len in kit.traits.query_lens:
        world, judge = kit.worlds(len(SHORT))
        graph = graph_of(captured(kit, world, first := world.batch(SHORT, query_len)), first)
        later = world.batch(far(world, query_len), query_len)
        how = f"a pass of {query_len} tokens recorded at lengths {SHORT} and replayed at {far(world, query_len)}"
        _judge("R3", replayed(world, graph, later), eager(judge, later), later, how)


def host_decisions_hold(kit: Kit) -> None:
    """As above, but the batch says how long it is: what was decided from that must be declared, or not matter."""
    world, judge = kit.worlds(len(SHORT))
    query_len = kit.traits.query_lens[0]
    graph = graph_of(captured(kit, world, first := _bounded(world, SHORT, query_len)), first)
    lengths = [tuple(c // part for c in far(world, query_len)) for part in (1, 2, 4)]
    refused = [contexts for contexts in lengths if not _holds(world, judge, graph, contexts, query_len)]
    if len(refused) == len(lengths):
        raise Broken("R4", f"`decisions` differs from that at {SHORT} for {lengths}: a graph would never be replayed")


def _holds(world: World, judge: World, graph: Graph, contexts: Sequence[int], query_len: int) -> bool:
    """False when the backend says that this batch needs another graph."""
    batch = _bounded(world, contexts, query_len)
    try:
        got = replayed(world, graph, batch)
    except GraphMismatchError:
        return False
    how = f"a pass recorded where the longest row is {max(SHORT) + query_len} tokens, replayed at {batch.longest}"
    _judge("R4", got, eager(judge, batch), batch, how)
    return True


def _bounded(world: World, contexts: Sequence[int], query_len: int) -> Batch:
    return world.batch(contexts, query_len, longest=max(contexts) + query_len)


# ---- R5 ----


def eager_steps_see_each_other(kit: Kit) -> None:
    """Draft steps on one plan, refreshed in between: each sees the tokens of those before it."""
    world, judge = kit.worlds(len(SHORT))
    batches = steps_from(world, far(world, STEPS * min(kit.traits.query_lens)))
    state = state_of(world, batches[0])
    world.fill(batches[0])
    for step, batch in enumerate(batches):
        if step:
            update(world, state, batch)
        got = torch.stack(layers(world, state.plan, world.inputs(batch)))
        _judge("R5", got, eager(judge, batch), batch, f"draft step {step + 1} after a refresh")


def recorded_steps_see_each_other(kit: Kit) -> None:
    """All draft steps of a round, lengths and plan refreshed between them: inside the recording where that can be."""
    world, judge = kit.worlds(len(SHORT))
    graph = graph_of(captured_steps(kit, world, first := steps_from(world, SHORT)), first[0])
    batches = steps_from(world, far(world, STEPS * min(kit.traits.query_lens)))
    world.fill(batches[0])
    update(world, graph.state, batches[0])
    graph.load(step_inputs(world, batches))
    for step, (got, batch) in enumerate(zip(graph.replay(graph.decisions), batches, strict=True)):
        how = f"step {step + 1} of a recorded draft loop"
        _judge("R5", torch.stack(got), eager(judge, batch), batch, how)


def replays_in_turn(kit: Kit) -> None:
    """One graph, replayed at long, short and long lengths again: no replay uses what another computed."""
    world, judge = kit.worlds(len(SHORT))
    query_len = kit.traits.query_lens[-1]
    graph = graph_of(captured(kit, world, first := world.batch(SHORT, query_len)), first)
    top = far(world, query_len)
    for contexts in (top, SHORT, tuple(c // 2 for c in top), top):
        batch = world.batch(contexts, query_len)
        _judge("R5", replayed(world, graph, batch), eager(judge, batch), batch, f"a replay at {contexts}, after others")


def steps_from(world: World, contexts: Sequence[int], depth: int = STEPS) -> list[Batch]:
    """The batches of `depth` draft steps, each continuing after the tokens of the one before."""
    query_len = min(world.traits.query_lens)
    return [world.batch([c + step * query_len for c in contexts], query_len) for step in range(depth)]


def step_inputs(world: World, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The inputs of all steps, by step: `q` and `own` with a leading dimension of steps."""
    each = [world.inputs(batch) for batch in batches]
    return {name: torch.stack([inputs[name] for inputs in each]) for name in each[0]}


def captured_steps(kit: Kit, world: World, batches: Sequence[Batch]) -> GraphManager:
    """A graph of a whole draft loop, recorded at the lengths of `batches`; a recording a step where refresh cannot be.

    Either way a replay leaves the state at the last step.
    """

    def factory(shape: GraphShape, stage: Stage) -> Prepared:
        world.fill(batches[0])
        state, inputs = state_of(world, batches[0]), step_inputs(world, batches)
        return Prepared(state, inputs, partial(_draft_loop, world, state, inputs, batches))

    record = record_whole if kit.traits.steps_in_graph else partial(_record_steps, world, batches)
    manager = GraphManager("draft loop", kit.recorder(), Ladder([shape_of(batches[0])]), factory, record)
    manager.capture()
    return manager


def _record_steps(
    world: World, batches: Sequence[Batch], recorder: Recorder, prepared: Prepared
) -> tuple[list[list[Tensor]], Recording]:
    outputs, steps = [], _Steps(world, prepared.state, batches)
    for step, batch in enumerate(batches):
        if step:
            _advance(world, prepared.state, batch)
        inputs = {name: value[step] for name, value in prepared.inputs.items()}
        made, recording = recorder.record(partial(layers, world, prepared.state.plan, inputs))
        outputs.append(made)
        steps.recordings.append(recording)
    return outputs, steps


class _Steps:
    """One recording a draft step; what refreshes runs between replays, where it may use the host."""

    def __init__(self, world: World, state: AttentionState, batches: Sequence[Batch]) -> None:
        self.recordings: list[Recording] = []
        self._world, self._state, self._batches = world, state, batches

    def replay(self) -> None:
        for step, (recording, batch) in enumerate(zip(self.recordings, self._batches, strict=True)):
            if step:
                _advance(self._world, self._state, batch)
            recording.replay()

    def release(self) -> None:
        for recording in self.recordings:
            recording.release()


def _draft_loop(
    world: World, state: AttentionState, inputs: dict[str, Tensor], batches: Sequence[Batch]
) -> list[list[Tensor]]:
    outputs = []
    for step, batch in enumerate(batches):
        if step:
            _advance(world, state, batch)
        outputs.append(layers(world, state.plan, {name: value[step] for name, value in inputs.items()}))
    return outputs


def _advance(world: World, state: AttentionState, batch: Batch) -> None:
    """Every row's context grows by the tokens it has just stored: on the device, as far as it is up to the kit."""
    counts = state.buffers["counts"]
    state.buffers["context"].add_(counts)
    state.buffers["positions"].add_(counts[:, None])
    state.buffers["tokens"].add_(counts[:, None])
    world.backend.refresh(state.plan, over(state.buffers, batch))


def right_numbers(world: World, batch: Batch) -> None:
    """An eager pass against the oracle; Wrong when it is off."""
    got, right = eager(world, batch), world.expected(batch)
    if not close(got, right, batch, world.traits.tolerance):
        raise Wrong(
            f"the numbers are wrong, {worst(got, right, batch)} (tolerance {world.traits.tolerance}): pages of "
            f"{world.page_size}, contexts {batch.context.tolist()}, counts {batch.counts.tolist()}; memory that no "
            "query may see held NaN"
        )
