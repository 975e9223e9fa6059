"""MLA on a CUDA device: our kernels over FlashMLA's own test grid, poisoned memory, recorded passes, the real FlashMLA.

SPECULATOR_FLASHMLA and SPECULATOR_FLASH3 name third-party builds; their tests are skipped without.
"""

from __future__ import annotations

import os
import random
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from target.attention.mla import MlaAttention, MlaPlan
from target.attention.sdpa import SdpaAttention
from target.attention.splits import empty_splits, fill_splits, lengths
from target.batch import Batch
from target.cache import LayerShape, PagedCache
from target.errors import PlanError
from tests.unit.mla_scenes import SCENES, Scene, by_hand, run, scene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
DEEPSEEK = dict(rank=512, rope=64, page_size=64, dtype=torch.bfloat16, device="cuda", scale=576**-0.5)
# batch, queries, length, heads: as in FlashMLA's own tests. What is compiled follows from (queries, heads), from
# whether there is one request, and from which sizes are multiples of 16. Tiles are whole, partly used, or end within a
# query
GRID = [
    *((1, 2, 140, 16), (6, 2, 4096, 16), (3, 2, 20, 16), (66, 2, 4096, 16), (1, 16, 700, 9), (6, 16, 4096, 9)),
    *((3, 16, 20, 9), (66, 16, 140, 9), (6, 1, 4096, 128), (66, 1, 20, 128), (3, 1, 140, 128)),
    *((6, 2, 4096, 128), (66, 2, 140, 128), (3, 2, 20, 128)),
]
SEVERAL = [one for one in GRID if one[0] > 1]
FEW_HEADS = [one for one in SEVERAL if one[3] < 128]
ON_GPU = [name for name in SCENES if name != "a prompt chunk"]
ALIKE: dict[str, dict[str, Any]] = {
    "the sign bit": dict(counts=[16], offset=48),
    "a chain above the context": dict(offset=16),
}
needs_flash_mla = pytest.mark.skipif(
    not os.environ.get("SPECULATOR_FLASHMLA") and find_spec("flash_mla") is None, reason="no build of FlashMLA"
)
needs_flash3 = pytest.mark.skipif(not os.environ.get("SPECULATOR_FLASH3"), reason="no build of FlashAttention-3")


def close(got: Tensor, s: Scene) -> None:
    tolerance = 1e-4 if s.q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.float(), by_hand(s), rtol=tolerance, atol=tolerance)


def portable(s: Scene, rows: int) -> MlaAttention:
    """Our kernels without those for Hopper."""
    from target.attention.mla_triton import TritonSplits
    from target.kernels.mla import Config

    attention = MlaAttention(s.cache, s.rank, "triton")
    attention.backend = TritonSplits(s.cache, s.rank, config=Config(rows, 8 if s.rank > 256 else 4, 2))
    return attention


VARIANTS = ["hopper", "hopper chained", "seesaw", "seesaw chained"]


def variant(s: Scene, name: str, processors: int | None = None) -> MlaAttention:
    """One of the kernels for Hopper, whatever the table would choose."""
    from target.attention.mla_triton import TritonSplits
    from target.kernels.mla import HOPPER, hopper_takes

    if not hopper_takes(s.cache.layers[1].flatten(1), s.rank, s.cache.page_size):
        pytest.skip("made for Hopper, pages of whole blocks and triton 3.6")
    kernel, *chained = name.split()
    attention = MlaAttention(s.cache, s.rank, "triton")
    config = HOPPER._replace(kernel=kernel, chained=bool(chained))
    attention.backend = TritonSplits(s.cache, s.rank, processors, config)
    return attention


def scene_of(name: str, **sizes: Any) -> Scene:
    """A scene with as many queries, heads and requests as the others, so that few kernels are compiled."""
    alike = dict(heads=9, width=16, requests=5, room=64, device="cuda", **ALIKE.get(name, {}))
    return scene(**{**SCENES[name], **alike, **sizes})


def scene_on(batch: int, queries: int, length: int, heads: int, **sizes: Any) -> Scene:
    """A scene of the grid."""
    contexts, counts = rows_of(batch, queries, length, seed=heads)
    return scene(contexts, counts, heads, **{**DEEPSEEK, "room": 64, **sizes})


