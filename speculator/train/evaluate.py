"""Measures a pair on prompts: exact greedy chains as a server would run them, and how much the texts repeat.

Owns: prompt sets, greedy drafts at every position, the replay of rounds. Must never know sessions; trees and sampling
are measured by `speculator bench` on the real engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speculator.heads.base import DraftHead
from speculator.train.answers import Written
from speculator.train.attention import hidden_rows
from speculator.train.decode import decode_sorted
from speculator.train.head import head_attend
from speculator.train.recipe import Evaluation, RecipeError
from speculator.train.repetition import repeated_share, shared_share
from speculator.train.tokenizer import END, PAD, ChatTokenizer
from target.attention.dense import dense_attend
from target.decoder import Decoder


class Round(NamedTuple):
    """One target pass of a chain: drafts that were right in a row, and tokens committed."""

    accepted: int
    committed: int


def load_prompts(folder: Path, name: str, tokenizer: ChatTokenizer, limit: int) -> list[list[int]]:
    """First turns of `folder`/NAME.jsonl as chat prompts."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        raise RecipeError(f"{path} does not exist; --prompts must name a folder with {name}.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    turns = [json.loads(line)["turns"][0] for line in lines]
    return [tokenizer.prompt([{"role": "user", "content": turn}]) for turn in turns]


def greedy_texts(model: Decoder, prompts: Sequence[list[int]], new_tokens: int, rows: int) -> list[Written]:
    answers = decode_sorted(model, prompts, new_tokens, [0.0] * len(prompts), rows, seed=0)
    return [Written(p, a) for p, a in zip(prompts, answers, strict=True)]


@torch.no_grad()
def greedy_drafts(head: DraftHead, model: Decoder, texts: Sequence[Written], depth: int) -> list[list[list[int]]]:
    """[text][row t]: the head's greedy chain for tokens t + 2 .. t + 1 + depth after the true tokens <= t + 1."""
    device = model.embed.weight.device
    sequences = [[*w.prompt, *w.answer] for w in texts]
    longest = max(map(len, sequences))
    tokens = torch.tensor([[*s, *[PAD] * (longest - len(s))] for s in sequences], device=device)
    positions = torch.arange(longest, device=device).expand_as(tokens)
    features = head.features(model(tokens, positions, dense_attend(model.config), head.taps))[:, :-1]
    drafts = _chains(head, features, tokens[:, 1:], positions[:, :-1], depth).tolist()
    return [rows[: len(s) - 1] for rows, s in zip(drafts, sequences, strict=True)]


def _chains(head: DraftHead, features: Tensor, tokens: Tensor, positions: Tensor, depth: int) -> Tensor:
    """[R, N, depth]; features [R, N, F], tokens [R, N] the next tokens."""
    attend = head_attend(head, hidden_rows(torch.zeros_like(tokens[:1])))
    state, drafts = head.fuse(features), []
    for j in range(depth):
        output = head(state, tokens, positions + j, attend)
        tokens = head.logits(output).argmax(-1)
        drafts.append(tokens)
        state = head.recycle(output)
    return torch.stack(drafts, -1)


def replay(text: Written, drafts: Sequence[Sequence[int]], depth: int, limit: int) -> list[Round]:
    """The rounds of a chain of `depth` over a text whose first token came with the prompt.

    Rounds start below `limit` new tokens. Nothing is committed past the end mark.
    """
    tokens = [*text.prompt, *text.answer]
    length, rounds = len(text.prompt) + 1, []
    while length < min(len(tokens), len(text.prompt) + limit):
        accepted, drafted = 0, drafts[length - 2][:depth]
        while accepted < len(drafted) and tokens[length + accepted : length + accepted + 1] == [drafted[accepted]]:
            accepted += 1
        committed = min(accepted + 1, len(tokens) - length)
        rounds.append(Round(accepted, committed))
        length += committed
    return rounds


