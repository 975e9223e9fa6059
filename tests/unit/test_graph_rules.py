"""The five rules of recorded passes, each as it must be and broken on purpose, with attention that is planned lazily.

The GPU tests run this file again with CUDA graphs: only `device` differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from graph_toys import LazyPlan, Toy, same, some_rows
from torch import Tensor

from graphs.draft_decode import DraftDecodeGraphManager
from graphs.errors import CaptureError, GraphMismatchError, SharedStorageError, StateError
from graphs.graph import Graph, Prepared, Stage, Tally
from graphs.manager import GraphManager
from graphs.prefill_eagle import PrefillEagleGraphManager
from graphs.recorder import Recorder
from graphs.shape import GraphShape, Ladder
from graphs.state import AttentionState, AttentionStatePair
from graphs.target_verify import TargetVerifyGraphManager

SHAPE = GraphShape(2, 3)
SHORT, LONG = some_rows([2, 5], 3), some_rows([37, 50], 3, seed=1)


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy(device: str) -> Toy:
    return Toy(device)


@pytest.fixture
def recorder(toy: Toy) -> Iterator[Recorder]:
    recorder = toy.recorder()
    yield recorder
    recorder.close()


def verify_manager(
    toy: Toy, recorder: Recorder | None, *shapes: GraphShape, **changes: Any
) -> TargetVerifyGraphManager:
    given = dict(forward=toy.forward, build_state=toy.state, build_inputs=toy.inputs) | changes
    return TargetVerifyGraphManager(recorder, Ladder(shapes or (SHAPE,)), **given)


def eagle_manager(toy: Toy, recorder: Recorder, **given: Any) -> PrefillEagleGraphManager:
    return PrefillEagleGraphManager(recorder, Ladder([SHAPE]), toy.head, toy.head_inputs, **given)


def picked(manager: GraphManager, rows: int = 2, query_len: int = 3) -> Graph:
    graph = manager.pick(rows, query_len)
    assert graph is not None
    return graph


def head_load(toy: Toy, rows: Any) -> dict[str, Tensor]:
    features = torch.ones(rows.rows, rows.width, 16, device=toy.device) / 3
    return {**toy.load(rows), "features": features}


def raw_graph(toy: Toy, recorder: Recorder, state: AttentionState, body: Any) -> Graph:
    """A recording without a manager and so without its checks, for the twins that must go wrong."""
    prepared = Prepared(state, toy.inputs(SHAPE), lambda: None)
    outputs, recording = recorder.record(lambda: body(state, prepared.inputs))
    return Graph(prepared, outputs, recording, Tally("raw"))


# captured at length L0, replayed at L1 >> L0: what every rule comes down to


@pytest.mark.parametrize("rows", [SHORT, LONG, some_rows([0, 60], 3), some_rows([58], 1)], ids=str)
def test_replay_is_eager_bit_for_bit(toy, recorder, rows):
    manager = verify_manager(toy, recorder)
    manager.capture()
    assert toy.agrees(picked(manager), rows)


# R1 identity


def test_r1_every_pass_of_a_capture_has_its_own_plan(toy, recorder):
    manager = verify_manager(toy, recorder, SHAPE, GraphShape(1, 3))
    manager.capture()
    states = [state for pair in manager.pairs.values() for state in pair]
    assert len({id(state.plan) for state in states}) == 4
    for pair in manager.pairs.values():
        pair.check()


def test_r1_broken_one_plan_for_warm_up_and_capture_is_refused_before_it_is_recorded(toy, recorder):
    plan, recorded = LazyPlan(), []

    def forward(state: AttentionState, inputs: Mapping[str, Tensor]) -> Tensor:
        recorded.append(recorder.recording)
        return toy.forward(state, inputs)

    build = lambda shape: toy.state(shape, lambda buffers: plan)  # noqa: E731
    manager = verify_manager(toy, recorder, build_state=build, forward=forward)
    with pytest.raises(SharedStorageError, match="plan is plan"):
        manager.capture()
    assert recorded == [False] * 3
    assert not manager.ready
    assert manager.pick(2, 3) is None


class Scratched(LazyPlan):
    """Every plan is an object of its own, but on first use it plans into memory of the backend."""

    def __init__(self, scratch: Tensor) -> None:
        super().__init__()
        self._scratch = lambda: scratch  # out of sight until used

    def limits(self, buffers: Mapping[str, Tensor]) -> Tensor:
        own = super().limits(buffers)
        self.limit = self._scratch().copy_(own[:, 0, 0])
        return self.limit[:, None, None]


def test_r1_broken_what_is_planned_into_shared_memory_on_first_use_is_refused(toy, recorder):
    scratch = toy.ints([0, 0])
    build = lambda shape: toy.state(shape, lambda buffers: Scratched(scratch))  # noqa: E731
    manager = verify_manager(toy, recorder, build_state=build)
    with pytest.raises(SharedStorageError, match="plan.limit is plan.limit"):
        manager.capture()
    assert not manager.ready


def test_r1_broken_one_plan_for_warm_up_and_capture_replays_the_warm_up(toy, recorder):
    state = toy.state(SHAPE)
    state.refresh(toy.values(SHORT))
    recorder.warm(lambda: toy.forward(state, toy.inputs(SHAPE)))
    graph = raw_graph(toy, recorder, state, toy.forward)
    assert not toy.agrees(graph, LONG)


def test_r1_a_fresh_plan_in_place_of_the_used_one_mends_it(toy, recorder):
    state = toy.state(SHAPE)
    state.refresh(toy.values(SHORT))
    recorder.warm(lambda: toy.forward(state, toy.inputs(SHAPE)))
    state.replan()
    assert toy.agrees(raw_graph(toy, recorder, state, toy.forward), LONG)


def test_r1_broken_two_shapes_share_a_plan(toy, recorder):
    plan = LazyPlan()
    fresh = iter([None, None, None, None, plan, None, None, plan])  # two warm-ups, then three passes a shape
    make = lambda buffers: next(fresh) or LazyPlan()  # noqa: E731
    manager = verify_manager(toy, recorder, SHAPE, GraphShape(1, 3), build_state=lambda shape: toy.state(shape, make))
    with pytest.raises(SharedStorageError, match="captured"):
        manager.capture()


def test_r1_the_heads_pass_takes_the_targets_buffers_and_none_of_its_plans(toy, recorder):
    target = verify_manager(toy, recorder)
    eagle = eagle_manager(toy, recorder, pairs=target.pairs)
    target.warm_up()
    eagle.warm_up()
    target.capture()
    eagle.capture()
    theirs, ours = target.pairs[SHAPE], eagle.pairs[SHAPE]
    for mine, other in zip(ours, theirs, strict=True):
        assert all(mine.buffers[name] is other.buffers[name] for name in mine.buffers)
        assert mine.plan is not other.plan
    ours.check()


@pytest.mark.parametrize("taken", [True, False], ids=["the target's pairs", "states of its own"])
def test_r1_the_heads_pass_replays_as_eager(toy, recorder, taken):
    target = verify_manager(toy, recorder)
    target.capture()
    eagle = eagle_manager(toy, recorder, **(dict(pairs=target.pairs) if taken else dict(build_state=toy.state)))
    eagle.capture()
    for rows in (SHORT, LONG, SHORT):
        assert toy.agrees(picked(target), rows)
        assert toy.agrees(picked(eagle), rows, toy.head, head_load(toy, rows))


def test_one_refresh_of_the_targets_state_holds_for_the_heads_pass(toy, recorder):
    target = verify_manager(toy, recorder)
    target.capture()
    eagle = eagle_manager(toy, recorder, pairs=target.pairs)
    eagle.capture()
    expected, _ = toy.eager(picked(eagle), LONG, head_load(toy, LONG), toy.head)
    picked(target).state.refresh(toy.values(LONG))
    picked(eagle).load(head_load(toy, LONG))
    assert same(picked(eagle).replay(), expected)


def test_r1_broken_the_head_warmed_up_on_the_targets_captured_state_is_refused(toy, recorder):
    target = verify_manager(toy, recorder)
    target.capture()
    captured = target.pairs[SHAPE].captured
    eagle = eagle_manager(toy, recorder, build_state=lambda shape: captured)
    with pytest.raises(SharedStorageError, match="target verify 2x3, captured"):
        eagle.warm_up()


def test_r1_broken_the_head_warmed_up_on_the_targets_captured_state_reads_what_no_kernel_wrote(toy, recorder):
    target = verify_manager(toy, recorder)
    target.capture()
    captured = target.pairs[SHAPE].captured
    assert captured.plan.initialised
    captured.refresh(toy.values(SHORT))
    inputs = toy.head_inputs(SHAPE)
    warmed = recorder.warm(lambda: toy.head(captured, inputs))
    right = toy.state(SHAPE)
    right.refresh(toy.values(SHORT))
    assert not same(warmed, toy.head(right, inputs))


def test_r1_broken_the_targets_plan_recorded_a_second_time_is_not_planned(toy, recorder):
    """It works as long as the target's graph ran just before on the same lengths, and no longer."""
    target = verify_manager(toy, recorder)
    target.capture()
    assert toy.agrees(picked(target), SHORT)
    graph = raw_graph(toy, recorder, target.pairs[SHAPE].captured, toy.forward)
    assert not toy.agrees(graph, LONG)


