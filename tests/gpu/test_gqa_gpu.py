"""Grouped-query attention in Triton on a CUDA device: numbers, poisoned memory, bits of a row, recorded passes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from graphs.recorder import CudaRecorder
from target.attention.choose import grouped_attention
from target.attention.sdpa import SdpaAttention
from target.batch import Batch
from target.cache import LayerShape, PagedCache
from tests.gpu.sync import no_waiting
from tests.unit.test_gqa import SCENES, WINDOWS, Scene, close, oracle, run, scene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
LLAMA = dict(heads=32, kv_heads=8, dim=128, page_size=64, dtype=torch.bfloat16, device="cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TWO = [torch.float32, torch.bfloat16]  # every shape is compiled for every type


@pytest.fixture(autouse=True, scope="module")
def full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


# ---- numbers ----


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", TWO)
def test_every_scene(name: str, window: int | None, dtype: torch.dtype) -> None:
    s = scene(**SCENES[name], dtype=dtype, device="cuda")
    expected = oracle(s, window)
    close(run(s, window), expected)


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("page_size", [2, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_heads_and_pages(dim: int, page_size: int, dtype: torch.dtype) -> None:
    for tree in (False, True):
        s = scene([700, 0, 63, 64, 90], [8, 1, 0, 5, 8], dim=dim, page_size=page_size, dtype=dtype, device="cuda",
                  heads=6, kv_heads=2, tree=tree)  # fmt: skip
        expected = oracle(s, None)
        close(run(s), expected)


@pytest.mark.parametrize("queries", [1, 2, 4, 5, 8, 16, 33, 64, 300])
@pytest.mark.parametrize("length", [0, 500, 4096, 20_000])
@pytest.mark.parametrize("page_size", [16, 64])
def test_the_shape_of_a_large_model(queries: int, length: int, page_size: int) -> None:
    draw = random.Random(queries)
    counts = [queries, draw.randint(1, queries), 0]
    for tree in (False, True) if queries <= 64 else (False,):
        s = scene([length, length // 3, 7], counts, **{**LLAMA, "page_size": page_size}, tree=tree)
        expected = oracle(s, None)
        close(run(s), expected)


@pytest.mark.parametrize("queries", [1, 8, 64, 600])
@pytest.mark.parametrize("window", [100, 4096])
def test_windows_over_long_rows(queries: int, window: int) -> None:
    for tree in (False, True) if queries <= 64 else (False,):
        s = scene([9000, 50, 4090], [queries, queries, 1], **LLAMA, tree=tree)
        expected = oracle(s, window)
        close(run(s, window), expected)


@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (40, 8), (8, 1), (32, 32), (3, 1), (64, 8)])
@pytest.mark.parametrize("queries", [1, 7])
def test_groups_of_many_sizes(heads: int, kv_heads: int, queries: int) -> None:
    s = scene([1000, 130], [queries, 1], **{**LLAMA, "heads": heads, "kv_heads": kv_heads})
    expected = oracle(s, None)
    close(run(s), expected)


@pytest.mark.parametrize("changes", [dict(tma=False), dict(splits=1), dict(splits=32, shortest=1), dict(stages=1)])
@pytest.mark.parametrize("queries", [1, 8, 64])
def test_other_configurations(changes: dict[str, Any], queries: int) -> None:
    s = scene([3000, 64], [queries, 1], **LLAMA)
    expected = oracle(s, None)
    close(run(s, **changes), expected)


# ---- what must not matter ----


@pytest.mark.parametrize("queries", [1, 8, 64])
@pytest.mark.parametrize(("tree", "window"), [(False, None), (True, None), (False, 300), (True, 300)])
@pytest.mark.parametrize("dtype", TWO)
def test_a_row_has_the_same_bits_whoever_else_is_there(
    queries: int, tree: bool, window: int | None, dtype: torch.dtype
) -> None:
    contexts = [5000, 3, 700, 64, 127, 1800]
    s = scene(contexts, [queries] * 6, **{**LLAMA, "dtype": dtype}, tree=tree, room=9000)
    together = run(s, window)
    for r in range(6):
        one, b = slice(r, r + 1), s.batch
        masks = b.ancestors[one] if b.ancestors is not None else None
        alone = Batch(
            b.tokens[one], b.positions[one], b.context[one], b.counts[one], b.pages[one], masks,
            longest=contexts[r] + queries, static=True,
        )  # fmt: skip
        assert torch.equal(run(Scene(s.cache, alone, s.q[one], s.k[one], s.v[one]), window)[0], together[r])


@pytest.mark.parametrize("queries", [1, 8, 33, 64])
@pytest.mark.parametrize(("tree", "window"), [(False, None), (True, None), (False, 300), (True, 300)])
@pytest.mark.parametrize("dtype", TWO)
def test_the_same_bits_whichever_program_takes_a_split(
    queries: int, tree: bool, window: int | None, dtype: torch.dtype
) -> None:
    """Spans of 1, 2, 3, 4, 8 and 16 splits, joined in registers, by the last program and by a kernel of its own."""
    s = scene([5000, 3, 700, 64, 0], [queries, queries, 1, queries, 0], **{**LLAMA, "dtype": dtype}, tree=tree)
    apart = run(s, window, splits=16, shortest=1, parts=64, joined=0)
    close(apart, oracle(s, window))
    for parts in (64, 8, 6, 4, 2, 1):
        for more in (dict(joined=0), dict(joined=2, run=1 << 20), dict(joined=2, run=1024)):
            assert torch.equal(run(s, window, splits=16, shortest=1, parts=parts, **more), apart), (parts, more)


@pytest.mark.parametrize("queries", [1, 8, 33, 64])
def test_a_full_device_and_a_lone_row_give_the_same_bits(queries: int) -> None:
    """As many rows as leave each a single program, beside one of them with a program for every split."""
    contexts = [700, 20, 1500, 64] * 16
    s = scene(contexts, [queries] * 64, **LLAMA)
    together = run(s)
    for r in (0, 1, 2, 63):
        one, b = slice(r, r + 1), s.batch
        alone = Batch(
            b.tokens[one], b.positions[one], b.context[one], b.counts[one], b.pages[one],
            longest=contexts[r] + queries, static=True,
        )  # fmt: skip
        assert torch.equal(run(Scene(s.cache, alone, s.q[one], s.k[one], s.v[one]))[0], together[r])


def test_what_lies_below_every_window_is_not_read() -> None:
    s = scene([3000, 170], [3, 2], **LLAMA)
    expected = run(s, 100)
    for r, context in enumerate((3000, 170)):
        index = torch.arange(context - 99, device="cuda")
        s.cache.layers[1][s.batch.pages[r][index // 64] * 64 + index % 64] = math.nan
    assert torch.equal(run(s, 100), expected) and expected.isfinite().all()


def test_the_choice_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from target.attention.triton import TritonAttention

    for name in ("SPECULATOR_ATTENTION", "SPECULATOR_FLASH3"):
        monkeypatch.delenv(name, raising=False)
    cache = PagedCache([[LayerShape(1, 80, 1)], [LayerShape(2, 64)]], 4, 16, torch.bfloat16, "cuda")
    assert isinstance(grouped_attention(cache), TritonAttention)  # a head over the cache of a target with latents
    assert isinstance(grouped_attention(cache, "torch"), SdpaAttention)
    wide = PagedCache([[LayerShape(2, 512)]], 4, 16, torch.bfloat16, "cuda")
    assert isinstance(grouped_attention(wide), SdpaAttention)


def test_nothing_is_read_on_the_host() -> None:
    s = scene([500, 70], [2, 1], **LLAMA, tree=True)
    run(s, 100)
    torch.cuda.synchronize()
    with no_waiting():
        run(s, 100)


# ---- recorded passes ----


@pytest.fixture
def recorder() -> Iterator[CudaRecorder]:
    recorder = CudaRecorder()
    yield recorder
    recorder.close()


@pytest.mark.parametrize(("tree", "window"), [(False, None), (True, None), (False, 100), (True, 100)])
@pytest.mark.parametrize("queries", [1, 8])
def test_a_pass_recorded_short_is_replayed_long(
    recorder: CudaRecorder, queries: int, tree: bool, window: int | None
) -> None:
    """Across the borders of blocks, pages and splits; rows come and go; the plan is the one that was recorded."""
    from target.attention.triton import TritonAttention

    s = scene([6000] * 3, [queries] * 3, **LLAMA, tree=tree)
    attention, kept = TritonAttention(s.cache), s.cache.layers[1].clone()
    straight = s.batch.positions - s.batch.context[:, None]

    def lengths(contexts: list[int], counts: list[int]) -> None:
        s.batch.context.copy_(torch.tensor(contexts))
        s.batch.counts.copy_(torch.tensor(counts))
        s.batch.positions.copy_(s.batch.context[:, None] + straight)
        s.cache.layers[1].copy_(kept)

    def attend(plan: Batch) -> Tensor:
        return attention.run(plan, 1, s.q, s.k, s.v, window)

    lengths([5, 9, 1], [queries] * 3)
    plan = attention.plan(s.batch)
    recorder.warm(lambda: attend(plan))
    lengths([5, 9, 1], [queries] * 3)
    out, recording = recorder.record(lambda: attend(plan))
    for contexts, counts in (
        ([63, 64, 0], [queries, 1, 0]),
        ([6000, 127, 2000], [1, queries, queries]),
        ([255, 0, 4096], [queries, queries, 1]),
        ([5, 9, 1], [queries] * 3),
    ):
        lengths(contexts, counts)
        recording.replay()
        replayed = out.clone()
        expected = oracle(s, window)
        close(replayed, expected)
        lengths(contexts, counts)
        assert torch.equal(replayed, attend(attention.plan(s.batch)))
