"""Attention in one fixed order: along paths in torch, and its kernels on the interpreter."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from target.attention.paths import PathAttention, path_indices
from target.batch import Batch, causal_positions
from target.errors import PlanError
from tests.unit.test_gqa import SCENES, WINDOWS, Scene, close, interpreted, on_the_interpreter, oracle, scene

__all__ = ["interpreted"]  # a fixture
NAMES = [name for name in SCENES if "above all bits" not in name]


@pytest.fixture
def short_splits(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens, and 128 from 256 on: the interpreter is slow."""
    from target.kernels import fixed_gqa

    for name, value in (("SPAN", 64), ("NEAR", 256), ("FAR_SPAN", 128)):
        monkeypatch.setattr(fixed_gqa, name, value)


def by_kernels(s: Scene, window: int | None = None) -> Tensor:
    from target.attention.fixed import FixedAttention

    attention = FixedAttention(s.cache)
    return attention.run(attention.plan(s.batch), 1, s.q, s.k, s.v, window)


def by_paths(s: Scene, window: int | None = None) -> Tensor:
    attention = PathAttention(s.cache)
    return attention.run(attention.plan(s.batch._replace(static=False)), 1, s.q, s.k, s.v, window)


# ---- along paths, in torch ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", WINDOWS)
def test_paths_are_what_queries_see(name: str, window: int | None) -> None:
    s = scene(**SCENES[name])
    expected = oracle(s, window)
    close(by_paths(s, window), expected)


def test_a_path_goes_from_the_root_down() -> None:
    masks = torch.tensor([[0b0001, 0b0010 | 1, 0b0101, 0b1010 | 1]])
    b = scene([5], [4], tree=True).batch._replace(ancestors=masks)
    assert [path_indices(b, 0, t).tolist()[5:] for t in range(4)] == [[5], [5, 6], [5, 7], [5, 6, 8]]


def test_lengths_that_the_host_must_not_read_are_refused() -> None:
    s = scene([9], [1])
    with pytest.raises(PlanError, match="cannot be recorded"):
        PathAttention(s.cache).plan(s.batch)


# ---- the kernels, interpreted ----


