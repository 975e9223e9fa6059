"""Grouped-query attention in Triton beside the SDPA oracle, on the interpreter; and which backend is chosen where."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from target.attention.choose import attention_for, grouped_attention
from target.attention.mla import MlaAttention, TorchSplits
from target.attention.sdpa import SdpaAttention
from target.batch import Batch
from target.cache import LayerShape, PagedCache
from target.config import parse_config
from target.errors import PlanError

SCENES: dict[str, dict[str, Any]] = {
    "one token": dict(contexts=[37], counts=[1]),
    "the first token": dict(contexts=[0], counts=[1]),
    "a chain": dict(contexts=[200], counts=[5]),
    "ragged rows": dict(contexts=[0, 63, 64, 300, 129], counts=[4, 1, 2, 3, 4]),
    "padded rows": dict(contexts=[90, 70, 0, 150, 12], counts=[2, 0, 0, 1, 0]),
    "nothing at all": dict(contexts=[5, 6], counts=[0, 0]),
    "many splits": dict(contexts=[1400, 255, 256], counts=[2, 1, 2]),
    "a chain above the context": dict(contexts=[61, 127], counts=[1, 1], offset=3),
    "three heads a group": dict(contexts=[70, 300], counts=[7, 3], heads=3, kv_heads=1),
    "seven heads a group": dict(contexts=[70, 140], counts=[4, 1], heads=14, kv_heads=2),
    "one head a group": dict(contexts=[130], counts=[3], heads=2, kv_heads=2),
    "odd sizes": dict(contexts=[75, 9], counts=[3, 2], dim=24, page_size=3),
    "pages of two": dict(contexts=[75, 9], counts=[3, 2], page_size=2),
    "pages of blocks": dict(contexts=[200, 64, 63], counts=[3, 1, 2], page_size=128),
    "a tree": dict(contexts=[150, 3], counts=[9, 6], tree=True),
    "a large tree": dict(contexts=[100, 0], counts=[64, 30], tree=True),
    "a level of a tree": dict(contexts=[60, 130], counts=[4, 2], tree=True, offset=31),
    "the sign bit": dict(contexts=[100], counts=[4], tree=True, offset=60),
    "a level above all bits": dict(contexts=[100, 7], counts=[4, 1], tree=True, offset=70),
    "a prompt chunk": dict(contexts=[10, 0, 40], counts=[90, 17, 0]),
    "a long chunk of wide groups": dict(contexts=[100], counts=[70], heads=8, kv_heads=2),
}
WINDOWS = (None, 1, 3, 40, 100)


class Scene(NamedTuple):
    """Rows over one cache whose layer 1 is attended to; everything a pass needs."""

    cache: PagedCache
    batch: Batch
    q: Tensor  # [R, T, heads, dim]
    k: Tensor  # [R, T, kv_heads, dim]
    v: Tensor


def scene(
    contexts: Sequence[int],
    counts: Sequence[int],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    page_size: int = 16,
    offset: int = 0,
    tree: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    room: int = 0,
    seed: int = 0,
) -> Scene:
    """Random keys and values in scattered pages; every slot that is not written holds NaN, but for the first.

    Nodes of a tree hang below random earlier ones; earlier levels left holes, which no later node's path goes through.
    """
    draw, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
    rows, width = len(contexts), max(max(counts), 1)
    longest = max(c + offset + width for c in contexts) + room
    columns = -(-longest // page_size)
    cache = PagedCache([[LayerShape(kv_heads, dim)] * 2], rows * columns + 1, page_size, dtype, device)
    order = list(range(1, rows * columns + 1))
    draw.shuffle(order)
    pages = torch.tensor(order, device=device).view(rows, columns)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    for layer in cache.layers:
        layer[1:] = math.nan
    holes = set(draw.sample(range(offset), offset // 3)) if tree else set()
    for r, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        written = [i for i in range(context + offset) if i - context not in holes] if count else []
        index = torch.tensor(written, dtype=torch.int64, device=device)
        slots = pages[r][index // page_size] * page_size + index % page_size
        cache.layers[1][slots] = noise(len(written), 2, kv_heads, dim)
    context = torch.tensor(contexts, device=device)
    masks, depths = _trees(draw, rows, width, offset, holes)
    straight = offset + torch.arange(width).expand(rows, -1)
    batch = Batch(
        tokens=torch.zeros(rows, width, dtype=torch.int64, device=device),
        positions=context[:, None] + (depths if tree else straight).to(device),
        context=context,
        counts=torch.tensor(counts, device=device),
        pages=pages,
        ancestors=masks.to(device) if tree else None,
        offset=offset,
        longest=longest,
        static=True,
    )
    return Scene(
        cache, batch, noise(rows, width, heads, dim), noise(rows, width, kv_heads, dim),
        noise(rows, width, kv_heads, dim),
    )  # fmt: skip


def _trees(draw: random.Random, rows: int, width: int, offset: int, holes: set[int]) -> tuple[Tensor, Tensor]:
    """[R, T] int64 masks, a node's own bit set or not, not contiguous; and depths. Bits above 63 do not exist."""
    masks, depths = torch.zeros(width, rows, dtype=torch.int64).T, torch.zeros(rows, width, dtype=torch.int64)
    for r in range(rows):
        paths: list[list[int]] = []
        for node in range(offset + width):
            above = [] if node in holes else draw.choice([[], *(p for p in paths if p)])
            paths.append([] if node in holes else [*above, node])
        for t, path in enumerate(paths[offset:]):
            value = sum(1 << i for i in path[: None if draw.random() < 0.5 else -1] if i < 64)
            masks[r, t], depths[r, t] = value - (1 << 64) if value >> 63 else value, len(path) - 1
    return masks, depths


