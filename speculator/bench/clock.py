"""What a round costs and what drafts gain: one session with drafts beside the same session without, in turns.

Owns: times and what follows from them. Must never count acceptance its own way. Steps that read a prompt and the first
rounds of an answer are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from speculator.bench.outcomes import Outcome, outcomes
from speculator.bench.prompts import Prompt
from speculator.bench.recording import Round
from speculator.bench.records import Cost, Ledger, Time
from speculator.bench.rounds import ChatTokenizer, Plan, play
from speculator.engine import Engine
from speculator.types import DraftShape

WARM = 2  # rounds of each answer that do not count
Timed = list[tuple[Round, Outcome]]


def measure(
    engine: Engine,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    plan: Plan,
    taus: Mapping[int, float | None],
) -> Time | None:
    """Times of `prompts` under `plan`, one session; None when no round could be timed.

    `taus` are those of chains by depth, as the counterfactual runs found them: each of these depths is timed too, and
    the one with the best tau * plain_token / round is recommended (0: plain decoding is faster than any).
    """
    plain, drafted, costs = Timed(), Timed(), {depth: Timed() for depth in taus}
    for prompt in prompts:  # in turns, so that all meet the machine in the same mood
        plain += _timed(engine, tokenizer, prompt, replace(plan, shape=None))
        drafted += _timed(engine, tokenizer, prompt, plan)
        for depth, found in costs.items():
            found += _timed(engine, tokenizer, prompt, replace(plan, shape=DraftShape(depth)))
    if not plain or not drafted:
        return None
    token, ledger = median(_wall(r) for r, _ in plain), _ledger([r for r, _ in drafted])
    tau = sum(o.tokens for _, o in drafted) / len(drafted)
    rows = tuple(_cost(depth, found, taus[depth], token) for depth, found in costs.items() if found)
    return Time(
        sessions=1,
        ledger=ledger,
        plain_token=token,
        tau=round(tau, 6),
        predicted=round(tau * token / median(_wall(r) for r, _ in drafted), 4),
        measured=round(_rate(drafted) / _rate(plain), 4),
        costs=rows,
        recommended_depth=recommend(rows),
    )


def recommend(costs: Sequence[Cost]) -> int | None:
    """The depth of the best speed-up, the smallest of equals; 0 when plain decoding is faster; None without figures."""
    known = [(cost.speedup, -cost.depth) for cost in costs if cost.speedup is not None]
    if not known:
        return None
    speedup, depth = max(known)
    return -depth if speedup > 1 else 0


def _timed(engine: Engine, tokenizer: ChatTokenizer, prompt: Prompt, plan: Plan) -> Timed:
    """Rounds of the first turn."""
    alone = replace(prompt, turns=prompt.turns[:1])
    answers = play(engine, tokenizer, [alone], replace(plan, rows=1), {})
    pairs = [pair for a in answers for pair in zip(a.rounds, outcomes(a), strict=True)]
    return [(r, o) for r, o in pairs[WARM:] if r.alone]


def _wall(one: Round) -> float:
    return one.verify + one.draft + one.host


def _rate(timed: Timed) -> float:
    return sum(o.tokens for _, o in timed) / sum(_wall(r) for r, _ in timed)


def _ledger(rounds: Sequence[Round]) -> Ledger:
    draft, verify, host = (sum(getattr(r, name) for r in rounds) / len(rounds) for name in ("draft", "verify", "host"))
    return Ledger(len(rounds), draft, verify, host, draft + verify + host)


def _cost(depth: int, timed: Timed, tau: float | None, token: float) -> Cost:
    wall = median(_wall(r) for r, _ in timed)
    return Cost(depth, wall, tau, None if tau is None else round(tau * token / wall, 4))
