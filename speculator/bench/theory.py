"""Theoretical acceptance 1 - TV(p, q): what the rejection rule accepts on average, from the distributions themselves.

Owns: comparing p and q of every judged position while the engine runs; only sums are kept. Must never change a result
of the engine it listens to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from speculator.bench.bootstrap import Array, interval, ratio, weights
from speculator.bench.figures import rounded
from speculator.bench.records import Interval, Theory
from speculator.bench.rounds import room_of
from speculator.engine import Engine
from speculator.local import LocalSequence
from speculator.passes import Passes, Relay, Verified
from speculator.sampling import probabilities, scores
from speculator.types import DraftShape, Rule, SamplingParams
from target.batch import Batch
from target.states import StatePass


class Listener(Relay):
    """Passes that remember the newest logits of a verification."""

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes)
        self.logits: Tensor | None = None  # [R, T, V]

    def verify(self, batch: Batch, *states: StatePass | None) -> Verified:
        found = super().verify(batch, *states)
        self.logits = found.logits
        return found


@contextmanager
def listening(engine: Engine) -> Iterator[Listener]:
    """Hear the target's verdicts until the block ends."""
    before, listener = engine.passes, Listener(engine.passes)
    engine.passes = listener
    try:
        yield listener
    finally:
        engine.passes = before


def theoretical(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    depth: int,
    tokens: int,
    rows: int,
    ends: frozenset[int] = frozenset(),
    resamples: int = 0,
    confidence: float = 0.95,
) -> Theory:
    """Mean 1 - TV(p, q) per position of chains of `depth` over rounds of up to `tokens` tokens after each prompt.

    `sampling` must have a temperature; its rule is replaced by rejection, under which a position's acceptance is
    1 - TV(p, q) by construction. Two measurements of one thing, then: `acceptance` and `measured` must agree.
    Prompts that leave no room for an answer are left out.
    """
    prompts = [prompt for prompt in prompts if len(prompt) < room_of(engine.info)]
    sums = torch.zeros(len(prompts), 3, depth, dtype=torch.float64)  # acceptance in theory, accepted, judged
    rounds = 0
    with listening(engine) as listener:
        for start in range(0, len(prompts), rows):
            chosen = enumerate(prompts[start : start + rows])
            drawn = replace(sampling, rule=Rule.REJECTION)
            group = [
                _sequence(engine, row, prompt, replace(drawn, seed=sampling.seed + start + row), depth)
                for row, prompt in chosen
            ]
            rounds += _run(engine, listener, group, sums[start : start + rows], tokens, ends)
    theory, accepted, judged = sums.sum(0).tolist()
    return Theory(
        rule=Rule.REJECTION.value,
        rounds=rounds,
        acceptance=_means(theory, judged),
        measured=_means(accepted, judged),
        count=tuple(int(n) for n in judged),
        intervals=_intervals(sums.numpy(), resamples, confidence) if resamples and prompts else (),
    )


def _intervals(sums: Array, resamples: int, confidence: float) -> tuple[Interval | None, ...]:
    """Over prompts, of sums [prompts, 3, depth]."""
    drawn = weights(len(sums), resamples)
    rates = ratio(drawn @ sums[:, 0], drawn @ sums[:, 2])
    return tuple(rounded(interval(column, len(sums), confidence)) for column in rates.T)


def _sequence(engine: Engine, row: int, prompt: Sequence[int], sampling: SamplingParams, depth: int) -> LocalSequence:
    sequence = LocalSequence(engine, row, sampling, DraftShape(depth))
    sequence.tokens = list(prompt)
    while sequence.cached < len(prompt):
        step = sequence.feed()
        sequence.take(step, engine.step([step])[0])
    return sequence


def _run(
    engine: Engine,
    listener: Listener,
    group: Sequence[LocalSequence],
    sums: Tensor,
    tokens: int,
    ends: frozenset[int],
) -> int:
    """Rounds of a group until all are over; adds to `sums` [group, 3, depth]."""
    most = room_of(engine.info)
    rounds, limit = 0, {s.row: min(len(s.tokens) - 1 + tokens, most) for s in group}  # one token is there
    live = [s for s in group if s.tokens[-1] not in ends and len(s.tokens) < limit[s.row]]
    while live:
        steps = [s.round() for s in live]
        held = [engine.rows.q(s.row, s.draft.draft_id) if s.draft else None for s in live]
        sampling = engine.rows.sampling([s.row for s in live])
        results = engine.step(steps)
        assert listener.logits is not None
        p = probabilities(scores(listener.logits, sampling, None), sampling)
        for i, (s, result) in enumerate(zip(live, results, strict=True)):
            room = _room(result.tokens, ends, limit[s.row] - len(s.tokens))
            _add(sums[s.row], p[i], held[i], len(result.accepted), room)
        rounds += len(live)
        news = [s.take(step, result) for s, step, result in zip(live, steps, results, strict=True)]
        live = [s for s, new in zip(live, news, strict=True) if not ends & {*new} and len(s.tokens) < limit[s.row]]
    for sequence in group:
        engine.close(sequence.row)
    return rounds


def _room(tokens: Sequence[int], ends: frozenset[int], left: int) -> int:
    """How many of a round's tokens lie inside an answer of `left` more at most, an end mark being its last."""
    return min(left, next((i + 1 for i, token in enumerate(tokens) if token in ends), left))


def _add(sums: Tensor, p: Tensor, q: Tensor | None, accepted: int, room: int) -> None:
    """One round: p [T, V] after each node (the root first), q [depth, V]; positions past `room` count for nothing."""
    if q is None:
        return
    reached, accepted = min(accepted + 1, len(q), room), min(accepted, room)
    sums[0, :reached] += torch.minimum(p[:reached], q[:reached].to(p.dtype)).sum(-1).cpu()
    sums[1, :accepted] += 1
    sums[2, :reached] += 1


def _means(over: Sequence[float], under: Sequence[float]) -> tuple[float | None, ...]:
    return tuple(round(a / b, 6) if b else None for a, b in zip(over, under, strict=True))
