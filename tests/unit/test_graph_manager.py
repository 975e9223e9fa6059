"""GraphManager: when graphs are ready, what a batch gets before and after, and what remains after an error."""

from __future__ import annotations

import logging

import pytest
import torch
from graph_toys import Toy, some_rows

from graphs.errors import CaptureError, CaptureMemoryError, StateError
from graphs.graph import Prepared
from graphs.manager import GraphManager
from graphs.recorder import record_body
from graphs.shape import GraphShape, Ladder
from graphs.tape import TapeRecorder
from graphs.target_verify import TargetVerifyGraphManager

SHAPES = Ladder.grid([1, 2, 4], [3])


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def toy():
    return Toy()


@pytest.fixture
def recorder():
    return TapeRecorder()


def manager_of(toy, recorder, **changes):
    given = dict(forward=toy.forward, build_state=toy.state, build_inputs=toy.inputs) | changes
    return TargetVerifyGraphManager(recorder, SHAPES, **given)


def test_wanted_and_ready_are_two_facts(toy, recorder):
    manager = manager_of(toy, recorder)
    assert manager.wanted and not manager.ready
    assert manager.pick(1, 3) is None
    assert manager.counts.eager == {"not captured yet": 1}
    manager.warm_up()
    assert not manager.ready
    manager.capture()
    assert manager.ready and manager.reason == ""
    assert manager.pick(1, 3).shape == GraphShape(1, 3)


def test_ready_is_set_after_the_last_shape_and_not_before(toy, recorder):
    seen = []
    manager = manager_of(toy, recorder)
    manager.capture(lambda done, total, shape: seen.append((manager.ready, manager.pick(1, 3))))
    assert seen == [(False, None)] * len(SHAPES) and manager.ready


def test_without_a_cache_nothing_is_captured_which_is_said_once(toy, recorder, caplog):
    manager = manager_of(toy, recorder)
    manager.warm_up()
    for _ in range(2):
        manager.withhold("there is no KV cache yet")
    assert [manager.pick(1, 3) for _ in range(3)] == [None] * 3
    assert manager.counts.eager == {"there is no KV cache yet": 3} and caplog.text.count("no KV cache yet") == 1
    assert manager.wanted and not manager.ready and not manager.graphs and recorder.pool_bytes == 0
    manager.capture()
    assert manager.ready and manager.reason == "" and toy.agrees(manager.pick(2, 3), some_rows([4, 30], 3))
    manager.withhold("the cache is gone")
    assert not manager.ready and recorder.pool_bytes == 0


def test_what_nobody_wants_is_off_whatever_is_missing(toy):
    manager = manager_of(toy, None)
    manager.withhold("there is no KV cache yet")
    assert manager.reason == "graphs are off"


def test_without_a_recorder_everything_runs_eager_and_nothing_is_warmed(toy, caplog):
    caplog.set_level(logging.INFO)
    manager = manager_of(toy, None, forward=None)
    manager.warm_up()
    manager.capture()
    assert not manager.wanted and not manager.ready
    assert manager.pick(1, 3) is None
    assert manager.counts.eager == {"graphs are off": 1}
    assert [r.levelname for r in caplog.records] == ["INFO"]


def test_warm_up_runs_every_shape_largest_first(toy, recorder):
    seen = []
    manager = manager_of(toy, recorder)
    manager.warm_up(lambda done, total, shape: seen.append((done, total, shape.rows)))
    assert seen == [(0, 3, 4), (1, 3, 2), (2, 3, 1)]
    assert sum(plan.initialised for plan in toy.plans) == 3
    seen.clear()
    manager.capture(lambda done, total, shape: seen.append(shape.rows))
    assert seen == [4, 2, 1]
    assert len(toy.plans) == 3 + 3 * 3, "three passes a shape, each with a plan of its own"


def test_every_reason_is_counted_and_logged_once(toy, recorder, caplog):
    manager = manager_of(toy, recorder)
    manager.capture()
    for _ in range(3):
        assert manager.pick(5, 3) is None
    assert manager.pick(1, 4) is None
    assert manager.pick(1, 3, ("tree",)) is None
    manager.pick(4, 3).replay()
    assert manager.counts.eager == {
        "no shape holds 5 rows of 3": 3,
        "no shape holds 1 rows of 4": 1,
        "no shape is tree": 1,
    }
    assert manager.counts.replayed == 1
    assert manager.counts.share == 1 / 6
    assert [record.message for record in caplog.records] == [
        "target verify runs eager: no shape holds 5 rows of 3",
        "target verify runs eager: no shape holds 1 rows of 4",
        "target verify runs eager: no shape is tree",
    ]