def oracle(s: Scene, window: int | None) -> Tensor:
    """[R, T, heads, dim] float32 by SDPA over a float32 copy of the cache; zeros for padding."""
    shape = s.cache.layers[1].shape
    cache = PagedCache(
        [[LayerShape(*shape[2:])] * 2], s.cache.pages, s.cache.page_size, torch.float32, s.q.device
    )  # fmt: skip
    cache.layers[1].copy_(s.cache.layers[1])
    attention = SdpaAttention(cache)
    out = attention.run(attention.plan(s.batch), 1, s.q.float(), s.k.float(), s.v.float(), window)
    valid = torch.arange(s.q.shape[1], device=s.q.device) < s.batch.counts[:, None]
    return out.masked_fill(~valid[..., None, None], 0)


def run(s: Scene, window: int | None = None, **changes: Any) -> Tensor:
    """By the Triton backend; `changes` of its configuration."""
    from target.attention.triton import TritonAttention
    from target.kernels.gqa import pick

    shape = s.q.shape[1], s.q.shape[2], s.k.shape[2], s.q.shape[3]
    config = pick(*shape, s.q.dtype, s.q.device)._replace(**changes) if changes else None
    attention = TritonAttention(s.cache, config)
    return attention.run(attention.plan(s.batch), 1, s.q, s.k, s.v, window)


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-3}.get(got.dtype, 2e-2)
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


# ---- the kernels, interpreted ----


def on_the_interpreter(test):  # type: ignore[no-untyped-def]
    numpy_grumbles = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
    return numpy_grumbles(pytest.mark.usefixtures("interpreted")(test))


@pytest.fixture
def interpreted() -> None:
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs triton and TRITON_INTERPRET=1 from the start")
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("triton's interpreter converts arrays in a way numpy 2.4 forbids")


@on_the_interpreter
@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_kernels_compute_attention(name: str, window: int | None) -> None:
    s = scene(**SCENES[name])
    expected = oracle(s, window)
    close(run(s, window), expected)


@on_the_interpreter
@pytest.mark.parametrize("name", ["ragged rows", "pages of blocks", "a tree", "many splits", "a prompt chunk"])
@pytest.mark.parametrize("dim", [16, 32, 40])
def test_half_precision(name: str, dim: int) -> None:
    """Powers of two over pages of whole blocks read them through the copy engine."""
    s = scene(**{**SCENES[name], "dim": dim, "dtype": torch.float16})
    close(run(s), oracle(s, None))
    close(run(s, tma=False), oracle(s, None))


