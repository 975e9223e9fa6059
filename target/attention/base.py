"""The seam between layers and attention backends.

Owns: the protocol. Must never know a particular backend or model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from target.batch import Batch

Plan = TypeVar("Plan")

# attend(layer, q [R, T, heads, dim], k, v [R, T, kv_heads, dim], window) -> [R, T, heads, dim]
Attend = Callable[[int, Tensor, Tensor, Tensor, int | None], Tensor]


class Attention(Protocol[Plan]):
    """`plan` once per pass (it may read the host), `run` once per layer (it may be recorded, and never reads the host).

    `run` stores the keys and values of the pass's own tokens before it attends to them.
    """

    def plan(self, batch: Batch) -> Plan: ...

    def run(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor: ...


class Turn(NamedTuple):
    """What is done to the heads of a qkv product before they attend: per-head norms of queries and keys, rotation."""

    cos: Tensor  # [R, T, 1, dim] of a Rope; the first dim values of a head are rotated
    sin: Tensor
    q_weight: Tensor | None = None  # [head_dim] of the norms
    k_weight: Tensor | None = None
    eps: float = 0.0
    pairs: bool = False  # of an interleaved Rope


class FusedAttention(ABC):
    """A backend that also takes the qkv product as it is, and turns and stores it on its way."""

    @abstractmethod
    def run_fused(self, plan: Any, layer: int, qkv: Tensor, turn: Turn, window: int | None) -> Tensor:
        """qkv [R, T, heads + 2 kv_heads, dim] -> [R, T, heads, dim]."""


def fused_form(attend: Attend) -> Callable[[int, Tensor, Turn, int | None], Tensor] | None:
    """`run_fused` of the pass that `attend` is bound to; None where its backend has none or something is between."""
    if not isinstance(attend, partial) or not isinstance(attend.func, MethodType):
        return None
    backend = attend.func.__self__
    return partial(backend.run_fused, *attend.args) if isinstance(backend, FusedAttention) else None


def bind(attention: Attention[Plan], batch: Batch) -> Attend:
    """Plan a pass and return what its layers call."""
    return partial(attention.run, attention.plan(batch))