# R2 contents


def test_r2_states_own_their_memory_whatever_the_builder_writes_later(toy, recorder):
    scratch = torch.zeros(64, dtype=torch.int64, device=toy.device)

    def build(shape: GraphShape) -> AttentionState:
        values = dict(context=scratch[: shape.rows], counts=scratch[32 : 32 + shape.rows].fill_(1))
        pages = torch.zeros(shape.rows, toy.pages, dtype=torch.int64, device=toy.device)
        return AttentionState(shape, {**values, "pages": pages}, toy.new_plan)

    manager = verify_manager(toy, recorder, SHAPE, GraphShape(1, 3), build_state=build)
    manager.capture()
    scratch.fill_(1 << 40)
    assert toy.agrees(picked(manager), LONG)
    assert toy.agrees(picked(manager, 1), some_rows([41], 3))


def test_r2_broken_a_pair_of_views_is_refused(toy, recorder):
    scratch = torch.zeros(64, dtype=torch.int64, device=toy.device)
    plan_of = lambda buffers: {"splits": scratch[:4]}  # noqa: E731
    with pytest.raises(SharedStorageError, match="splits"):
        AttentionStatePair(toy.state(SHAPE, plan_of), toy.state(SHAPE, plan_of)).check()


def test_r2_broken_views_that_a_later_build_overwrites_replay_its_contents(toy, recorder):
    scratch = torch.zeros(2, dtype=torch.int64, device=toy.device)
    state = toy.state(SHAPE, lambda buffers: scratch)

    def body(state: AttentionState, inputs: Mapping[str, Tensor]) -> Tensor:
        return toy.forward(state, inputs, Limits(state.plan))

    graph = raw_graph(toy, recorder, state, body)
    scratch.copy_(toy.ints([40, 53]))
    assert toy.agrees(graph, LONG)
    scratch.copy_(toy.ints([3, 3]))  # the next build
    assert not toy.agrees(graph, LONG)


