"""What the target is asked to write for training: questions of the corpora, pieces of text as questions, text starts.

Must never know models or evaluation prompts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from speculator.train.data import Stream, user_prompt
from speculator.train.tokenizer import ASSISTANT, END, USER, ChatTokenizer

REQUESTS = (
    "Explain",
    "Describe",
    "Write a short story about",
    "Write an email about",
    "Write a poem about",
    "Give me three tips about",
    "What do you know about",
    "What is the meaning of",
    "Summarize in one sentence:",
    "Rewrite this:",
    "Answer the question.",
    "Is this true?",
    "Compare",
    "Make a list of",
    "Imagine you are",
    "How would you solve this?",
    "Write a Python function for this:",
    "Complete this code.",
    "Continue:",
    "What happens next?",
)


def chat_prompts(
    streams: Mapping[str, Stream], weights: Mapping[str, float], count: int, longest: int, draw: random.Random
) -> list[list[int]]:
    """Questions of training conversations, up to and including the assistant's mark, none twice unless all are used."""
    pools = {name: _questions(s, longest) for name, s in streams.items() if s.chat and weights.get(name, 1.0) > 0}
    pools = {name: pool for name, pool in pools.items() if pool}
    if not pools:
        return []
    shares = {name: len(pool) * weights.get(name, 1.0) for name, pool in pools.items()}
    chosen: list[list[int]] = []
    for name, pool in pools.items():
        wanted = round(count * shares[name] / sum(shares.values()))
        draw.shuffle(pool)
        chosen += [pool[i % len(pool)] for i in range(wanted)]
    draw.shuffle(chosen)
    return chosen


def _questions(stream: Stream, longest: int) -> list[list[int]]:
    ends = [*stream.starts[1:].tolist(), len(stream.tokens)]
    found = []
    for start, end in zip(stream.starts.tolist(), ends, strict=True):
        tokens = stream.tokens[start : min(end, start + longest)]
        where = np.flatnonzero(tokens == ASSISTANT)
        if len(where):
            found.append(tokens[: int(where[0]) + 1].tolist())
    return found


def snippet_prompts(
    streams: Mapping[str, Stream], tokenizer: ChatTokenizer, count: int, draw: random.Random
) -> list[list[int]]:
    """Pieces of text as questions, most behind a request: what people ask is not what books answer."""
    requests = [tokenizer.encode(r + " ") for r in REQUESTS] + [tokenizer.encode(r + "\n\n") for r in REQUESTS]
    prompts = []
    for piece in _pieces(streams, count, (3, 90), draw):
        request = draw.choice(requests) if draw.random() < 0.8 else []
        prompts.append(user_prompt([*request, *piece]))
    return prompts


def text_prompts(streams: Mapping[str, Stream], count: int, draw: random.Random) -> list[list[int]]:
    """Pieces of text to go on with."""
    return [[END, *piece] for piece in _pieces(streams, count, (4, 64), draw)]


def _pieces(
    streams: Mapping[str, Stream], count: int, sizes: tuple[int, int], draw: random.Random
) -> list[Sequence[int]]:
    texts = [s for s in streams.values() if len(s.tokens) > 2 * sizes[1]]
    weights = [len(s.tokens) ** 0.5 for s in texts]
    pieces: list[Sequence[int]] = []
    while texts and len(pieces) < count:
        stream = draw.choices(texts, weights)[0]
        start = draw.randrange(len(stream.tokens) - sizes[1])
        piece = stream.tokens[start : start + draw.randint(*sizes)].tolist()
        pieces.append([t for t in piece if t not in (END, USER, ASSISTANT)])
    return pieces
