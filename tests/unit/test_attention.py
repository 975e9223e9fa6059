"""Attention over the paged cache: trees, windows, scratch nodes, and memory that must not be read."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from target.attention.base import Attend
from target.attention.sdpa import SdpaAttention, visible
from target.batch import Batch, causal_positions
from target.config import parse_config
from target.decoder import Decoder, init_weights
from target.errors import PlanError
from target.model import Hidden
from tests.unit.targets import Rig, some_tokens

ALL = (0, 1, 2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(window: int | None = None) -> Decoder:
    """Two layers; the first has the window, the second sees everything."""
    raw = dict(
        architectures=["Qwen2ForCausalLM"], vocab_size=53, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=window or 1, use_sliding_window=window is not None,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Decoder(parse_config(raw))
    init_weights(model, torch.Generator().manual_seed(5), std=0.3)
    return model.requires_grad_(False).eval()


MODELS = {window: tiny(window) for window in (None, 1, 3, 8)}


# an oracle that shares nothing with the code under test: one dense sequence per root-to-node path


def attend_by_hand(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("rthd,rshd->rhts", q, k) / math.sqrt(q.shape[-1])
    for t in range(q.shape[1]):
        scores[:, :, t, t + 1 :] = -math.inf
        if window is not None:
            scores[:, :, t, : max(0, t + 1 - window)] = -math.inf
    return torch.einsum("rhts,rshd->rthd", scores.softmax(-1), v)


def plain(model: Decoder, tokens: Sequence[int]) -> Tensor:
    """[1 + taps, T, H] of one plain sequence."""
    hidden = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], attend_by_hand, ALL)
    return torch.stack((hidden.final[0], *(t[0] for t in hidden.taps)))


class RandomTree:
    """A tree below a context: node i hangs below `parents[i]` < i; a forest of roots is allowed."""

    def __init__(self, nodes: int, seed: int, roots: int = 1) -> None:
        self.draw = random.Random(seed)
        self.parents = [-1 if i < roots else self.draw.randrange(i) for i in range(nodes)]
        self.tokens = some_tokens(nodes, seed + 1)

    def path(self, node: int) -> list[int]:
        above = [] if self.parents[node] < 0 else self.path(self.parents[node])
        return [*above, node]

    def mask(self, node: int, own: bool = True) -> int:
        value = sum(1 << i for i in self.path(node)[: None if own else -1])
        return value - (1 << 64) if value >= 1 << 63 else value  # int64

    def depth(self, node: int) -> int:
        return len(self.path(node)) - 1

    def expected(self, model: Decoder, context: Sequence[int], node: int) -> Tensor:
        """[1 + taps, H]"""
        return plain(model, [*context, *(self.tokens[i] for i in self.path(node))])[:, -1]


def states(hidden: Hidden, row: int, query: int) -> Tensor:
    return torch.stack((hidden.final[row, query], *(t[row, query] for t in hidden.taps)))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def prefilled(rig: Rig, contexts: Sequence[Sequence[int]], scratch: int = 80) -> list[list[int]]:
    """Page tables of rows whose contexts are in the cache."""
    tables = [rig.table(len(c) + scratch) for c in contexts]
    for context, table in zip(contexts, tables, strict=True):
        if context:
            rig.feed(context, table, [len(context)], ())
    return tables


shapes = settings(max_examples=30, deadline=None, derandomize=True)


@shapes
@given(
    sizes=st.lists(st.tuples(st.integers(1, 64), st.integers(0, 20)), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    window=st.sampled_from(list(MODELS)),
    page_size=st.sampled_from([2, 3, 8]),
    scattered=st.booleans(),
    own=st.booleans(),
)
def test_a_node_of_a_tree_equals_its_path_as_a_sequence(
    sizes: list[tuple[int, int]], seed: int, window: int | None, page_size: int, scattered: bool, own: bool
) -> None:
    """Rows of 1..64 nodes below contexts of 0..20 tokens; a node's own bit may be set or not."""
    model = MODELS[window]
    rig = Rig(model, page_size, pages=400, scattered=scattered)
    contexts = [some_tokens(n, seed + row) for row, (_, n) in enumerate(sizes)]
    trees = [RandomTree(n, seed + row, roots=1 + seed % 3) for row, (n, _) in enumerate(sizes)]
    tables = prefilled(rig, contexts)
    masks = [[t.mask(i, own) for i in range(len(t.tokens))] for t in trees]
    depths = [[t.depth(i) for i in range(len(t.tokens))] for t in trees]
    got = rig.run(rig.batch([t.tokens for t in trees], [len(c) for c in contexts], tables, masks, depths), ALL)
    assert got.final.isfinite().all()  # padding too
    for row, (tree, context) in enumerate(zip(trees, contexts, strict=True)):
        nodes = (
            range(len(tree.tokens))
            if len(tree.tokens) < 8
            else [0, 1, *tree.draw.sample(range(2, len(tree.tokens)), 5)]
        )
        for node in nodes:
            close(states(got, row, node), tree.expected(model, context, node))


