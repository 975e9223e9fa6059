"""FlashAttention behind its adapters, where the kernels are stood in for in torch; and which passes it is given."""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_gqa import SCENES, Scene, close, interpreted, on_the_interpreter, oracle, scene  # noqa: F401
from torch import Tensor

from speculator.passes import EagerPasses
from target.attention import choose
from target.attention.base import Turn, bind, fused_form
from target.attention.flash import FlashAttention2, FlashAttention3
from target.attention.prompts import FlashPrompts, is_prompt
from target.attention.sdpa import SdpaAttention
from target.batch import Batch, causal_positions
from target.cache import LayerShape, PagedCache
from target.errors import PlanError
from tests.unit.engines import VOCAB, tiny_engine, tiny_target
from tests.unit.test_recorded import CHAIN, record

CHAINS = [name for name, made in SCENES.items() if not made.get("tree") and made.get("dim", 16) % 8 == 0]
CHUNKS = dict(contexts=[10, 0, 40, 300], counts=[90, 17, 0, 65], dtype=torch.float16)


def attention_of(
    q: Tensor, keys: Tensor, values: Tensor, stored: Tensor, table: Tensor, window: tuple[int, int], counts: Tensor
) -> Tensor:
    """What FlashAttention promises: the last of a row's queries sees the last of its tokens; the rest is untouched."""
    assert table.dtype == stored.dtype == counts.dtype == torch.int32 and table.stride(1) == 1 and q.is_contiguous()
    out, groups = torch.full_like(q, torch.nan), q.shape[2] // keys.shape[2]
    for r, count in enumerate(counts.tolist()):
        length = int(stored[r])
        rows = [part[table[r].long()].flatten(0, 1)[:length].float() for part in (keys, values)]
        key, value = (part.repeat_interleave(groups, 1) for part in rows)
        for t in range(count):
            own = length - count + t
            seen = slice(0 if window[0] < 0 else max(0, own - window[0]), max(0, own + 1))
            if own >= 0:
                weights = (torch.einsum("hd,lhd->hl", q[r, t].float(), key[seen]) * q.shape[3] ** -0.5).softmax(-1)
                out[r, t] = torch.einsum("hl,lhd->hd", weights, value[seen]).to(q.dtype)
    return out


def flash3(*given: Any) -> None:
    """Rows without starts are joined as if all were the first, which the real kernel does too."""
    q, keys, values, out, starts, counts, stored = (given[i] for i in (0, 1, 2, 6, 7, 10, 11))
    queries, longest, table, scale, causal, window = given[12], given[13], given[14], given[23], given[24], given[25:27]
    assert starts.dtype == torch.int32 and starts.tolist() == [row * queries for row in range(len(counts) + 1)]
    q, out = (part.view(-1, queries, *part.shape[1:]) for part in (q, out))
    assert (scale, causal) == (q.shape[3] ** -0.5, True) and longest >= int(stored.max())
    result = attention_of(q, keys, values, stored, table, window, counts)
    inside = torch.arange(queries) < counts[:, None]
    out[inside] = result[inside]


