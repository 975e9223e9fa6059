"""A pair whose head is right now and then, a tokenizer of letters, and toy prompts: for the tests of the bench."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from engines import tiny_engine

from speculator.bench.prompts import Prompt
from speculator.bench.recording import Answer
from speculator.bench.rounds import Plan, play
from speculator.engine import Engine
from speculator.heads.exact import ExactPlan, exact_pair
from speculator.types import DraftShape, SamplingParams

LETTERS = 60
GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.9, top_p=0.95, seed=5)


class Letters:
    """One token a letter."""

    has_chat = True

    def encode_chat(self, messages: str | Sequence[dict[str, str]]) -> list[int]:
        text = messages if isinstance(messages, str) else "|".join(m["content"] for m in messages)
        return [ord(c) % LETTERS for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(65 + i) for i in ids)


def toy_prompts(count: int = 6) -> list[Prompt]:
    """Every second one has a second turn."""
    turns = [(f"question {i * 7919}", "and?")[: 1 + i % 2] for i in range(count)]
    return [Prompt(str(i), "toy", "odd" if i % 2 else "even", asked) for i, asked in enumerate(turns)]


def lucky_engine(rows: int = 4) -> Engine:
    """An exact head with noise on its weights."""
    torch.set_num_threads(1)
    pair = exact_pair(ExactPlan(vocab=LETTERS))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in pair.head.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.02 * weight.std())
    made = tiny_engine(pair.target, pair.head, rows=rows, pages=300 * rows)
    return Engine(replace(made.info, vocab_size=LETTERS), pair.target, pair.head, made.cache)


def run(
    engine: Engine, params: SamplingParams, shape: DraftShape | None, count: int = 6, **more: object
) -> list[Answer]:
    plan = Plan(params, shape, **{"tokens": 60, "rows": 4, **more})  # type: ignore[arg-type]
    return sorted(_play(engine, plan, count), key=lambda a: a.key)


def _play(engine: Engine, plan: Plan, count: int) -> Iterator[Answer]:
    return play(engine, Letters(), toy_prompts(count), plan, {})
