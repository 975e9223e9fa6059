"""Paged keys and values: one pool of pages, shared by target layers and head layers.

Owns: the storage and moving accepted nodes into place. Must never know who allocates pages or why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from target.errors import PlanError


class LayerShape(NamedTuple):
    """What one layer stores per token: `parts` times `kv_heads` heads of `head_dim`; keys and values, or one latent."""

    kv_heads: int
    head_dim: int
    parts: int = 2  # keys at 0 and values at 1; 1 for the latent of MLA


class PagedCache:
    """`pages` pages of `page_size` tokens; page 0 is the null page.

    A page number means the same token slots in every layer, so a session has one page table for target and head.
    `groups` are runs of layers of one shape (the target's, then the head's); layers are numbered through. Each
    layer's storage is [pages * page_size, parts, kv_heads, head_dim]. Slot 0 is read in place
    of invisible tokens and stays zero; padding writes to `pad_slot`.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[LayerShape]],
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if page_size < 2 or pages < 2:
            raise PlanError(f"a cache needs 2 pages of 2 tokens or more, got {pages} of {page_size}")
        self.page_size, self.pages, self.pad_slot = page_size, pages, page_size - 1
        self.groups: list[Tensor] = []
        for group in groups:
            if len(set(group)) != 1:
                raise PlanError(f"the layers of a cache group must have one shape, got {sorted(set(group)) or 'none'}")
            heads, dim, parts = group[0]
            shape = (len(group), pages * page_size, parts, heads, dim)
            self.groups.append(torch.zeros(shape, dtype=dtype, device=device))
        self.layers: list[Tensor] = [layer for group in self.groups for layer in group]

    @property
    def bytes(self) -> int:
        return sum(group.numel() * group.element_size() for group in self.groups)

    def move(self, source: Tensor, destination: Tensor, group: int = 0) -> None:
        """Copy slots `source` [N] to `destination` [N] int64 in one group; all are read before any is written."""
        store = self.groups[group]
        store.index_copy_(1, destination, store.index_select(1, source))


def bytes_per_token(groups: Sequence[Sequence[LayerShape]], dtype: torch.dtype) -> int:
    """Bytes that one token takes in the cache, all layers together."""
    return sum(parts * heads * dim for group in groups for heads, dim, parts in group) * dtype.itemsize