@pytest.fixture
def rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products on the interpreter whose rows are computed alike, as a GPU's are; numpy's library does not."""
    numpy = pytest.importorskip("numpy")

    def matmul(a: Any, b: Any, **_: Any) -> Any:
        return (a[:, :, None] * b[None]).sum(1, dtype=a.dtype)

    monkeypatch.setattr(numpy, "matmul", matmul)


@on_the_interpreter
@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [None, 1, 40])
def test_the_kernels_compute_attention(name: str, window: int | None) -> None:
    s = scene(**SCENES[name])
    expected = oracle(s, window)
    close(by_kernels(s, window), expected)


@on_the_interpreter
@pytest.mark.parametrize("name", ["ragged rows", "many splits", "a tree", "a long chunk of wide groups"])
def test_half_precision_and_splits_of_full_length(name: str) -> None:
    s = scene(**{**SCENES[name], "dtype": torch.float16})
    expected = oracle(s, None)
    close(by_kernels(s), expected)


@on_the_interpreter
@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("window", [None, 100])
def test_long_passes_go_in_slices(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from target.kernels import fixed_gqa

    monkeypatch.setattr(fixed_gqa, "SLICE_TOKENS", 16)
    for name in ("a prompt chunk", "a tree"):
        s = scene(**SCENES[name])
        expected = oracle(s, window)
        close(by_kernels(s, window), expected)


@on_the_interpreter
@pytest.mark.usefixtures("rows_alike", "short_splits")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("context", [0, 61, 126])
def test_a_node_of_a_tree_has_the_bits_of_plain_decoding(context: int, window: int | None) -> None:
    """Whatever its siblings, its number in the tree and the blocks it lies in: the same keys in the same order."""
    tree, plain = tree_and_plain(context, {})
    in_tree = by_kernels(tree, window)
    for t in range(tree.q.shape[1]):
        assert torch.equal(in_tree[0, t], by_kernels(plain[t], window)[0, 0]), t


def tree_and_plain(context: int, sizes: dict[str, Any]) -> tuple[Scene, list[Scene]]:
    """A tree of 12 nodes, and for each node its path as committed tokens of a row of its own, run as a single query."""
    draw = random.Random(context)
    s = scene([context], [12], tree=True, seed=context, **sizes)
    parents = [draw.randrange(max(t, 1)) for t in range(12)]
    paths: list[list[int]] = []
    for t, parent in enumerate(parents):
        paths.append([*(paths[parent] if t else []), t])
    masks = torch.tensor([[sum(1 << node for node in path) for path in paths]], device=s.q.device)
    depths = torch.tensor([[len(path) - 1 for path in paths]], device=s.q.device)
    batch = s.batch._replace(ancestors=masks, positions=context + depths)
    return s._replace(batch=batch), [alone(s, context, path) for path in paths]


def alone(s: Scene, context: int, path: list[int]) -> Scene:
    """The last node of a path as a chain's next token, over a copy of the cache."""
    other = scene([context + len(path) - 1], [1], heads=s.q.shape[2], kv_heads=s.k.shape[2], dim=s.q.shape[3],
                  page_size=s.cache.page_size, dtype=s.q.dtype, device=str(s.q.device), seed=1)  # fmt: skip
    size = s.cache.page_size
    store, kept = other.cache.layers[1], s.cache.layers[1]
    for i in range(context + len(path) - 1):
        slot = int(other.batch.pages[0, i // size]) * size + i % size
        if i < context:
            store[slot] = kept[int(s.batch.pages[0, i // size]) * size + i % size]
        else:
            node = path[i - context]
            store[slot] = torch.stack((s.k[0, node], s.v[0, node]))
    last = slice(path[-1], path[-1] + 1)
    return Scene(other.cache, other.batch, s.q[:, last], s.k[:, last], s.v[:, last])


@on_the_interpreter
@pytest.mark.usefixtures("rows_alike", "short_splits")
@pytest.mark.parametrize("window", [None, 50])
def test_a_chunk_has_the_bits_of_its_tokens_one_by_one(window: int | None) -> None:
    s = scene([40], [100], heads=2, kv_heads=1)
    together = by_kernels(s, window)
    pieces = [(0, 1), (1, 40), (40, 41), (41, 100)]
    for begin, end in pieces:
        part = chunk(s, begin, end)
        assert torch.equal(by_kernels(part, window)[0], together[0, begin:end])


def chunk(s: Scene, begin: int, end: int) -> Scene:
    """Queries begin..end of a row as a pass of their own after the others."""
    context = s.batch.context + begin
    width = slice(begin, end)
    batch = Batch(
        s.batch.tokens[:, width], causal_positions(context, end - begin), context,
        torch.full_like(context, end - begin), s.batch.pages, longest=int(context[0]) + end - begin, static=True,
    )  # fmt: skip
    return Scene(s.cache, batch, s.q[:, width], s.k[:, width], s.v[:, width])


@on_the_interpreter
@pytest.mark.usefixtures("rows_alike", "short_splits")
@pytest.mark.parametrize("tree", [False, True])
def test_a_row_has_the_same_bits_whoever_else_is_there(tree: bool) -> None:
    s = scene([600, 3, 290, 64], [3, 1, 2, 3], tree=tree, room=900)
    together = by_kernels(s)
    for r in range(4):
        one, b = slice(r, r + 1), s.batch
        masks = b.ancestors[one] if b.ancestors is not None else None
        batch = Batch(
            b.tokens[one], b.positions[one], b.context[one], b.counts[one], b.pages[one], masks,
            longest=int(b.context[r]) + 3, static=True,
        )  # fmt: skip
        assert torch.equal(by_kernels(Scene(s.cache, batch, s.q[one], s.k[one], s.v[one]))[0], together[r])


# ---- without kernels ----


def refuse_to_compile(*_: Any) -> None:
    raise RuntimeError("the assembler crashed\nand says so at length")


@on_the_interpreter
@pytest.mark.parametrize("name", ["ragged rows", "padded rows", "a chain above the context", "a tree", "the sign bit"])
@pytest.mark.parametrize("window", [None, 40])
def test_without_kernels_attention_goes_along_paths(
    name: str, window: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from target.attention import fixed

    monkeypatch.setattr(fixed.kernels, "compile_all", refuse_to_compile)
    s = scene(**SCENES[name])
    attention = fixed.FixedAttention(s.cache)
    expected = oracle(s, window)
    for _ in range(2):
        close(attention.run(attention.plan(s.batch), 1, s.q, s.k, s.v, window), expected)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "4 and 2 heads of 16" in said[0] and said[0].endswith("slowly: the assembler crashed")


@on_the_interpreter
@pytest.mark.usefixtures("short_splits")
def test_windows_are_compiled_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with and without a window may differ; passes with and without a tree may not."""
    from target.attention import fixed

    asked, s = [], scene([30], [2])
    monkeypatch.setattr(fixed.kernels, "compile_all", lambda *given: asked.append(given[-1]))
    attention = fixed.FixedAttention(s.cache)
    tree = s.batch._replace(ancestors=torch.tensor([[1, 3]]))
    for batch in (s.batch, tree):
        for window in (None, 7, 9):
            attention.run(attention.plan(batch), 1, s.q, s.k, s.v, window)
    assert asked == [False, True]


@on_the_interpreter
def test_a_device_without_the_resources_goes_along_paths_from_then_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from target.attention import fixed

    launches = []

    def refuse(*_: Any) -> None:
        launches.append(1)
        raise importlib.import_module("triton").OutOfResources(300_000, 100_000, "shared memory")

    monkeypatch.setattr(fixed.kernels, "launch_attend", refuse)
    s = scene([70, 5], [3, 2])
    attention = fixed.FixedAttention(s.cache)
    expected = oracle(s, None)
    for _ in range(2):
        close(attention.run(attention.plan(s.batch), 1, s.q, s.k, s.v, None), expected)
    assert len(launches) == 1 and "out of resource: shared memory" in caplog.text


@on_the_interpreter
def test_queries_need_not_lie_whole_heads_apart() -> None:
    s = scene([70, 5], [3, 2])
    wide = torch.full((2, 3, 4 * 16 + 5), float("nan"))
    wide[..., :64] = s.q.flatten(2)
    odd = s._replace(q=wide.as_strided(s.q.shape, (3 * 69, 69, 16, 1)))
    assert torch.equal(by_kernels(odd), by_kernels(s))


@on_the_interpreter
def test_splits_end_where_they_end_whatever_the_length() -> None:
    from target.kernels.fixed_gqa import splits_below

    assert [splits_below(n) for n in (1, 256, 257, 8192, 8193, 10_241, 131_072)] == [1, 1, 2, 32, 33, 34, 92]


@on_the_interpreter
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s._replace(batch=s.batch._replace(longest=0)), "how long its longest row is"),
        (lambda s: s._replace(batch=s.batch._replace(pages=s.batch.pages.int())), "read int64 lengths and page tables"),
        (lambda s: s._replace(q=s.q[:, :, :3]), "cannot serve 3 query"),
        (lambda s: s._replace(batch=s.batch._replace(ancestors=s.batch.tokens, offset=64)), "a tree of 65 nodes"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(change, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=words):
        by_kernels(change(scene([9], [1])))
