"""Whole rounds on a CUDA device with kernels between their passes: what is asked of rounds without them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from speculator.round_glue import TorchGlue
from speculator.round_state import EVERY, MODES
from speculator.types import DraftShape
from tests.gpu.sync import no_waiting
from tests.unit import test_round as cpu
from tests.unit import test_run_ahead as ahead
from tests.unit.engines import tiny_engine
from tests.unit.test_recorded import PARAMS, pair
from tests.unit.test_round import CHAIN, KINDS, TREE, play, record, same, visitors
from tests.unit.test_round_fused import both

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
GPU = torch.device("cuda")
SOME = [("eagle3", CHAIN), ("eagle3", TREE), ("mtp", CHAIN)]


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[None]:
    """Engines that other modules have recorded stay theirs."""
    cpu._made.cache_clear()
    ahead.recorded.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECULATOR_FUSED", "on")
        yield
    cpu._made.cache_clear()
    ahead.recorded.cache_clear()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != EVERY])
@pytest.mark.parametrize("rows, depth", [(1, 7), (3, 0), (8, 7), (64, 1), (64, 15), (5, 16)])
def test_any_verdict_is_that_of_torch(rows: int, depth: int, mode: str) -> None:
    for seed in range(8):
        both(rows, depth, mode, seed, device=GPU)
    both(rows, 0, mode, 3, plain=True, device=GPU)


@pytest.mark.parametrize("kind, shape", KINDS)
def test_everything_said_is_that_of_eager_passes(kind: str, shape: DraftShape) -> None:
    cpu.test_everything_said_is_that_of_eager_passes(kind, shape, "cuda")


def test_which_rounds_are_on_kernels() -> None:
    for kind, shape in SOME:
        rounds = cpu.lent(kind, shape, "cuda").rounds
        kinds = [rounds._kind_of(s) for s in rounds.manager.graphs]
        assert {made.mode for made in kinds} == set(MODES) - {EVERY}
        for made in kinds:
            assert type(rounds._glue(made)).__name__ == ("ChainGlue" if made.drafted.is_chain else "TreeGlue")
            assert type(rounds._glue(made._replace(mode=EVERY))) is TorchGlue
        assert any(made.drafted == shape for made in kinds)


@pytest.mark.parametrize("kind, shape", KINDS)
def test_every_graph_replays_what_running_gives_bit_for_bit(kind: str, shape: DraftShape) -> None:
    cpu.test_every_graph_replays_what_running_gives_bit_for_bit(kind, shape, "cuda")


ALIKE = [
    cpu.test_the_smallest_graph_that_holds_the_round_is_replayed,
    cpu.test_depths_change_from_round_to_round,
    cpu.test_sessions_with_and_without_drafts_share_a_round,
    cpu.test_greedy_rounds_are_recorded_whatever_the_rule,
    cpu.test_verify_and_propose_as_calls_of_their_own,
    cpu.test_drafts_of_clients_and_of_the_engine_take_turns,
    cpu.test_a_round_that_failed_can_be_run_again,
]


@pytest.mark.parametrize("test", ALIKE, ids=lambda test: test.__name__[5:])
def test_as_on_the_cpu(test: Any) -> None:
    test(device="cuda")


@pytest.mark.parametrize("alone", [True, False])
def test_sessions_without_drafts_decode_in_rounds_too(alone: bool) -> None:
    cpu.test_sessions_without_drafts_decode_in_rounds_too(alone, "cuda")


@pytest.mark.parametrize("kind, shape", SOME)
def test_rounds_with_sessions_coming_and_going(kind: str, shape: DraftShape) -> None:
    target, head = pair(kind, "cuda")
    expected = visitors(tiny_engine(target, head, pages=3000), shape, 100, rows=8)
    engine = tiny_engine(target, head, pages=3000)
    rounds = record(engine, shape, rows=8, rung=None)
    assert same(visitors(engine, shape, 100, rows=8), expected)
    assert rounds.counts.share == 1.0


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


@pytest.mark.parametrize("kind, shape", ahead.KINDS)
def test_one_round_ahead_says_what_an_engine_that_waits_says(kind: str, shape: DraftShape) -> None:
    for seed in range(3):
        ahead.test_every_message_is_that_of_an_engine_that_waits(kind, shape, seed + 1, "cuda")
    ahead.test_a_round_ahead_that_failed_is_run_again(kind, shape, "cuda")


@pytest.mark.parametrize("shape", [CHAIN, TREE])
@pytest.mark.parametrize("why", ["stop", "limit"])
def test_a_row_that_ended_commits_and_writes_nothing(why: str, shape: DraftShape) -> None:
    ahead.test_a_row_that_ended_commits_and_writes_nothing(why, shape, "cuda")
