"""Rounds of every rule as CUDA graphs: what the CPU tests ask of the tape, and that nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from speculator.types import DraftShape, SamplingParams
from tests.gpu.sync import no_waiting
from tests.unit import test_round_rules as cpu
from tests.unit.engines import tiny_engine
from tests.unit.test_recorded import pair
from tests.unit.test_round import CHAIN, TREE, play, record, same
from tests.unit.test_round_rules import DRAWN, KINDS, TREES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kind, shape, mixes", KINDS)
def test_everything_said_is_that_of_eager_passes(
    kind: str, shape: DraftShape, mixes: Sequence[Sequence[SamplingParams]]
) -> None:
    cpu.test_everything_said_is_that_of_eager_passes(kind, shape, mixes, "cuda")


@pytest.mark.parametrize("shape", [CHAIN, TREE])
def test_every_graph_replays_what_running_gives_bit_for_bit(shape: DraftShape) -> None:
    cpu.test_every_graph_replays_what_running_gives_bit_for_bit("eagle3", shape, "cuda")


@pytest.mark.parametrize("shape", [CHAIN, TREE])
def test_hundreds_of_rounds_with_sessions_coming_and_going(shape: DraftShape) -> None:
    cpu.test_hundreds_of_rounds_with_sessions_coming_and_going("eagle3", shape, "cuda")


@pytest.mark.parametrize("params", [DRAWN[2], DRAWN[4]])
def test_a_round_that_failed_is_run_again(params: list[SamplingParams]) -> None:
    cpu.test_a_round_that_failed_is_run_again_over_what_its_drafts_were_drawn_from(params, "cuda")


@pytest.mark.parametrize("params", [[cpu.REJECTION, cpu.BLOCK], [cpu.PENALTY, cpu.PENALTY]])
def test_sessions_go_on_where_a_prompt_in_their_step_failed(params: list[SamplingParams]) -> None:
    cpu.test_sessions_go_on_where_a_prompt_in_their_step_failed(params, True, "cuda")


ALIKE = [
    cpu.test_what_a_step_noted_is_taken_back_and_nothing_else,
    cpu.test_drafts_are_drawn_from_a_vocabulary_of_the_heads_own,
    cpu.test_depths_change_from_round_to_round,
    cpu.test_passes_and_rounds_take_turns_over_drawn_drafts,
    cpu.test_drafts_of_clients_between_rounds,
    cpu.test_no_round_of_them_is_launched_before_the_last_one_counts,
]


@pytest.mark.parametrize("test", ALIKE, ids=lambda test: test.__name__[5:])
def test_as_on_the_cpu(test: Any) -> None:
    test(device="cuda")


@pytest.mark.parametrize("shape, params", [(CHAIN, DRAWN[2]), (CHAIN, DRAWN[4]), (TREE, TREES[0])])
def test_nothing_in_a_launch_waits_for_the_device(shape: DraftShape, params: Sequence[SamplingParams]) -> None:
    target, head = pair("eagle3", "cuda")
    engine = tiny_engine(target, head)
    rounds = record(engine, shape, every_rule=True)
    launch = rounds.launch

    def strictly(*given: Any) -> Any:
        with no_waiting():
            return launch(*given)

    rounds.launch = strictly  # type: ignore[method-assign]
    assert same(play(engine, params, shape), play(tiny_engine(target, head), params, shape))
    assert rounds.counts.share == 1.0