@pytest.mark.parametrize("length", [1, 2, 33, 63, 64])
@pytest.mark.parametrize("window", list(MODELS))
def test_a_chain_as_a_tree_equals_a_chain(length: int, window: int | None) -> None:
    model, context, tokens = MODELS[window], some_tokens(9), some_tokens(length, 1)
    chain = RandomTree(length, 0)
    chain.parents = list(range(-1, length - 1))
    rig = Rig(model)
    one, two = prefilled(rig, [context, context])
    as_chain = rig.run(rig.batch([tokens], [9], [one]), ALL)
    masks = [[chain.mask(i) for i in range(length)]]
    as_tree = rig.run(rig.batch([tokens], [9], [two], masks, [list(range(length))]), ALL)
    close(as_tree.final, as_chain.final)
    close(as_chain.final[0], plain(model, context + tokens)[0, 9:])


@shapes
@given(
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=7),
    rows=st.integers(1, 3),
    seed=st.integers(0, 1000),
    window=st.sampled_from(list(MODELS)),
)
@example(widths=[8] * 9, rows=3, seed=2, window=None)  # the last level lies above all 64 bits
@example(widths=[8] * 9, rows=3, seed=2, window=3)
def test_levels_stored_one_after_another_equal_paths(
    widths: list[int], rows: int, seed: int, window: int | None
) -> None:
    """A level reads the levels before it from the cache (`offset`); its masks name ancestors of those alone."""
    model = MODELS[window]
    rig, draw = Rig(model, pages=400), random.Random(seed)
    contexts = [some_tokens(draw.randint(0, 15), row) for row in range(rows)]
    trees = [RandomTree(sum(widths), seed + row, roots=widths[0]) for row in range(rows)]
    starts = [sum(widths[:i]) for i in range(len(widths) + 1)]
    for tree in trees:
        for level in range(1, len(widths)):
            for node in range(starts[level], starts[level + 1]):
                tree.parents[node] = tree.draw.randrange(starts[level - 1], starts[level])
    tables = prefilled(rig, contexts)
    for level, start in enumerate(starts[:-1]):
        nodes = range(start, starts[level + 1])
        batch = rig.batch(
            [[t.tokens[i] for i in nodes] for t in trees],
            [len(c) for c in contexts],
            tables,
            [[t.mask(i, own=False) for i in nodes] for t in trees],
            [[level] * len(nodes) for _ in trees],
            offset=start,
        )
        got = rig.run(batch, ALL)
        for row, (tree, context) in enumerate(zip(trees, contexts, strict=True)):
            for node in {nodes[0], nodes[-1]}:
                close(states(got, row, node - start), tree.expected(model, context, node))


