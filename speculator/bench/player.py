"""What the acceptance benchmark plays prompts on: an engine in this process, or a server.

Owns: the seam between the two. Must never compute a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from speculator.bench import theory
from speculator.bench.forced import Found, draft_everywhere
from speculator.bench.prompts import Prompt
from speculator.bench.recording import Answer
from speculator.bench.records import Theory
from speculator.bench.rounds import ChatTokenizer, Key, Plan, play
from speculator.engine import Engine
from speculator.types import DraftShape, SamplingParams

HOST_AHEAD = (
    "On a GPU the host hands work over ahead of the device: of draft and verify in the ledger only the sum is right."
)


class Player(Protocol):
    """Plays prompts and drafts along known texts; each method is that of the engine in this process, or equal to it."""

    notes: Sequence[str]  # what a reader of its times must know

    def play(
        self,
        tokenizer: ChatTokenizer,
        prompts: Sequence[Prompt],
        plan: Plan,
        have: dict[Key, Answer],
        notes: list[str] | None = None,
    ) -> Iterator[Answer]:
        """See rounds.play."""
        ...

    def draft_everywhere(
        self,
        answers: Sequence[Answer],
        shapes: Sequence[DraftShape],
        sampling: SamplingParams,
        rows: int,
        have: Callable[[Answer], Found],
    ) -> Iterator[tuple[Answer, Found]]:
        """See forced.draft_everywhere."""
        ...

    def theory(
        self, prompts: Sequence[Sequence[int]], plan: Plan, depth: int, resamples: int, confidence: float
    ) -> Theory:
        """See theory.theoretical; ConfigError where whole distributions cannot be had."""
        ...


class EnginePlayer:
    """An engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.notes: Sequence[str] = (HOST_AHEAD,) if engine.device.type == "cuda" else ()

    def play(
        self,
        tokenizer: ChatTokenizer,
        prompts: Sequence[Prompt],
        plan: Plan,
        have: dict[Key, Answer],
        notes: list[str] | None = None,
    ) -> Iterator[Answer]:
        return play(self.engine, tokenizer, prompts, plan, have, notes)

    def draft_everywhere(
        self,
        answers: Sequence[Answer],
        shapes: Sequence[DraftShape],
        sampling: SamplingParams,
        rows: int,
        have: Callable[[Answer], Found],
    ) -> Iterator[tuple[Answer, Found]]:
        return draft_everywhere(self.engine, answers, shapes, sampling, rows, have)

    def theory(
        self, prompts: Sequence[Sequence[int]], plan: Plan, depth: int, resamples: int, confidence: float
    ) -> Theory:
        return theory.theoretical(
            self.engine, prompts, plan.sampling, depth, plan.tokens, plan.rows, plan.ends, resamples, confidence
        )
