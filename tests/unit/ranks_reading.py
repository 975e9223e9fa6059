"""What ranks run in the tests of gathered logits. Apart from the tests, because each rank imports it anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from speculator.ranks.engine import Follower, LeadEngine
from speculator.types import DraftShape, Rule, SamplingParams
from target import parallel
from tests.unit.engines import Driver
from tests.unit.ranks_programs import COUNT, PROMPTS, config_of, in_gang

NOISE = SamplingParams(temperature=0.9, seed=2**64 - 3)
WAYS = {
    "greedy": [SamplingParams()] * 3,
    "noise": [SamplingParams(), NOISE, SamplingParams(temperature=1.2, seed=7)],
    "greedy rules": [SamplingParams(rule=Rule.REJECTION), SamplingParams(rule=Rule.BLOCK), SamplingParams()],
    "top-k": [SamplingParams(temperature=0.7, top_k=9), NOISE, SamplingParams(temperature=1.1, top_k=5, top_p=0.8)],
    "min-p": [SamplingParams(temperature=0.9, min_p=0.05), NOISE, SamplingParams()],
    "top-p": [SamplingParams(temperature=0.9, top_p=0.7), NOISE, SamplingParams()],
    "rejection": [SamplingParams(temperature=0.9, rule=Rule.REJECTION), NOISE, SamplingParams()],
}


def said(engine: Any, way: str, shape: DraftShape) -> list[Any]:
    """Committed tokens and accepted counts of three sessions."""
    driver = Driver(engine)
    sessions = driver.start(PROMPTS, WAYS[way], shape)
    driver.rounds(sessions, COUNT, [shape] * 3)
    return [[s.produced, s.accepted] for s in sessions]


def widest(rank: int, folder: str, size: int, way: str, shape: list[int], sets: dict[str, object]) -> Any:
    """What rank 0 says, and the most numbers of a row that any rank sent while sessions ran."""
    engine, _ = found = in_gang(rank, size, config_of(folder, **sets))
    sent, gather = [0], parallel._gather_into

    def noted(out: Tensor, own: Tensor, **named: Any) -> Any:
        sent.append(own.shape[-1])
        return gather(out, own, **named)

    parallel._gather_into = noted
    if rank:
        Follower(engine, found[1].channel).run()
        return max(sent)
    assert isinstance(engine, LeadEngine)
    tokens = said(engine, way, DraftShape(*shape))
    engine.end()
    return [tokens, max(sent), sum(replayed for replayed, _ in engine.passes_run().values())]