@pytest.mark.parametrize("window", list(MODELS))
def test_a_chain_continues_above_its_context(window: int | None) -> None:
    """Without masks a query sees every index up to its own, scratch nodes included."""
    model, rig = MODELS[window], Rig(MODELS[window])
    contexts, drafts = [some_tokens(7), some_tokens(3, 1)], [some_tokens(5, 2), some_tokens(5, 3)]
    tables = prefilled(rig, contexts)
    for step in range(5):
        got = rig.run(rig.batch([d[step : step + 1] for d in drafts], [7, 3], tables, offset=step), ALL)
        for row in range(2):
            close(states(got, row, 0), plain(model, contexts[row] + drafts[row][: step + 1])[:, -1])


# what a pass must not read


def poison(rig: Rig, keep: Sequence[int]) -> None:
    """NaN everywhere but in the slots of `keep` and in the zero slot."""
    for layer in rig.cache.layers:
        kept = layer[[0, *keep]].clone()
        layer.fill_(math.nan)
        layer[[0, *keep]] = kept


@pytest.mark.parametrize("window", list(MODELS))
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_unwritten_memory_is_never_read(kind: str, window: int | None) -> None:
    contexts = [some_tokens(n, n) for n in (10, 0, 5)]
    trees = [RandomTree(n, n) for n in (3, 7, 1)]
    tokens = [t.tokens for t in trees]
    masks = [[t.mask(i) for i in range(len(t.tokens))] for t in trees] if kind == "tree" else None
    depths = [[t.depth(i) for i in range(len(t.tokens))] for t in trees] if kind == "tree" else None
    results = []
    for poisoned in (False, True):
        rig = Rig(MODELS[window])
        tables = prefilled(rig, contexts)
        if poisoned:
            poison(rig, [s for c, t in zip(contexts, tables, strict=True) for s in rig.slots(t, range(len(c)))])
        results.append(rig.run(rig.batch(tokens, [10, 0, 5], tables, masks, depths), ALL))
        assert all((layer[0] == 0).all() for layer in rig.cache.layers)  # padding does not end in the zero slot
    for row, tree in enumerate(trees):
        for query in range(len(tree.tokens)):
            assert torch.equal(states(results[0], row, query), states(results[1], row, query))
    assert results[1].final.isfinite().all()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("scattered", [True, False], ids=["scattered pages", "pages side by side"])
def test_other_pages_and_the_tail_are_never_read(scattered: bool, rows: int) -> None:
    contexts = [some_tokens(6), some_tokens(9, 1)][:rows]
    tokens = [some_tokens(3, 2), some_tokens(3, 3)][:rows]
    rig = Rig(MODELS[None], scattered=scattered)
    tables = prefilled(rig, contexts)
    poison(rig, [s for c, t in zip(contexts, tables, strict=True) for s in rig.slots(t, range(len(c)))])
    got = rig.run(rig.batch(tokens, [len(c) for c in contexts], tables), ALL)
    for row in range(rows):
        close(got.final[row], plain(MODELS[None], contexts[row] + tokens[row])[0, len(contexts[row]) :])


def test_padding_of_a_single_row_is_written_elsewhere() -> None:
    """A bound on the length that is not tight must not let padding into the row's own pages."""
    rig = Rig(MODELS[None], scattered=False)
    (table,) = prefilled(rig, [some_tokens(6)])
    poison(rig, rig.slots(table, range(6)))
    batch = rig.batch([[3, 4, 0]], [6], [table])._replace(counts=torch.tensor([2]))
    got = rig.run(batch, ALL)
    close(got.final[0, :2], plain(MODELS[None], [*some_tokens(6), 3, 4])[0, 6:])
    assert all(layer[rig.slots(table, [8])].isnan().all() for layer in rig.cache.layers)


@pytest.mark.parametrize("masks", [None, [[0], [0, 1, 3]]])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_padding_sees_something(window: int | None, masks: list[list[int]] | None) -> None:
    """A softmax over nothing is NaN in some backends."""
    rig = Rig(MODELS[None])
    batch = rig.batch([[1], [2, 3, 4]], [9, 0], [rig.table(12)] * 2, masks)
    assert visible(batch, batch.longest, window).any(-1).all()


