"""The seam between layers and attention backends.

Owns: the protocol. Must never know a particular backend or model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

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


def bind(attention: Attention[Plan], batch: Batch) -> Attend:
    """Plan a pass and return what its layers call."""
    return partial(attention.run, attention.plan(batch))