@on_the_interpreter
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 9)), min_size=1, max_size=4),
    page_size=st.sampled_from([2, 5, 32, 64]),
    offset=st.sampled_from([0, 1, 7]),
    tree=st.booleans(),
    window=st.sampled_from(WINDOWS),
    splits=st.sampled_from([1, 2, 8]),
    shortest=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_any_batch(
    rows: list[tuple[int, int]], page_size: int, offset: int, tree: bool, window: int | None, splits: int,
    shortest: int, seed: int,
) -> None:  # fmt: skip
    contexts, counts = zip(*rows, strict=True)
    s = scene(contexts, counts, page_size=page_size, offset=offset, tree=tree, seed=seed)
    expected = oracle(s, window)
    close(run(s, window, splits=splits, shortest=shortest), expected)


@on_the_interpreter
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("tree", [False, True])
def test_a_row_has_the_same_bits_whoever_else_is_there(tree: bool, window: int | None) -> None:
    s = scene([1100, 3, 290, 64], [3, 1, 2, 3], tree=tree, room=5000)
    together = run(s, window)
    for r in range(4):
        one = slice(r, r + 1)
        b = s.batch
        masks = b.ancestors[one] if b.ancestors is not None else None
        alone = Batch(
            b.tokens[one], b.positions[one], b.context[one], b.counts[one], b.pages[one], masks,
            longest=int(b.context[r]) + 3, static=True,
        )  # fmt: skip
        row = Scene(s.cache, alone, s.q[one], s.k[one], s.v[one])
        assert torch.equal(run(row, window)[0], together[r])


@on_the_interpreter
@pytest.mark.parametrize("window", [1, 2, 3, 80])
def test_a_path_that_goes_on_above_all_bits(window: int) -> None:
    """The nodes that a mask can still name lie further below than the query's position tells."""
    s = scene([0, 40], [1, 1], offset=70, tree=True)
    s.cache.layers[1].nan_to_num_(0.5)
    all_bits = torch.full_like(s.batch.tokens, -1)
    s = s._replace(batch=s.batch._replace(ancestors=all_bits, positions=s.batch.context[:, None] + 70))
    expected = oracle(s, window)
    close(run(s, window), expected)


