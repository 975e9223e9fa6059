"""FlashAttention for prompt chunks on a CUDA device: numbers beside ours, poisoned memory, the host, the choice.

SPECULATOR_FLASH3 names a third-party build; flash-attn is taken where it is installed. Each is skipped without.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from target.attention.base import Turn
from target.attention.choose import grouped_attention
from target.attention.flash import FlashAttention2, FlashAttention3
from target.attention.prompts import FlashPrompts
from target.cache import LayerShape, PagedCache
from tests.gpu.sync import no_waiting
from tests.unit.test_gqa import Scene, oracle, scene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
needs_flash3 = pytest.mark.skipif(not os.environ.get("SPECULATOR_FLASH3"), reason="no build of FlashAttention-3")
needs_flash2 = pytest.mark.skipif(find_spec("flash_attn") is None, reason="no package flash_attn")
THREE = [pytest.param("3", size, marks=needs_flash3) for size in (64, 16)]
TWO = pytest.param("2", 256, marks=needs_flash2)
LLAMA = dict(heads=32, kv_heads=8, dim=128, page_size=64, dtype=torch.bfloat16, device="cuda")
BOUND = 2e-2  # from float32 attention, and as much from ours; values have unit variance


def chunk(contexts: list[int], counts: list[int], **changes: Any) -> Scene:
    made = scene(contexts, counts, **{**LLAMA, **changes})
    return made._replace(batch=made.batch._replace(static=False))


def served(s: Scene, flash: str) -> FlashPrompts:
    from target.attention.triton import TritonAttention

    kernel = FlashAttention3(s.cache, splits=1) if flash == "3" else FlashAttention2(s.cache)
    return FlashPrompts(TritonAttention(s.cache), kernel)


def run(attention: Any, s: Scene, window: int | None = None) -> Tensor:
    out: Tensor = attention.run(attention.plan(s.batch), 1, s.q, s.k, s.v, window)
    return out


def beside(s: Scene, flash: str, window: int | None = None) -> None:
    """FlashAttention, our kernels and float32 on one scene; unwritten slots hold NaN, and padding gives zeros."""
    attention = served(s, flash)
    expected = oracle(s, window)
    got, ours = run(attention, s, window), run(attention.ours, s, window)
    assert attention.plan(s.batch).prompt is not None
    torch.testing.assert_close(got.float(), expected, rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(got.float(), ours.float(), rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("counts", [[65, 1, 0], [512, 300, 511], [2048, 128, 127]])
@pytest.mark.parametrize("window", [None, 100, 4096])
@pytest.mark.parametrize(("flash", "page_size"), [*THREE, TWO])
def test_chunks_of_ragged_rows(counts: list[int], window: int | None, flash: str, page_size: int) -> None:
    beside(chunk([0, 4096, 700], counts, page_size=page_size), flash, window)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(32, 32, 64), (28, 4, 128), (16, 2, 256), (6, 2, 80), (8, 1, 96)]
)
@pytest.mark.parametrize(("flash", "page_size"), [THREE[0], TWO])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sizes_of_heads(heads: int, kv_heads: int, dim: int, flash: str, page_size: int, dtype: torch.dtype) -> None:
    sizes = dict(heads=heads, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype)
    beside(chunk([90, 1000], [200, 77], **sizes), flash)


@pytest.mark.parametrize(("flash", "page_size"), [THREE[0], TWO])
def test_a_chunk_from_its_qkv_product(flash: str, page_size: int) -> None:
    """Normed, turned and stored by our kernels: the same bits in the cache, and results within bounds."""
    s = chunk([300, 0], [600, 90], page_size=page_size)
    attention, kept = served(s, flash), s.cache.layers[1].clone()
    angle = torch.randn(*s.q.shape[:2], 1, 128, device="cuda")
    weights = [torch.rand(128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    turn = Turn(angle.cos().bfloat16(), angle.sin().bfloat16(), *weights, 1e-6)
    qkv = torch.cat((s.q, s.k, s.v), dim=2)
    ours = attention.ours.run_fused(attention.ours.plan(s.batch), 1, qkv, turn, None)
    stored = s.cache.layers[1].clone()
    s.cache.layers[1].copy_(kept)
    got = attention.run_fused(attention.plan(s.batch), 1, qkv, turn, None)
    torch.testing.assert_close(got, ours, rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(s.cache.layers[1], stored, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("flash", "page_size"), [THREE[0], TWO])
def test_a_chunk_gives_the_same_bits_again_and_nothing_is_read_on_the_host(flash: str, page_size: int) -> None:
    """Replayed prompts are compared with eager ones bit for bit, and attention is eager in both."""
    s = chunk([500, 70], [300, 200], page_size=page_size)
    attention = served(s, flash)
    first = run(attention, s)
    torch.cuda.synchronize()
    with no_waiting():
        again = run(attention, s)
    assert torch.equal(first, again)


@needs_flash3
def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from target.attention.triton import TritonAttention

    monkeypatch.delenv("SPECULATOR_ATTENTION", raising=False)

    def cache(dtype: torch.dtype) -> PagedCache:
        return PagedCache([[LayerShape(2, 128)]], 4, 64, dtype, "cuda")

    chosen = grouped_attention(cache(torch.bfloat16))
    assert isinstance(chosen, FlashPrompts) and isinstance(chosen.flash, FlashAttention3)
    assert isinstance(grouped_attention(cache(torch.bfloat16), "triton"), TritonAttention)
    assert isinstance(grouped_attention(cache(torch.float32)), TritonAttention)