def flash2(
    q: Tensor, keys: Tensor, values: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, softmax_scale: float,
    causal: bool, window_size: tuple[int, int], num_splits: int,
) -> Tensor:  # fmt: skip
    assert keys.shape[1] % 256 == 0 and causal and softmax_scale == q.shape[3] ** -0.5 and num_splits == 1
    every = torch.full_like(cache_seqlens, q.shape[1])
    return attention_of(q, keys, values, cache_seqlens, block_table, window_size, every)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are here."""
    named_build(monkeypatch)
    package(monkeypatch, flash_attn_with_kvcache=flash2)


def named_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATOR_FLASH3", "somewhere")
    monkeypatch.setattr("target.attention.flash.load_build", lambda place, pattern: None)
    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", SimpleNamespace(fwd=flash3), raising=False)


def package(monkeypatch: pytest.MonkeyPatch, **members: object) -> None:
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, "flash_attn", module)


class TorchKernels:
    """Stands in for our kernels: the same seam, by SDPA; remembers which calls attended."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache, self.sdpa, self.attended = cache, SdpaAttention(cache), 0

    def plan(self, batch: Batch) -> Batch:
        return batch

    def store(self, plan: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        slots = plan.slots(self.cache.page_size, self.cache.pad_slot).flatten()
        self.cache.layers[layer].index_copy_(0, slots, torch.stack((k, v), dim=2).flatten(0, 1))

    def run(self, plan: Batch, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        self.attended += 1
        return self.sdpa.run(self.sdpa.plan(plan), layer, q, k, v, window)

    def turn_and_store(self, plan: Batch, layer: int, qkv: Tensor, turn: Turn) -> Tensor:
        kv_heads = self.cache.layers[layer].shape[2]
        q, k, v = qkv.split((qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
        self.store(plan, layer, q, k, v)
        return q


def served(s: Scene, kind: Any) -> tuple[FlashPrompts, TorchKernels]:
    ours = TorchKernels(s.cache)
    return FlashPrompts(ours, kind(s.cache)), ours  # type: ignore[arg-type]


def eager(s: Scene) -> Scene:
    return s._replace(batch=s.batch._replace(static=False))


# ---- the adapters ----


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("kind", "page_size"), [(FlashAttention3, 16), (FlashAttention2, 256)])
def test_rows_of_any_counts_see_what_they_should(
    builds: None, name: str, window: int | None, kind: Any, page_size: int
) -> None:
    s = scene(**{**SCENES[name], "page_size": page_size, "dim": 16, "dtype": torch.float16})
    expected = oracle(s, window)
    TorchKernels(s.cache).store(s.batch, 1, s.q, s.k, s.v)
    flash = kind(s.cache)
    close(flash.attend(flash.prepare(s.batch), 1, s.q, window), expected)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (FlashAttention3, dict(dtype=torch.float32), "FlashAttention-3 computes in 16 bits, not in torch.float32"),
        (FlashAttention3, dict(dim=20), "FlashAttention-3 takes heads of a multiple of 8 up to 256, not of 20"),
        (FlashAttention3, dict(dim=264), "takes heads of a multiple of 8 up to 256, not of 264"),
        (FlashAttention3, dict(page_size=128), "FlashAttention-3 reads pages of at most 64 tokens here, not of 128"),
        (FlashAttention2, dict(page_size=64), "flash-attn reads pages of a multiple of 256 tokens, not of 64"),
        (FlashAttention2, dict(page_size=256, dtype=torch.float32), "flash-attn computes in 16 bits"),
    ],
)
def test_a_cache_that_cannot_be_read_is_refused(builds: None, kind: Any, changes: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        kind(scene([9], [1], **{"dtype": torch.float16, **changes}).cache)


def test_a_cache_of_latents_is_refused(builds: None) -> None:
    cache = PagedCache([[LayerShape(1, 24, 1)]], 4, 16, torch.float16)
    with pytest.raises(PlanError, match="FlashAttention-3 reads keys and values, and the cache has none"):
        FlashAttention3(cache)


@pytest.mark.parametrize(("kind", "page_size"), [(FlashAttention3, 16), (FlashAttention2, 256)])
def test_trees_are_refused(builds: None, kind: Any, page_size: int) -> None:
    s = scene([9], [3], tree=True, page_size=page_size, dtype=torch.float16)
    with pytest.raises(PlanError, match="has no tree mask: verify chains, or use another backend"):
        kind(s.cache).prepare(s.batch)


def test_a_build_that_nobody_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECULATOR_FLASH3", raising=False)
    with pytest.raises(PlanError, match="needs a build named by SPECULATOR_FLASH3"):
        FlashAttention3(scene([9], [1], dtype=torch.float16).cache)


# ---- which passes it is given ----


@pytest.mark.parametrize(("kind", "page_size"), [(FlashAttention3, 64), (FlashAttention2, 256)])
def test_prompt_chunks_are_given_to_it(builds: None, kind: Any, page_size: int) -> None:
    s = eager(scene(**CHUNKS, page_size=page_size))
    expected = oracle(s, None)
    attention, ours = served(s, kind)
    close(attention.run(attention.plan(s.batch), 1, s.q, s.k, s.v, None), expected)
    assert ours.attended == 0


def test_prompt_chunks_in_fused_form(builds: None) -> None:
    s = eager(scene(**CHUNKS))
    expected = oracle(s, 40)
    attention, ours = served(s, FlashAttention3)
    fused = fused_form(bind(attention, s.batch))
    assert fused is not None
    cos = torch.ones(*s.q.shape[:2], 1, 16)
    close(fused(1, torch.cat((s.q, s.k, s.v), dim=2), Turn(cos, torch.zeros_like(cos)), 40), expected)
    assert ours.attended == 0


@pytest.mark.parametrize("changes", [dict(counts=[64, 3]), dict(counts=[64, 3], tree=True), dict(static=True)])
def test_rounds_trees_and_recorded_passes_stay_with_our_kernels(builds: None, changes: dict[str, Any]) -> None:
    static = changes.pop("static", False)
    s = scene(**{"contexts": [10, 20], "counts": [90, 17], "dtype": torch.float16, **changes})
    s = s if static else eager(s)
    expected = oracle(s, None)
    attention, ours = served(s, FlashAttention3)
    plan = attention.plan(s.batch)
    got = attention.run(plan, 1, s.q, s.k, s.v, None)
    valid = torch.arange(got.shape[1]) < s.batch.counts[:, None]
    close(got.masked_fill(~valid[..., None, None], 0), expected)
    assert plan.prompt is None and ours.attended == 1 and not is_prompt(s.batch)


class TorchPrompts:
    """Stands in for FlashAttention in full precision."""

    name = "torch"

    def __init__(self, cache: PagedCache) -> None:
        self.cache, self.prepared, self.attended = cache, 0, 0

    def prepare(self, batch: Batch) -> Batch:
        self.prepared += 1
        return batch

    def attend(self, state: Batch, layer: int, q: Tensor, window: int | None) -> Tensor:
        self.attended += 1
        keys, values = self.cache.layers[layer].unflatten(0, (-1, self.cache.page_size)).unbind(2)
        stored, table = (state.context + state.counts).int(), state.pages.int()
        left = (-1, -1) if window is None else (window - 1, 0)
        return attention_of(q.contiguous(), keys, values, stored, table, left, state.counts.int()).nan_to_num(0)


def test_prompts_recorded_in_segments_attend_by_it_between_them() -> None:
    """Two rows of a chunk whose counts differ, planned once; what was recorded for the warm-up has no part in it."""
    target = tiny_target()
    engine, plain = tiny_engine(target, None), tiny_engine(target, None)
    assert isinstance(engine.passes, EagerPasses) and isinstance(plain.passes, EagerPasses)
    cache = engine.cache
    flash, ours = TorchPrompts(cache), TorchKernels(cache)
    engine.passes.attention = FlashPrompts(ours, flash)  # type: ignore[arg-type]
    passes = record(engine, CHAIN, rows=1, prompt_tokens=256)
    assert (flash.prepared, flash.attended) == (0, 0)
    before = ours.attended
    tokens = torch.randint(VOCAB, (2, 80), generator=torch.Generator().manual_seed(0))
    context, counts = torch.tensor([0, 0]), torch.tensor([80, 71])
    pages = torch.arange(1, 1 + 2 * passes.sizes.pages).view(2, -1)
    batch = Batch(tokens, causal_positions(context, 80), context, counts, pages, longest=80)
    with torch.inference_mode():
        fed, expected = passes.feed(batch), plain.passes.feed(batch)
    for row, count in enumerate(counts.tolist()):
        torch.testing.assert_close(fed.final[row, :count], expected.final[row, :count], rtol=1e-4, atol=1e-4)
    layers = passes.eager.model.config.num_layers
    assert (flash.prepared, flash.attended, ours.attended) == (1, layers, before)
    assert passes.counts["prompt"].replayed == 1


@on_the_interpreter
def test_chunks_turned_and_stored_by_the_real_kernels(builds: None) -> None:
    """Fused or not, what FlashAttention reads is what our kernels would have read."""
    from target.attention.triton import TritonAttention

    s = eager(scene(**CHUNKS))
    angle = torch.randn(*s.q.shape[:2], 1, 16)
    turn, qkv = Turn(angle.cos(), angle.sin()), torch.cat((s.q, s.k, s.v), dim=2)
    kept = s.cache.layers[1].clone()
    ours = TritonAttention(s.cache)
    attention = FlashPrompts(ours, FlashAttention3(s.cache))
    expected = ours.run_fused(ours.plan(s.batch), 1, qkv, turn, None)
    stored = s.cache.layers[1].clone()
    s.cache.layers[1].copy_(kept)
    close(attention.run_fused(attention.plan(s.batch), 1, qkv, turn, None), expected.float())
    torch.testing.assert_close(s.cache.layers[1], stored, rtol=0, atol=0, equal_nan=True)
    s.cache.layers[1].copy_(kept)
    plain = ours.run(ours.plan(s.batch), 1, s.q, s.k, s.v, 40)
    s.cache.layers[1].copy_(kept)
    close(attention.run(attention.plan(s.batch), 1, s.q, s.k, s.v, 40), plain.float())


# ---- the choice ----


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Nothing is here, and what is said is heard."""
    monkeypatch.delenv("SPECULATOR_FLASH3", raising=False)
    monkeypatch.setattr(choose, "find_spec", lambda name: sys.modules.get(name))
    choose._say.cache_clear()
    caplog.set_level(logging.INFO, logger=choose.__name__)
    return caplog


def choice(page_size: int = 16, dtype: torch.dtype = torch.float16) -> Any:
    return choose._with_flash(TorchKernels(PagedCache([[LayerShape(2, 16)]], 4, page_size, dtype)))  # type: ignore[arg-type]


def test_without_a_build_our_kernels_take_all(told: pytest.LogCaptureFixture) -> None:
    assert isinstance(choice(), TorchKernels) and isinstance(choice(), TorchKernels)
    assert told.messages == ["prompt chunks attend by our kernels: no build of FlashAttention is here"]
    assert told.records[0].levelno == logging.INFO


def test_a_named_build_comes_first(told: pytest.LogCaptureFixture, builds: None) -> None:
    chosen = choice(64)
    assert isinstance(chosen, FlashPrompts) and isinstance(chosen.flash, FlashAttention3) and chosen.flash.splits == 1
    assert told.messages == ["prompt chunks attend by FlashAttention-3, rounds by our kernels"]


def test_pages_that_it_cannot_read_are_left_to_the_package_or_to_ours(
    told: pytest.LogCaptureFixture, builds: None
) -> None:
    chosen = choice(256)
    assert isinstance(chosen, FlashPrompts) and isinstance(chosen.flash, FlashAttention2)
    assert isinstance(choice(128), TorchKernels)
    assert told.messages[1].startswith(
        "prompt chunks attend by our kernels: FlashAttention-3 reads pages of at most 64 tokens here, not of 128; flash"
    )


def test_the_package_where_no_build_is_named(
    told: pytest.LogCaptureFixture, builds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECULATOR_FLASH3")
    chosen = choice(256)
    assert isinstance(chosen, FlashPrompts) and isinstance(chosen.flash, FlashAttention2)
    assert told.messages == ["prompt chunks attend by flash-attn, rounds by our kernels"]


def test_what_cannot_serve_is_told(told: pytest.LogCaptureFixture, builds: None) -> None:
    assert isinstance(choice(64, torch.float32), TorchKernels)
    assert told.messages == [
        "prompt chunks attend by our kernels: FlashAttention-3 computes in 16 bits, not in torch.float32; "
        "flash-attn computes in 16 bits, not in torch.float32"
    ]
    assert told.records[0].levelno == logging.WARNING


def test_a_build_that_is_not_there_and_a_package_without_the_function(
    told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECULATOR_FLASH3", str(tmp_path))
    package(monkeypatch)
    assert isinstance(choice(64), TorchKernels) and isinstance(choice(256), TorchKernels)
    assert "neither a library nor a folder with a _vllm_fa3_C*.so; flash-attn reads pages" in told.messages[0]
    assert "of at most 64 tokens here, not of 256; the package flash_attn cannot be used" in told.messages[1]


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 6))
    layer = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(64, 2, 2, 64))
    with pytest.raises(PlanError, match=r"FlashAttention-3 runs on compute capability 9.0 to 9.9, not on 8.6"):
        FlashAttention3(SimpleNamespace(layers=[layer], page_size=16))  # type: ignore[arg-type]