def rows_of(batch: int, queries: int, length: int, seed: int) -> tuple[list[int], list[int]]:
    """Contexts around a length; some rows are padding and some have fewer queries."""
    draw = random.Random(seed)
    contexts = [
        max(0, length - queries + (draw.randrange(-length // 4, length // 4) if batch > 1 else 0)) for _ in range(batch)
    ]
    counts = [queries if r == 0 else draw.choice([0, queries, queries, draw.randint(1, queries)]) for r in range(batch)]
    return contexts, counts


# ---- numbers ----


@pytest.mark.parametrize(("batch", "queries", "length", "heads"), GRID)
def test_the_grid_of_flash_mla(batch: int, queries: int, length: int, heads: int) -> None:
    s = scene_on(batch, queries, length, heads)
    close(run(s, MlaAttention(s.cache, 512)), s)


@pytest.mark.parametrize(
    ("batch", "queries", "length", "heads", "name"),
    [(*one, name) for name in VARIANTS for one in (FEW_HEADS if "chained" in name else SEVERAL)],
)
def test_every_variant_on_the_grid(batch: int, queries: int, length: int, heads: int, name: str) -> None:
    """Launches that may overlap run the same code but for their waits, so they need not run it in every shape."""
    s = scene_on(batch, queries, length, heads)
    close(run(s, variant(s, name)), s)


@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("processors", [7, 13])
@pytest.mark.parametrize("kind", VARIANTS)
def test_every_variant_on_every_scene(name: str, processors: int, kind: str) -> None:
    """Few processors give each part several requests, with odd and even numbers of blocks one after the other."""
    s = scene_of(name, **DEEPSEEK)
    close(run(s, variant(s, kind, processors)), s)


@pytest.mark.parametrize("kind", ["hopper", "seesaw"])
def test_one_part_may_have_all_the_work(kind: str) -> None:
    s = scene_of("ragged rows", **DEEPSEEK)
    close(run(s, variant(s, kind, processors=1)), s)


@pytest.mark.parametrize("kind", ["hopper", "seesaw"])
def test_a_variant_of_half_the_rank(kind: str) -> None:
    s = scene([700, 130, 0, 64], [8, 3, 0, 8], 20, **{**DEEPSEEK, "rank": 256, "dtype": torch.float16})
    close(run(s, variant(s, kind)), s)


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_variant_repeats_its_bits(kind: str) -> None:
    """A race between warpgroups or launches would show as other bits sooner or later."""
    contexts, counts = rows_of(33, 2, 1500, seed=3)
    s = scene(contexts, counts, heads=128, **DEEPSEEK)
    attention = variant(s, kind)
    first = run(s, attention)
    assert all(torch.equal(first, run(s, attention)) for _ in range(50))


@pytest.mark.parametrize(("batch", "queries", "length", "heads"), FEW_HEADS)
@pytest.mark.parametrize(("rows", "page_size"), [(16, 16), (32, 64)])
def test_the_portable_kernel(batch: int, queries: int, length: int, heads: int, rows: int, page_size: int) -> None:
    s = scene_on(batch, queries, length, heads, page_size=page_size)
    close(run(s, portable(s, rows)), s)


@pytest.mark.parametrize("name", ON_GPU)
def test_every_scene_by_the_portable_kernel(name: str) -> None:
    s = scene_of(name, **DEEPSEEK)
    close(run(s, portable(s, 32)), s)


@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_scene_of_a_small_rank(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and name in ("a level of a tree", "large pages"):
        pytest.skip("in the other type, and a kernel to compile for each")
    s = scene_of(name, rank=64, rope=16, dtype=dtype)
    close(run(s, MlaAttention(s.cache, s.rank, "triton")), s)


@pytest.mark.parametrize("name", SCENES)
def test_the_torch_reference_on_the_device(name: str) -> None:
    s = scene(**SCENES[name], device="cuda")
    close(run(s, MlaAttention(s.cache, s.rank, "torch")), s)


@pytest.mark.parametrize(("page_size", "dtype"), [(64, torch.bfloat16), (128, torch.float16)])
def test_long_rows_are_split_and_joined(page_size: int, dtype: torch.dtype) -> None:
    s = scene([20_000, 1, 9_999], [2, 2, 1], heads=16, **{**DEEPSEEK, "page_size": page_size, "dtype": dtype})
    close(run(s, MlaAttention(s.cache, 512)), s)


def test_the_hopper_kernel_is_the_one_under_test() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("made for Hopper")
    from target.kernels.mla import hopper_takes

    s = scene([9], [1], **DEEPSEEK)
    assert hopper_takes(s.cache.layers[0].flatten(1), 512, 64)


@pytest.mark.parametrize(("rows", "pieces"), [(1, 132), (5, 1), (32, 66), (33, 7), (300, 132)])
def test_the_planning_kernel_computes_the_reference_s_integers(rows: int, pieces: int) -> None:
    from target.kernels.mla import HOPPER, launch_plan

    draw = random.Random(rows * pieces)
    stored = [draw.choice([0, 1, 63, 64, 65, draw.randrange(70_000)]) for _ in range(rows)]
    counts = torch.tensor([min(n, 2) for n in stored], device="cuda")
    none = torch.empty(0, dtype=torch.int64, device="cuda")
    batch = Batch(none, none, torch.tensor(stored, device="cuda") - counts, counts, none)
    plan, expected = empty_splits(rows, pieces, none.device), empty_splits(rows, pieces, none.device)
    launch_plan(plan, batch, HOPPER)
    fill_splits(expected, lengths(batch))
    assert torch.equal(plan.plan, expected.plan) and torch.equal(plan.splits, expected.splits)


@pytest.mark.parametrize("name", ["chosen", *VARIANTS])
def test_nothing_is_read_on_the_host(name: str) -> None:
    s = scene([500, 70], [2, 1], heads=16, **DEEPSEEK)
    attention = MlaAttention(s.cache, 512, "triton") if name == "chosen" else variant(s, name)
    run(s, attention)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        run(s, attention)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- recorded passes ----

BACKENDS = ["triton", "torch", *VARIANTS, pytest.param("flash_mla", marks=needs_flash_mla)]
GROWTH = [([1, 40], [64, 63]), ([100, 100], [3000, 2]), ([63, 64], [65, 128]), ([3000, 9], [5, 2999])]


class Recorded:
    """A pass over static tensors, recorded with a plan that was or was not used before."""

    def __init__(self, backend: str, start: list[int], used: bool, queries: int = 2) -> None:
        self.scene = scene([3000] * 2, [queries] * 2, heads=16, room=100, **DEEPSEEK)
        self.scene = self.scene._replace(batch=self.scene.batch._replace(static=True))
        self.kept = self.scene.cache.layers[1].clone()
        by_name = variant(self.scene, backend) if backend in VARIANTS else None
        self.attention = by_name or MlaAttention(self.scene.cache, 512, backend)
        self.set(start)
        plan = self.attention.plan(self.scene.batch)
        self.eager(plan if used else None)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = run(self.scene, self.attention, plan)

    def set(self, contexts: list[int]) -> None:
        """New lengths, and the cache as it was: a pass writes its own tokens."""
        self.scene.batch.context.copy_(torch.tensor(contexts))
        self.scene.cache.layers[1].copy_(self.kept)

    def eager(self, plan: MlaPlan | None = None) -> Tensor:
        return run(self.scene, self.attention, plan)

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.out.clone()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("start", "then"), GROWTH)
def test_a_replay_plans_again(backend: str, start: list[int], then: list[int]) -> None:
    recorded = Recorded(backend, start, used=False)
    for contexts in (then, start, then):
        recorded.set(contexts)
        replayed = recorded.replay()
        recorded.set(contexts)
        assert torch.equal(replayed, recorded.eager())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_shared_with_the_warm_up_goes_stale(backend: str) -> None:
    """The broken twin of the test above."""
    recorded = Recorded(backend, [100, 100], used=True)
    recorded.set([2900, 2500])
    replayed = recorded.replay()
    recorded.set([2900, 2500])
    assert (replayed - recorded.eager()).abs().max() > 0.01


@pytest.mark.parametrize("name", VARIANTS)
def test_a_plan_that_was_never_filled_is_wrong_but_harmless(name: str) -> None:
    """Garbage records may not lead the kernels out of bounds."""
    s = scene([3000, 70], [2, 2], heads=16, **DEEPSEEK)
    for attention in (MlaAttention(s.cache, 512, "triton"), variant(s, name), portable(s, 32)):
        plan = attention.plan(s.batch)
        run(s, attention, plan)
        plans, draw = plan.metadata.state.plan, torch.Generator("cuda").manual_seed(0)
        for low, high in ((-1, 0), (-5, 5), (0, 60), (-(1 << 30), 1 << 30)):
            for values in plans:
                values.copy_(torch.randint(low, high, values.shape, generator=draw, device="cuda"))
            run(s, attention, plan)
        torch.cuda.synchronize()
        close(run(s, attention), s)


# ---- the real FlashMLA ----


@needs_flash_mla
@pytest.mark.parametrize(("batch", "queries", "length", "heads"), [one for one in GRID if one[1] <= 8])
def test_flash_mla_behind_the_seam(batch: int, queries: int, length: int, heads: int) -> None:
    s = scene_on(batch, queries, length, heads)
    close(run(s, MlaAttention(s.cache, 512, "flash_mla")), s)


@needs_flash_mla
def test_flash_mla_refuses_what_it_cannot_do() -> None:
    tree = scene([100], [3], tree=True, **DEEPSEEK)
    with pytest.raises(PlanError, match="no tree mask"):
        MlaAttention(tree.cache, 512, "flash_mla").plan(tree.batch)


# ---- FlashAttention-3 ----


def grouped(contexts: list[int], counts: list[int]) -> tuple[PagedCache, Batch, list[Tensor]]:
    """32 query and 8 key heads of 128 over pages of 64, as Llama-3.1-8B's; contexts are random keys and values."""
    rows, width, columns = len(contexts), max(counts), 64
    cache = PagedCache([[LayerShape(8, 128)]], rows * columns + 1, 64, torch.bfloat16, "cuda")
    cache.layers[0][64:].normal_()
    pages = (torch.randperm(rows * columns, device="cuda") + 1).view(rows, columns)
    ids = torch.zeros(rows, width, dtype=torch.int64, device="cuda")
    context, count = (torch.tensor(x, device="cuda") for x in (contexts, counts))
    batch = Batch(ids, ids, context, count, pages, longest=columns * 64, static=True)
    shapes: list[Any] = [(rows, width, 32, 128), (rows, width, 8, 128), (rows, width, 8, 128)]
    return cache, batch, [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]


@needs_flash3
def test_flash_attention_3_keeps_its_plan_in_one_place() -> None:
    """Recorded once; refreshed before a replay it equals the reference, and without it does not."""
    from target.attention.flash import FlashAttention3

    cache, batch, (q, k, v) = grouped([100, 70, 9], [4, 2, 0])
    attention, reference = FlashAttention3(cache), SdpaAttention(cache)
    valid = torch.arange(4, device="cuda") < batch.counts[:, None]

    def exact() -> Tensor:
        return reference.run(reference.plan(batch), 0, q, k, v, None)[valid]

    plan, graph = attention.plan(batch), torch.cuda.CUDAGraph()
    torch.testing.assert_close(attention.run(plan, 0, q, k, v, None)[valid], exact(), rtol=2e-2, atol=2e-2)
    address = plan.metadata.values.data_ptr()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = attention.run(plan, 0, q, k, v, None)
    kept = cache.layers[0].clone()
    batch.context.copy_(torch.tensor([3000, 3500, 64]))
    graph.replay()
    stale = out[valid].clone()
    cache.layers[0].copy_(kept)
    attention.refresh(plan, 32, 8, 128)
    assert plan.metadata.values.data_ptr() == address
    graph.replay()
    torch.testing.assert_close(out[valid], exact(), rtol=2e-2, atol=2e-2)
    assert (stale - exact()).abs().max() > 0.05