@on_the_interpreter
def test_what_lies_below_every_window_is_not_read() -> None:
    s = scene([300, 170], [3, 2])
    expected = run(s, 20)
    for r, context in enumerate((300, 170)):
        index = torch.arange(context - 19)
        s.cache.layers[1][s.batch.pages[r][index // 16] * 16 + index % 16] = math.nan
    assert torch.equal(run(s, 20), expected) and expected.isfinite().all()


@on_the_interpreter
def test_a_pass_stores_its_own_tokens_and_no_padding() -> None:
    s = scene([30, 12], [3, 1])
    before = s.cache.layers[1].clone()
    run(s)
    changed = (s.cache.layers[1].nan_to_num(9.0) != before.nan_to_num(9.0)).flatten(1).any(1).nonzero().flatten()
    slots = [int(s.batch.pages[r, i // 16]) * 16 + i % 16 for r, i in ((0, 30), (0, 31), (0, 32), (1, 12))]
    assert sorted(changed.tolist()) == sorted(slots)
    assert torch.equal(s.cache.layers[1][slots[2]], torch.stack((s.k[0, 2], s.v[0, 2])))
    assert not s.cache.layers[0][1:].isfinite().any()


@on_the_interpreter
def test_slices_of_a_wider_product_are_read_as_they_are() -> None:
    s = scene([70, 9], [3, 2])
    wide = torch.cat((s.q, s.k, s.v), 2)
    q, k, v = wide.split((4, 2, 2), 2)
    contexts = torch.stack((s.batch.context, s.batch.counts), 1)
    batch = s.batch._replace(context=contexts[:, 0], counts=contexts[:, 1], pages=s.batch.pages.T.contiguous().T)
    expected = run(s)
    assert not q.is_contiguous() and not batch.context.is_contiguous() and not batch.pages.is_contiguous()
    assert torch.equal(run(Scene(s.cache, batch, q, k, v)), expected)


@on_the_interpreter
def test_a_plan_follows_the_lengths_of_its_batch() -> None:
    from target.attention.triton import TritonAttention

    s = scene([1000, 900], [2, 2])
    attention, kept = TritonAttention(s.cache), s.cache.layers[1].clone()
    plan = attention.plan(s.batch)
    for contexts in ([5, 900], [1000, 63], [64, 127]):
        s.batch.context.copy_(torch.tensor(contexts))
        s.cache.layers[1].copy_(kept)
        expected = oracle(s, None)
        close(attention.run(plan, 1, s.q, s.k, s.v, None), expected)


@on_the_interpreter
def test_configurations_depend_on_shapes_alone() -> None:
    from target.kernels.gqa import pick, splits_of

    half = torch.float16, torch.device("cpu")
    assert [pick(t, 32, 8, 128, *half).rows for t in (1, 4, 8, 16, 64)] == [16, 16, 32, 64, 128]
    assert [pick(t, 32, 8, 128, *half).rows for t in (32, 33, 48, 49, 97)] == [128, 64, 64, 128, 128]
    assert pick(65, 32, 8, 128, *half).splits == 1
    assert [splits_of(n) for n in (1, 2, 3, 8, 16, 32, 1000)] == [64, 64, 42, 16, 8, 4, 4]


# ---- programs that take several splits ----

FINE = dict(splits=8, shortest=1)  # of 16 blocks of 32 tokens and more: splits of several blocks
CUTS = {4: 0, 3: 2, 2: 2, 1: 0}  # programs a row: spans of 2, 3, 4 and 8; and in how many stages the last one joins


@on_the_interpreter
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("window", [None, 150])
def test_the_same_bits_whichever_program_takes_a_split(tree: bool, window: int | None) -> None:
    """Joined in registers, by the last program of a row or by a kernel of its own."""
    s = scene([510, 3, 0, 130], [3, 1, 0, 2], tree=tree, heads=4, kv_heads=1)
    expected = oracle(s, window)
    apart = run(s, window, **FINE, parts=8, joined=0)
    close(apart, expected)
    for parts, joined in CUTS.items():
        assert torch.equal(run(s, window, **FINE, parts=parts, joined=joined), apart)


@on_the_interpreter
def test_a_row_far_longer_than_the_others_is_shared() -> None:
    """By programs that take 128 tokens each; of short rows one takes all. The last joins, whatever the tile."""
    s = scene([510, 70, 30], [2, 1, 2])
    assert torch.equal(run(s, **FINE, parts=1, run=128), run(s, **FINE, parts=8, joined=0))


@on_the_interpreter
def test_a_batch_that_fills_the_device_leaves_no_partial_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything launched to join them; the bits are those of a row with programs for all of its splits."""
    from target.kernels import gqa

    s = scene([300, 5, 290], [2, 1, 2])
    one = run(s, parts=64)
    shapes: list[tuple[int, ...]] = []
    empty = torch.empty

    def noted(*sizes: int, **options: Any) -> Tensor:
        shapes.append(sizes)
        return empty(*sizes, **options)

    monkeypatch.setattr(gqa, "room", lambda device, resident, others: 264 // (others * 30))
    monkeypatch.setattr(gqa, "combine_kernel", None)
    monkeypatch.setattr(torch, "empty", noted)
    assert torch.equal(run(s, parts=1), one)
    assert torch.equal(run(s), one)
    assert shapes == [tuple(s.q.shape)] * 2


@on_the_interpreter
@pytest.mark.parametrize("longest", [1, 64, 700, 5000])
@pytest.mark.parametrize("parts", [1, 2, 5, 64])
def test_the_host_bounds_what_rows_ask_for(longest: int, parts: int) -> None:
    from target.kernels.gqa_splits import _runs, cut

    for splits, shortest, most in ((16, 2, 2048), (5, 1, 256), (1, 2, 2048)):
        way = cut(longest, 64, splits, shortest, most, parts)
        runs = [_runs(blocks, splits, shortest, parts, most // 64) for blocks in range(1, -(-longest // 64) + 1)]
        assert max(runs) <= way.programs <= way.bound <= splits
        if parts < way.bound:
            assert max(runs) == way.programs
    assert cut(5000, 64, 16, 2, 2048, 1).programs == 3 and cut(2048, 64, 16, 2, 2048, 1).programs == 1


@on_the_interpreter
def test_how_many_programs_fill_a_device() -> None:
    from target.kernels.gqa_splits import room

    device = torch.device("cpu")
    assert [room(device, 2, others) for others in (0, 1, 8, 64, 100, 256, 1000)] == [264, 264, 33, 4, 2, 1, 1]
    assert room(device, 1, 64) == 2


# ---- wrong input ----


@on_the_interpreter
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s._replace(batch=s.batch._replace(longest=0)), "how long its longest row is"),
        (lambda s: s._replace(batch=s.batch._replace(pages=s.batch.pages.int())), "read int64 lengths and page tables"),
        (lambda s: s._replace(q=s.q[:, :, :3]), "1 holds 2 x 2 heads of 16 in .*float32 and cannot serve 3 query"),
        (lambda s: s._replace(k=s.k[:, :, :1]), "cannot serve 4 query heads of 16 over 1 in"),
        (lambda s: s._replace(q=s.q.half()), "in torch.float16"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(change, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=words):
        run(change(scene([9], [1])))


@on_the_interpreter
@pytest.mark.parametrize("shape", [LayerShape(1, 576, 1), LayerShape(2, 512)])
def test_a_cache_without_readable_heads_is_refused(shape: LayerShape) -> None:
    from target.attention.triton import TritonAttention

    with pytest.raises(PlanError, match="holds keys and values of 256 or less a head"):
        TritonAttention(PagedCache([[shape]], 2, 2, torch.float32))


# ---- the choice ----


def config(**changes: object):  # type: ignore[no-untyped-def]
    sizes = dict(vocab_size=9, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return parse_config({"architectures": ["LlamaForCausalLM"], **sizes, **changes})


def latents():  # type: ignore[no-untyped-def]
    mla = dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=None)
    moe = dict(moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1)
    return config(architectures=["DeepseekV3ForCausalLM"], first_k_dense_replace=1, **mla, **moe)


def cache(*shape: int) -> PagedCache:
    return PagedCache([[LayerShape(*shape or (2, 16))]], 2, 2, torch.float32)


@pytest.mark.parametrize("name", [None, "auto", "torch"])
def test_without_a_device_the_choice_is_torch(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECULATOR_ATTENTION", raising=False)
    assert isinstance(attention_for(config(), cache(), name), SdpaAttention)
    assert isinstance(grouped_attention(cache(), name), SdpaAttention)


def test_the_environment_decides_where_no_argument_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATOR_ATTENTION", "triton")
    with pytest.raises(PlanError, match="the triton backend needs a CUDA device: use torch"):
        attention_for(config(), cache())
    assert isinstance(attention_for(config(), cache(), "torch"), SdpaAttention)
    monkeypatch.setenv("SPECULATOR_ATTENTION", "cuda")
    with pytest.raises(PlanError, match="unknown attention backend 'cuda': auto, torch or triton"):
        grouped_attention(cache())


def test_the_choice_reaches_layers_of_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECULATOR_ATTENTION", "torch")
    chosen = attention_for(latents(), cache(1, 24, 1))
    assert isinstance(chosen, MlaAttention) and isinstance(chosen.backend, TorchSplits)
    monkeypatch.setenv("SPECULATOR_ATTENTION", "triton")
    with pytest.raises(PlanError, match="triton"):
        attention_for(latents(), cache(1, 24, 1))