def chain_figures(rounds: Sequence[Round], depth: int) -> dict[str, Any]:
    """tau: tokens committed per target pass; survival[i]: share of rounds with more than i accepted drafts."""
    count = max(1, len(rounds))
    survival = [round(sum(r.accepted > i for r in rounds) / count, 4) for i in range(depth)]
    return {"tau": round(sum(r.committed for r in rounds) / count, 4), "survival": survival, "rounds": len(rounds)}


def text_figures(texts: Sequence[Written], recipe: Evaluation) -> dict[str, Any]:
    answers = [w.answer[: recipe.repetition_tokens] for w in texts]
    return {
        "prompts": len(texts),
        "repeated_4grams": round(repeated_share(answers), 4),
        "shared_8grams": round(shared_share(answers), 4),
        "ended": round(sum(a[-1] == END for a in answers) / len(answers), 4),
        "mean_tokens": round(sum(map(len, answers)) / len(answers), 1),
    }


def evaluate_set(
    model: Decoder, head: DraftHead | None, prompts: Sequence[list[int]], recipe: Evaluation, rows: int = 20
) -> tuple[dict[str, Any], list[Written]]:
    """Figures of one prompt set, and its texts. Without a head only the texts are measured."""
    deepest = max(recipe.depths)
    longest = max(recipe.repetition_tokens, recipe.new_tokens + deepest + 1)
    texts = greedy_texts(model, prompts, longest, rows=4 * rows)
    figures = text_figures(texts, recipe)
    if head is not None:
        figures["chain"] = _chain_sets(model, head, texts, recipe, rows)
    return figures, texts


def _chain_sets(
    model: Decoder, head: DraftHead, texts: Sequence[Written], recipe: Evaluation, rows: int
) -> dict[str, Any]:
    order = sorted(texts, key=lambda w: len(w.prompt))
    rounds: dict[int, list[Round]] = {depth: [] for depth in recipe.depths}
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        drafts = greedy_drafts(head, model, some, max(recipe.depths))
        for depth, found in rounds.items():
            for text, chains in zip(some, drafts, strict=True):
                found += replay(text, chains, depth, recipe.new_tokens)
    return {str(depth): chain_figures(found, depth) for depth, found in rounds.items()}


def evaluate(
    model: Decoder, head: DraftHead | None, tokenizer: ChatTokenizer, folder: Path, recipe: Evaluation
) -> dict[str, Any]:
    """Figures of all sets, their averages, and a few texts. Run it in float32 on the weights that are shipped."""
    sets: dict[str, Any] = {}
    samples: dict[str, list[dict[str, str]]] = {}
    for name in recipe.sets:
        prompts = load_prompts(folder, name, tokenizer, recipe.limit)
        sets[name], texts = evaluate_set(model, head, prompts, recipe)
        samples[name] = [{k: tokenizer.decode(v) for k, v in w._asdict().items()} for w in texts[:8]]
        print(f"[evaluate] {name}: {_brief(sets[name])}", flush=True)
    return {"sets": sets, "average": averages(sets), "samples": samples}


def averages(sets: dict[str, Any]) -> dict[str, Any]:
    """Plain means over the sets."""
    each = list(sets.values())
    mean: dict[str, Any] = {"repeated_4grams": round(sum(s["repeated_4grams"] for s in each) / len(each), 4)}
    if all("chain" in s for s in each):
        depths = each[0]["chain"]
        mean["tau"] = {d: round(sum(s["chain"][d]["tau"] for s in each) / len(each), 4) for d in depths}
    return mean


def _brief(figures: dict[str, Any]) -> str:
    taus = {depth: chain["tau"] for depth, chain in figures.get("chain", {}).items()}
    texts = {"repeated": "repeated_4grams", "shared": "shared_8grams", "ended": "ended", "tokens": "mean_tokens"}
    return "  ".join([f"tau {taus}", *(f"{name} {figures[key]}" for name, key in texts.items())])
