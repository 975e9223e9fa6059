"""What an engine commits while it drafts and samples: every token against the target's distribution after its prefix.

The place of a token in the cumulative distribution it was drawn from is uniform, whatever came before it, so one
chi-square judges tokens of all rounds and rows together. An engine with a planted bug must fail the same test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from engines import Driver, tiny_engine
from torch import Tensor

from speculator import engine as engine_module
from speculator.heads.base import DraftHead
from speculator.heads.exact import ExactPlan, exact_pair
from speculator.rows import Rows
from speculator.sampling import RowSampling, probabilities, scores
from speculator.types import DraftShape, Rule, SamplingParams
from target.attention.dense import attend_causal
from target.decoder import Decoder

PROMPT, ROWS, COUNT, BINS = [5, 9, 3, 2], 600, 9, 24
SUSPICIOUS = 1e-6
CHAIN = DraftShape(depth=4)
TREE = DraftShape(depth=3, nodes=10, branching=3)
STATIC = DraftShape(depth=2, parents=(-1, -1, 0, 0, 1))
WARM = SamplingParams(temperature=1.0)
PENALTY = SamplingParams(temperature=0.8, repetition_penalty=2.0)
MIN_P = SamplingParams(temperature=1.0, min_p=0.06)
CASES = {
    "rejection, chain": (Rule.REJECTION, CHAIN, WARM),
    "rejection, dynamic tree": (Rule.REJECTION, TREE, WARM),
    "rejection, static tree": (Rule.REJECTION, STATIC, WARM),
    "rejection, chain, penalty": (Rule.REJECTION, CHAIN, PENALTY),
    "rejection, dynamic tree, min-p": (Rule.REJECTION, TREE, MIN_P),
    "block, chain": (Rule.BLOCK, CHAIN, WARM),
    "block, chain, penalty": (Rule.BLOCK, CHAIN, PENALTY),
    "block, chain, min-p": (Rule.BLOCK, CHAIN, MIN_P),
}


class Pair(NamedTuple):
    target: Decoder
    head: DraftHead


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A head that is right about its target up to some noise, and knows two of three tokens."""
    target, head = exact_pair(ExactPlan(vocab=12))
    noise = torch.Generator().manual_seed(3)
    for matrix, size in ((target.head_weight, 0.1), (head.lm_head.weight, 0.3)):
        matrix.add_(torch.randn(matrix.shape, generator=noise) * size)
    return Pair(target, head)


class Played(NamedTuple):
    tokens: Tensor  # [ROWS, prompt + COUNT]
    params: list[SamplingParams]
    accepted: float  # drafted tokens a round


def play(pair: Pair, rule: Rule, shape: DraftShape, params: SamplingParams) -> Played:
    """COUNT tokens of many rows that differ in their seeds, over as many rounds as that takes."""
    driver = Driver(tiny_engine(pair.target, pair.head, rows=ROWS, page_size=64, pages=ROWS * 5 + 1))
    given = [replace(params, rule=rule, seed=7 * row + 3) for row in range(ROWS)]
    sessions = driver.start([PROMPT] * ROWS, given, shape)
    driver.rounds(sessions, COUNT, [shape] * ROWS)
    accepted = [count for s in sessions for count in s.accepted]
    tokens = torch.tensor([s.tokens[: len(PROMPT) + COUNT] for s in sessions])
    return Played(tokens, given, sum(accepted) / len(accepted))


def places(target: Decoder, played: Played) -> Tensor:
    """Where in its cumulative distribution, likelier tokens first, each committed token fell: [ROWS * COUNT]."""
    tokens, rows = played.tokens, RowSampling.from_params(played.params, "cpu")
    with torch.inference_mode():
        logits = target.logits(target(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), attend_causal).final)
    before = torch.nn.functional.one_hot(tokens, logits.shape[-1]).cumsum(1) > 0
    p = probabilities(scores(logits, rows, before), rows)[:, len(PROMPT) - 1 : -1]
    p, order = p.sort(dim=-1, descending=True)
    rank = (order == tokens[:, len(PROMPT) :, None]).long().argmax(-1, keepdim=True)
    share = torch.rand(rank.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    return (p.cumsum(-1).gather(-1, rank) - p.gather(-1, rank) * share).flatten()


def p_value(places: Tensor) -> float:
    """Chi-square of uniform places."""
    counts = torch.bincount((places * BINS).long().clamp(0, BINS - 1), minlength=BINS).double()
    expected = len(places) / BINS
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((BINS - 1) / 2, dtype=torch.float64), statistic / 2))


@pytest.mark.parametrize("case", CASES)
def test_an_engine_commits_the_target_s_distribution(pair: Pair, case: str) -> None:
    played = play(pair, *CASES[case])
    assert played.accepted > 0.4, "drafts that are never accepted prove nothing"
    assert p_value(places(pair.target, played)) > SUSPICIOUS


# Planted bugs: the same test must convict each of them. A q that is lost is none: drafts judged certain bias nothing.


@pytest.mark.parametrize("case", ["rejection, chain", "block, chain", "block, chain, penalty"])
def test_q_of_the_node_before_is_convicted(pair: Pair, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    held = Rows.q

    def shifted(self: Rows, row: int, draft_id: int) -> Tensor | None:
        q = held(self, row, draft_id)
        return None if q is None else q.roll(1, 0)

    monkeypatch.setattr(Rows, "q", shifted)
    played = play(pair, *CASES[case])
    assert p_value(places(pair.target, played)) < SUSPICIOUS


@pytest.mark.parametrize("case", ["rejection, chain, penalty", "block, chain, penalty"])
def test_a_verdict_without_the_penalty_is_convicted(pair: Pair, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    def unpenalised(logits: Tensor, rows: RowSampling, seen: Tensor | None) -> Tensor:
        return scores(logits, rows._replace(any_penalty=False), seen)

    monkeypatch.setattr(engine_module, "scores", unpenalised)
    played = play(pair, *CASES[case])
    assert p_value(places(pair.target, played)) < SUSPICIOUS
