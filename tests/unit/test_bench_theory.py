"""Theoretical acceptance: 1 - TV(p, q) from the distributions, and what the rejection rule then accepts."""

from __future__ import annotations

import pytest
import torch
from bench_toys import SAMPLED, Letters, lucky_engine, toy_prompts

from speculator.bench.theory import _add, _room, theoretical


def test_a_round_adds_what_p_and_q_share() -> None:
    sums = torch.zeros(3, 2, dtype=torch.float64)
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]], dtype=torch.float64)
    q = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    _add(sums, p, q, 0, 9)  # the second position was not judged
    _add(sums, p, q, 2, 9)
    assert sums.tolist() == [[pytest.approx(1.2), pytest.approx(0.3)], [1, 1], [2, 1]]
    _add(sums, p, q, 2, 1)  # the answer ended at the first position
    assert sums.tolist() == [[pytest.approx(1.8), pytest.approx(0.3)], [2, 1], [3, 1]]


def test_what_lies_past_the_end_is_not_judged() -> None:
    assert _room([4, 7, 5], frozenset({7}), 9) == 2
    assert _room([4, 7, 5], frozenset(), 9) == 9
    assert _room([4, 7, 5], frozenset({5}), 2) == 2


def test_what_is_accepted_is_what_theory_says() -> None:
    engine = lucky_engine()
    prompts = [Letters().encode_chat(p.turns[0]) for p in toy_prompts(16)]
    before = engine.passes
    too_long = [1] * (engine.info.total_pages * engine.info.page_size)  # is left out
    found = theoretical(engine, [*prompts, too_long], SAMPLED, 2, 90, 4, resamples=200)
    assert engine.passes is before
    assert found.count[0] == found.rounds > 300
    for theory, measured, count in zip(found.acceptance, found.measured, found.count, strict=True):
        assert theory is not None and measured is not None and 0.02 < theory < 0.98
        assert abs(theory - measured) < 4 * (theory * (1 - theory) / count) ** 0.5
    for theory, band in zip(found.acceptance, found.intervals, strict=True):
        assert theory is not None and band is not None and band[0] < theory < band[1]
