"""Less repetition, more endings: the target learns from what it wrote itself.

Clean answers are imitated; in greedy answers the tokens that complete a repeated 4-gram, or a phrase said to everybody
whatever was asked, are made unlikely (sequence-level unlikelihood, Welleck et al. 2019, arXiv 1908.04319). Must never
know heads.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from speculator.train.answers import Written
from speculator.train.companion import CompanionTrainer
from speculator.train.data import ANSWER, REPEATED, SKIP, Document, Mixture, Packed, Stream, pack
from speculator.train.decode import decode_sorted
from speculator.train.optim import Budget, Optimizers
from speculator.train.pretrain import Loss, loss_weights
from speculator.train.prompts import chat_prompts, snippet_prompts
from speculator.train.recipe import Refine
from speculator.train.repetition import common, repeated, repeated_share, shared_share, stuttered
from speculator.train.report import Log
from speculator.train.tokenizer import END, ChatTokenizer
from target.decoder import Decoder


def refine(
    model: Decoder,
    loss: Loss,
    recipe: Refine,
    streams: Mapping[str, Stream],
    tokenizer: ChatTokenizer,
    device: torch.device,
    seed: int,
    companion: CompanionTrainer | None = None,
) -> list[dict[str, float]]:
    """Run all rounds in place; returns one row per round and the curve."""
    mixture = Mixture(streams, recipe.weights, recipe.length, device, seed)
    optimizers, log = Optimizers(model, recipe.learning), Log("refine")
    budget = Budget(recipe.rounds * recipe.steps, recipe.seconds, settle=recipe.steps)
    words = frozenset(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).strip().isalpha())
    step = 0
    for number in range(recipe.rounds):
        prompts = _prompts(recipe, streams, tokenizer, seed + number)
        written, heats = _write(model, prompts, recipe, seed + number)
        joint = companion.state() if companion is not None else {}
        summary = _summary(written, heats)
        log(step, round=number, **summary, **joint)
        if companion is not None:
            companion.read(_followed(written, recipe), summary["shared"])
        rows = OwnRows(_documents(written, heats, recipe, words), recipe, device, seed + number)
        while step < (number + 1) * recipe.steps and (progress := budget.progress(step)) < 1:
            if companion is not None:
                companion.backward()
                companion.step(progress)
            _step(loss, optimizers, mixture, rows, recipe, progress, log, step)
            step += 1
    log(step, progress=1.0)
    return log.rows


def _prompts(recipe: Refine, streams: Mapping[str, Stream], tokenizer: ChatTokenizer, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    chats = chat_prompts(streams, recipe.weights, round(recipe.prompts * 0.7), recipe.length // 2, draw)
    prompts = chats + snippet_prompts(streams, tokenizer, recipe.prompts - len(chats), draw)
    draw.shuffle(prompts)
    return prompts


def _write(
    model: Decoder, prompts: Sequence[list[int]], recipe: Refine, seed: int
) -> tuple[list[Written], list[float]]:
    draw = random.Random(seed)
    heats = [recipe.temperature if draw.random() < recipe.sampled_share else 0.0 for _ in prompts]
    writer = copy.deepcopy(model).to(torch.bfloat16) if model.embed.weight.is_cuda else model
    answers = decode_sorted(writer, prompts, recipe.new_tokens, heats, 4096, seed)
    return [Written(p, a) for p, a in zip(prompts, answers, strict=True)], heats


def _summary(written: Sequence[Written], heats: Sequence[float]) -> dict[str, float]:
    greedy = [w.answer for w, heat in zip(written, heats, strict=True) if heat == 0]
    return {
        "greedy_repeated": repeated_share(greedy),
        "ended": float(np.mean([w.answer[-1] == END for w in written])),
        "shared": shared_share(greedy[:320]),
        "answer_tokens": float(np.mean([len(w.answer) for w in written])),
    }


def _followed(written: Sequence[Written], recipe: Refine) -> list[Document]:
    """Answers that the companion learns to follow: what is served, less what refinement is about to remove."""
    kept = [w for w in written if sum(repeated(w.answer)) <= recipe.companion_share * len(w.answer)]
    return [w.document() for w in kept or written]


def _documents(
    written: Sequence[Written], heats: Sequence[float], recipe: Refine, words: frozenset[int] = frozenset()
) -> list[Document]:
    """Clean answers to imitate, and greedy ones whose faults are marked.

    Faults are repetitions and stock phrases; `words` may not follow themselves.
    """
    documents = []
    stock = common([w.answer for w in written], math.ceil(recipe.common_share * len(written)) + 1)
    for one, heat, phrases in zip(written, heats, stock, strict=True):
        again = [any(m) for m in zip(repeated(one.answer), stuttered(one.answer, words), phrases, strict=True)]
        clean = one.answer[-1] == END and sum(again) <= recipe.clean_share * len(again)
        if clean and (heat > 0 or recipe.imitate_greedy):
            documents.append(_own(one, [ANSWER] * len(again)))
        elif heat == 0 and any(again):
            documents.append(_own(one, [REPEATED if bad else SKIP for bad in again]))
    return documents


def _own(one: Written, marks: Sequence[int]) -> Document:
    """Nothing is learnt from the prompt."""
    document = one.document(marks)
    document.marks[: len(one.prompt)] = SKIP
    return document


class OwnRows:
    """Packed answers on the device, drawn at random."""

    def __init__(self, documents: Sequence[Document], recipe: Refine, device: torch.device, seed: int) -> None:
        packed: Packed = pack(documents, recipe.length + 1)
        self._tokens = torch.from_numpy(packed.tokens.astype(np.int64)).to(device)
        self._marks = torch.from_numpy(packed.marks[:, 1:].copy()).to(device)
        self._generator = torch.Generator(device).manual_seed(seed)

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        device = self._tokens.device
        index = torch.randint(len(self._tokens), (rows,), generator=self._generator, device=device)
        return self._tokens[index], self._marks[index]


def _step(
    loss: Loss,
    optimizers: Optimizers,
    mixture: Mixture,
    rows: OwnRows,
    recipe: Refine,
    progress: float,
    log: Log,
    step: int,
) -> None:
    own = round(recipe.rows * recipe.own_share)
    parts = (rows.batch(own), mixture.batch(recipe.rows - own))
    tokens, marks = (torch.cat(part) for part in zip(*parts, strict=True))
    likely, unlikely = loss(tokens, *loss_weights(marks, 0.2))
    (likely + recipe.unlikelihood * unlikely).backward()
    optimizers.step(progress)
    if step % 10 == 0 and log.due:
        values = {"loss": float(likely.detach()), "unlikelihood": float(unlikely.detach())} | optimizers.state()
        log(step, **values, progress=progress)