class Limits:
    """A plan made on the host: the limits lie in memory that somebody else fills."""

    def __init__(self, limit: Tensor) -> None:
        self.limit = limit

    def limits(self, buffers: Mapping[str, Tensor]) -> Tensor:
        return self.limit[:, None, None]


def test_r2_a_warm_up_may_change_its_lengths(toy, recorder):
    def body(state: AttentionState, inputs: Mapping[str, Tensor]) -> Tensor:
        result = toy.forward(state, inputs)
        state.buffers["context"].add_(inputs["tokens"].shape[1])
        return result

    target = verify_manager(toy, recorder, forward=body)
    target.capture()
    pair = target.pairs[SHAPE]
    assert pair.warmup.buffers["context"].tolist() == [3, 3]
    assert pair.captured.buffers["context"].tolist() == [0, 0]
    eagle = eagle_manager(toy, recorder, pairs=target.pairs)
    seen = []
    eagle.warm_up(lambda done, total, shape: seen.append(pair.warmup.buffers["context"].tolist()))
    assert pair.warmup.buffers["context"].tolist() == [0, 0], (
        "the head's warm-up begins with what the state was built with"
    )
    eagle.capture()
    assert toy.agrees(picked(eagle), LONG, toy.head, head_load(toy, LONG))


def test_r2_a_smaller_batch_leaves_nothing_of_the_larger_one(toy, recorder):
    shape = GraphShape(32, 2)
    manager = verify_manager(toy, recorder, shape)
    manager.capture()
    graph = picked(manager, 32, 2)
    for rows in (32, 12, 1, 32):
        assert toy.agrees(graph, some_rows([(7 * i) % 50 for i in range(rows)], 2, seed=rows))
        assert graph.state.buffers["counts"][rows:].sum() == 0


