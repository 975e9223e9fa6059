"""What a round costs and what drafts gain: one session with drafts beside the same session without, in turns.

Owns: times and what follows from them. Must never count acceptance its own way. Steps that read a prompt and the first
rounds of an answer are left out. The speed-up is found twice: predicted from tau and the median times of a plain step
and of a round, whose parts are on the clock one by one, and measured by a clock that runs through the whole answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from speculator.bench.bootstrap import interval, ratio, weights
from speculator.bench.figures import rounded
from speculator.bench.outcomes import Outcome, outcomes
from speculator.bench.player import Player
from speculator.bench.prompts import Prompt
from speculator.bench.recording import Answer, Round
from speculator.bench.records import Cost, Interval, Ledger, Time
from speculator.bench.rounds import ChatTokenizer, Key, Plan
from speculator.types import DraftShape

WARM = 2  # rounds of each answer that do not count
DOUBTFUL = 0.1  # a gap between prediction and measurement, or between parts and clock, that a reader should know
PARTS = ("draft", "verify", "commit", "host", "rpc")


@dataclass
class Timed:
    """Rounds of some answers, and how long the clock ran over them."""

    rounds: list[Round] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    by_prompt: dict[Key, tuple[int, float]] = field(default_factory=dict)  # tokens, seconds

    def add(self, answer: Answer) -> None:
        """The rounds after the first ones; none of an answer that was disturbed."""
        counted: list[Outcome] = outcomes(answer)[WARM:]
        found = answer.rounds[WARM:]
        if not found or not all(r.alone for r in found):
            return
        self.rounds += found
        tokens, spent = sum(o.tokens for o in counted), found[-1].at - answer.rounds[WARM - 1].at
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + spent
        self.by_prompt[answer.key] = tokens, spent

    @property
    def tau(self) -> float:
        return self.tokens / len(self.rounds)

    @property
    def typical(self) -> float:
        """Median seconds of a round, from its parts."""
        return median(spent(r) for r in self.rounds)

    @property
    def rate(self) -> float:
        """Tokens a second of the clock."""
        return self.tokens / self.seconds


def measure(
    player: Player,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    plan: Plan,
    taus: Mapping[int, float | None],
    resamples: int = 0,
    confidence: float = 0.95,
) -> Time | None:
    """Times of `prompts` under `plan`, one session; None when no round could be timed.

    `taus` are those of chains by depth, as the counterfactual runs found them: each of these depths is timed too, and
    the one with the best tau * plain_token / round is recommended (0: plain decoding is faster than any).
    """
    plain, drafted, costs = Timed(), Timed(), {depth: Timed() for depth in taus}
    for prompt in prompts:  # in turns, so that all meet the machine in the same mood
        _play(player, tokenizer, prompt, replace(plan, shape=None, drafter=None), plain)
        _play(player, tokenizer, prompt, plan, drafted)
        for depth, found in costs.items():
            _play(player, tokenizer, prompt, replace(plan, shape=DraftShape(depth)), found)
    if not plain.rounds or not drafted.rounds:
        return None
    token = plain.typical
    rows = tuple(_cost(depth, found, taus[depth], token) for depth, found in costs.items() if found.rounds)
    predicted, measured = drafted.tau * token / drafted.typical, drafted.rate / plain.rate
    return Time(
        sessions=1,
        ledger=_ledger(drafted),
        plain_token=token,
        tau=round(drafted.tau, 6),
        predicted=round(predicted, 4),
        measured=round(measured, 4),
        costs=rows,
        recommended_depth=recommend(rows),
        gap=round(predicted / measured - 1, 4),
        interval=_interval(plain, drafted, resamples, confidence),
    )


def _interval(plain: Timed, drafted: Timed, resamples: int, confidence: float) -> Interval | None:
    """Of the measured speed-up, by the bootstrap over the prompts that were timed both ways."""
    both = [key for key in drafted.by_prompt if key in plain.by_prompt]
    if not resamples or not both:
        return None
    rows = np.array([[*drafted.by_prompt[key], *plain.by_prompt[key]] for key in both])
    fast, spent, slow, whole = (weights(len(both), resamples) @ rows).T
    return rounded(interval(ratio(fast * whole, spent * slow), len(both), confidence))


def recommend(costs: Sequence[Cost]) -> int | None:
    """The depth of the best speed-up, the smallest of equals; 0 when plain decoding is faster; None without figures."""
    known = [(cost.speedup, -cost.depth) for cost in costs if cost.speedup is not None]
    if not known:
        return None
    speedup, depth = max(known)
    return -depth if speedup > 1 else 0


def doubts(found: Time) -> list[str]:
    """What a reader must know before believing the times."""
    told, ledger = [], found.ledger
    if found.gap is not None and abs(found.gap) > DOUBTFUL:
        told.append(
            f"The predicted speed-up {found.predicted:.2f} lies {100 * abs(found.gap):.0f} %"
            f" {'above' if found.gap > 0 else 'below'} the measured one {found.measured:.2f}: the times of this run are"
            " not steady, time it again on a quiet machine."
        )
    if ledger.wall and abs(ledger.round / ledger.wall - 1) > DOUBTFUL:
        told.append(
            f"The parts of a round add up to {100 * ledger.round / ledger.wall:.0f} % of its time by the clock."
        )
    return told


def spent(one: Round) -> float:
    """Seconds of a round: all its parts."""
    return one.draft + one.verify + one.commit + one.host + one.rpc


def _play(player: Player, tokenizer: ChatTokenizer, prompt: Prompt, plan: Plan, found: Timed) -> None:
    """Adds the rounds of the first turn."""
    alone = replace(prompt, turns=prompt.turns[:1])
    for answer in player.play(tokenizer, [alone], replace(plan, rows=1), {}):
        found.add(answer)


def _ledger(timed: Timed) -> Ledger:
    count = len(timed.rounds)
    parts = {name: sum(getattr(r, name) for r in timed.rounds) / count for name in PARTS}
    return Ledger(rounds=count, **parts, round=sum(parts.values()), wall=timed.seconds / count)


def _cost(depth: int, timed: Timed, tau: float | None, token: float) -> Cost:
    return Cost(depth, timed.typical, tau, None if tau is None else round(tau * token / timed.typical, 4))
