"""Batches of MLA over a scattered, poisoned cache, and naive attention to compare with.

Shared by the CPU and GPU tests of MLA. Must never share code with what it is the oracle of.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from target.attention.mla import MlaAttention, MlaPlan
from target.batch import Batch
from target.cache import LayerShape, PagedCache

RANK, ROPE, SCALE = 16, 8, 0.21

SCENES: dict[str, dict[str, Any]] = {
    "one token": dict(contexts=[37], counts=[1]),
    "a chain": dict(contexts=[200], counts=[5]),
    "ragged rows": dict(contexts=[0, 63, 64, 500, 129], counts=[4, 1, 2, 3, 4]),
    "padded rows": dict(contexts=[90, 70, 0, 300, 12], counts=[2, 0, 0, 1, 0]),
    "nothing at all": dict(contexts=[5, 6], counts=[0, 0]),
    "a tree": dict(contexts=[150, 3], counts=[9, 6], tree=True),
    "a level of a tree": dict(contexts=[60, 130], counts=[4, 2], tree=True, offset=31),
    "the sign bit": dict(contexts=[100], counts=[4], tree=True, offset=60),
    "a chain above the context": dict(contexts=[61, 127], counts=[1, 1], offset=3),
    "a part that ends in a split row": dict(contexts=[60, 1500, 300], counts=[2, 2, 2]),
    "large pages": dict(contexts=[100, 20], counts=[2, 2], page_size=64),
    "many heads": dict(contexts=[70], counts=[16], heads=9),
    "a prompt chunk": dict(contexts=[10, 0, 40], counts=[33, 17, 0]),
}


class Scene(NamedTuple):
    """Rows over one cache; everything a pass needs, and all latents by row and index for the oracle."""

    cache: PagedCache
    batch: Batch
    q: Tensor  # [R, T, H, dim]
    latent: Tensor  # [R, T, dim]
    stored: Tensor  # [R, L, dim], the pass's own tokens included; NaN where nothing is stored
    rank: int
    scale: float


def scene(
    contexts: Sequence[int],
    counts: Sequence[int],
    heads: int = 3,
    rank: int = RANK,
    rope: int = ROPE,
    page_size: int = 16,
    offset: int = 0,
    tree: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    room: int = 0,
    seed: int = 0,
    scale: float = SCALE,
    requests: int = 1,
    width: int = 1,
) -> Scene:
    """Random latents in scattered pages; every slot that is not written holds NaN, but for the null page's first.

    There are `requests` rows or more of `width` queries or more; what `contexts` and `counts` do not name is padding.
    A node of a tree sees some of the nodes below it, the holes that earlier levels left in the cache excepted.
    """
    draw, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
    contexts, counts = ([*given, *[0] * (requests - len(given))] for given in (contexts, counts))
    rows, width, dim = len(contexts), max(*counts, width), rank + rope
    longest = max(c + offset + width for c in contexts) + room
    columns = -(-longest // page_size)
    cache = PagedCache([[LayerShape(1, dim, 1)] * 2], rows * columns + 1, page_size, dtype, device)
    order = list(range(1, rows * columns + 1))
    draw.shuffle(order)
    pages = torch.tensor(order, device=device).view(rows, columns)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    stored = torch.full((rows, longest, dim), math.nan, device=device).to(dtype)
    for layer in cache.layers:
        layer[1:] = math.nan
    holes = set(draw.sample(range(offset), offset // 3)) if tree else set()
    for r, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        written = [i for i in range(context + offset) if i - context not in holes] if count else []
        index = torch.tensor(written, dtype=torch.int64, device=device)
        stored[r, index] = noise(len(written), dim)
        slots = pages[r][index // page_size] * page_size + index % page_size
        cache.layers[1].view(-1, dim)[slots] = stored[r, index]
    q, latent = noise(rows, width, heads, dim), noise(rows, width, dim)
    for r, count in enumerate(counts):
        stored[r, contexts[r] + offset : contexts[r] + offset + count] = latent[r, :count]
    context = torch.tensor(contexts, device=device)
    batch = Batch(
        tokens=torch.zeros(rows, width, dtype=torch.int64, device=device),
        positions=context[:, None] + offset + torch.arange(width, device=device),
        context=context,
        counts=torch.tensor(counts, device=device),
        pages=pages,
        ancestors=_masks(draw, rows, width, offset, holes).to(device) if tree else None,
        offset=offset,
        longest=longest,
    )
    return Scene(cache, batch, q, latent, stored, rank, scale)


def _masks(draw: random.Random, rows: int, width: int, offset: int, holes: set[int]) -> Tensor:
    """[R, T] int64 random ancestors, each node's own bit included."""
    written = ~sum(1 << i for i in holes)
    masks = [
        [draw.getrandbits(offset + t + 1) & written | 1 << (offset + t) for t in range(width)] for _ in range(rows)
    ]
    return torch.tensor([[m - (1 << 64) if m >> 63 else m for m in row] for row in masks])


def by_hand(s: Scene) -> Tensor:
    """[R, T, H, rank] float32, row by row in float64; zeros for padding."""
    out = torch.zeros(*s.q.shape[:3], s.rank, dtype=torch.float64, device=s.q.device)
    for r, count in enumerate(s.batch.counts.tolist()):
        context = int(s.batch.context[r])
        for t in range(count):
            own = context + s.batch.offset + t
            index = torch.arange(own + 1)
            if s.batch.ancestors is not None:
                mask = int(s.batch.ancestors[r, t])
                index = torch.tensor(
                    [i for i in range(own + 1) if i < context or i == own or mask >> (i - context) & 1]
                )
            keys = s.stored[r, index.to(s.stored.device)].double()
            out[r, t] = (s.q[r, t].double() @ keys.T * s.scale).softmax(-1) @ keys[:, : s.rank]
    return out.float()


def run(s: Scene, attention: MlaAttention, plan: MlaPlan | None = None) -> Tensor:
    return attention.run(plan or attention.plan(s.batch), 1, s.q, s.latent, s.scale)