def test_r2_padding_rows_are_inert(toy, recorder):
    """Valid rows do not depend on how many rows pad them out, and padding stores nothing."""
    manager = verify_manager(toy, recorder, GraphShape(4, 3))
    manager.capture()
    graph, batch = picked(manager, 4), some_rows([9, 30], 3)
    assert toy.agrees(graph, some_rows([50, 51, 52, 53], 3, seed=5))
    before = toy.stored()
    graph.state.refresh(toy.values(batch))
    graph.load(toy.load(batch))
    out = graph.replay()
    assert out.isfinite().all()
    slots = 2 * toy.pages * 4  # those of the two rows
    assert torch.equal(toy.stored()[:, slots:], before[:, slots:])


# R3 addresses


def test_r3_what_is_refreshed_is_what_was_recorded(toy, recorder):
    manager = verify_manager(toy, recorder)
    manager.capture()
    graph = picked(manager)
    addresses = [t.data_ptr() for t in (*graph.state.buffers.values(), *graph.inputs.values())]
    for rows in (SHORT, LONG):
        assert toy.agrees(graph, rows)
    assert addresses == [t.data_ptr() for t in (*graph.state.buffers.values(), *graph.inputs.values())]


def test_r3_broken_a_recorded_copy_never_hears_of_a_refresh(toy, recorder):
    state = toy.state(SHAPE)
    copies = {name: buffer.clone() for name, buffer in state.buffers.items()}
    graph = raw_graph(
        toy, recorder, state, lambda state, inputs: toy.run(toy.embed[inputs["tokens"]], copies, state.plan)
    )
    assert not toy.agrees(graph, LONG)


def test_r3_broken_a_buffer_that_moved_is_noticed(toy, recorder):
    manager = verify_manager(toy, recorder)
    manager.capture()
    graph = picked(manager)
    graph.state.buffers["context"].set_(torch.zeros(2, dtype=torch.int64, device=toy.device))
    with pytest.raises(GraphMismatchError, match="moved"):
        graph.replay()
    assert manager.counts.eager["addresses differ"] == 1


# R4 host decisions


def splitting(toy: Toy, limit: list[int]) -> dict[str, Any]:
    """A pass whose host code takes another path for long rows."""

    def forward(state: AttentionState, inputs: Mapping[str, Tensor]) -> Tensor:
        result = toy.forward(state, inputs)
        return result * 2 if limit[0] > 32 else result

    return dict(forward=forward, decide=lambda shape: ("long" if limit[0] > 32 else "short",))


