"""Recorded passes as CUDA graphs: bit-equal to the same passes run eager, and the same texts, over many rounds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from speculator.bench.bitwise import compare
from speculator.types import DraftShape, Rule, SamplingParams
from tests.unit.engines import VOCAB, Driver, tiny_engine
from tests.unit.test_recorded import CHAIN, PARAMS, PROMPTS, TREE, pair, record, replayed_share, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KINDS = [("eagle", CHAIN), ("eagle3", CHAIN), ("eagle3", TREE), ("mtp", CHAIN), ("mtp", TREE), ("mtp2", CHAIN)]


@pytest.mark.parametrize("kind, shape", KINDS)
def test_tokens_and_acceptance_are_those_of_eager_passes(kind: str, shape: DraftShape) -> None:
    target, head = pair(kind, "cuda")
    expected = run(tiny_engine(target, head), shape)
    engine = tiny_engine(target, head)
    passes = record(engine, shape)
    assert run(engine, shape) == expected
    assert passes.counts["target verify"].replayed > 5
    assert not passes.counts["target verify"].eager and not passes.counts["draft decode"].eager


@pytest.mark.parametrize("kind, shape", KINDS)
def test_every_graph_replays_what_running_gives_bit_for_bit(kind: str, shape: DraftShape) -> None:
    """Each captured shape, filled with a batch that uses all of it, at lengths far from those of capture."""
    engine = tiny_engine(*pair(kind, "cuda"))
    passes = record(engine, shape)
    found = compare(engine, passes)
    assert [(name, s) for name, shapes in found.items() for s, equal in shapes.items() if not equal] == []
    assert {m.name: len(m.graphs) for m in passes.managers} == {name: len(shapes) for name, shapes in found.items()}
    assert sum(map(len, found.values())) > 20


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_a_thousand_rounds_with_sessions_coming_and_going(kind: str) -> None:
    """Every committed token and every accepted count, graphs off and on; more than 99 % of the passes replayed."""
    target, head = pair(kind, "cuda")
    outcomes = []
    for recorded in (False, True):
        engine = tiny_engine(target, head, rows=8, pages=3000)
        passes = record(engine, CHAIN, rows=8) if recorded else None
        outcomes.append(mixed(engine))
        if passes:
            assert replayed_share(passes) > 0.99, passes.counts
    assert outcomes[0] == outcomes[1]
    assert sum(len(accepted) for _, accepted in outcomes[0]) >= 1000


def mixed(engine: Any) -> list[tuple[list[int], list[int]]]:
    draw, found = random.Random(5), []
    for wave in range(12):
        driver = Driver(engine)
        count = draw.randint(1, 8)
        prompts = [[draw.randrange(VOCAB) for _ in range(draw.randint(2, 60))] for _ in range(count)]
        rules = [Rule.COUPLED, Rule.COUPLED, Rule.REJECTION]
        params = [
            SamplingParams(temperature=draw.choice([0, 0.8]), seed=wave * 10 + i, rule=draw.choice(rules))
            for i in range(count)
        ]
        shapes = [draw.choice([CHAIN, CHAIN, DraftShape(2, 0, 1), DraftShape(0, 0, 1)]) for _ in range(count)]
        sessions = driver.start(prompts, params, CHAIN)
        for goal in (15, 30, 60):
            driver.rounds(sessions[: max(1, count - goal // 20)], goal, shapes)
        driver.rounds(sessions, 70, shapes)
        found += [(s.tokens, s.accepted) for s in sessions]
        for s in sessions:
            engine.close(s.row)
    return found


def test_free_pool_memory_is_nobodys(kind: str = "eagle3") -> None:
    """The pool's free memory is filled with NaN before every round: nothing may have lived there."""
    target, head = pair(kind, "cuda")
    expected = run(tiny_engine(target, head), CHAIN)
    engine = tiny_engine(target, head)
    passes = record(engine, CHAIN)
    poison = passes.recorder.poison()
    driver = Driver(engine, scatter=1)
    sessions = driver.start(PROMPTS, PARAMS, CHAIN)
    for goal in range(1, 31):
        poison.replay()
        driver.rounds(sessions, goal, [CHAIN] * len(sessions))
    assert [(s.tokens[:40], s.accepted[:5]) for s in sessions] == [(t[:40], a[:5]) for t, a in expected]
