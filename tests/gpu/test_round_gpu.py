"""Whole rounds as CUDA graphs: what the CPU tests ask of the tape, and that nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from speculator.round import Rounds
from speculator.types import DraftShape
from tests.gpu.sync import no_waiting
from tests.unit import test_round as cpu
from tests.unit import test_run_ahead as ahead
from tests.unit.engines import tiny_engine
from tests.unit.test_recorded import PARAMS, PROMPTS, pair
from tests.unit.test_round import CHAIN, KINDS, TREE, Listening, play, record, same, visitors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SOME = [("eagle3", CHAIN), ("eagle3", TREE), ("mtp", CHAIN), ("mtp2", CHAIN)]


@pytest.mark.parametrize("kind, shape", KINDS)
def test_everything_said_is_that_of_eager_passes(kind: str, shape: DraftShape) -> None:
    cpu.test_everything_said_is_that_of_eager_passes(kind, shape, "cuda")


@pytest.mark.parametrize("kind, shape", KINDS)
def test_every_graph_replays_what_running_gives_bit_for_bit(kind: str, shape: DraftShape) -> None:
    cpu.test_every_graph_replays_what_running_gives_bit_for_bit(kind, shape, "cuda")


@pytest.mark.parametrize("alone", [True, False])
def test_sessions_without_drafts_decode_in_rounds_too(alone: bool) -> None:
    cpu.test_sessions_without_drafts_decode_in_rounds_too(alone, "cuda")


ALIKE = [
    cpu.test_the_smallest_graph_that_holds_the_round_is_replayed,
    cpu.test_depths_change_from_round_to_round,
    cpu.test_sessions_with_and_without_drafts_share_a_round,
    cpu.test_what_is_not_recorded_runs_pass_by_pass_and_says_why,
    cpu.test_greedy_rounds_are_recorded_whatever_the_rule,
    cpu.test_verify_and_propose_as_calls_of_their_own,
    cpu.test_drafts_of_clients_and_of_the_engine_take_turns,
    cpu.test_a_round_that_failed_can_be_run_again,
    cpu.test_a_body_that_reads_on_the_host_is_refused,
]


@pytest.mark.parametrize("test", ALIKE, ids=lambda test: test.__name__[5:])
def test_as_on_the_cpu(test: Any) -> None:
    test(device="cuda")


@pytest.mark.parametrize("kind, shape", SOME)
def test_a_thousand_rounds_with_sessions_coming_and_going(kind: str, shape: DraftShape) -> None:
    target, head = pair(kind, "cuda")
    expected = visitors(tiny_engine(target, head, pages=3000), shape, 400, rows=8)
    engine = tiny_engine(target, head, pages=3000)
    rounds = record(engine, shape, rows=8, rung=None)
    assert same(visitors(engine, shape, 400, rows=8), expected)
    assert rounds.counts.replayed >= 1000 and rounds.counts.share == 1.0


@pytest.mark.parametrize("kind, shape", SOME)
def test_nothing_in_a_launch_waits_for_the_device(kind: str, shape: DraftShape) -> None:
    target, head = pair(kind, "cuda")
    expected = play(tiny_engine(target, head), PARAMS, shape)
    engine = tiny_engine(target, head)
    rounds = record(engine, shape)
    launch = rounds.launch

    def strictly(*given: Any) -> Any:
        with no_waiting():
            return launch(*given)

    rounds.launch = strictly  # type: ignore[method-assign]
    assert same(play(engine, PARAMS, shape), expected)
    assert rounds.counts.share == 1.0


def test_a_trace_of_launches_shows_no_synchronisation() -> None:
    target, head = pair("eagle3", "cuda")
    engine = tiny_engine(target, head)
    rounds = record(engine, CHAIN)
    driver = Listening(engine)
    sessions = driver.start(PROMPTS, PARAMS, CHAIN)
    driver.rounds(sessions, 3, [CHAIN] * 3)
    launch = rounds.launch

    def marked(*given: Any) -> Any:
        with torch.profiler.record_function("launch of a round"):
            return launch(*given)

    rounds.launch = marked  # type: ignore[method-assign]
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities()), acc_events=True) as trace:
        driver.rounds(sessions, 12, [CHAIN] * 3)
    events = list(trace.events() or ())
    spans = [e.time_range for e in events if e.name == "launch of a round" and str(e.device_type).endswith("CPU")]
    inside = [e.name for e in events if any(s.start <= e.time_range.start < s.end for s in spans)]
    assert len(spans) > 3 and any("GraphLaunch" in name for name in inside)
    assert not [name for name in inside if "Synchronize" in name or name == "cudaMemcpy"]


@pytest.mark.parametrize("kind, shape", ahead.KINDS)
def test_one_round_ahead_says_what_an_engine_that_waits_says(kind: str, shape: DraftShape) -> None:
    for seed in range(3):
        ahead.test_every_message_is_that_of_an_engine_that_waits(kind, shape, seed + 1, "cuda")
    ahead.test_a_round_ahead_that_failed_is_run_again(kind, shape, "cuda")


@pytest.mark.parametrize("seed", range(6))
def test_cancels_at_any_moment_lose_and_double_nothing(seed: int) -> None:
    ahead.test_cancels_at_any_moment_lose_and_double_nothing(seed, "cuda")


@pytest.mark.parametrize("shape", [CHAIN, TREE])
@pytest.mark.parametrize("why", ["stop", "limit"])
def test_a_row_that_ended_commits_and_writes_nothing(why: str, shape: DraftShape) -> None:
    ahead.test_a_row_that_ended_commits_and_writes_nothing(why, shape, "cuda")


def test_a_launch_ahead_does_not_wait_for_the_round_under_way() -> None:
    engine = ahead.recorded("eagle3", CHAIN, "cuda")
    hand, launch = ahead.Hand(engine), engine.launch

    def strictly(steps: Any) -> Any:
        with no_waiting() if steps[0].ahead else nullcontext():
            return launch(steps)

    engine.launch = strictly  # type: ignore[method-assign]
    try:
        hand.generate("a", PROMPTS[0], 60, ignore_eos=True)
        assert hand.finish().engine.ahead > 10
    finally:
        engine.launch = launch  # type: ignore[method-assign]


def test_free_pool_memory_is_nobodys() -> None:
    """The pool's free memory is filled with NaN before every round: nothing may have lived there."""
    target, head = pair("eagle3", "cuda")
    expected = play(tiny_engine(target, head), PARAMS, TREE)
    engine = tiny_engine(target, head)
    rounds = record(engine, TREE)
    for _ in poisoned(rounds):
        assert same(play(engine, PARAMS, TREE), expected)


def poisoned(rounds: Rounds) -> Iterator[None]:
    """Every launch meets a poisoned pool."""
    assert rounds.manager.recorder is not None
    poison, launch = rounds.manager.recorder.poison(), rounds.launch

    def launched(*given: Any) -> Any:
        poison.replay()
        return launch(*given)

    rounds.launch = launched  # type: ignore[method-assign]
    yield