def test_r4_a_replay_with_the_same_decisions_is_eager(toy, recorder):
    limit = [8]
    given = splitting(toy, limit)
    manager = verify_manager(toy, recorder, **given)
    manager.capture()
    assert picked(manager).decisions == ("short",)
    assert toy.agrees(picked(manager), LONG, given["forward"])


def test_r4_a_replay_with_other_decisions_is_refused_and_counted(toy, recorder):
    limit = [8]
    given = splitting(toy, limit)
    manager = verify_manager(toy, recorder, **given)
    manager.capture()
    limit[0] = 64
    for decisions in (given["decide"](SHAPE), ()):
        with pytest.raises(GraphMismatchError, match="recorded with"):
            picked(manager).replay(decisions)
    assert manager.counts.eager["host decisions differ"] == 2
    assert manager.counts.replayed == 0


def test_r4_broken_an_unnoted_branch_replays_the_other_path(toy, recorder):
    limit = [8]
    given = splitting(toy, limit)
    manager = verify_manager(toy, recorder, forward=given["forward"])
    manager.capture()
    limit[0] = 64
    assert not toy.agrees(picked(manager), LONG, given["forward"])


def test_r4_a_decision_that_changes_between_warm_up_and_capture_is_refused(toy, recorder):
    stages = iter(range(10))
    manager = verify_manager(toy, recorder, decide=lambda shape: (next(stages),))
    with pytest.raises(CaptureError, match="the host decided"):
        manager.capture()


# R5 refresh


def draft_manager(toy: Toy, recorder: Recorder | None, **changes: Any) -> DraftDecodeGraphManager:
    given = dict(
        forward=toy.step, build_state=toy.state, build_inputs=toy.inputs, refresh_step=toy.next_step, fused=True
    )
    return DraftDecodeGraphManager(recorder, **({"rows": (1, 4), "depths": (0, 2, 5)} | given | changes))


