"""What the kit asks of an attention backend.

Owns: the protocol, the traits, the batch record. Must never know how a backend works, nor import pytest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """R rows of T queries; row r has `counts[r]` valid ones, the rest is padding. Padded rows have count and context 0.

    Query t of a row is stored at sequence index `context + offset + t` of its page table; `offset` counts the tokens
    that earlier passes stored above the context. It sees every index below `context`, the nodes of its ancestor mask
    and itself; without masks (None) every index up to its own. Bit j of a mask is the node stored at `context + j`.
    The tensors of a `static` batch, as all are here, are refilled between the runs of a recorded pass.
    """

    tokens: Tensor  # [R, T] int64
    positions: Tensor  # [R, T] int64
    context: Tensor  # [R] int64
    counts: Tensor  # [R] int64
    pages: Tensor  # [R, P] int64 page table; 0 is the null page, where padding may write and nothing is read
    ancestors: Tensor | None = None  # [R, T] int64
    offset: int = 0
    longest: int = 0  # bound of context + offset + counts over the rows, for this batch: a replay may come with more
    static: bool = True


@dataclass(frozen=True)
class Traits:
    """What a backend can do, and how far it is to be tested."""

    heads: int
    kv_heads: int
    head_dim: int  # of queries, keys and values; of a latent: rank + rotary part
    rank: int = 0  # of a latent, which is then all that is cached: head 0 of kv_heads 1. 0: keys and values
    layers: int = 2
    query_lens: tuple[int, ...] = (1, 2, 4)
    page_sizes: tuple[int, ...] = (16,)
    trees: bool = False  # whether batches may have ancestor masks
    steps_in_graph: bool = True  # whether `refresh` may be recorded between draft steps; else one recording a step
    longest: int = 512  # tokens of the longest row to test
    borders: tuple[
        int, ...
    ] = ()  # lengths where the backend splits its work; pages and powers of two are tested anyway
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4  # relative and absolute, against the oracle; replay against eager is always bit for bit

    @property
    def latent(self) -> bool:
        return self.rank > 0

    @property
    def parts(self) -> int:
        """Entries per token and head: keys and values, or one latent."""
        return 1 if self.latent else 2


class Backend(Protocol):
    """Made by `Backend(device)`; may be subclassed for the defaults of what has one.

    A plan is made over the tensors of a batch, whose addresses stay while their values change. The rules:
    a pass that runs or is recorded with a plan right after `plan` or `refresh` computes what the tensors hold then,
    and a replay of a recorded pass computes what they hold at the replay, after another `refresh`.
    """

    traits: Traits

    def __init__(self, device: torch.device) -> None: ...

    def make_cache(self, pages: int, page_size: int) -> Any:
        """A cache of all layers, of any type. Slot s of a page p is number `p * page_size + s`."""

    def write(self, cache: Any, layer: int, slots: Tensor, entries: Tensor) -> None:
        """Put `entries` [N, parts, kv_heads, head_dim] into `slots` [N] int64: history, or NaN that nobody may read."""

    def plan(self, cache: Any, batch: Batch) -> Any:
        """Prepare a pass; may read the host and the device, may plan lazily, must own what it keeps."""

    def run(self, plan: Any, layer: int, q: Tensor, *given: Any) -> Tensor:
        """Store the pass's own tokens, attend, return [R, T, heads, head_dim]. It is recorded: it never reads values.

        Keys and values: q [R, T, heads, head_dim], given k, v [R, T, kv_heads, head_dim] and window (None here);
        the scale is head_dim ** -0.5. Latent: q [R, T, heads, rank + rope], given latent [R, T, rank + rope] and the
        scale; the result is [R, T, heads, rank].
        """

    def refresh(self, plan: Any, batch: Batch) -> None:
        """The tensors of the batch hold new values: bring the plan up to date, in place. Default: nothing to do.

        Called before every replay, and between draft steps: recorded there when `steps_in_graph`.
        """

    def decisions(self, batch: Batch) -> tuple[object, ...]:
        """What was decided on the host for this batch (a kernel, a number of splits). Default: nothing.

        A recorded pass is replayed only for batches with the decisions it was recorded with.
        """
        return ()

    def shared(self, cache: Any) -> Iterable[object]:
        """What plans have in common by design, apart from the cache: a workspace, or this backend if they refer to it.

        Nothing that can be reached from here is looked at when states are compared, so name as little as possible.
        Default: nothing.
        """
        return ()
