"""Fixed order on a CUDA device: one row against k + 1 rows, to the bit, by kernel, by layer and over a whole pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speculator import invariant
from speculator.bench.synthetic import LLAMA_8B
from speculator.bundled import find_pairs
from speculator.fixed_passes import fixed_passes
from speculator.passes import EagerPasses
from target.attention.base import bind
from target.batch import Batch, causal_positions
from target.cache import PagedCache
from target.config import parse_config
from target.decoder import Decoder, init_weights
from target.fused import fuse
from target.products import choose_products, fixed_product
from tests.unit.test_gqa import SCENES, WINDOWS, Scene, close, oracle, scene
from tests.unit.test_invariant_attention import NAMES, by_kernels, chunk, tree_and_plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
]
LLAMA = dict(heads=32, kv_heads=8, dim=128, page_size=64, dtype=torch.bfloat16, device="cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# each shape of a layer is compiled, so one type has them all
ALIKE = [name for name in NAMES if not {"heads", "kv_heads", "dim", "page_size"} & SCENES[name].keys()]


@pytest.fixture(autouse=True, scope="module")
def given_up() -> Iterator[Callable[..., bool]]:
    """What the backend does without kernels; none of these tests may pass that way."""
    from target.attention import fixed

    def refuse(kind: Any, error: Exception) -> bool:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        before = fixed._given_up
        patch.setattr(fixed, "_given_up", refuse)
        yield before


# ---- attention ----


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in ALIKE), *((name, torch.bfloat16) for name in NAMES)]
)
@pytest.mark.parametrize("window", WINDOWS)
def test_every_scene(name: str, window: int | None, dtype: torch.dtype) -> None:
    s = scene(**SCENES[name], dtype=dtype, device="cuda")
    expected = oracle(s, window)
    close(by_kernels(s, window), expected)


@pytest.mark.parametrize("length", [500, 4096, 12_000])
@pytest.mark.parametrize("queries", [1, 8, 64])
@pytest.mark.parametrize("tree", [False, True])
def test_the_shape_of_a_large_model(length: int, queries: int, tree: bool) -> None:
    s = scene([length, length // 3, 7], [queries, 1, 0], **LLAMA, tree=tree)
    expected = oracle(s, None)
    close(by_kernels(s), expected)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("context", [0, 30, 61, 250, 1021, 8185])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_node_of_a_tree_has_the_bits_of_plain_decoding(context: int, window: int | None, dtype: torch.dtype) -> None:
    tree, plain = tree_and_plain(context, {**LLAMA, "dtype": dtype})
    in_tree = by_kernels(tree, window)
    for t in range(tree.q.shape[1]):
        assert torch.equal(in_tree[0, t], by_kernels(plain[t], window)[0, 0]), t


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (8, 8)])
def test_a_chunk_has_the_bits_of_its_tokens_one_by_one(heads: tuple[int, int], window: int | None) -> None:
    s = scene([700], [600], **{**LLAMA, "heads": heads[0], "kv_heads": heads[1]})
    together = by_kernels(s, window)
    for begin, end in [(0, 1), (1, 9), (9, 73), (73, 74), (74, 600)]:
        assert torch.equal(by_kernels(chunk(s, begin, end), window)[0], together[0, begin:end]), (begin, end)


def test_a_row_has_the_same_bits_whoever_else_is_there() -> None:
    for tree in (False, True):
        s = scene([9000, 3, 290, 2047], [3, 1, 2, 3], **LLAMA, tree=tree, room=9000)
        together, b = by_kernels(s), s.batch
        for r in range(4):
            one = slice(r, r + 1)
            masks = b.ancestors[one] if b.ancestors is not None else None
            batch = Batch(b.tokens[one], b.positions[one], b.context[one], b.counts[one], b.pages[one], masks,
                          longest=int(b.context[r]) + 3, static=True)  # fmt: skip
            alone = by_kernels(Scene(s.cache, batch, s.q[one], s.k[one], s.v[one]))
            assert torch.equal(alone[0], together[r])


def test_without_kernels_passes_run_along_paths_and_are_not_recorded(
    given_up: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    from target.attention import fixed

    def crash(*_: Any) -> None:
        raise RuntimeError("the assembler crashed")

    monkeypatch.setattr(fixed, "_given_up", given_up)
    monkeypatch.setattr(fixed.kernels, "compile_all", crash)
    s = scene([300, 5], [4, 2], **LLAMA, tree=True)
    attention, graph = fixed.FixedAttention(s.cache), torch.cuda.CUDAGraph()

    def attend() -> Tensor:
        return attention.run(attention.plan(s.batch), 1, s.q, s.k, s.v, None)

    expected = oracle(s, None)
    close(attend(), expected)
    with pytest.raises(RuntimeError, match="cannot be recorded"), torch.cuda.graph(graph):
        attend()
    close(attend(), expected)


# ---- norms ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [128, 2048, 4096, 8192])
def test_a_normed_row_has_the_same_bits_in_any_company(size: int, dtype: torch.dtype) -> None:
    from target.kernels.norm import launch_norm

    x, more, weight = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((65, size), (65, size), (size,)))
    whole = launch_norm(x, more, weight, 1e-5)
    for begin, end in ((0, 1), (7, 15), (64, 65), (1, 65)):
        part = launch_norm(x[begin:end], more[begin:end], weight, 1e-5)
        assert all(torch.equal(p, w[begin:end]) for p, w in zip(part, whole, strict=True))


# ---- layers and the whole pass ----

SMALL: Mapping[str, Any] = {**LLAMA_8B, "vocab_size": 4096, "num_hidden_layers": 4, "intermediate_size": 6144}
QWEN: Mapping[str, Any] = {**SMALL, "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}


class Bench:
    """A target in fixed order with a cache, and rows whose contexts are filled."""

    def __init__(self, raw: Mapping[str, Any], contexts: list[int]) -> None:
        with torch.device("cuda"):
            self.model = Decoder(parse_config(raw)).to(torch.bfloat16)
        init_weights(self.model, torch.Generator("cuda").manual_seed(0), std=0.05)
        self.model.requires_grad_(False).eval()
        choose_products(self.model, fixed_product(torch.device("cuda")))
        fuse(self.model)
        self.contexts, columns = contexts, 40
        self.cache = PagedCache([self.model.cache_layers], len(contexts) * columns + 1, 64, torch.bfloat16, "cuda")
        self.pages = torch.arange(1, len(contexts) * columns + 1, device="cuda").view(len(contexts), columns)
        self.passes: EagerPasses = fixed_passes(self.model, None, self.cache)
        self.tokens = torch.randint(0, 4096, (len(contexts), 2048), device="cuda")
        self.feed(512)

    def feed(self, chunk: int) -> None:
        for row, context in enumerate(self.contexts):
            for begin in range(0, context, chunk):
                self.verify([row], begin, min(begin + chunk, context))

    def batch(self, rows: list[int], begins: list[int], width: int, tree: Tensor | None = None) -> Batch:
        context = torch.tensor(begins, device="cuda")
        tokens = torch.stack([self.tokens[r, b : b + width] for r, b in zip(rows, begins, strict=True)])
        counts = torch.full_like(context, width)
        return Batch(tokens, causal_positions(context, width), context, counts, self.pages[rows], tree,
                     longest=max(begins) + width)  # fmt: skip

    @torch.inference_mode()
    def verify(self, rows: list[int], begin: int, end: int) -> Tensor:
        return self.passes.verify(self.batch(rows, [begin], end - begin)).logits


@pytest.fixture(scope="module", params=["llama", "qwen"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench({"llama": SMALL, "qwen": QWEN}[request.param], [600, 1030, 77, 256])


@torch.inference_mode()
def test_every_layer_gives_a_row_the_same_bits_in_any_company(bench: Bench) -> None:
    taps = tuple(range(5))
    batch = bench.batch([0, 1, 2, 3], bench.contexts, 8)
    whole = bench.model(batch.tokens, batch.positions, bind(bench.passes.attention, batch), taps)
    for row, context in enumerate(bench.contexts):
        for t in range(8):
            one = bench.batch([row], [context + t], 1)
            alone = bench.model(one.tokens, one.positions, bind(bench.passes.attention, one), taps)
            for k in taps:
                assert torch.equal(alone.taps[k][0, 0], whole.taps[k][row, t]), (row, t, k)
            assert torch.equal(alone.final[0, 0], whole.final[row, t])


@torch.inference_mode()
def test_what_a_head_taps_changes_no_bit(bench: Bench) -> None:
    batch = bench.batch([1], [1030], 8)
    finals = [
        bench.model(batch.tokens, batch.positions, bind(bench.passes.attention, batch), taps).final
        for taps in ((), (2,), (1, 2, 4))
    ]
    assert all(torch.equal(final, finals[0]) for final in finals)


@pytest.mark.parametrize("width", [2, 8, 33, 64])
def test_logits_of_a_whole_pass_are_those_of_its_tokens(bench: Bench, width: int) -> None:
    whole = bench.verify([0], 600, 600 + width)
    for t in {0, 1, width // 2, width - 1}:
        assert torch.equal(bench.verify([0], 600 + t, 601 + t)[0, 0], whole[0, t])


@torch.inference_mode()
def test_logits_of_a_tree_are_those_of_its_paths(bench: Bench) -> None:
    masks = torch.tensor([[0b1, 0b11, 0b101, 0b1011, 0b10101, 0b101011]], device="cuda")
    batch = bench.batch([1], [1030], 6, masks)
    depths = torch.tensor([[0, 1, 1, 2, 2, 3]], device="cuda")
    in_tree = bench.passes.verify(batch._replace(positions=1030 + depths)).logits
    for path in ([0, 1, 3, 5], [0, 2, 4]):
        chain = bench.batch([1], [1030], len(path))._replace(tokens=batch.tokens[:, path])
        assert torch.equal(bench.passes.verify(chain).logits[0], in_tree[0, path])


def test_chunks_of_a_prompt_leave_the_same_cache(bench: Bench) -> None:
    kept = [layer.clone() for layer in bench.cache.layers]
    for chunk_size in (1024, 100, 17):
        bench.feed(chunk_size)
        for row, context in enumerate(bench.contexts):
            index = torch.arange(context, device="cuda")
            slots = bench.pages[row][index // 64] * 64 + index % 64
            for layer, before in zip(bench.cache.layers, kept, strict=True):
                assert torch.equal(layer[slots], before[slots]), (chunk_size, row)


# ---- the certificate ----


@pytest.mark.slow
@pytest.mark.skipif(not find_pairs(), reason="needs a bundled pair")
@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_the_certificate_of_the_bundled_pair(tmp_path: Path, graphs: str) -> None:
    path = tmp_path / "certificate.json"
    sizes = ["--limit", "4", "--tokens", "48", "--rows", "4", "--kv-tokens", "8192"]
    code = invariant.main(["--device", "cuda", "--dtype", "bfloat16", "--graphs", graphs, *sizes, "--json", str(path)])
    report = json.loads(path.read_text())
    assert code == 0, [record for record in report["records"] if record["difference"]]
    assert report["tokens_compared"] >= 26 * 4 * 48