def by_hand(toy: Toy, depth: int) -> Any:
    """The oracle: every step with a state and a plan built for it."""

    def body(state: AttentionState, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        outputs: list[Any] = []
        for step in range(depth):
            now = toy.state(state.shape)
            values = {**state.buffers, "context": state.buffers["context"] + step}
            now.refresh(values)
            outputs.append(toy.step(now, inputs, step, outputs[-1] if outputs else None))
        return tuple(outputs)

    return body


@pytest.mark.parametrize("fused", [True, False], ids=["one graph", "one graph a step"])
def test_r5_draft_steps_replay_as_eager(toy, recorder, fused):
    manager = draft_manager(toy, recorder, fused=fused)
    manager.capture()
    for context, depth in (([3], 5), ([40], 5), ([50, 2, 9], 2), ([7, 8, 9, 10], 5), ([40], 2)):
        graph = manager.bundle(depth).pick(len(context))
        assert len(graph.outputs) == depth
        assert toy.agrees(graph, some_rows(context, 1), by_hand(toy, depth))


@pytest.mark.parametrize("fused", [True, False], ids=["one graph", "one graph a step"])
def test_r5_broken_lengths_that_stay_behind(toy, recorder, fused):
    manager = draft_manager(toy, recorder, fused=fused, refresh_step=lambda state, step: None)
    manager.capture()
    assert not toy.agrees(manager.bundle(5).pick(1), some_rows([20], 1), by_hand(toy, 5))


def test_r5_broken_a_plan_kept_over_the_steps_misses_the_tokens_stored_since(toy, recorder):
    plans: dict[AttentionState, LazyPlan] = {}

    def stale(state: AttentionState, inputs: Mapping[str, Tensor], step: int, above: Any) -> Any:
        plan = plans.setdefault(state, state.plan)  # of the first step
        tokens = inputs["tokens"] if step == 0 else above[0]
        hidden = toy.run(toy.embed[tokens], state.buffers, plan)
        return (hidden @ toy.embed.T).argmax(-1), hidden

    manager = draft_manager(toy, recorder, forward=stale)
    manager.capture()
    graph, rows = manager.bundle(5).pick(1), some_rows([20], 1)
    assert not toy.agrees(graph, rows, by_hand(toy, 5))
    first = graph.outputs[0][1]
    expected, _ = toy.eager(graph, rows, toy.load(rows), by_hand(toy, 5))
    assert torch.equal(first, expected[0][1]), "the first step is right, which is why this stays unseen"


def test_r5_a_new_plan_must_be_new(toy):
    plan = LazyPlan()
    state = toy.state(SHAPE, lambda buffers: plan)
    with pytest.raises(SharedStorageError, match="plan"):
        state.replan()
    with pytest.raises(SharedStorageError, match="plan"):
        state.fresh()


# depth, rows, memory


@pytest.mark.parametrize("fused", [True, False], ids=["one graph", "one graph a step"])
def test_depth_down_to_nothing_and_back(toy, recorder, fused):
    manager = draft_manager(toy, recorder, fused=fused)
    manager.capture()
    for depth in (5, 0, 5, 2, 0, 2):
        bundle = manager.bundle(depth)
        assert (bundle.depth, bundle.width) == (depth, depth + 1)
        graph = bundle.pick(3)
        if depth:
            assert toy.agrees(graph, some_rows([11, 30, 4], 1), by_hand(toy, depth))
        else:
            assert graph is None
    assert manager.counts.eager.total() == 0, "depth 0 has nothing to run, and nothing runs eager"


def test_depths_share_nothing(toy, recorder):
    manager = draft_manager(toy, recorder)
    manager.capture()
    one, other = manager.bundle(2).pick(1), manager.bundle(5).pick(1)
    assert not one.state.storages() & other.state.storages()


@pytest.mark.parametrize("kind", ["verify", "one graph", "one graph a step"])
def test_free_memory_of_the_pool_may_hold_anything_between_replays(toy, recorder, kind):
    if kind == "verify":
        manager, body = verify_manager(toy, recorder), toy.forward
        manager.capture()
        graph, rows = picked(manager), LONG
    else:
        manager, body = draft_manager(toy, recorder, fused=kind == "one graph"), by_hand(toy, 5)
        manager.capture()
        graph, rows = manager.bundle(5).pick(1), some_rows([20], 1)
    poison = recorder.poison()
    for _ in range(2):
        assert toy.agrees(graph, rows, body)
        poison.replay()


def test_outputs_outlive_the_replays_of_other_graphs(toy, recorder):
    """The head reads the target's hidden states after other graphs of the pool have run."""
    target = verify_manager(toy, recorder)
    target.capture()
    eagle = eagle_manager(toy, recorder, pairs=target.pairs)
    eagle.capture()
    assert toy.agrees(picked(target), LONG)
    hidden = picked(target).outputs.clone()
    recorder.poison().replay()
    assert toy.agrees(picked(eagle), LONG, toy.head, head_load(toy, LONG))
    assert torch.equal(picked(target).outputs, hidden)


def test_eagle_wants_one_source_of_states(toy, recorder):
    with pytest.raises(StateError, match="either"):
        eagle_manager(toy, recorder)
    with pytest.raises(StateError, match="either"):
        eagle_manager(toy, recorder, pairs=verify_manager(toy, recorder).pairs, build_state=toy.state)


def test_stages_come_in_order(toy, recorder):
    seen = []

    def factory(shape: GraphShape, stage: Stage) -> Prepared:
        state, inputs = toy.state(shape), toy.inputs(shape)
        seen.append((shape.rows, stage))
        return Prepared(state, inputs, lambda: toy.forward(state, inputs))

    manager = GraphManager("plain", recorder, Ladder([GraphShape(1, 3), SHAPE]), factory)
    manager.capture()
    one_shape = [Stage.WARMUP, Stage.DISPOSABLE, Stage.CAPTURED]
    expected = [(2, Stage.WARMUP), (1, Stage.WARMUP)] + [(rows, stage) for rows in (2, 1) for stage in one_shape]
    assert seen == expected