def test_no_passes_no_share(toy):
    assert manager_of(toy, None).counts.share == 0


class Failing(TapeRecorder):
    """Fails at the third recording."""

    def record(self, body):
        if len(self._recordings) == 2:
            return record_body(self, lambda: torch.zeros(1).item())
        return record_body(self, body)


def test_one_shape_that_fails_releases_all(toy):
    recorder = Failing()
    manager = manager_of(toy, recorder)
    with pytest.raises(CaptureError, match="reads a value on the host"):
        manager.capture()
    assert not manager.ready and not manager.pairs
    assert recorder.pool_bytes == 0
    assert manager.pick(4, 3) is None
    assert manager.reason.startswith("capture failed: ")
    assert list(manager.counts.eager) == [manager.reason]
    assert not list(recorder.owners)


def test_a_capture_may_be_tried_again(toy):
    recorder = Failing()
    manager = manager_of(toy, recorder)
    with pytest.raises(CaptureError):
        manager.capture()
    recorder.close()
    recorder._recordings.append(None)  # no longer the second
    recorder._recordings.clear()
    again = manager_of(toy, TapeRecorder())
    again.capture()
    assert toy.agrees(again.pick(2, 3), some_rows([4, 30], 3))


def test_errors_of_the_pass_itself_come_through(toy, recorder):
    def forward(state, inputs):
        raise KeyError("layer")

    manager = manager_of(toy, recorder, forward=forward)
    with pytest.raises(KeyError):
        manager.capture()
    assert not manager.ready and not recorder.recording


@pytest.mark.parametrize("verb", ["warm_up", "capture"])
def test_a_full_device_is_one_sentence_also_before_anything_is_recorded(toy, recorder, verb):
    def forward(state, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore about it.")

    manager = manager_of(toy, recorder, forward=forward)
    with pytest.raises(CaptureMemoryError, match=r"^no memory left to run the pass: CUDA .* 2 GiB\.$"):
        getattr(manager, verb)()
    assert not manager.ready and not recorder.recording


def test_nothing_is_captured_while_serving(toy, recorder):
    manager = manager_of(toy, recorder)
    manager.capture()
    manager.serve()
    for verb in (manager.capture, manager.warm_up, lambda: manager.withhold("no cache")):
        with pytest.raises(CaptureError, match="while serving"):
            verb()
    assert manager.ready, "what was captured before still replays"
    assert toy.agrees(manager.pick(2, 3), some_rows([4, 30], 3))


def test_close_frees_the_pool_and_passes_run_eager(toy, recorder):
    manager = manager_of(toy, recorder)
    manager.capture()
    graph = manager.pick(2, 3)
    assert recorder.pool_bytes > 0
    manager.close()
    assert recorder.pool_bytes == 0
    assert manager.pick(2, 3) is None
    assert manager.counts.eager == {"closed": 1}
    with pytest.raises(CaptureError, match="released"):
        graph.replay()


def test_closing_one_manager_leaves_the_others_of_the_recorder(toy, recorder):
    one, other = manager_of(toy, recorder), manager_of(toy, recorder, name="other")
    one.capture()
    other.capture()
    one.close()
    assert toy.agrees(other.pick(4, 3), some_rows([4, 30, 2, 1], 3))


def test_a_second_capture_replaces_the_first(toy, recorder):
    manager = manager_of(toy, recorder)
    manager.capture()
    held = recorder.pool_bytes
    manager.capture()
    assert recorder.pool_bytes == held
    assert toy.agrees(manager.pick(2, 3), some_rows([4, 30], 3))


def test_a_factory_must_build_what_it_was_asked_for(toy, recorder):
    def factory(shape, stage):
        state, inputs = toy.state(GraphShape(9, 9)), {}
        return Prepared(state, inputs, lambda: None)

    with pytest.raises(StateError, match="asked for a state of shape 4x3, got one of 9x9"):
        GraphManager("plain", recorder, SHAPES, factory).warm_up()


def test_inputs_are_refused_before_anything_is_written(toy, recorder):
    manager = manager_of(toy, recorder)
    manager.capture()
    graph = manager.pick(1, 3)
    with pytest.raises(StateError, match="no buffer 'positions', only tokens"):
        graph.load({"tokens": toy.ints([[1, 2, 3]]), "positions": toy.ints([[1, 2, 3]])})
    with pytest.raises(StateError, match="cannot hold"):
        graph.load({"tokens": toy.ints([[1, 2, 3, 4]])})
    assert graph.inputs["tokens"].sum() == 0
