"""Prompt chunks by FlashAttention, everything else by our kernels, over one cache.

Owns: which pass goes where. Must never know how either computes. A pass longer than a round's, without a tree and not
recorded, is a prompt chunk; our kernels turn and store its tokens, FlashAttention reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from target.attention.base import FusedAttention, Turn
from target.batch import Batch

if TYPE_CHECKING:  # it needs triton
    from target.attention.triton import TritonAttention

ROUND = 64  # queries of a row in a round, at most


class PromptKernel(Protocol):
    """`prepare` once per pass, `attend` once per layer over keys and values that are already stored."""

    name: str

    def prepare(self, batch: Batch) -> Any: ...

    def attend(self, state: Any, layer: int, q: Tensor, window: int | None) -> Tensor:
        """q [R, T, heads, dim] -> [R, T, heads, dim]; padding gives zeros."""


class PromptPlan(NamedTuple):
    """One pass."""

    batch: Batch  # as our kernels take it
    prompt: Any  # what the prompt kernel prepared; None where ours attend


class FlashPrompts(FusedAttention):
    """`plan`, `run` and `run_fused` of our kernels, with another attention for prompt chunks."""

    def __init__(self, ours: TritonAttention, flash: PromptKernel) -> None:
        self.ours, self.flash = ours, flash

    def plan(self, batch: Batch) -> PromptPlan:
        """Raises PlanError for a batch that cannot be read."""
        planned = self.ours.plan(batch)
        return PromptPlan(planned, self.flash.prepare(planned) if is_prompt(batch) else None)

    def run(self, plan: PromptPlan, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [R, T, heads, dim], k and v [R, T, kv_heads, dim] -> [R, T, heads, dim]."""
        if plan.prompt is None:
            return self.ours.run(plan.batch, layer, q, k, v, window)
        self.ours.store(plan.batch, layer, q, k, v)
        return self.flash.attend(plan.prompt, layer, q, window)

    def run_fused(self, plan: PromptPlan, layer: int, qkv: Tensor, turn: Turn, window: int | None) -> Tensor:
        """qkv [R, T, heads + 2 kv_heads, dim] -> [R, T, heads, dim]."""
        if plan.prompt is None:
            return self.ours.run_fused(plan.batch, layer, qkv, turn, window)
        q = self.ours.turn_and_store(plan.batch, layer, qkv, turn)
        return self.flash.attend(plan.prompt, layer, q, window)


def is_prompt(batch: Batch) -> bool:
    """Whether a pass is a prompt chunk that nobody records."""
    return batch.tokens.shape[1] > ROUND and batch.ancestors is None and not batch.static
