"""The finished target's own answers, which the head learns from.

Owns: choosing prompts and temperatures, writing, saving. Must never know heads.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from speculator.train.data import ANSWER, QUESTION, Document, Stream
from speculator.train.decode import decode_sorted
from speculator.train.prompts import chat_prompts, snippet_prompts, text_prompts
from speculator.train.recipe import Answers
from speculator.train.report import Log
from speculator.train.tokenizer import ASSISTANT, ChatTokenizer
from target.decoder import Decoder


class Written(NamedTuple):
    """A prompt and what the model wrote after it."""

    prompt: list[int]
    answer: list[int]

    def document(self, marks: Sequence[int] | None = None) -> Document:
        """Prompt marked as question (or as answer when it is plain text), answer by `marks` or all as answer."""
        first = QUESTION if ASSISTANT in self.prompt else ANSWER
        tokens = np.array([*self.prompt, *self.answer], np.uint16)
        answer = [ANSWER] * len(self.answer) if marks is None else list(marks)
        return Document(tokens, np.array([first] * len(self.prompt) + answer, np.uint8))


def choose_prompts(
    recipe: Answers, streams: Mapping[str, Stream], tokenizer: ChatTokenizer, seed: int
) -> list[list[int]]:
    """The shares of a recipe, shuffled."""
    draw, count = random.Random(seed), recipe.prompts
    chats, snippets = round(count * recipe.chat_share), round(count * recipe.snippet_share)
    prompts = chat_prompts(streams, recipe.weights, chats, recipe.max_prompt, draw)
    prompts += snippet_prompts(streams, tokenizer, snippets, draw)
    prompts += text_prompts(streams, max(0, count - len(prompts)), draw)
    draw.shuffle(prompts)
    return prompts


def choose_temperatures(recipe: Answers, count: int, seed: int) -> list[float]:
    draw = random.Random(seed)
    heats = recipe.temperatures or (0.0,)
    return [0.0 if draw.random() < recipe.greedy_share else draw.choice(heats) for _ in range(count)]


def write_all(model: Decoder, prompts: Sequence[list[int]], recipe: Answers, seed: int) -> list[Written]:
    """Answer the prompts in rounds until all are answered or the time is up."""
    heats = choose_temperatures(recipe, len(prompts), seed)
    log, begin, tokens = Log("answers"), time.monotonic(), 0
    written: list[Written] = []
    stride = recipe.rows * 4  # sorted by length within a stride, so that batches are even
    for start in range(0, len(prompts), stride):
        some, heat = prompts[start : start + stride], heats[start : start + stride]
        answers = decode_sorted(model, some, recipe.new_tokens, heat, recipe.rows, seed + start)
        written += [Written(p, a) for p, a in zip(some, answers, strict=True)]
        tokens += sum(map(len, answers))
        log(len(written), prompts=len(prompts), answer_tokens=tokens)
        if time.monotonic() - begin > recipe.seconds:
            break
    return written


def save_written(written: Sequence[Written], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = np.array([(len(w.prompt), len(w.answer)) for w in written], np.int32)
    tokens = np.fromiter(chain.from_iterable((*w.prompt, *w.answer) for w in written), np.uint16)
    np.savez(path, sizes=sizes, tokens=tokens)


def load_written(path: Path) -> list[Written]:
    with np.load(path) as arrays:
        tokens, sizes = arrays["tokens"].tolist(), arrays["sizes"].tolist()
    written, at = [], 0
    for prompt, answer in sizes:
        written.append(Written(tokens[at : at + prompt], tokens[at + prompt : at + prompt + answer]))
        at += prompt + answer
    return written
