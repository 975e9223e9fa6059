"""Tiny engines and a driver that runs sessions through them, shared by the engine tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from speculator.engine import Engine
from speculator.heads.base import DraftHead, TargetWeights
from speculator.heads.eagle import EagleHead
from speculator.heads.eagle3 import Eagle3Head
from speculator.heads.record import HeadRecord
from speculator.types import Draft, DraftShape, EngineInfo, Feed, SamplingParams, Step, StepResult
from target.cache import PagedCache
from target.config import ModelConfig, parse_config
from target.decoder import Decoder, init_weights

VOCAB = 61


def tiny_config(**changes: object) -> ModelConfig:
    raw: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    return parse_config({**raw, **changes})


def tiny_target(seed: int = 0, **changes: object) -> Decoder:
    model = Decoder(tiny_config(**changes))
    init_weights(model, torch.Generator().manual_seed(seed), std=0.25)
    return model.requires_grad_(False).eval()


def tiny_record(kind: str, **changes: object) -> HeadRecord:
    base: dict[str, object] = dict(
        kind=kind, hidden_size=32, target_hidden_size=32, vocab_size=VOCAB, draft_vocab_size=VOCAB,
        intermediate_size=40, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
        boundaries=(2, 3, 4) if kind == "eagle3" else (), own_lm_head=kind == "eagle3",
    )  # fmt: skip
    return HeadRecord(**{**base, **changes})  # type: ignore[arg-type]


def tiny_head(target: Decoder, kind: str, seed: int = 1, **changes: object) -> DraftHead:
    record = tiny_record(kind, **changes)
    build = EagleHead if kind == "eagle" else Eagle3Head
    head = build(record, TargetWeights(target.embed.weight, target.head_weight), target.config.num_layers)
    init_weights(head, torch.Generator().manual_seed(seed), std=0.25)
    if head.lm_head is not None and head.lm_head.weight.shape == target.head_weight.shape:
        head.lm_head.weight.data.copy_(target.head_weight)
    if record.d2t:
        stride = VOCAB // record.draft_vocab_size
        head.target_ids = torch.arange(record.draft_vocab_size) * stride
    return head.to(target.embed.weight.device).requires_grad_(False).eval()


def tiny_engine(target: Decoder, head: DraftHead | None, rows: int = 8, page_size: int = 4, pages: int = 600) -> Engine:
    """An engine on the device of the target."""
    groups = [target.cache_layers] + ([head.cache_layers] if head else [])
    cache = PagedCache(groups, pages, page_size, torch.float32, target.embed.weight.device)
    info = EngineInfo(
        target_model="tiny", draft_model="tiny", draft_method=head.record.kind if head else "none",
        vocab_size=target.config.vocab_size, eos_token_ids=(), max_context=512, max_rows=rows, page_size=page_size,
        total_pages=pages, scratch_tokens=160, prefill_chunk=16,
    )  # fmt: skip
    return Engine(info, target, head, cache)


@dataclass
class Sequence_:
    """One session as the scheduler would keep it."""

    row: int
    tokens: list[int]
    pages: list[int]
    cached: int = 0
    draft: Draft | None = None
    produced: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


Drafter = Callable[[Sequence_], Draft]


class Driver:
    """Runs sessions in lockstep: prompts in chunks, then rounds with the head's drafts or with `drafter`'s."""

    def __init__(self, engine: Engine, scatter: int = 0) -> None:
        self.engine = engine
        order = torch.randperm(engine.info.total_pages - 1, generator=torch.Generator().manual_seed(scatter)) + 1
        self._free: list[int] = order.tolist() if scatter else list(range(1, engine.info.total_pages))

    def start(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], shape: DraftShape | None
    ) -> list[Sequence_]:
        sessions = [Sequence_(row, list(p), self._take(len(p) + 260)) for row, p in enumerate(prompts)]
        for s, param in zip(sessions, params, strict=True):
            self.engine.open(s.row, param, shape is not None)
        while any(s.cached < len(s.tokens) - 1 or not s.produced for s in sessions):
            waiting = [s for s in sessions if not s.produced]
            self._run([self._chunk(s, shape) for s in waiting], waiting)
        return sessions

    def rounds(
        self,
        sessions: Sequence[Sequence_],
        count: int,
        shapes: Sequence[DraftShape | None],
        drafter: Drafter | None = None,
    ) -> None:
        """Go on until every session has produced `count` tokens."""
        while live := [s for s in sessions if len(s.produced) < count]:
            steps = []
            for s in live:
                draft = drafter(s) if drafter else (s.draft or Draft())
                steps.append(self._step(s, draft=draft, root=s.tokens[-1], propose=shapes[s.row]))
            self._run(steps, live)

    def _chunk(self, s: Sequence_, shape: DraftShape | None) -> Step:
        chunk = s.tokens[s.cached : s.cached + self.engine.info.prefill_chunk]
        end = s.cached + len(chunk)
        last = end == len(s.tokens)
        feed = Feed(chunk, None if last else s.tokens[end])
        return self._step(s, feed=feed, propose=shape if last else None)

    def _step(self, s: Sequence_, **parts: object) -> Step:
        return Step(s.row, s.cached, s.pages, **parts)  # type: ignore[arg-type]

    def _run(self, steps: list[Step], sessions: list[Sequence_]) -> list[StepResult]:
        results = self.engine.step(steps)
        for step, session, result in zip(steps, sessions, results, strict=True):
            if step.feed:
                session.cached += len(step.feed.tokens)
            else:
                session.cached += len(result.tokens)
                session.accepted.append(len(result.accepted))
            session.tokens += result.tokens
            session.produced += result.tokens
            session.draft = result.draft
        return results

    def _take(self, tokens: int) -> list[int]:
        count = -(-tokens // self.engine.info.page_size)
        taken, self._free = self._free[:count], self._free[count:]
        return taken
