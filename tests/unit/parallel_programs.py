"""What ranks run in the tests of tensor parallelism. Apart from the tests, because each rank imports it anew."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speculator.sampling import gumbel_of
from target.attention.base import bind
from target.attention.choose import attention_for
from target.batch import Batch, causal_positions
from target.cache import PagedCache
from target.decoder import Decoder
from target.load import load_target
from target.parallel import TENSOR, Mesh, ParallelDecoder
from target.readout import Asked

TAPS = (0, 2, 4)
CHUNKS = ((5, 9, 2, 40, 3, 8, 52), (1, 30, 4), (17,))


def tensor_mesh(size: int) -> Mesh:
    return Mesh.build({TENSOR: size}, "gloo", timedelta(seconds=10))


@torch.inference_mode()
def passes(model: Decoder) -> list[Tensor]:
    """Final states, taps and logits of one row fed in chunks; the chunks joined."""
    cache = PagedCache([model.cache_layers], 6, 4, torch.float32)
    attention, pages, context = attention_for(model.config, cache), torch.tensor([[3, 1, 5, 2]]), 0
    found = []
    for chunk in CHUNKS:
        start, count = torch.tensor([context]), torch.tensor([len(chunk)])
        batch = Batch(torch.tensor([chunk]), causal_positions(start, len(chunk)), start, count, pages)
        hidden = model(batch.tokens, batch.positions, bind(attention, batch._replace(longest=16)), TAPS)
        found.append([hidden.final, *hidden.taps, model.logits(hidden.final)])
        context += len(chunk)
    return [torch.cat(parts, 1) for parts in zip(*found, strict=True)]


def shard_passes(rank: int, folder: str, size: int) -> list[Any]:
    torch.set_num_threads(1)
    model = load_target(Path(folder), torch.float32, axis=tensor_mesh(size).tensor)
    return [[t.tolist() for t in passes(model)], sum(p.numel() for p in model.parameters())]


def question(kind: str) -> Asked:
    """One about three rows over 53 columns."""
    if kind == "greedy":
        return Asked()
    if kind == "best":
        return Asked(best=4, ranked=True)
    keys = torch.tensor([5, -9, 2**40])
    return Asked(best=2, temperature=torch.tensor([0.7, 0.0, 1.3]), keys=keys, ranked=kind == "ranked")


def questions(rank: int, folder: str, size: int, kind: str) -> Any:
    """The answer of ranks about final states [1, 3, H] that all of them have."""
    torch.set_num_threads(1)
    model = load_target(Path(folder), torch.float32, axis=tensor_mesh(size).tensor)
    assert isinstance(model, ParallelDecoder)
    model.noise = gumbel_of
    model.logits = lambda final: 1 / 0  # the whole is never written
    found = model.read(states(model.config.hidden_size), question(kind))
    return None if found is None else [None if part is None else part.tolist() for part in found]


def states(width: int) -> Tensor:
    return torch.randn(1, 3, width, generator=torch.Generator().manual_seed(4))


def grid(rank: int) -> list[Any]:
    mesh = Mesh.build({"pipeline": 2, TENSOR: 2}, "gloo", timedelta(seconds=10))
    mine, stages = torch.tensor([1.0 + rank]), mesh.axes["pipeline"]
    return [
        mesh.tensor.rank,
        stages.rank,
        float(mesh.tensor.sum(mine.clone())),
        stages.gather(mine).flatten().tolist(),
    ]


def wrong_grid(rank: int) -> None:
    tensor_mesh(3)