def test_holes_between_levels_are_never_read() -> None:
    """Rows with fewer nodes leave slots below `offset` unwritten; no mask names them."""
    rig, model = Rig(MODELS[None]), MODELS[None]
    contexts = [some_tokens(4), some_tokens(6, 1)]
    tables = prefilled(rig, contexts)
    poison(rig, [s for c, t in zip(contexts, tables, strict=True) for s in rig.slots(t, range(len(c)))])
    first, second = [[7, 8, 9], [5]], [[11], [12]]
    rig.run(rig.batch(first, [4, 6], tables, [[0, 0, 0], [0]], [[0, 0, 0], [0]]), ALL)
    got = rig.run(rig.batch(second, [4, 6], tables, [[1 << 2], [1 << 0]], [[1], [1]], offset=3), ALL)
    close(states(got, 0, 0), plain(model, [*contexts[0], 9, 11])[:, -1])
    close(states(got, 1, 0), plain(model, [*contexts[1], 5, 12])[:, -1])


@pytest.mark.parametrize("scattered", [True, False], ids=["scattered pages", "pages side by side"])
def test_stale_nodes_change_nothing(scattered: bool) -> None:
    """Rejected nodes stay behind as finite values, in slots that masks do not name and later passes overwrite."""
    results = []
    for stale in (0.0, 1e4):
        rig = Rig(MODELS[None], scattered=scattered)
        context = some_tokens(6)
        (table,) = prefilled(rig, [context])
        for layer in rig.cache.layers:
            layer[rig.slots(table, range(6, 40))] = stale
        rig.run(rig.batch([[3]], [6], [table], [[0]], [[0]]), ALL)  # node 0; nodes 1..3 are left stale
        results.append(rig.run(rig.batch([[4]], [6], [table], [[1]], [[1]], offset=4), ALL).final)
    assert torch.equal(*results)
    close(results[1][0, 0], plain(MODELS[None], [*some_tokens(6), 3, 4])[0, -1])


# the seam


class Recorder:
    """Wraps a backend's `run` to see what layers hand over."""

    def __init__(self, attend: Attend) -> None:
        self.attend, self.calls = attend, []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        self.calls.append((layer, window, q.shape, k.shape))
        return self.attend(layer, q, k, v, window)


def test_layers_name_themselves_and_their_window() -> None:
    recorder = Recorder(attend_by_hand)
    MODELS[3](torch.zeros(2, 5, dtype=torch.int64), torch.arange(5).expand(2, -1), recorder)
    assert recorder.calls == [(0, 3, (2, 5, 4, 6), (2, 5, 2, 6)), (1, None, (2, 5, 4, 6), (2, 5, 2, 6))]


def test_masks_are_built_once_for_all_layers() -> None:
    rig = Rig(MODELS[3])
    plan = rig.attention.plan(rig.batch([some_tokens(4)], [0], [rig.table(4)]))
    assert plan.mask(3, 2, torch.float32) is plan.mask(3, 2, torch.float32)
    assert plan.mask(3, 2, torch.float32) is not plan.mask(None, 2, torch.float32)


def test_a_batch_must_say_how_long_it_is() -> None:
    rig = Rig(MODELS[None])
    zero = torch.zeros(1, dtype=torch.int64)
    batch = Batch(zero[None], causal_positions(zero, 1), zero, zero + 1, torch.tensor([rig.table(4)]))
    with pytest.raises(PlanError, match="longest"):
        SdpaAttention(rig.cache).plan(batch)


def test_a_page_table_that_is_too_short_is_refused() -> None:
    rig = Rig(MODELS[None], page_size=4)
    with pytest.raises(PlanError, match="1 pages of 4 tokens do not hold 5 tokens"):
        rig.run(rig.batch([some_tokens(5)], [0], [rig.table(4)]))
