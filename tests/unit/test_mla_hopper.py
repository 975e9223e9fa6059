"""The MLA kernels for Hopper on threads: numbers, barriers and who may overwrite what, without a device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from target.attention.splits import aligned, empty_splits, fill_splits, lengths
from tests.unit.gluon_threads import Descriptor, Language, Pointer, on_threads
from tests.unit.mla_scenes import SCENES, Scene, by_hand, scene

RANK, ROPE, ROWS, BLOCK = 128, 64, 64, 64
SIZES = dict(rank=RANK, rope=ROPE, scale=0.08)
NAMES = {"hopper": RANK, "seesaw": RANK // 2}  # columns of the blocks that are copied


@pytest.fixture(scope="module")
def threads() -> Iterator[tuple[Language, dict[str, ModuleType]]]:
    random.seed(0)
    with on_threads() as found:
        yield found


def attend(threads: tuple[Language, dict[str, ModuleType]], name: str, s: Scene, processors: int) -> Tensor:
    """[R, T, H, rank]: every program of the pass one after the other, then what the parts found, joined."""
    language, modules = threads
    requests, queries, heads, _ = s.q.shape
    pairs, tiles = queries * heads, -(-queries * heads // ROWS)
    plan = empty_splits(requests, aligned(max(processors // tiles, 1), requests), s.q.device)
    fill_splits(plan, lengths(s.batch))
    parts = plan.plan.shape[0]
    found = [torch.full((n, pairs, RANK), torch.nan) for n in (requests, requests + parts)]
    lse = torch.full((requests + parts, pairs), torch.nan)
    kernel: Any = modules[f"target.kernels.mla_{name}"].decode_kernel
    inputs, tree = _arguments(s, name), s.batch.ancestors is not None
    constants = dict(QUERIES=queries, HEADS=heads, PAGE=s.cache.page_size, TREE=tree, CHAINED=False)
    for part in range(parts):
        for tile in range(tiles):
            language.place = (tile, part)
            kernel(
                *inputs, *map(Pointer, (plan.plan, plan.splits, *found, lse)), s.scale * 1.4426950408889634,
                s.batch.offset, requests, parts, s.batch.pages.shape[1], **constants,
            )  # fmt: skip
    return _joined(*found, lse, plan.splits.tolist()).view(requests, queries, heads, RANK)


def _arguments(s: Scene, name: str) -> list[Any]:
    """Descriptors of queries and latents, with the pass's own stored, and the batch."""
    latents = s.cache.layers[1].flatten(1)
    latents.index_copy_(0, s.batch.slots(s.cache.page_size, s.cache.pad_slot).flatten(), s.latent.flatten(0, 1))
    queries = s.q.view(-1, RANK + ROPE)
    matrices = ((queries, ROWS), (latents, BLOCK))
    descriptors = [Descriptor(of, rows, wide) for of, rows in matrices for wide in (NAMES[name], ROPE)]
    masks = s.batch.context if s.batch.ancestors is None else s.batch.ancestors
    return [*descriptors, *map(Pointer, (s.batch.pages, s.batch.context, s.batch.counts, masks))]


def _joined(out: Tensor, partial: Tensor, lse: Tensor, splits: list[int]) -> Tensor:
    for request, (begin, end) in enumerate(zip(splits, splits[1:], strict=False)):
        if end - begin == 1:
            continue
        seen = lse[begin:end, :, None] > -torch.inf
        weights = torch.where(seen, lse[begin:end, :, None].exp2(), 0.0)
        total = torch.where(seen, partial[begin:end] * weights, 0.0).sum(0)
        out[request] = total / weights.sum(0).clamp(min=1e-30)
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [case for case in SCENES if case != "a prompt chunk"])
@pytest.mark.parametrize("processors", [1, 5])
def test_the_kernels_for_hopper_compute_attention(threads: Any, name: str, case: str, processors: int) -> None:
    page_size = 128 if case == "large pages" else 64
    s = scene(**{**SCENES[case], **SIZES, "page_size": page_size})  # type: ignore[arg-type]
    torch.testing.assert_close(attend(threads, name, s, processors), by_hand(s).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("processors", [2, 9])
def test_requests_of_odd_and_even_lengths_follow_each_other(threads: Any, name: str, processors: int) -> None:
    """Buffers, queries and barriers go from request to request with every parity of blocks."""
    s = scene([700, 63, 64, 0, 130, 250, 2], [8, 1, 3, 0, 8, 5, 1], heads=10, page_size=64, **SIZES)  # type: ignore[arg-type]
    torch.testing.assert_close(attend(threads, name, s, processors), by_hand(s).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_warpgroup_runs_ahead_through_requests_of_one_block(threads: Any, name: str) -> None:
    """Nothing but barriers keeps the one that has no block of its own from missing a phase."""
    s = scene([20] * 30, [1] * 30, page_size=64, **SIZES)  # type: ignore[arg-type]
    torch.testing.assert_close(attend(threads, name, s, 1), by_hand(s).float(), rtol=1e-4, atol=1e-5)
