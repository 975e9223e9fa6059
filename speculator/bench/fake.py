"""An engine that computes nothing, to measure the service around it.

Owns: the step contract at its cheapest. Must never import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from speculator.types import Draft, DraftShape, EngineInfo, SamplingParams, Step, StepResult, StepTimes

TOKEN = 7


class EchoEngine:
    """Drafts chains of one token and accepts all of them."""

    def __init__(self, max_rows: int = 64, max_context: int = 1 << 22, page_size: int = 1 << 12) -> None:
        pages = max_rows * 8 + max_context // page_size + 2
        self.info = EngineInfo(
            target_model="echo",
            draft_model="echo",
            draft_method="eagle3",
            vocab_size=32_000,
            eos_token_ids=(0,),
            max_context=max_context,
            max_rows=max_rows,
            page_size=page_size,
            total_pages=pages,
            scratch_tokens=64,
            prefill_chunk=512,
            default_shape=DraftShape(5),
        )
        self.times = StepTimes(0.0, 1e-6, 1e-6)
        depths = range(self.info.max_depth + 1)
        self._first = {depth: StepResult((TOKEN,), (-1.0,), draft=_chain(depth)) for depth in depths}
        self._only = {depth: StepResult(draft=_chain(depth)) for depth in depths}
        self._round = {(one, other): _accepted(one, other) for one in depths for other in depths}

    def open(self, row: int, sampling: SamplingParams, speculate: bool) -> None:
        return None

    def close(self, row: int) -> None:
        return None

    def launch(self, steps: Sequence[Step]) -> None:
        return None

    def passes_run(self) -> dict[str, tuple[int, int]]:
        return {}

    def step(self, steps: Sequence[Step]) -> list[StepResult]:
        return [self._one(step) for step in steps]

    def _one(self, step: Step) -> StepResult:
        depth = 0 if step.propose is None else step.propose.depth
        if step.draft is not None:
            return self._round[len(step.draft.tokens), depth]
        sampled = step.feed is not None and step.feed.following is None
        return self._first[depth] if sampled else self._only[depth]


def _accepted(count: int, depth: int) -> StepResult:
    return StepResult((TOKEN,) * (count + 1), (-1.0,) * (count + 1), tuple(range(count)), _chain(depth))


def _chain(depth: int) -> Draft:
    return Draft((TOKEN,) * depth, tuple(range(-1, depth - 1)), (-1.0,) * depth, draft_id=1)
